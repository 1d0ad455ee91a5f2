"""A run whose rows join and leave between steps, each at its own pace.

Shapes: B rows, A rows that took part in a forward pass, K rows that stay, L positions of the canvas, N tokens that it wrote,
C columns, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm.protocols import RNG
from dlm.trajectory import Canvas, Frame


@dataclass(frozen=True)
class WrittenDistribution:
    """The network's distribution of each token that the last forward pass wrote, before temperature: token n is in column_N of row_N.

    score_NV: log p of the tokens up to a constant; the entry of the mask means nothing. Positions that were not written are not kept: their
    distributions are most of the memory of a pass.
    """

    row_N: Tensor
    column_N: Tensor
    score_NV: Tensor

    def at(self, row: int, column_C: Tensor) -> tuple[Tensor, Tensor]:
        """(scores (C, V) at these columns of a row, whether each was written (C,)); scores of others mean nothing."""
        if not len(self.row_N):
            return self.score_NV.new_zeros(len(column_C), self.score_NV.shape[1]), torch.zeros_like(column_C, dtype=torch.bool)
        hit_CN = (self.row_N == row) & (self.column_N == column_C.to(self.column_N.device)[:, None])
        return self.score_NV[hit_CN.int().argmax(1)], hit_CN.any(1)


class Running(Protocol):
    """The state of a run. `live_B`: rows that are not done; `step` makes one forward pass for all of them."""

    distribution: WrittenDistribution | None
    reads_first: ClassVar[bool]
    """Whether the first forward pass of a row is longer than the next ones, so that it is better made before it joins others."""

    @property
    def live_B(self) -> Tensor:
        """bool (B,)."""

    def frame(self) -> Frame:
        """The state as it is."""

    def step(self) -> Frame:
        """The state after one more forward pass."""

    def join(self, other: Any) -> None:
        """Take in the rows of another run of the same sampler, after one's own; the other is used up."""

    def keep(self, rows_K: Tensor) -> None:
        """Go on with these rows alone, in this order."""


@runtime_checkable
class Joinable(Protocol):
    """A sampler whose rows can join and leave."""

    def begin(self, canvas: Canvas, *, rng: RNG) -> Running:
        """A run before its first forward pass. rng: one a row."""


def stacked(one_BL: Tensor, other_BL: Tensor, fill: float = 0) -> Tensor:
    """The rows of both, the narrower ones padded on the right; of tensors (B,), (B, L) or (B, L, ...)."""
    if one_BL.dim() == 1 or one_BL.shape[1] == other_BL.shape[1]:
        return torch.cat([one_BL, other_BL])
    width, depth = max(one_BL.shape[1], other_BL.shape[1]), one_BL.dim() - 2
    return torch.cat([F.pad(x_BL, (0, 0) * depth + (0, width - x_BL.shape[1]), value=fill) for x_BL in (one_BL, other_BL)])
