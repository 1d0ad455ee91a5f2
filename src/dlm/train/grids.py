"""Grids in training: each draw is a grid under a random symmetry, of which a puzzle's cells may be given.

Shapes: B rows, T cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dlm.grids import kinds
from dlm.grids.grid import Grid, cells_of
from dlm.text.tokenizer import Tokenizer
from dlm.train.data import Stream


@dataclass(frozen=True)
class GridStream(Stream):
    """Grids one after another; a window is a grid, and a token the number of its symbol."""

    varies: ClassVar[bool] = True
    kind: Grid | None = None

    @classmethod
    def of(cls, kind: Grid, part: str) -> GridStream:
        """part: `train`, `val` or `all`."""
        return cls(kind.corpus(part).flatten().numpy(), cells_of(kind), f"{part} part", kind=kind)

    def draw(self, batch: int, rng: torch.Generator) -> Tensor:
        """Random grids, int64 (B, T)."""
        assert self.kind is not None
        grids_NT = torch.from_numpy(self.tokens_N).view(-1, self.window)
        rows_BT = grids_NT[torch.randint(len(grids_NT), (batch,), generator=rng)]
        return self.varied(rows_BT, rng) if self.augment else rows_BT

    def varied(self, rows_BT: Tensor, rng: torch.Generator) -> Tensor:
        """Each grid under a random symmetry of its own."""
        assert self.kind is not None
        return self.kind.varied(rows_BT, rng)

    def free(self, x_BT: Tensor, free_BT: Tensor, share: float, rng: torch.Generator) -> Tensor:
        """In this share of the rows a puzzle's cells are given."""
        assert self.kind is not None
        if not share:
            return free_BT
        given_B1 = torch.rand(len(free_BT), 1, generator=rng) < share
        return free_BT & ~(given_B1 & self.kind.given(x_BT, rng))


@dataclass(frozen=True)
class GridData:
    """A kind of grid as data: its shape is that of the window, and given cells take the place of a context."""

    kind: Grid
    unit: ClassVar[str] = "cell"

    @property
    def settings(self) -> Mapping[str, Any]:
        kind = self.kind
        return {"window": cells_of(kind), "axes": kind.axes, "groups": kind.groups, "conv": 0, "context": 0}

    def tokenizer(self) -> Tokenizer:
        """A token for each symbol, in their order."""
        return Tokenizer.characters(self.kind.symbols)

    def stream(self, part: str, window: int, val_fraction: float) -> GridStream:
        """The grids of a part; their number and size are those of the kind."""
        return GridStream.of(self.kind, part)


def find(source: str) -> GridData | None:
    """The kind of grid that a source names; None for another source."""
    return None if (kind := kinds.find(source)) is None else GridData(kind)
