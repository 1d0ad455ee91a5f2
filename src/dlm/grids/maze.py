"""Mazes: rooms joined by doors into one tree, so that a single path leads from the start to the goal; it is what a puzzle asks for.

Rooms lie at even rows and columns, a door or a wall between two neighbours, a pillar of wall between four. Every tree is equally likely,
and every pair of start and goal: of R rooms there are as many mazes as spanning trees (Kirchhoff) times R (R - 1).
Shapes: B grids, T cells row by row, N rows and columns, R rooms.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm.errors import InputError
from dlm.grids.grid import Cells

SIZES = range(3, 22, 2)
ENUMERATED = 5  # so small that every maze is known
CORPUS = {"train": 4096, "val": 256}  # trees, before symmetries, starts and goals
SEEDS = {"train": 1, "val": 2}
WALL, PATH, FLOOR, GOAL, START = range(5)


@dataclass(frozen=True)
class Maze:
    """size: rows and columns, an odd number."""

    size: int

    @classmethod
    def of(cls, setting: str) -> Maze:
        """An odd number from 3 to 21, by default 9. InputError for another one."""
        if setting and setting not in map(str, SIZES):
            raise InputError(f"maze:{setting} is unknown: the size is an odd number from {SIZES[0]} to {SIZES[-1]}, as in maze:9")
        return cls(int(setting or 9))

    @property
    def word(self) -> str:
        return f"maze:{self.size}"

    @property
    def axes(self) -> tuple[int, ...]:
        return self.size, self.size

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        return (1, self.size), (self.size, 1)

    @property
    def symbols(self) -> str:
        return "#*:GS"

    @property
    def broken(self) -> str:
        return "a wall, path, start or goal that cannot be"

    @cached_property
    def rooms(self) -> list[int]:
        return [y * self.size + x for y in range(0, self.size, 2) for x in range(0, self.size, 2)]

    @cached_property
    def doors(self) -> dict[int, tuple[int, int]]:
        """The two rooms beside each cell that is a door or a wall."""
        across = {
            y * self.size + x: (y * self.size + x - 1, y * self.size + x + 1)
            for y in range(0, self.size, 2)
            for x in range(1, self.size, 2)
        }
        down = {
            y * self.size + x: ((y - 1) * self.size + x, (y + 1) * self.size + x)
            for y in range(1, self.size, 2)
            for x in range(0, self.size, 2)
        }
        return across | down

    @cached_property
    def near(self) -> list[list[int]]:
        """The cells above, below and beside each cell."""
        size = self.size
        sides = [[(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)] for y in range(size) for x in range(size)]
        return [[y * size + x for y, x in four if 0 <= y < size and 0 <= x < size] for four in sides]

    def conflicts(self, cells: Cells) -> list[int]:
        """Walls where rooms are, and openings in pillars; doors that close a circle, walls that cut rooms off; more than one start or goal;
        a path that branches, ends or runs past a start or goal. Local rules say it all: in a tree, a path that does not branch or end
        elsewhere leads from the start to the goal."""
        found = {room for room in self.rooms if cells[room] == WALL}
        found |= {cell for cell, value in enumerate(cells) if value not in (None, WALL) and not self._may_open(cell)}
        found |= {door for door in self.doors if cells[door] in (START, GOAL)}
        for end in (START, GOAL):
            places = [cell for cell, value in enumerate(cells) if value == end]
            if len(places) > 1 or (not places and all(cells[room] is not None for room in self.rooms)):
                found |= set(places or self.rooms)
        _, circles = self._joined([door for door in self.doors if cells[door] not in (None, WALL)])
        found |= set(circles)
        reached, _ = self._joined([door for door in self.doors if cells[door] != WALL])
        found |= {door for door, (one, two) in self.doors.items() if reached[one] != reached[two]}
        return sorted(found | self._branches(cells))

    def _may_open(self, cell: int) -> bool:
        return cell in self.doors or cell // self.size % 2 == cell % self.size % 2 == 0

    def _branches(self, cells: Cells) -> set[int]:
        found = set()
        for cell, value in enumerate(cells):
            if value in (PATH, START, GOAL):
                around = [cells[other] for other in self.near[cell]]
                known, wanted = sum(other in (PATH, START, GOAL) for other in around), 2 if value == PATH else 1
                if not known <= wanted <= known + around.count(None):
                    found.add(cell)
        return found

    def _joined(self, doors: list[int]) -> tuple[dict[int, int], list[int]]:
        """A number for each room, the same for those that these doors join, and the doors whose rooms were joined already."""
        number = {room: room for room in self.rooms}
        circles = []
        for door in doors:
            one, two = (number[room] for room in self.doors[door])
            if one == two:
                circles.append(door)
            else:
                number = {room: one if label == two else label for room, label in number.items()}
        return number, circles

    def completions(self, cells: Cells) -> Iterator[list[int]]:
        """Tree by tree; a cell that is no wall may be one in a puzzle that leaves it open."""
        if self.conflicts(cells):
            return
        undecided = [door for door in self.doors if cells[door] is None]
        for opened in self._trees(list(cells), [door for door in self.doors if cells[door] not in (None, WALL)], undecided):
            for start in self._ends(cells, START):
                for goal in self._ends(cells, GOAL):
                    if start != goal:
                        made = self.drawn(opened, start, goal)
                        if all(value in (None, new) for value, new in zip(cells, made, strict=True)):
                            yield made

    def _trees(self, cells: list[int | None], opened: list[int], undecided: list[int]) -> Iterator[list[int]]:
        """The doors of every tree that opens these, and of the undecided ones any."""
        if not undecided:
            yield opened
            return
        door, rest = undecided[0], undecided[1:]
        if not self._joined([*opened, door])[1]:
            yield from self._trees(cells, [*opened, door], rest)
        cells[door] = WALL
        if not self.conflicts(cells):
            yield from self._trees(cells, opened, rest)
        cells[door] = None

    def _ends(self, cells: Cells, end: int) -> list[int]:
        known = [room for room in self.rooms if cells[room] == end]
        return known or [room for room in self.rooms if cells[room] is None]

    def drawn(self, opened: list[int], start: int, goal: int) -> list[int]:
        """The cells of the maze of these doors, its path found from the goal backwards."""
        cells = [FLOOR if cell in {*self.rooms, *opened} else WALL for cell in range(self.size**2)]
        before, reached = {start: start}, [start]
        for cell in reached:
            for other in self.near[cell]:
                if cells[other] != WALL and other not in before:
                    before[other] = cell
                    reached.append(other)
        cell = goal
        while cell != start:
            cells[cell] = PATH
            cell = before[cell]
        cells[start], cells[goal] = START, GOAL
        return cells

    def tree(self, rng: random.Random) -> list[int]:
        """The doors of a uniform spanning tree: walks without their circles (Wilson 1996)."""
        beside: dict[int, list[tuple[int, int]]] = {room: [] for room in self.rooms}
        for door, (one, two) in self.doors.items():
            beside[one].append((door, two))
            beside[two].append((door, one))
        inside, opened = {self.rooms[0]}, []
        for room in self.rooms:
            left, at = {}, room
            while at not in inside:
                left[at] = rng.choice(beside[at])
                at = left[at][1]
            at = room
            while at not in inside:
                inside.add(at)
                opened.append(left[at][0])
                at = left[at][1]
        return opened

    def _random(self, rng: random.Random) -> list[int]:
        return self.drawn(self.tree(rng), *rng.sample(self.rooms, 2))

    def corpus(self, part: str) -> Tensor:
        """Every maze where all are known, else random ones, from a seed of each part."""
        if self.size <= ENUMERATED:
            return torch.tensor(list(self.completions([None] * self.size**2)))
        found = []
        for name in ("train", "val") if part == "all" else (part,):
            rng = random.Random(SEEDS[name])
            found += [self._random(rng) for _ in range(CORPUS[name])]
        return torch.tensor(found)

    def varied(self, x_BT: Tensor, rng: torch.Generator) -> Tensor:
        """The walls under one of the eight symmetries of a square, with another start and goal: filling dead ends leaves the path."""
        rows, size = len(x_BT), self.size
        open_BNN = (x_BT != WALL).view(rows, size, size)
        down_B11, right_B11, turned_B11 = (torch.rand(3, rows, 1, 1, generator=rng) < 0.5).unbind()
        open_BNN = torch.where(down_B11, open_BNN.flip(1), open_BNN)
        open_BNN = torch.where(right_B11, open_BNN.flip(2), open_BNN)
        open_BNN = torch.where(turned_B11, open_BNN.mT, open_BNN)
        start_B, goal_B = torch.tensor(self.rooms)[torch.rand(rows, len(self.rooms), generator=rng).argsort(-1)[:, :2]].unbind(-1)
        ends_BT = F.one_hot(start_B, size**2) + F.one_hot(goal_B, size**2) > 0
        path_BNN, ends_BNN = open_BNN, ends_BT.view_as(open_BNN)
        while bool((dead_BNN := path_BNN & ~ends_BNN & (_openings(path_BNN) < 2)).any()):
            path_BNN = path_BNN & ~dead_BNN
        made_BT = torch.where(open_BNN, torch.where(path_BNN, PATH, FLOOR), WALL).flatten(1)
        return made_BT.scatter(1, start_B[:, None], START).scatter(1, goal_B[:, None], GOAL)

    def given(self, x_BT: Tensor, rng: torch.Generator) -> Tensor:
        """The walls, the start and the goal."""
        return (x_BT != PATH) & (x_BT != FLOOR)

    def puzzle(self, seed: int, clues: int = 0) -> list[int | None]:
        """The walls, the start and the goal of a random maze, and random other cells up to `clues`."""
        rng = random.Random(seed)
        answer = self._random(rng)
        cells = [None if value in (PATH, FLOOR) else value for value in answer]
        holes = [cell for cell, value in enumerate(cells) if value is None]
        for cell in rng.sample(holes, min(len(holes), max(0, clues - len(cells) + len(holes)))):
            cells[cell] = answer[cell]
        return cells


def _openings(open_BNN: Tensor) -> Tensor:
    """How many of the four cells around each are open."""
    padded = F.pad(open_BNN.int(), (1, 1, 1, 1))
    return padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
