"""Grids in training: each draw is a grid under a random symmetry, of which a puzzle's cells may be given.

Shapes: B rows, T cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlm.grids.grid import Grid, cells_of
from dlm.text.tokenizer import Tokenizer
from dlm.train.data import Stream


@dataclass(frozen=True)
class GridStream(Stream):
    """Grids one after another; a window is a grid, and a token the number of its symbol."""

    kind: Grid | None = None

    @classmethod
    def of(cls, kind: Grid, part: str) -> GridStream:
        """part: `train`, `val` or `all`."""
        return cls(kind.corpus(part).flatten().numpy(), cells_of(kind), f"{part} part", kind)

    def draw(self, batch: int, rng: torch.Generator) -> Tensor:
        """Random grids under random symmetries, int64 (B, T)."""
        assert self.kind is not None
        grids_NT = torch.from_numpy(self.tokens_N).view(-1, self.window)
        return self.kind.varied(grids_NT[torch.randint(len(grids_NT), (batch,), generator=rng)], rng)

    def free(self, free_BT: Tensor, share: float, rng: torch.Generator) -> Tensor:
        """In this share of the rows a puzzle's cells are given."""
        assert self.kind is not None
        if not share:
            return free_BT
        given_B1 = torch.rand(len(free_BT), 1, generator=rng) < share
        return free_BT & ~(given_B1 & self.kind.given(len(free_BT), rng))


def tokenizer(kind: Grid) -> Tokenizer:
    """A token for each symbol, in their order."""
    return Tokenizer.characters(kind.symbols)
