"""Tensors of a checkpoint that are read one at a time, when they are wanted, so that a large one never lies in memory as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. shape: of what `read` gives."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    def rows(self, first: int, last: int) -> Stored:
        """Some of its rows alone."""
        read = self.read

        def some() -> Tensor:
            return read()[first:last].clone()

        return Stored((last - first, *self.shape[1:]), some)

    def with_row(self, row: Callable[[Tensor], Tensor]) -> Stored:
        """With one more row at the end, computed from the others."""
        read = self.read

        def longer() -> Tensor:
            return row(read())

        rows, *rest = self.shape or (0,)
        return Stored((rows + 1, *rest), longer)

    def times(self, scale: Stored) -> Stored:
        """Of integers, the floats that they stand for: each row times its scale."""
        read = self.read
        return Stored(self.shape, lambda: read() * scale.read())
