"""`dlm generate --compare`, `--samples`, `--until-settled`, `dlm show` and `dlm settle` with several runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from conftest import Dlm, make_model
from dlm.trajectory import Trajectory


@pytest.fixture(scope="module")
def sisters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sisters")
    for process in ("masked", "uniform", "semantic", "hybrid"):
        make_model(noise={"process": process}).save_pretrained(folder / process)
    make_model("autoregressive").save_pretrained(folder / "ar")
    return folder


def test_compare_gives_what_each_gives_alone(dlm: Dlm, sisters: Path) -> None:
    entries = [str(sisters / "masked"), f"{sisters / 'uniform'}@worst:3", str(sisters / "hybrid"), str(sisters / "ar")]
    code, out, _ = dlm("generate", "Ab", "--compare", ",".join(entries), "--steps", "5", "--seed", "3", "--json")
    together = json.loads(out.splitlines()[-1])["runs"]
    assert code == 0
    assert [record["model"] for record in together] == ["masked", "uniform", "hybrid", "ar"]
    for entry, record in zip(entries, together, strict=True):
        name, _, sampler = entry.partition("@")
        steps = () if name.endswith("ar") else ("--steps", "5")
        options = (*steps, *(("--sampler", sampler) if sampler else ()))
        alone = json.loads(dlm("generate", "Ab", "--model", name, "--seed", "3", "--json", *options)[1].splitlines()[-1])
        assert alone["text"] == record["text"]
        assert alone["forwards"] == record["forwards"]


@pytest.mark.slow
def test_compared_runs_are_kept_shown_and_measured(dlm: Dlm, sisters: Path, tmp_path: Path) -> None:
    entries = f"{sisters / 'masked'}@predictor-corrector:2,{sisters / 'uniform'},{sisters / 'semantic'}@refine"
    code, out, err = dlm("generate", "Ab", "-n", "3", "--length", "32", "--compare", entries, "--steps", "6", "--save", "run.traj")
    files = sorted(str(path.name) for path in tmp_path.glob("run-*.traj"))
    assert code == 0
    assert len(files) == 3
    assert out.count("---") == 9
    assert "see it again with: dlm show" in err
    assert all(len(Trajectory.load(tmp_path / name).current_BT) == 3 for name in files)
    code, out, _ = dlm("show", *files)
    assert code == 0
    assert out.count("---") == 3
    assert dlm("show", *files, "--html", "page.html")[0] == 0
    assert all(label in (tmp_path / "page.html").read_text() for label in ("masked", "uniform", "semantic"))
    code, out, err = dlm("settle", *files, "--judge", str(sisters / "ar"), "--plot", "plot.png", "--json")
    runs = json.loads(out.splitlines()[-1])["runs"]
    assert code == 0
    assert [run["texts"] for run in runs] == [3, 3, 3]
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    for run in runs:
        assert len(run["settled"]["mean"]) == 7
        assert run["settled"]["mean"][-1] == 1
        assert run["error"]["mean"][-1] == 0
        assert run["edits"] == pytest.approx(sum(run["changed"]["mean"]), abs=1e-3)
    assert {run["label"] for run in runs} == {"masked, predictor-corrector:2", "uniform, ancestral", "semantic, refine"}


def test_until_settled_reports_what_it_saved(dlm: Dlm, sisters: Path) -> None:
    words = (
        "generate",
        "Ab",
        "--model",
        str(sisters / "uniform"),
        "--steps",
        "200",
        "--temperature",
        "0",
        "--length",
        "32",
        "--until-settled",
        "2",
        "--json",
    )
    code, out, err = dlm(*words)
    record = json.loads(out.splitlines()[-1])
    assert code == 0
    assert record["steps_saved"] > 0
    assert record["forwards"] == 200 - record["steps_saved"]
    assert 0 <= record["expected_edits"] <= record["tokens"]
    assert re.search(rf"{record['steps_saved']} steps saved; of {record['tokens']} tokens the model expects", err)


def test_what_cannot_be_compared_or_measured_is_told(dlm: Dlm, sisters: Path, tmp_path: Path) -> None:
    uniform, masked = str(sisters / "uniform"), str(sisters / "masked")
    make_model(alphabet="abc").save_pretrained(tmp_path / "other")
    make_model("autoregressive", alphabet="zyx").save_pretrained(tmp_path / "judge")
    assert dlm("generate", "Ab", "--model", masked, "--steps", "2", "--save", "a.traj")[0] == 0
    for words, told in (
        (("generate", "--compare", masked), "two or more"),
        (("generate", "--compare", f"{masked},{masked}"), "two or more"),
        (("generate", "--model", masked, "--sampler", "worst"), "needs replacement noise"),
        (("generate", "--model", uniform, "--sampler", "topk"), "needs masked noise"),
        (("generate", "--model", masked, "--sampler", "refine"), "needs replacement noise"),
        (("generate", "--model", uniform, "--sampler", "refine:2"), "has no setting"),
        (("generate", "--model", uniform, "--sampler", "worst:many"), "is no number"),
        (("generate", "--model", uniform, "--sampler", "entropy-bound:-1"), "must be at least 0"),
        (("generate", "--model", masked, "--until-settled", "2"), "revises"),
        (("generate", "--model", masked, "--greedy-tail", "2"), "replacement noise"),
        (("generate", "--model", masked, "-n", "0"), "--samples"),
        (("settle", "missing.traj"), "no file missing.traj"),
        (("settle", "a.traj", "--judge", masked), "must be autoregressive"),
        (("settle", "a.traj", "--judge", "judge"), "another vocabulary"),
        (("settle", "a.traj", "--plot", "a.jpg"), ".png, .svg or .pdf"),
    ):
        assert told in dlm.told(*words), words
