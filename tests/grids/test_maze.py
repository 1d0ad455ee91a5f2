"""Mazes against counting and searching by other means: trees by Kirchhoff, paths by breadth-first search, conflicts by trying all cells."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest
import torch

from dlm.errors import InputError
from dlm.grids import kinds
from dlm.grids.grid import parse, puzzles, written
from dlm.grids.maze import GOAL, PATH, START, WALL, Maze

FIVE = """
S....
.###.
...#.
##.#.
..G#.
"""


def shortest(size: int, cells: list[int]) -> tuple[int, list[set[int]]]:
    """(open cells reached from the start, every shortest path to the goal), by levels of distance."""
    start, goal = cells.index(START), cells.index(GOAL)
    level, seen = {start: [{start}]}, {start}
    paths: list[set[int]] = []
    while level:
        if goal in level:
            paths = level[goal]
        further: dict[int, list[set[int]]] = {}
        for cell, ways in level.items():
            y, x = divmod(cell, size)
            for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if 0 <= v < size and 0 <= u < size and cells[v * size + u] != WALL and v * size + u not in seen:
                    further.setdefault(v * size + u, []).extend(way | {v * size + u} for way in ways)
        seen |= further.keys()
        level = further
    return len(seen), paths


def is_maze(size: int, cells: list[int]) -> bool:
    """Pillars are walls and rooms are not; one start and goal, in rooms; the openings are a tree; the path is the shortest one."""
    rooms = [y * size + x for y in range(0, size, 2) for x in range(0, size, 2)]
    pillars = [y * size + x for y in range(1, size, 2) for x in range(1, size, 2)]
    if any(cells[cell] != WALL for cell in pillars) or any(cells[cell] == WALL for cell in rooms):
        return False
    if [cells.count(end) for end in (START, GOAL)] != [1, 1] or {cells.index(START), cells.index(GOAL)} - set(rooms):
        return False
    opened = sum(value != WALL for value in cells)
    reached, paths = shortest(size, cells)
    if opened - len(rooms) != len(rooms) - 1 or reached != opened:  # as many doors as a tree has, and all in one piece
        return False
    return paths == [{cell for cell, value in enumerate(cells) if value in (PATH, START, GOAL)}]


def trees(rooms: int) -> int:
    """Spanning trees of a square of rooms, by Kirchhoff: the determinant of its Laplacian without a row and column."""
    places = list(itertools.product(range(rooms), repeat=2))
    laplacian = torch.zeros(len(places), len(places), dtype=torch.float64)
    for (i, a), (j, b) in itertools.combinations(enumerate(places), 2):
        if abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1:
            laplacian[i, j] = laplacian[j, i] = -1
    laplacian -= torch.diag(laplacian.sum(1))
    return round(float(torch.linalg.det(laplacian[1:, 1:])))


@pytest.fixture(scope="module")
def every() -> torch.Tensor:
    """Mazes of 5 x 5."""
    return Maze(5).corpus("all")


def test_mazes_of_3_x_3_are_those_without_conflicts() -> None:
    """Among all fillings that are one cell away from a maze, and random ones."""
    kind, rng = Maze(3), random.Random(0)
    found = {tuple(cells) for cells in kind.corpus("all").tolist()}
    assert len(found) == trees(2) * 4 * 3 == 48
    assert all(is_maze(3, list(cells)) for cells in found)
    tried = {(*cells[:at], value, *cells[at + 1 :]) for cells in found for at in range(9) for value in range(5)}
    tried |= {(*rng.choices(range(5), k=4), WALL, *rng.choices(range(5), k=4)) for _ in range(2000)}
    assert {cells for cells in tried if not kind.conflicts(cells)} == found


def test_every_maze_of_5_x_5_is_there_once(every: torch.Tensor) -> None:
    found = every.tolist()
    assert len({tuple(cells) for cells in found}) == len(found) == trees(3) * 9 * 8 == 13_824
    assert all(is_maze(5, cells) for cells in found[::97])


def test_random_trees_are_uniform() -> None:
    """Wilson's walks over the 192 trees of 3 x 3 rooms, by chi-square."""
    kind, rng, draws = Maze(5), random.Random(0), 9600
    counts = Counter(tuple(sorted(kind.tree(rng))) for _ in range(draws))
    chi_square = sum((count - draws / 192) ** 2 / (draws / 192) for count in counts.values())
    assert len(counts) == 192
    assert abs(chi_square - 191) < 5 * math.sqrt(2 * 191)


@pytest.mark.parametrize("size", [3, 7, 9])
def test_draws_are_mazes_whose_path_is_the_shortest(size: int) -> None:
    kind, rng = Maze(size), torch.Generator().manual_seed(0)
    first = [kind.drawn(kind.tree(random.Random(seed)), kind.rooms[0], kind.rooms[-1]) for seed in range(2)]
    drawn = kind.varied(torch.tensor(first).repeat(60, 1), rng).tolist()
    for cells in [*first, *drawn]:
        assert is_maze(size, cells)
        assert kind.conflicts(cells) == []
    walls = {tuple(value == WALL for value in cells) for cells in drawn}
    assert len(walls) == (4 if size == 3 else 16)  # of 3 x 3 there are no more trees; else two under eight symmetries


def test_one_wrong_cell_is_found_by_local_rules() -> None:
    kind, rng = Maze(7), random.Random(1)
    for _ in range(60):
        cells = kind.drawn(kind.tree(rng), *rng.sample(kind.rooms, 2))
        cell = rng.randrange(49)
        cells[cell] = rng.choice([value for value in range(5) if value != cells[cell]])
        assert bool(kind.conflicts(cells)) is not is_maze(7, cells)


def test_a_puzzle_gives_all_but_the_path_and_has_one_solution() -> None:
    kind = Maze(9)
    for seed in range(5):
        cells = kind.puzzle(seed)
        assert {value for value in cells if value is not None} == {WALL, START, GOAL}
        (answer,) = kind.completions(cells)
        assert is_maze(9, answer)
        assert all(value in (None, new) for value, new in zip(cells, answer, strict=True))
        assert sum(value is not None for value in kind.puzzle(seed, 60)) == 60


def test_completions_count_what_enumeration_counts(every: torch.Tensor) -> None:
    kind, rng = Maze(5), torch.Generator().manual_seed(1)
    for row in (0, 5000, 13_000):
        known_T = torch.rand(25, generator=rng) < 0.6
        cells = [value if keep else None for value, keep in zip(every[row].tolist(), known_T.tolist(), strict=True)]
        wanted = int(((every == every[row]) | ~known_T).all(-1).sum())
        found = list(kind.completions(cells))
        assert len({tuple(one) for one in found}) == len(found) == wanted


def test_given_cells_are_walls_start_and_goal(every: torch.Tensor) -> None:
    kind, x_BT = Maze(5), every[:50]
    given_BT = kind.given(x_BT, torch.Generator())
    assert torch.equal(given_BT, (x_BT == WALL) | (x_BT == START) | (x_BT == GOAL))


def test_a_drawing_is_one_puzzle() -> None:
    kind = kinds.find("maze:5")
    assert kind is not None
    (text,) = puzzles(FIVE)
    (answer,) = kind.completions(parse(kind, text))
    assert written(kind, answer) == "S::::*###:***#:##*#:::G#:"
    assert list(kind.completions(parse(kind, text.replace("##.#.", "####.")))) == []


def test_sizes_are_odd() -> None:
    assert kinds.find("maze") == Maze(9)
    for word in ("maze:4", "maze:1", "maze:23", "maze:x"):
        with pytest.raises(InputError, match="an odd number from 3 to 21"):
            kinds.find(word)
