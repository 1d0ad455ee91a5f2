"""The committed text of the rows of a run, each at its own length and in its own window.

Shapes: B rows, L columns of the canvas, K tokens, Q inputs of a forward pass, S end tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlm.sampling import windows
from dlm.sampling.batching import stacked
from dlm.trajectory import Canvas


def read_inputs(text_BL: Tensor, begin_B: Tensor, index_BQ: Tensor, start: int | None) -> Tensor:
    """The tokens that a network reads at these indices of each row's window: the start token if it has one, then the text."""
    shift = 0 if start is None else 1
    token_BQ = text_BL.gather(1, (begin_B[:, None] + index_BQ - shift).clamp(0, text_BL.shape[1] - 1))
    return token_BQ if start is None else token_BQ.masked_fill(index_BQ == 0, start)


def put(text_BL: Tensor, known_B: Tensor, token_BK: Tensor, count_B: Tensor) -> None:
    """Write the first count_B tokens of each row after its known columns."""
    row, k = (torch.arange(token_BK.shape[1], device=text_BL.device) < count_B[:, None]).nonzero(as_tuple=True)
    text_BL[row, known_B[row] + k] = token_BK[row, k]


@dataclass
class CommittedText:
    """tokens_BL, of which known_B columns are committed and end_B exist; begin_B: where the window of the next token begins; ended_B: rows
    that an end token has ended; free_BL: columns that are written, the others are given. window, context: as of the sampler."""

    tokens_BL: Tensor
    free_BL: Tensor
    end_B: Tensor
    known_B: Tensor
    begin_B: Tensor
    ended_B: Tensor
    window: int
    context: int
    mask_id: int

    @classmethod
    def of(cls, canvas: Canvas, window: int, context: int, mask_id: int) -> CommittedText:
        """The given text of a canvas whose holes are at the end of each row."""
        free_BL, end_B = canvas.free_BT, canvas.valid_BT.sum(-1)
        tokens_BL, known_B = torch.where(free_BL, mask_id, canvas.tokens_BT), end_B - free_BL.sum(-1)
        begin_B, ended_B = windows.tile(known_B, window, context), torch.zeros_like(free_BL[:, 0])
        return cls(tokens_BL, free_BL, end_B, known_B, begin_B, ended_B, window, context, mask_id)

    @property
    def live_B(self) -> Tensor:
        """Rows that go on, bool (B,)."""
        return (self.known_B < self.end_B) & ~self.ended_B

    @property
    def open_BL(self) -> Tensor:
        """Free columns that are not committed, bool (B, L)."""
        return self.free_BL & (torch.arange(self.free_BL.shape[1], device=self.free_BL.device) >= self.known_B[:, None])

    def count(self, start: int | None) -> Tensor:
        """How many inputs of its window are known in each row to a network that reads this start token; int64 (B,)."""
        return self.known_B - self.begin_B + (start is not None)

    def inputs(self, index_BQ: Tensor, start: int | None) -> Tensor:
        """As `read_inputs`."""
        return read_inputs(self.tokens_BL, self.begin_B, index_BQ, start)

    def room_B(self) -> Tensor:
        """How many draft tokens fit before the last token of the row and of its window, of which the target draws that one."""
        return torch.minimum(self.end_B, self.begin_B + self.window) - self.known_B - 1

    def commit(self, token_BK: Tensor, count_B: Tensor, stop_S: Tensor) -> Tensor:
        """Append the first count_B tokens of each row, up to the first end token; returns how many were, int64 (B,)."""
        ends_BK = torch.isin(token_BK, stop_S) & (torch.arange(token_BK.shape[1], device=token_BK.device) < count_B[:, None])
        ended_B = ends_BK.any(-1)
        count_B = torch.where(ended_B, ends_BK.int().argmax(-1) + 1, count_B)
        put(self.tokens_BL, self.known_B, token_BK, count_B)
        self.known_B, self.ended_B = self.known_B + count_B, self.ended_B | ended_B
        self.begin_B = windows.tile(self.known_B, self.window, self.context)
        return count_B

    def join(self, other: CommittedText) -> None:
        """Take in the rows of another text."""
        self.tokens_BL = stacked(self.tokens_BL, other.tokens_BL, self.mask_id)
        for name in ("free_BL", "end_B", "known_B", "begin_B", "ended_B"):
            setattr(self, name, stacked(getattr(self, name), getattr(other, name)))

    def keep(self, rows_K: Tensor) -> None:
        """Go on with these rows alone."""
        for name in ("tokens_BL", "free_BL", "end_B", "known_B", "begin_B", "ended_B"):
            setattr(self, name, getattr(self, name)[rows_K])
