"""Puzzles solved by a model: the rules decide, given cells stay, and every sampler works."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import Dlm, make_model
from dlm.errors import InputError
from dlm.grids.grid import Grid, cells_of, written
from dlm.grids.maze import Maze
from dlm.grids.sudoku import Sudoku
from dlm.language_model import LanguageModel, load
from dlm.language_model.options import DecodingOptions
from dlm.sampling import registry
from dlm.trajectory import Trajectory
from dlm.workflows.solve import Solving, solve, usual_model

FOUR = Sudoku(4)
PUZZLE = "1...2..1.14....."
NINE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
MAZE = ".#..S#.#..#.#.#.#....#......#######.G..#.....######.#....#...#.##.#.###........#."


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load("sudoku-4")


def untrained(process: str = "masked", kind: Grid = FOUR) -> LanguageModel:
    groups: dict[str, Any] = {"axes": kind.axes, "groups": kind.groups, "window": cells_of(kind), "alphabet": kind.symbols}
    made = make_model(noise={"process": process, "schedule": "linear"}, context=0, **groups)
    made.config = replace(made.config, training={"data": kind.word})
    return made


def keeps_given(puzzle: str, answer: str) -> bool:
    return all(cell in (".", new) for cell, new in zip(puzzle, answer, strict=True))


def test_minimal_puzzles_get_their_one_solution(lm: LanguageModel) -> None:
    for seed in range(12):
        cells = FOUR.puzzle(100 + seed, 0)
        found = solve(lm, written(FOUR, cells))
        assert found.solved
        assert found.unique
        assert found.answer == written(FOUR, next(FOUR.completions(cells)))
        assert found.forwards >= found.holes == cells.count(None)
        if found.tries == 1:
            assert found.forwards == found.holes


@pytest.mark.parametrize("sampler", [one.name for one in registry.usable("masked")])
def test_every_sampler_of_masks_fills_a_grid(sampler: str, lm: LanguageModel) -> None:
    found = solve(lm, PUZZLE, options=DecodingOptions(sampler=sampler), tries=20)
    assert found.solved, found
    assert keeps_given(PUZZLE, found.answer)
    assert not FOUR.conflicts([int(c) - 1 for c in found.answer])
    assert found.forwards > 0


@pytest.mark.parametrize("sampler", [one.name for one in registry.usable("replacement")])
def test_every_sampler_of_replacement_noise_fills_a_grid(sampler: str) -> None:
    found = solve(untrained("uniform"), PUZZLE, options=DecodingOptions(sampler=sampler, temperature=1.0, steps=4), tries=2)
    assert "." not in found.answer
    assert keeps_given(PUZZLE, found.answer)
    assert found.solved is (not FOUR.conflicts([int(c) - 1 for c in found.answer]))


def test_a_failed_try_masks_conflicts_and_counts_its_passes() -> None:
    """A network that knows nothing fails; each try after the first opens the cells in conflict and some others."""
    solving = Solving(untrained(), PUZZLE, DecodingOptions(), tries=4)
    frames = []
    while (frame := solving.step()) is not None:
        frames.append(frame)
    found = solving.result()
    assert not found.solved
    assert found.tries == 4
    assert found.conflicts == len(FOUR.conflicts([int(c) - 1 for c in found.answer])) > 0
    assert [frame.forwards for frame in frames] == list(range(1, found.forwards + 1))
    ends = [k for k, frame in enumerate(frames) if 4 not in frame.tokens_BT]
    assert len(ends) == 4
    for k in ends[:-1]:
        wrong = FOUR.conflicts(frames[k].tokens_BT[0].tolist())
        free = [cell for cell in wrong if PUZZLE[cell] == "."]
        opened = (frames[k + 1].tokens_BT[0] == 4).sum().item() + 1  # one has been written in that pass
        assert opened >= len(free)
    assert not bool((solving.trajectory.settled_BT[0] > 0).any())  # nothing settles before the rules accept it


def test_the_path_of_a_maze_is_drawn_until_the_rules_accept_it() -> None:
    """By a network that knows nothing, of a single hole, whose conflicts lie at its neighbours: it is masked again nonetheless."""
    lm, options = untrained(kind=Maze(3)), DecodingOptions(sampler="ancestral", temperature=1.0, steps=1)
    found = [solve(lm, "S::*##.*G", options=options, tries=100, seed=seed) for seed in range(3)]
    assert {(one.solved, one.unique, one.answer) for one in found} == {(True, True, "S::*##**G")}
    assert sum(one.tries for one in found) > 3
    assert all(one.forwards == one.tries for one in found)
    with pytest.raises(InputError, match="breaks a rule already: a wall, path, start or goal that cannot be at row 1 column 1"):
        solve(lm, "#...#...G")


def test_a_settled_grid_is_a_fixed_point(lm: LanguageModel) -> None:
    found = solve(lm, "1234341221434321")
    assert found.solved
    assert (found.forwards, found.holes, found.answer) == (0, 0, "1234341221434321")


@pytest.mark.parametrize(
    ("puzzle", "words"),
    [
        ("1..1............", "breaks a rule already: the same symbol at row 1 column 1, row 1 column 4"),
        ("123....4........", "no solution"),
        ("1" * 15, "15 cells"),
        ("a...............", "'a' is no cell"),
    ],
)
def test_puzzles_that_cannot_be_are_refused(puzzle: str, words: str, lm: LanguageModel) -> None:
    with pytest.raises(InputError, match=words):
        solve(lm, puzzle)


def test_the_verb_draws_the_grid_and_says_that_it_is_solved(dlm: Dlm) -> None:
    code, out, err = dlm("solve", PUZZLE)
    assert code == 0
    solution = written(FOUR, next(FOUR.completions([None if c == "." else int(c) - 1 for c in PUZZLE])))
    assert [c for c in out if c.isdigit()] == list(solution)
    assert out.splitlines()[2] == "────┼────"
    assert "sudoku-4, margin: solved; 11 holes in 11 forward passes" in err


@pytest.mark.parametrize(
    ("name", "puzzle", "answer"),
    [
        ("sudoku-9", NINE, "534678912672195348198342567859761423426853791713924856961537284287419635345286179"),
        ("maze-9", MAZE, ":#**S#:#::#*#:#:#:***#:::::*#######:G::#:::::######:#::::#:::#:##:#:###::::::::#:"),
    ],
)
def test_a_puzzle_finds_its_bundled_model_by_its_symbols(name: str, puzzle: str, answer: str) -> None:
    assert usual_model(puzzle) == name
    found = solve(load(name), puzzle)
    assert (found.answer, found.solved, found.unique, found.tries) == (answer, True, True, 1)


def test_files_and_standard_input_hold_several_puzzles(dlm: Dlm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = f"{PUZZLE}\n\n...............1\n"
    (tmp_path / "puzzles.txt").write_text(lines)
    code, out, err = dlm("solve", "puzzles.txt", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["solved"] == len(found["puzzles"]) == 2
    assert [one["unique"] for one in found["puzzles"]] == [True, False]
    assert "several solutions: one is shown" in err
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert json.loads(dlm("solve", "-", "--json")[1])["solved"] == 2


def test_a_saved_run_is_drawn_as_a_grid(dlm: Dlm) -> None:
    assert dlm("solve", PUZZLE, "--save", "run.traj")[0] == 0
    run = Trajectory.load("run.traj")
    assert run.meta["grid"] == {"axes": [4, 4], "tile": [2, 2]}
    assert len(run) == 12
    assert dlm("show", "run.traj", "--html", "run.html")[0] == 0
    assert '"cells":[0,-1,1,-1,2' in Path("run.html").read_text(encoding="utf-8")


def test_an_unsolved_puzzle_ends_in_1_and_bad_input_in_2(dlm: Dlm, tmp_path: Path) -> None:
    untrained().save_pretrained(tmp_path / "untrained")
    code, _, err = dlm("solve", PUZZLE, "untrained", "--tries", "2")
    assert code == 1
    assert "not solved" in err
    assert "2 tries" in err
    assert "sudoku-4 16 cells of 1234" in dlm.told("solve", "." * 36)
    assert "neither a file nor a puzzle" in dlm.told("solve", "puzzle.txt")
    assert "no solution" in dlm.told("solve", "123....4........")
    assert "no puzzle" in dlm.told("solve", "  ")
    assert "the sampler 'magic' is unknown" in dlm.told("solve", PUZZLE, "--sampler", "magic")
    (tmp_path / "two.txt").write_text(f"{PUZZLE}\n{PUZZLE}\n")
    assert "--save keeps the run of one puzzle" in dlm.told("solve", "two.txt", "--save", "run.traj")
    assert "given twice" in dlm.told("solve", PUZZLE, "sudoku-4", "-m", "sudoku-4")
