"""Rows of integers in a NumPy file: pictures, tables, anything with a fixed shape. A row is one window, and no window crosses it.

Shapes: N rows, T cells of one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dlm.errors import InputError
from dlm.text.tokenizer import Tokenizer
from dlm.train.data import Stream

VALUES = 256
"""Different numbers of a file at most: 0 .. 255."""
SYMBOLS = "".join(map(chr, (*range(48, 58), *range(65, 91), *range(97, 123), *range(256, 256 + VALUES - 62))))
"""Numbers as text, in code point order: a digit, a capital, a small letter, then letters of Latin Extended."""


@dataclass(frozen=True)
class ArrayRows:
    """A file of shape (N, ...) of integers from 0. The axes after the first are those of the window: rows and columns of a picture."""

    path: Path
    unit: ClassVar[str] = "cell"

    @cached_property
    def rows(self) -> np.ndarray:
        """int32 (N, ...). InputError for a file that is no such array."""
        try:
            found = np.load(self.path, mmap_mode="r", allow_pickle=False)
            shape, kind = found.shape, found.dtype.kind
        except FileNotFoundError:
            raise InputError(f"{self.path} does not exist: give the .npy file of an array of integers") from None
        except (OSError, ValueError, EOFError, SyntaxError, AttributeError) as error:
            raise InputError(f"{self.path} is no .npy file ({str(error).splitlines()[0]}): write one with numpy.save") from None
        if kind not in "iub" or len(shape) < 2 or not math.prod(shape):
            raise InputError(
                f"{self.path} holds {found.dtype} of shape {shape}: integers are needed, rows first, with the cells of each after"
            )
        if found.min() < 0 or found.max() >= VALUES:
            raise InputError(f"{self.path} has numbers from {found.min()} to {found.max()}: they must lie in 0 .. {VALUES - 1}")
        return np.asarray(found, dtype=np.int32)

    @property
    def settings(self) -> Mapping[str, Any]:
        shape = self.rows.shape[1:]
        if len(shape) == 1:
            return {"window": shape[0], "context": 0}
        lines = tuple(tuple(1 if axis == own else size for axis, size in enumerate(shape)) for own in range(len(shape)))
        return {"window": math.prod(shape), "axes": shape, "groups": lines, "conv": 0, "context": 0}

    def tokenizer(self) -> Tokenizer:
        """The token of a number is the number."""
        return Tokenizer.characters(SYMBOLS[: int(self.rows.max()) + 1])

    def stream(self, part: str, window: int, val_fraction: float) -> Stream:
        """The last rows validate, `val_fraction` of them."""
        rows = self.rows
        cut = len(rows) - round(len(rows) * val_fraction)
        parts = {"train": rows[:cut], "val": rows[cut:], "all": rows}
        if part not in parts:
            raise InputError(f"unknown split {part!r}; known: train, val, all")
        return Stream(parts[part].flatten(), window, f"{part} part", (window,) * len(parts[part]))


def find(source: str) -> ArrayRows:
    """The file that a source names."""
    return ArrayRows(Path(source))
