"""The signature of a kind of grid, and its text: a cell is one character, a hole a dot, a zero or an underscore.

Shapes: B grids, T cells row by row, S symbols.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dlm.errors import InputError

Cells = Sequence[int | None]
"""The symbol of each cell by its number, None for a hole."""

HOLES = ".0_"
RULES = "|-+ \t│┃─━┼╋"  # drawn between cells, and read as nothing


class Grid(Protocol):
    """A kind of grid. axes: its shape; groups: tiles of it, as of `dlm.models.axes`, whose embeddings a network learns. symbols: one
    character for each symbol, in code point order, none of them in HOLES. broken: the cells that break a rule, in words."""

    @property
    def word(self) -> str: ...
    @property
    def axes(self) -> tuple[int, ...]: ...
    @property
    def groups(self) -> tuple[tuple[int, ...], ...]: ...
    @property
    def symbols(self) -> str: ...
    @property
    def broken(self) -> str: ...

    def conflicts(self, cells: Cells) -> list[int]:
        """The cells that break a rule together; a grid without holes and conflicts is valid."""

    def completions(self, cells: Cells) -> Iterator[list[int]]:
        """Every valid grid with these cells, found by search, without a network."""

    def corpus(self, part: str) -> Tensor:
        """Valid grids, int64 (B, T). part: `train`, `val` or `all`."""

    def varied(self, x_BT: Tensor, rng: torch.Generator) -> Tensor:
        """Each grid under a random symmetry of its own."""

    def given(self, x_BT: Tensor, rng: torch.Generator) -> Tensor:
        """Cells of these grids that a puzzle might give, bool (B, T)."""

    def puzzle(self, seed: int, clues: int) -> list[int | None]:
        """A puzzle with one solution and `clues` given cells, or the fewest that the kind has, if those are more."""


def cells_of(grid: Grid) -> int:
    return math.prod(grid.axes)


def parse(grid: Grid, text: str) -> list[int | None]:
    """The cells of one grid. Borders and spaces count for nothing. InputError for another number of cells, and for unknown ones."""
    found = [c for c in text if c not in RULES and c not in "\r\n"]
    known, wanted = {symbol: i for i, symbol in enumerate(grid.symbols)}, cells_of(grid)
    if strange := [c for c in found if c not in known and c not in HOLES]:
        raise InputError(f"{strange[0]!r} is no cell of a {grid.word} grid: write {', '.join(grid.symbols)}, and . for a hole")
    if len(found) != wanted:
        shape = " x ".join(map(str, grid.axes))
        raise InputError(f"this grid has {len(found)} cells, a {grid.word} grid {wanted} ({shape}): write row by row, . for a hole")
    return [known.get(c) for c in found]


def puzzles(text: str) -> list[str]:
    """The grids of a text: one in each line that is not empty, or a single one drawn over several lines."""
    lines = [line for line in text.splitlines() if line.strip()]
    cells = [sum(c not in RULES for c in line) for line in lines]
    drawn = [count for count in cells if count]
    square = len(drawn) > 1 and len(set(drawn)) == 1 and drawn[0] == len(drawn)
    return ["\n".join(lines)] if square else [line for line, count in zip(lines, cells, strict=True) if count]


def written(grid: Grid, cells: Cells) -> str:
    """The cells as a line of characters."""
    return "".join("." if cell is None else grid.symbols[cell] for cell in cells)
