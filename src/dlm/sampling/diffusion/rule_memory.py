"""The tensors that rules keep from one step to the next.

Shapes: B rows, A rows that move now, K rows that stay, T positions of the window, C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlm.sampling.batching import stacked
from dlm.sampling.diffusion.columns import Columns


class RuleMemory:
    """Tensors (B, T, ...) by name, nan where a row has begun a block since."""

    def __init__(self, rows: int, window: int) -> None:
        self.rows, self.window, self.tensors = rows, window, dict[str, Tensor]()

    def forget(self, rows_A: Tensor) -> None:
        """These rows begin a block."""
        for kept in self.tensors.values():
            kept[rows_A] = torch.nan

    def of(self, rows_A: Tensor, columns: Columns | None = None) -> dict[str, Tensor]:
        """The part of these rows, or of their columns (A, C, ...)."""
        at = (rows_A,) if columns is None else (rows_A[:, None], columns.index_BC)
        return {name: value[at] for name, value in self.tensors.items()}

    def store(self, rows_A: Tensor, values: dict[str, Tensor], columns: Columns | None = None) -> None:
        """The part of these rows after a step."""
        for name, value in values.items():
            kept = self.tensors.setdefault(name, value.new_full((self.rows, self.window, *value.shape[2:]), torch.nan))
            if columns is None:
                kept[rows_A] = value
            else:
                row_N, at_N, column_N = columns.places
                kept[rows_A[row_N], at_N] = value[row_N, column_N]

    def join(self, other: RuleMemory) -> None:
        """Take in the rows of another memory."""
        for name in self.tensors.keys() | other.tensors.keys():
            known = self.tensors.get(name, other.tensors.get(name))
            assert known is not None
            shapes = ((one.rows, one.window, *known.shape[2:]) for one in (self, other))
            ours, theirs = (one.tensors.get(name, known.new_full(next(shapes), torch.nan)) for one in (self, other))
            self.tensors[name] = stacked(ours, theirs, torch.nan)
        self.rows, self.window = self.rows + other.rows, max(self.window, other.window)

    def keep(self, rows_K: Tensor) -> None:
        """Go on with these rows alone."""
        self.rows, self.tensors = len(rows_K), self.of(rows_K)
