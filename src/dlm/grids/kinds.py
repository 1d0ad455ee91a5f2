"""The kinds of grids by name, as `--data NAME` or `--data NAME:SETTING` takes them."""

from __future__ import annotations

from collections.abc import Callable

from dlm.grids.grid import Grid
from dlm.grids.sudoku import Sudoku

KINDS: dict[str, Callable[[str], Grid]] = {"sudoku": Sudoku.of}
"""By the word before the colon: a kind from the text after it, which may be empty."""


def find(word: str) -> Grid | None:
    """The kind of grid that a source of data names; None for another source. InputError for a setting that there is not."""
    name, _, setting = word.partition(":")
    return KINDS[name](setting) if name in KINDS else None
