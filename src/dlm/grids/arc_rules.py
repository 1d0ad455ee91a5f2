"""Tasks by rules that are known: a generator in the shape of ARC, on which a model's answers can be judged without end.

Every rule maps a grid of H x W colours, 0 the background, to another. Shapes: N rows and columns of a square grid.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from dlm.grids.arc import COLOURS, Task

Rule = Callable[[Tensor], Tensor]
LEAST = 2  # rows and columns
FULL = 0.2, 0.7  # share of cells that are not background, from .. to


def _mirror(rng: random.Random, _palette: list[int]) -> Rule:
    axis = rng.randrange(2)
    return lambda grid_HW: grid_HW.flip(axis)


def _turn(rng: random.Random, _palette: list[int]) -> Rule:
    quarters, mirrored = rng.randrange(1, 4), rng.random() < 0.5
    return lambda grid_HW: torch.rot90(grid_HW.mT if mirrored else grid_HW, quarters)


def _recolour(rng: random.Random, _palette: list[int]) -> Rule:
    """Each colour but the background becomes another one or stays."""
    table = torch.tensor([0, *rng.sample(range(1, COLOURS), COLOURS - 1)])
    return lambda grid_HW: table[grid_HW]


def _fall(rng: random.Random, _palette: list[int]) -> Rule:
    """Cells fall to one side, in their order."""
    axis, forwards = rng.randrange(2), rng.random() < 0.5

    def rule(grid_HW: Tensor) -> Tensor:
        order_HW = torch.argsort((grid_HW != 0).int(), dim=axis, descending=not forwards, stable=True)
        return grid_HW.gather(axis, order_HW)

    return rule


def _shift(rng: random.Random, _palette: list[int]) -> Rule:
    """By one, around the border."""
    axis, by = rng.randrange(2), rng.choice((-1, 1))
    return lambda grid_HW: grid_HW.roll(by, axis)


def _keep(rng: random.Random, palette: list[int]) -> Rule:
    """One colour is kept, the others become background."""
    kept = rng.choice(palette)
    return lambda grid_HW: torch.where(grid_HW == kept, grid_HW, 0)


def _count(_rng: random.Random, _palette: list[int]) -> Rule:
    """A row as long as the grid is wide, with as many cells of the commonest colour as there are, at most; of equal ones the lowest."""

    def rule(grid_HW: Tensor) -> Tensor:
        counts = torch.bincount(grid_HW.flatten(), minlength=COLOURS)[1:]
        colour, width = 1 + int(counts.argmax()), grid_HW.shape[1]
        return torch.where(torch.arange(width) < counts.max(), colour, 0)[None]

    return rule


def _crop(_rng: random.Random, _palette: list[int]) -> Rule:
    """The smallest rectangle with all that is not background."""

    def rule(grid_HW: Tensor) -> Tensor:
        rows, columns = grid_HW.any(1).nonzero()[:, 0], grid_HW.any(0).nonzero()[:, 0]
        return grid_HW[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]

    return rule


RULES: dict[str, Callable[[random.Random, list[int]], Rule]] = {
    "mirror": _mirror,
    "turn": _turn,
    "recolour": _recolour,
    "fall": _fall,
    "shift": _shift,
    "keep": _keep,
    "count": _count,
    "crop": _crop,
}


def task(seed: int, size: int, pairs: int, name: str = "") -> Task:
    """By one rule, by default any: `pairs` - 1 demonstrations and a test, in three colours on grids of 2 to `size` rows and columns."""
    rng = random.Random(seed)
    palette, full = rng.sample(range(1, COLOURS), 3), rng.uniform(*FULL)
    name = name or rng.choice(list(RULES))
    rule = RULES[name](rng, palette)
    inputs = [_grid(rng, size, palette, full) for _ in range(pairs)]
    found = tuple((given, rule(given)) for given in inputs)
    return Task(f"{name}-{seed}", found[:-1], found[-1:])


def _grid(rng: random.Random, size: int, palette: list[int], full: float) -> Tensor:
    """With a cell at least that is not background."""
    height, width = rng.randint(LEAST, size), rng.randint(LEAST, size)
    cells = [rng.choice(palette) if rng.random() < full else 0 for _ in range(height * width)]
    cells[rng.randrange(len(cells))] = rng.choice(palette)
    return torch.tensor(cells).view(height, width)
