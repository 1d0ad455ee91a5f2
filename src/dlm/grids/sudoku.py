"""Sudoku of any size that boxes fill: every symbol once in each row, column and box.

Shapes: B grids, T cells row by row, S symbols, which are also the cells of a row, H and W rows and columns of a box.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.grids.grid import Cells
from dlm.models import axes

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
ENUMERATED = 4  # so small that every grid is known
CORPUS = {"train": 256, "val": 64}  # grids found by random search, before symmetries
SEEDS = {"train": 1, "val": 2}


@dataclass(frozen=True)
class Sudoku:
    """size: symbols, and cells of a row."""

    size: int

    @classmethod
    def of(cls, setting: str) -> Sudoku:
        """`4`, `6` or `9`, by default 9. InputError for another size."""
        if setting and setting not in map(str, BOXES):
            raise InputError(f"sudoku:{setting} is unknown; known: {', '.join(f'sudoku:{size}' for size in BOXES)}")
        return cls(int(setting or 9))

    @property
    def word(self) -> str:
        return f"sudoku:{self.size}"

    @property
    def axes(self) -> tuple[int, ...]:
        return self.size, self.size

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        return (1, self.size), (self.size, 1), BOXES[self.size]

    @property
    def symbols(self) -> str:
        return "123456789"[: self.size]

    @property
    def broken(self) -> str:
        return "the same symbol"

    @cached_property
    def units(self) -> list[list[int]]:
        """The cells of each row, column and box."""
        at_TA = axes.coordinates(torch.arange(self.size**2), self.axes)
        labels = [axes.tile_of(at_TA, self.axes, tile) for tile in self.groups]
        return [(label_T == n).nonzero().flatten().tolist() for label_T in labels for n in range(self.size)]

    @cached_property
    def units_of(self) -> list[list[int]]:
        """The numbers of the units that each cell lies in."""
        return [[u for u, unit in enumerate(self.units) if cell in unit] for cell in range(self.size**2)]

    def conflicts(self, cells: Cells) -> list[int]:
        """The cells whose symbol stands once more in a unit of theirs."""
        found = set()
        for unit in self.units:
            values = [cells[cell] for cell in unit]
            found |= {cell for cell in unit if cells[cell] is not None and values.count(cells[cell]) > 1}
        return sorted(found)

    def completions(self, cells: Cells, rng: random.Random | None = None) -> Iterator[list[int]]:
        """By backtracking at the cell or symbol with the fewest choices; rng: symbols in random order."""
        if self.conflicts(cells):
            return
        used = [sum(1 << v for cell in unit if (v := cells[cell]) is not None) for unit in self.units]
        yield from self._search(list(cells), used, rng)

    def _search(self, cells: list[int | None], used: list[int], rng: random.Random | None) -> Iterator[list[int]]:
        everything, options = (1 << self.size) - 1, {}
        for cell, value in enumerate(cells):
            if value is None:
                one, two, three = self.units_of[cell]
                options[cell] = everything & ~(used[one] | used[two] | used[three])
        if not options:
            yield [value for value in cells if value is not None]
            return
        cell, choices = self._narrowest(options, used)
        symbols = [symbol for symbol in range(self.size) if choices >> symbol & 1]
        if rng is not None:
            rng.shuffle(symbols)
        for symbol in symbols:
            cells[cell] = symbol
            for unit in self.units_of[cell]:
                used[unit] ^= 1 << symbol
            yield from self._search(cells, used, rng)
            for unit in self.units_of[cell]:
                used[unit] ^= 1 << symbol
            cells[cell] = None

    def _narrowest(self, options: dict[int, int], used: list[int]) -> tuple[int, int]:
        """A cell and the bits of its symbols: one that a symbol of a unit has as its only place, else the cell of fewest choices. No bits
        where a symbol has no place."""
        best = min(options, key=lambda cell: options[cell].bit_count())
        if options[best].bit_count() < 2:
            return best, options[best]
        for unit, taken in zip(self.units, used, strict=True):
            once, twice = 0, 0
            for cell in unit:
                bits = options.get(cell, 0)
                twice |= once & bits
                once |= bits
            if once | taken != (1 << self.size) - 1:
                return best, 0
            if single := once & ~twice:
                bit = single & -single
                return next(cell for cell in unit if options.get(cell, 0) & bit), bit
        return best, options[best]

    def corpus(self, part: str) -> Tensor:
        """Every grid where all are known; else those of a random search, which is not exactly uniform, from a seed of each part."""
        empty: list[int | None] = [None] * self.size**2
        if self.size <= ENUMERATED:
            return torch.tensor(list(self.completions(empty)))
        found = []
        for name in ("train", "val") if part == "all" else (part,):
            rng = random.Random(SEEDS[name])
            found += [next(self.completions(empty, rng)) for _ in range(CORPUS[name])]
        return torch.tensor(found)

    def varied(self, x_BT: Tensor, rng: torch.Generator) -> Tensor:
        """Symbols renamed; bands, stacks, and rows and columns within them in another order; where boxes are square, transposed or not."""
        rows, (height, width) = len(x_BT), BOXES[self.size]
        names_BS = torch.rand(rows, self.size, generator=rng).argsort(-1)
        x_BSS = names_BS.gather(1, x_BT).view(rows, self.size, self.size)
        down_BS, right_BS = self._order(rows, height, rng), self._order(rows, width, rng)
        x_BSS = x_BSS.gather(1, down_BS[:, :, None].expand_as(x_BSS)).gather(2, right_BS[:, None].expand_as(x_BSS))
        turned_B = torch.rand(rows, generator=rng) < 0.5
        if height == width:
            x_BSS = torch.where(turned_B[:, None, None], x_BSS.mT, x_BSS)
        return x_BSS.flatten(1)

    def _order(self, rows: int, side: int, rng: torch.Generator) -> Tensor:
        """An order of the rows of a grid for each of `rows` (B, S): bands of so many rows, then rows within bands."""
        band_BN1 = torch.rand(rows, self.size // side, generator=rng).argsort(-1)[..., None]
        return (band_BN1 * side + torch.rand(rows, self.size // side, side, generator=rng).argsort(-1)).flatten(1)

    def given(self, x_BT: Tensor, rng: torch.Generator) -> Tensor:
        """A random set of cells, from a fifth of them to all but one."""
        rows, cells = x_BT.shape
        count_B1 = torch.randint(cells // 5, cells, (rows, 1), generator=rng)
        return torch.rand(rows, cells, generator=rng).argsort(-1) < count_B1

    def puzzle(self, seed: int, clues: int = 0) -> list[int | None]:
        """A random grid without the cells that can go one by one, down to `clues`, which leave one solution; 0: until none can go."""
        rng = random.Random(seed)
        cells: list[int | None] = list(next(self.completions([None] * self.size**2, rng)))
        for cell in rng.sample(range(self.size**2), self.size**2):
            if self.size**2 - cells.count(None) <= clues:
                break
            kept, cells[cell] = cells[cell], None
            if not self.unique(cells):
                cells[cell] = kept
        return cells

    def unique(self, cells: Cells) -> bool:
        """Whether there is one valid grid with these cells."""
        found = self.completions(cells)
        return next(found, None) is not None and next(found, None) is None
