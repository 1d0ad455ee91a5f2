"""Sudoku against counting by other means: all grids of 4 x 4, symmetries that keep the rules, puzzles with one solution."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dlm.errors import InputError
from dlm.grids import kinds
from dlm.grids.grid import Grid, cells_of, parse, puzzles, written
from dlm.grids.sudoku import Sudoku

HARD = "8..........36......7..9.2...5...7.......457.....1...3...1....68..85...1..9....4.."  # Inkala 2012
HARD_SOLVED = "812753649943682175675491283154237896369845721287169534521974368438526917796318452"


def valid(grid: Grid, cells: list[int]) -> bool:
    """Every row, column and box holds every symbol, by slices of a square."""
    size, (height, width) = grid.axes[0], grid.groups[-1]
    square = torch.tensor(cells).view(size, size)
    boxes = [square[y : y + height, x : x + width] for y in range(0, size, height) for x in range(0, size, width)]
    return all(sorted(unit.flatten().tolist()) == list(range(size)) for unit in [*square, *square.mT, *boxes])


def test_all_288_grids_of_4_x_4_are_those_that_trying_every_pair_of_rows_finds() -> None:
    rows = list(itertools.permutations(range(4)))
    tried = {sum(four, ()) for four in itertools.product(rows, repeat=4) if valid_columns(four)}
    found = Sudoku(4).corpus("all").tolist()
    assert {tuple(grid) for grid in found} == tried
    assert len(found) == len(tried) == 288
    assert math.log(len(found)) == pytest.approx(5.663, abs=1e-3)


def valid_columns(rows: tuple[tuple[int, ...], ...]) -> bool:
    boxes = ({rows[y][x], rows[y][x + 1], rows[y + 1][x], rows[y + 1][x + 1]} for y in (0, 2) for x in (0, 2))
    return all(len(set(column)) == 4 for column in zip(*rows, strict=True)) and all(len(box) == 4 for box in boxes)


@pytest.mark.parametrize("size", [4, 6, 9])
def test_symmetries_map_valid_grids_onto_valid_grids(size: int) -> None:
    kind, rng = Sudoku(size), torch.Generator().manual_seed(0)
    first = next(kind.completions([None] * size**2))
    varied = kind.varied(torch.tensor([first]).expand(200, -1), rng).tolist()
    assert all(valid(kind, cells) for cells in varied)
    assert all(not kind.conflicts(cells) for cells in varied)
    assert len({tuple(cells) for cells in varied}) > 60  # of 4 x 4 a class has 96 or 192


def test_the_symmetries_of_4_x_4_reach_every_grid_of_the_class_alike() -> None:
    """The 288 grids fall into two classes of 96 and 192; draws within a class are uniform (chi-square)."""
    kind, rng = Sudoku(4), torch.Generator().manual_seed(0)
    grids = kind.corpus("all")
    seen: set[tuple[int, ...]] = set()
    for first in grids.tolist():
        if tuple(first) in seen:
            continue
        drawn = [tuple(cells) for cells in kind.varied(torch.tensor([first]).expand(9600, -1), rng).tolist()]
        counts = {cells: drawn.count(cells) for cells in set(drawn)}
        seen |= counts.keys()
        wanted = len(drawn) / len(counts)
        chi_square, freedom = sum((count - wanted) ** 2 / wanted for count in counts.values()), len(counts) - 1
        assert len(counts) in (96, 192)
        assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)
    assert len(seen) == 288


def test_a_hard_puzzle_has_the_one_solution_that_is_known() -> None:
    kind = Sudoku(9)
    assert [written(kind, cells) for cells in kind.completions(parse(kind, HARD))] == [HARD_SOLVED]
    assert valid(kind, [int(c) - 1 for c in HARD_SOLVED])


@pytest.mark.parametrize("clues", [0, 8])
def test_puzzles_of_4_x_4_have_one_solution_among_all_grids(clues: int) -> None:
    kind, grids = Sudoku(4), Sudoku(4).corpus("all").tolist()
    for seed in range(20):
        cells = kind.puzzle(seed, clues)
        fitting = [grid for grid in grids if all(cell in (None, value) for cell, value in zip(cells, grid, strict=True))]
        assert len(fitting) == 1
        assert list(kind.completions(cells)) == fitting
        assert 16 - cells.count(None) >= clues
        if not clues:  # minimal: without any one of its cells there are more
            assert not any(kind.unique([*cells[:i], None, *cells[i + 1 :]]) for i, cell in enumerate(cells) if cell is not None)


def test_completions_count_what_enumeration_counts() -> None:
    kind, grids, rng = Sudoku(4), Sudoku(4).corpus("all"), torch.Generator().manual_seed(1)
    for _ in range(20):
        known = torch.rand(16, generator=rng) < 0.2
        like = grids[int(torch.randint(288, (1,), generator=rng))]
        cells = [int(value) if keep else None for value, keep in zip(like, known, strict=True)]
        wanted = int(((grids == like) | ~known).all(-1).sum())
        assert len(list(kind.completions(cells))) == wanted


def test_conflicts_are_the_cells_that_repeat() -> None:
    kind = Sudoku(4)
    assert kind.conflicts(parse(kind, "1..1............")) == [0, 3]
    assert kind.conflicts(parse(kind, "1....1..........")) == [0, 5]  # a box
    assert kind.conflicts(parse(kind, "1...........1...")) == [0, 12]
    assert kind.conflicts(parse(kind, "1234341221434321")) == []
    assert list(kind.completions(parse(kind, "11.............."))) == []


def test_given_cells_are_some_and_never_all() -> None:
    given = Sudoku(9).given(torch.zeros(500, 81, dtype=torch.long), torch.Generator().manual_seed(0)).sum(-1)
    assert int(given.min()) >= 16
    assert int(given.max()) <= 80
    assert float(given.float().std()) > 10


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1...2...", 1),
        ("1..2\n3..4\n....\n....\n", 1),
        ("1 . | . 2\n3 . | . 4\n----+----\n. . | . .\n. . | . .", 1),
        ("1..............2\n\n2..............1\n", 2),
    ],
)
def test_puzzles_are_lines_or_one_drawing(text: str, count: int) -> None:
    assert len(puzzles(text)) == count


def test_parse_reads_every_hole_and_border() -> None:
    kind = Sudoku(4)
    drawn = "1 _ │ 0 2\n3 . │ . 4\n────┼────\n. . │ . .\n. . │ . ."
    assert written(kind, parse(kind, puzzles(drawn)[0])) == "1..23..4........"
    assert cells_of(kind) == 16


@pytest.mark.parametrize(("text", "words"), [("1" * 17, "17 cells, a sudoku:4 grid 16"), ("5" + "." * 15, "'5' is no cell")])
def test_a_grid_of_another_shape_or_vocabulary_is_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse(Sudoku(4), text)


def test_kinds_are_found_by_name() -> None:
    four, nine = kinds.find("sudoku:4"), kinds.find("sudoku")
    assert four is not None
    assert nine is not None
    assert (four.word, nine.word) == ("sudoku:4", "sudoku:9")
    assert kinds.find("shakespeare") is None
    with pytest.raises(InputError, match="sudoku:5 is unknown; known: sudoku:4, sudoku:6, sudoku:9"):
        kinds.find("sudoku:5")
