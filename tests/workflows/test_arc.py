"""ARC tasks solved and counted: an exact network solves every task through all views, and what does not fit counts as not solved."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from conftest import Dlm, make_model
from dlm import bundled
from dlm.errors import InputError
from dlm.grids import arc
from dlm.grids.arc import OUTSIDE, PALETTE, SYMBOLS, Task
from dlm.language_model import LanguageModel
from dlm.language_model.options import DecodingOptions
from dlm.train.arc import TaskStream, find
from dlm.trajectory import Trajectory
from dlm.viz.gif import write_gif
from dlm.viz.html import write_html
from dlm.viz.layout import framed, looks, pieces
from dlm.viz.terminal import LiveView
from dlm.workflows import arc as workflow
from dlm.workflows.arc import Attempting

SIZE, PAIRS = 5, 3


def untrained(data: str = f"arc-rules:{SIZE}") -> LanguageModel:
    settings = find(data).settings
    shape = {name: settings[name] for name in ("axes", "groups", "window")}
    made = make_model(context=0, alphabet=SYMBOLS, colours=TaskStream.colours, **shape)
    made.config = replace(made.config, training={"data": data})
    return made


def exact(monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    """A model that knows the rule of `turned`, which is the same rule under every view: it writes the input turned by half a turn."""
    lm = untrained()

    def forward(z_BT: Tensor, *_: Any, index_BC: Tensor | None = None, **__: Any) -> Tensor:
        logits_BTV = torch.zeros(*z_BT.shape, len(SYMBOLS) + 1)
        for row, z_PSNS in enumerate(z_BT.view(len(z_BT), PAIRS, SIZE, 2, SIZE)):
            given = arc.outlined(z_PSNS[-1, :, 0])
            assert given is not None
            answer = arc.canvas([], given, given.flip(0, 1), size=SIZE, pairs=1)
            whole = torch.cat([z_PSNS[:-1], answer]).flatten()
            logits_BTV[row] = 20.0 * torch.nn.functional.one_hot(whole, len(SYMBOLS) + 1)
        return logits_BTV if index_BC is None else logits_BTV.take_along_dim(index_BC[..., None], 1)

    monkeypatch.setattr(lm.network, "forward", forward)
    return lm


def turned(name: str = "a", most: int = SIZE, tests: int = 1) -> Task:
    rng = torch.Generator().manual_seed(len(name) + most)
    inputs = [torch.randint(arc.COLOURS, (3, most), generator=rng) for _ in range(2 + tests)]
    pairs = tuple((given, given.flip(0, 1)) for given in inputs)
    return Task(name, pairs[:2], pairs[2:])


@pytest.mark.parametrize("sampler", ["confidence", "margin", "topk", "ancestral"])
def test_an_exact_network_solves_every_task_and_all_views_agree(monkeypatch: pytest.MonkeyPatch, sampler: str) -> None:
    lm = exact(monkeypatch)
    answers = workflow.solve(lm, turned(tests=2), views=6, options=DecodingOptions(sampler=sampler))
    assert [one.votes for one in answers] == [(6,), (6,)]
    assert all(one.solved and one.shape and one.cells == 1 for one in answers)


def test_a_task_that_does_not_fit_counts_as_not_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [turned(), turned("bb", most=4), turned("large", most=SIZE + 1)]
    found = workflow.score(exact(monkeypatch), tasks, views=2)
    assert (found.tasks, found.fitting, found.solved, found.shapes, found.cells) == (3, 2, 2, 1.0, 1.0)
    assert 0 < found.copied < 1
    wrong = replace(tasks[0], tests=(*tasks[0].tests, (tasks[0].tests[0][0], torch.zeros(3, 4, dtype=torch.long))))
    found = workflow.score(exact(monkeypatch), [wrong], views=2)  # of two tests one is right
    assert (found.solved, found.shapes) == (0, 0.5)
    untold = replace(tasks[0], name="untold", tests=((tasks[0].tests[0][0], None),))
    with pytest.raises(InputError, match="untold does not tell its answers"):
        workflow.score(exact(monkeypatch), [untold])


def test_the_answers_cells_are_compared_from_the_top_left() -> None:
    answer = torch.tensor([[1, 2], [3, 4]])
    assert workflow.agreement(answer, answer) == 1
    assert workflow.agreement(torch.tensor([[1, 2, 9]]), answer) == 0.5
    assert workflow.agreement(torch.zeros(0, 0, dtype=torch.long), answer) == 0


def test_two_attempts_are_the_views_with_the_most_votes() -> None:
    """An untrained network: attempts are undone to the task's own colours and turn, and have the votes of their views."""
    attempting = Attempting(untrained(), turned(), 0, DecodingOptions(), views=8, seed=3)
    attempting.finish()
    found = attempting.result()
    assert len(found.attempts) == len(found.votes) <= 2
    assert list(found.votes) == sorted(found.votes, reverse=True)
    assert found.solved is False
    shown = attempting.trajectory.current_BT.view(8, PAIRS, SIZE, 2, SIZE)
    given, answer = turned().demonstrations[0]
    assert torch.equal(arc.outlined(shown[0, 0, :, 0]), given)  # type: ignore[arg-type]
    for view, row in zip(attempting.views, shown, strict=True):
        seen = [arc.outlined(row[place, :, 1]) for place in range(2)]
        assert any(one is not None and torch.equal(view.undone(one), answer) for one in seen)
    assert (attempting.trajectory.start_BT.view(8, PAIRS, SIZE, 2, SIZE)[:, -1, :, 1] == len(SYMBOLS)).all()


def test_cells_are_drawn_in_their_colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempting = Attempting(exact(monkeypatch), turned(), 0, DecodingOptions(sampler="topk", steps=4), views=2)
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=100)
    with LiveView(attempting.trajectory, console) as view:
        while attempting.step() is not None:
            view.update(force=True)
    run = attempting.trajectory
    found, drawn = framed(run, 0, pieces(run, 0), looks(run, 0, after=1.0))
    lines = "".join(found).split("\n")
    assert len(lines) == PAIRS * SIZE + PAIRS - 1  # rows and the rules between pairs
    assert {len(line) for line in lines} == {2 * 2 * SIZE + 3}  # a cell is two columns wide
    cells = [(piece, look.colour) for piece, look in zip(found, drawn, strict=True) if look.kind != "border"]
    assert all(colour == ("" if piece.strip() == SYMBOLS[OUTSIDE] else PALETTE[int(piece)]) for piece, colour in cells)
    seen = {int(cell) for cell in run.current_BT[0].unique() if cell < arc.COLOURS}
    red, green, blue = (int(PALETTE[max(seen)][i : i + 2], 16) for i in (1, 3, 5))
    assert f"48;2;{red};{green};{blue}" in console.file.getvalue()  # type: ignore[attr-defined]
    run.save(tmp_path / "run.traj")
    loaded = Trajectory.load(tmp_path / "run.traj")
    write_html([("run", loaded)], tmp_path / "run.html")
    data = json.loads(re.search(r'id="data">(.*?)</script>', (tmp_path / "run.html").read_text(encoding="utf-8"))[1])  # type: ignore[index]
    assert data[0]["colours"] == [*PALETTE, ""]
    write_gif([("run", loaded)], tmp_path / "run.gif", rows=2, size=20)
    from PIL import Image

    with Image.open(tmp_path / "run.gif") as image:
        assert image.height > len(lines) * 30  # a grid does not scroll
        image.seek(image.n_frames - 1)  # type: ignore[attr-defined]
        shades = {color for _, color in image.convert("RGB").getcolors(1 << 16) or []}
    assert {tuple(bytes.fromhex(PALETTE[cell][1:])) for cell in seen} <= shades


def test_the_verb_counts_tasks_or_shows_one(dlm: Dlm, tmp_path: Path) -> None:
    toy = ["steps=2", "layers=1", "width=16", "heads=1", "batch=2", "eval_windows=2"]
    code, _, err = dlm("train", "arc-rules", "--data", "arc-rules:3", "--out", "run", *(word for one in toy for word in ("--set", one)))
    assert code == 0, err
    code, out, err = dlm("solve", "arc-rules:3", "run", "--views", "1", "--json")
    assert code == 1
    assert "of 256 tasks solved" in err
    assert json.loads(out)["fitting"] == 256
    name = find("arc-rules:3").tasks("val")[0].name
    code, out, err = dlm("solve", "arc-rules:3", "run", "--task", name, "--save", "one.traj", "--json")
    assert code in (0, 1)
    assert json.loads(out)["answers"][0]["task"] == name
    assert Trajectory.load(Path("one.traj")).meta["grid"]["tile"] == [3, 3]
    pair = {"input": [[1]], "output": [[2]]}
    Path("task.json").write_text(json.dumps({"train": [pair, pair], "test": [{"input": [[3]]}]}))
    code, out, err = dlm("solve", "arc:task.json", "run")
    assert code == 1
    assert "its answer is not told" in err
    assert f"for one task, not 256: add --task {name}" in dlm.told("solve", "arc-rules:3", "run", "--watch")
    assert "has no task 'nothing'" in dlm.told("solve", "arc-rules:3", "run", "--task", "nothing")
    assert "train one with dlm train arc --data arc:task.json" in dlm.told("solve", "arc:task.json")
    assert "no bundled model solves tasks of arc-rules:4" in dlm.told("solve", "arc-rules:4")
    assert "is no diffusion model of ARC tasks" in dlm.told("solve", "arc-rules:3", "sudoku-4")
    assert "does not exist" in dlm.told("solve", "arc:none", "run")


def test_the_bundled_model_solves_as_many_as_its_card_says() -> None:
    told = re.search(r"(\d+) of (\d+) solved", (bundled.models()["arc-rules"] / "README.md").read_text(encoding="utf-8"))
    assert told is not None
    tasks = find("arc-rules:3").tasks("val")
    assert len(tasks) == int(told[2])
    found = workflow.score(workflow.usual_model("arc-rules:3:keep"), tasks[::4], views=1)
    assert found.solved / found.tasks == pytest.approx(int(told[1]) / int(told[2]), abs=0.1)
