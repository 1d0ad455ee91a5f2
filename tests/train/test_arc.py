"""ARC in training: what a draw gives and asks for, where evaluation tasks may be read, and a rule that is learned."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Dlm
from dlm.errors import InputError
from dlm.grids import arc, arc_rules
from dlm.grids.arc import OUTSIDE
from dlm.language_model import load
from dlm.train import data_kinds, recipes, setup
from dlm.train.arc import ArcData, RuleStream, TaskStream, find
from dlm.workflows import arc as workflow
from dlm.workflows.fit import fit

TOY = ["--set", "steps=2", "--set", "layers=1", "--set", "width=16", "--set", "heads=1", "--set", "batch=2", "--set", "eval_windows=2"]


def of_colour(colour: int, pairs: int) -> dict[str, Any]:
    """A task whose grids are of one colour, so that it can be told where a cell comes from; the test's answer is one colour up."""
    same = [{"input": [[colour] * (i + 1)], "output": [[colour]]} for i in range(pairs)]
    return {"train": same, "test": [{"input": [[colour, colour]], "output": [[colour + 1]]}]}


@pytest.fixture
def source(tmp_path: Path) -> str:
    parts = {"train": {"one": of_colour(1, 2), "three": of_colour(3, 4)}, "eval": {"five": of_colour(5, 2), "seven": of_colour(7, 2)}}
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps(parts))
    return str(path)


def drawn(word: str, source: str) -> set[int]:
    """The colours that training windows have, without the renaming of colours."""
    stream = replace(find(f"{word}:{source}").stream("train", 600, 0.1), augment=False)
    return set(stream.draw(64, torch.Generator().manual_seed(0)).unique().tolist()) - {OUTSIDE}


def test_no_answer_of_an_evaluation_task_is_ever_trained_on(source: str) -> None:
    assert drawn("arc", source) == {1, 2, 3, 4}
    assert drawn("arc+demonstrations", source) == {1, 2, 3, 4, 5, 7}
    val = find(f"arc:{source}").stream("val", 600, 0.1)
    assert set(val.windows().unique().tolist()) == {5, 6, 7, 8, OUTSIDE}
    assert len(val.windows()) == 2


def test_a_draw_is_a_task_of_which_the_output_of_the_test_pair_is_asked_for(source: str) -> None:
    stream = find(f"arc:{source}").stream("train", 600, 0.1)
    rng = torch.Generator().manual_seed(0)
    x_BT = stream.draw(64, rng)
    assert x_BT.shape == (64, arc.PAIRS * arc.SIZE * 2 * arc.SIZE)
    assert len({tuple(row) for row in x_BT.tolist()}) > 32  # symmetries, colours, order and test pair differ
    everything = torch.ones_like(x_BT, dtype=torch.bool)
    test_BT, all_BT = (stream.free(x_BT, everything, share, rng) for share in (1.0, 0.0))
    asked = test_BT.view(64, arc.PAIRS, arc.SIZE, 2, arc.SIZE)
    assert asked[:, -1, :, 1].all()
    assert int(asked.sum()) == 64 * arc.SIZE**2
    outputs = all_BT.view(64, arc.PAIRS, arc.SIZE, 2, arc.SIZE)
    there_BP = x_BT.view(64, arc.PAIRS, arc.SIZE, 2, arc.SIZE)[:, :, 0, 0, 0] != OUTSIDE
    assert torch.equal(outputs[:, :, :, 1].flatten(2).all(-1), there_BP)
    assert not outputs[:, :, :, 0].any()


def test_validation_gives_the_condition_where_training_always_has_it(source: str) -> None:
    base = replace(recipes.find("arc"), data=f"arc:{source}", network=recipes.find("arc").network.with_(layers=1, width=32, heads=1))
    free = {share: setup.resolve(replace(base, context_share=share)).validation_free_WT for share in (0.5, 1.0)}
    assert free[1.0].sum(-1).tolist() == [arc.SIZE**2] * 2
    assert free[0.5].sum(-1).tolist() == [3 * arc.SIZE**2] * 2
    assert recipes.of_data(f"arc:{source}") == recipes.find("arc")


def test_a_source_without_parts_is_split_and_what_does_not_fit_is_left_out(tmp_path: Path) -> None:
    large = of_colour(1, 2) | {"test": [{"input": [[1] * 11], "output": [[1]]}]}
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps({"large": large} | {f"task{i}": of_colour(i, 2) for i in range(1, 9)}))
    data = find(f"arc:{path}")
    assert [task.name for task in data.tasks("val", 0.25)] == ["task7", "task8"]
    stream = data.stream("train", 600, 0.25)
    assert isinstance(stream, TaskStream)
    assert len(data.tasks("train", 0.25)) == 7
    assert len(stream.tasks) == 6
    path.write_text(json.dumps({"large": large}))
    with pytest.raises(InputError, match="the all part has no task whose grids fit 10 x 10"):
        find(f"arc:{path}").stream("all", 600, 0.25)
    path.write_text(json.dumps({"untold": of_colour(1, 2) | {"test": [{"input": [[1]]}]}}))
    with pytest.raises(InputError, match="no task of the all part tells the output of a test"):
        find(f"arc:{path}").stream("all", 600, 0.25)


def test_generated_tasks_are_new_in_every_draw_and_of_one_rule_where_it_is_named() -> None:
    data = data_kinds.find("arc-rules:4:crop")
    assert isinstance(data, ArcData)
    assert {task.name.partition("-")[0] for task in data.tasks("val")} == {"crop"}
    stream = data.stream("train", 96, 0.1)
    assert isinstance(stream, RuleStream)
    first, second = (stream.draw(8, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert not (first == second).all(-1).any()
    assert torch.equal(first, stream.draw(8, torch.Generator().manual_seed(0)))
    for row in first.view(-1, 3, 4, 2, 4):
        given, answer = (arc.outlined(row[-1, :, side]) for side in (0, 1))
        assert given is not None
        assert answer is not None
        assert torch.equal(arc_rules.RULES["crop"](None, [])(given), answer)  # type: ignore[arg-type]
    for word, message in (("arc-rules:1", "grids of rules have 2 to 30 rows"), ("arc-rules:4:crops", "did you mean crop")):
        with pytest.raises(InputError, match=message):
            find(word)


def test_bad_sources_end_with_code_2_and_one_line(dlm: Dlm, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("[]")
    for word in ("arc", f"arc:{tmp_path / 'none'}", f"arc:{tmp_path / 'bad.json'}", "arc-rules:99"):
        assert dlm.told("train", "arc", "--data", word, "--out", str(tmp_path / "run"), *TOY)


def test_a_checkpoint_keeps_the_colours_of_its_tokens(dlm: Dlm, tmp_path: Path) -> None:
    dlm("train", "arc", "--data", "arc-rules:2", "--out", str(tmp_path / "run"), *TOY)
    assert load(str(tmp_path / "run")).grid == {"axes": [6, 4], "tile": [2, 2], "colours": [*arc.PALETTE, ""]}


@pytest.mark.slow
def test_a_rule_is_learned_to_the_last_cell(tmp_path: Path) -> None:
    """Grids of 2 x 2 cropped to what is not background: the shape of the answer is learned as its cells are."""
    config = replace(recipes.find("arc-rules"), data="arc-rules:2:crop", batch=64, lr=6e-3, warmup=10, context_share=0.0, steps=150)
    fit(config.with_settings(["layers=2", "heads=2", "width=32", "eval_every=1000"]), tmp_path / "crop")
    found = workflow.score(str(tmp_path / "crop"), find("arc-rules:2:crop").tasks("val")[:100], views=1)
    assert found.solved == 100
    assert found.copied < 0.9
