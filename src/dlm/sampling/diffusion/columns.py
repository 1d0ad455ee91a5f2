"""The positions of a window that a step writes, gathered: their logits alone go through a rule, for a vocabulary may be large.

Shapes: B rows, T positions of the window, C columns: the positions of a row in rising order, then padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from dlm.protocols import RNG, SomeDraws


@dataclass(frozen=True)
class Columns:
    """index_BC: positions in the window, no two of a window alike; real_BC: False at the padding of rows that have fewer. width: T."""

    index_BC: Tensor
    real_BC: Tensor
    width: int

    @classmethod
    def of(cls, at_BT: Tensor) -> Columns:
        """Of the positions that are True; as many columns as the row that has most."""
        count_B1, width = at_BT.sum(-1, keepdim=True), at_BT.shape[1]
        index_BC = at_BT.int().argsort(dim=-1, descending=True, stable=True)[:, : int(count_B1.max())]
        return cls(index_BC, torch.arange(index_BC.shape[1], device=at_BT.device) < count_B1, width)

    def take(self, x_BT: Tensor) -> Tensor:
        """(B, C, ...) of (B, T, ...)."""
        index = self.index_BC.view(*self.index_BC.shape, *[1] * (x_BT.dim() - 2)).expand(-1, -1, *x_BT.shape[2:])
        return x_BT.gather(1, index)

    def put(self, x_BT: Tensor, values_BC: Tensor) -> Tensor:
        """x with the values at the positions of the columns that are real."""
        return x_BT.scatter(1, self.index_BC, torch.where(self.real_BC, values_BC, self.take(x_BT)))

    @property
    def at_BT(self) -> Tensor:
        """The positions of the columns that are real, bool (B, T)."""
        held_BT = self.index_BC.new_zeros(len(self.index_BC), self.width)
        return held_BT.scatter_add(1, self.index_BC, self.real_BC.to(held_BT)) > 0

    def repeat(self, times: int) -> Columns:
        """For a batch in which every row stands so many times."""
        if times == 1:
            return self
        return Columns(self.index_BC.repeat(times, 1), self.real_BC.repeat(times, 1), self.width)

    def among(self, read_BT: Tensor) -> Columns:
        """The same columns by their places among the positions that are read, which are theirs and others, in rising order."""
        rank_BT = read_BT.long().cumsum(-1) - 1
        return Columns(rank_BT.gather(1, self.index_BC).clamp(min=0), self.real_BC, int(rank_BT[:, -1].max()) + 1)

    @cached_property
    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """(row, position, column) of each column that is real, int64 (N,)."""
        row_N, column_N = self.real_BC.nonzero(as_tuple=True)
        return row_N, self.index_BC[row_N, column_N], column_N

    def draws(self, rng: RNG) -> list[SomeDraws]:
        """The generators, so that each position is given the number that it would have in the whole window."""
        return [SomeDraws(own, self.width, partial(self._pick, row)) for row, own in enumerate(rng)]

    def _pick(self, row: int, drawn_T: Tensor) -> Tensor:
        return drawn_T[self._drawn_BC[row]]

    @cached_property
    def _drawn_BC(self) -> Tensor:
        return self.index_BC.cpu()  # where numbers are drawn; copied once, if any are
