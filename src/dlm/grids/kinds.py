"""The kinds of grids by name, as `--data NAME` or `--data NAME:SETTING` takes them. Imports no torch until a kind is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dlm.grids.grid import Grid


def _sudoku(setting: str) -> Grid:
    from dlm.grids.sudoku import Sudoku

    return Sudoku.of(setting)


def _maze(setting: str) -> Grid:
    from dlm.grids.maze import Maze

    return Maze.of(setting)


KINDS: dict[str, Callable[[str], Grid]] = {"sudoku": _sudoku, "maze": _maze}
"""By the word before the colon: a kind from the text after it, which may be empty."""


def find(word: str) -> Grid | None:
    """The kind of grid that a source of data names; None for another source. InputError for a setting that there is not."""
    name, _, setting = word.partition(":")
    return KINDS[name](setting) if name in KINDS else None
