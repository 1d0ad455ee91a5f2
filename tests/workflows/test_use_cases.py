"""Every use case from Python gives what its command prints with `--json`, models by name or loaded already."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

import dlm as library
from conftest import Dlm, make_model
from dlm.calibration import measure
from dlm.errors import InputError
from dlm.evaluation.card import dumps

ROOT = Path(__file__).parents[2]


class Result(Protocol):
    def record(self) -> dict[str, object]: ...


def printed(run: Dlm, *words: str) -> dict[str, Any]:
    """The last line of a command, as JSON."""
    code, out, err = run(*words, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def plain(result: Result) -> dict[str, Any]:
    """The record after a journey through JSON, where nan is null."""
    assert dataclasses.is_dataclass(result)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(result, dataclasses.fields(result)[0].name, None)
    found: dict[str, Any] = json.loads(dumps(result.record()))
    assert found["format"] == 1
    return found


class Watch:
    """A progress callback that remembers."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def __call__(self, done: int, total: int) -> None:
        self.calls.append((done, total))

    def check(self) -> None:
        """It began at nothing, never went back, and ended with all of it."""
        done, totals = zip(*self.calls, strict=True)
        assert done[0] == 0
        assert list(done) == sorted(done)
        assert len(set(totals)) == 1
        assert done[-1] == totals[-1]
        assert len(done) > 2


@pytest.mark.parametrize("loaded", [False, True])
def test_evaluate(dlm: Dlm, masked_dir: Path, text_file: Path, loaded: bool) -> None:
    words = ("--data", str(text_file), "--split", "all", "--max-windows", "4", "--passes", "3", "--seed", "5")
    shown = printed(dlm, "eval", str(masked_dir), *words)
    watch = Watch()
    model = library.load(str(masked_dir)) if loaded else str(masked_dir)
    found = library.evaluate(model, text_file, split="all", max_windows=4, passes=3, seed=5, card=shown["card"], progress=watch)
    assert plain(found) == shown
    assert found.is_bound
    assert found.windows == 4
    assert "card" not in dataclasses.replace(found, card=None).record()
    watch.check()
    card = json.loads(Path(str(shown["card"])).read_text())
    assert card["format"] == 1
    assert card["figures"]["nats_per_token"] == found.nats_per_token


def test_evaluate_an_autoregressive_model(dlm: Dlm, autoregressive_dir: Path, masked_dir: Path, text_file: Path) -> None:
    words = ("--data", str(text_file), "--split", "all", "--max-windows", "4", "--window", "8")
    shown = printed(dlm, "eval", str(autoregressive_dir), *words, "--card", "card.json")
    found = library.evaluate(str(autoregressive_dir), str(text_file), split="all", max_windows=4, window=8, card="card.json")
    assert plain(found) == shown
    assert found.stderr == 0
    assert found.estimator == "autoregressive"
    with pytest.raises(library.InputError, match="unknown estimator 'magic'"):
        library.evaluate(str(masked_dir), text_file, estimator="magic")
    with pytest.raises(library.InputError, match="no device 'abacus'"):
        library.evaluate(str(masked_dir), text_file, device="abacus")


@pytest.mark.parametrize(
    "model",
    [make_model(), make_model(attention="block_causal", block_length=8), make_model("autoregressive")],
    ids=["masked", "block diffusion", "autoregressive"],
)
def test_evaluate_at_a_temperature(dlm: Dlm, model: library.LanguageModel, text_file: Path, tmp_path: Path) -> None:
    """As the network whose last layer is divided by it."""
    model.save_pretrained(tmp_path / "model")
    words = ("--data", str(text_file), "--split", "all", "--max-windows", "4", "--passes", "2")
    plainly = printed(dlm, "eval", "model", *words)
    shown = printed(dlm, "eval", "model", *words, "--temperature", "1.25")
    assert shown.pop("temperature") == 1.25
    assert Path(str(shown.pop("card"))).name == "model-all-temperature1.25.json"
    cold = library.load("model")
    with torch.no_grad():
        cold.network.head.weight /= 1.25
    cold.save_pretrained("cold")
    expected = printed(dlm, "eval", "cold", *words)
    assert shown["nats_per_token"] == pytest.approx(expected["nats_per_token"], abs=1e-6)
    assert shown["stderr"] == pytest.approx(expected["stderr"], abs=1e-6)
    assert abs(plainly["nats_per_token"] - shown["nats_per_token"]) > 1e-3
    assert "must be above 0" in dlm.told("eval", "model", *words, "--temperature", "0")


def test_a_bound_of_other_noise_has_no_temperature(dlm: Dlm, text_file: Path) -> None:
    make_model(noise={"process": "uniform", "schedule": "linear"}).save_pretrained("uniform")
    told = dlm.told("eval", "uniform", "--data", str(text_file), "--temperature", "0.9")
    assert "uniform is neither a masked model nor an autoregressive one" in told


def test_calibrate(dlm: Dlm, autoregressive_dir: Path, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "masked")
    words = ("calibrate", "masked", "--judge", str(autoregressive_dir), "--quick", "-n", "3", "--temperature", "0.9", "--seed", "2")
    shown = printed(dlm, *words)
    watch = Watch()
    kept = json.loads(Path("masked/calibration.json").read_text())
    found = library.calibrate("masked", str(autoregressive_dir), quick=True, samples=3, temperature=0.9, seed=2, progress=watch)
    watch.check()
    assert kept.pop("dlm_version") == library.__version__
    assert kept == shown
    written = json.loads(Path("masked/calibration.json").read_text())
    assert written == kept | {"dlm_version": library.__version__}  # a table is written only where it is told to be
    for one in (record := plain(found)), shown:
        for row in one["rows"]:
            assert row.pop("seconds") > 0
    assert record == shown
    again = library.calibrate(library.load("masked"), str(autoregressive_dir), retime=True, samples=3, out="masked")
    assert [row.bits for row in again.rows] == [row.bits for row in found.rows]
    assert json.loads(Path("masked/calibration.json").read_text()) == plain(again) | {"dlm_version": library.__version__}
    Path("a_file").touch()
    with pytest.raises(library.InputError, match="a_file is no directory"):
        library.calibrate("masked", str(autoregressive_dir), out="a_file")


def test_a_calibration_that_is_stopped_goes_on(autoregressive_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, judge, out = tmp_path / "model", str(autoregressive_dir), tmp_path / "out"
    make_model().save_pretrained(model)
    written: list[str] = []
    generate = library.LanguageModel.generate

    def counting(lm: library.LanguageModel, *args: Any, **options: Any) -> Any:
        written.append(options["sampler"])
        return generate(lm, *args, **options)

    monkeypatch.setattr(library.LanguageModel, "generate", counting)

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    def run(**options: Any) -> list[str]:
        """The settings that it measures."""
        written.clear()
        library.calibrate(str(model), judge, quick=True, samples=2, out=out, **options)
        return written.copy()

    with pytest.raises(KeyboardInterrupt, match="stopped, 2 of 3 settings are kept; the same command goes on"):
        run(progress=stop)
    (kept,) = out.iterdir()
    stopped = kept.read_text()
    assert len(stopped.splitlines()) == 3
    assert not (out / "calibration.json").exists()
    kept.write_text(stopped[:-9])  # killed in the middle of a line
    with pytest.raises(KeyboardInterrupt):
        run(progress=stop)
    assert len(run()) == 1
    assert [path.name for path in out.iterdir()] == ["calibration.json"]
    rows = json.loads((out / "calibration.json").read_text())["rows"]
    assert run() == [row["options"]["sampler"] for row in rows]  # a finished one is measured anew
    again = json.loads((out / "calibration.json").read_text())["rows"]
    assert [one | {"seconds": 0} for one in rows] == [one | {"seconds": 0} for one in again]
    kept.write_text(stopped)
    assert len(run(seed=1)) == 3  # of another seed, and of a model that was trained again
    kept.write_text(stopped)
    make_model(context=4).save_pretrained(model)
    assert len(run()) == 1
    make_model(layers=3).save_pretrained(model)
    kept.write_text(stopped)
    assert len(run()) == 3


def test_ctrl_c_of_a_calibration_says_how_to_go_on(dlm: Dlm, autoregressive_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model().save_pretrained("masked")
    measured: list[object] = []
    real = measure.measure

    def stopping(*args: Any, **options: Any) -> Any:
        if measured:
            raise KeyboardInterrupt
        measured.append(args)
        return real(*args, **options)

    monkeypatch.setattr(measure, "measure", stopping)
    words = ("calibrate", "masked", "--judge", str(autoregressive_dir), "--quick", "-n", "2")
    code, out, err = dlm(*words)
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "dlm: stopped, 1 of 3 settings are kept; the same command goes on"
    monkeypatch.setattr(measure, "measure", real)
    assert dlm(*words)[0] == 0


BLOCKS: dict[str, Any] = {"attention": "block_causal", "block_length": 4}


@pytest.mark.parametrize(
    ("network", "learned", "expected"),
    [({}, None, [1, 2]), (BLOCKS, [1, 2, 4, 16], [1, 2]), (BLOCKS, None, []), (BLOCKS, "many", [])],
    ids=["bidirectional", "several block lengths", "one block length", "damaged"],
)
def test_a_calibration_writes_in_blocks_that_the_model_reads(
    network: dict[str, Any], learned: object, expected: list[int], autoregressive_dir: Path, tmp_path: Path
) -> None:
    lm = make_model(window=32, **network)
    training = {} if learned is None else {"block_lengths": learned}
    lm.config = dataclasses.replace(lm.config, training=training)
    table = library.calibrate(lm, str(autoregressive_dir), samples=2, out=tmp_path)
    found = [row for row in table.rows if row.options["sampler"] == "first-hitting"]
    assert [row.options.get("block_length", 0) for row in found] == [0, *expected]
    assert all(row.exact and row.calls == 32 for row in found)
    assert table.reference() == found[0]


def test_a_calibration_without_a_format_is_read_and_a_later_one_is_told(tmp_path: Path, autoregressive_dir: Path) -> None:
    make_model().save_pretrained(tmp_path / "masked")
    table = library.calibrate(str(tmp_path / "masked"), str(autoregressive_dir), quick=True, samples=2, out=tmp_path / "new")
    path = tmp_path / "new" / "calibration.json"
    data = json.loads(path.read_text())
    del data["format"]
    path.write_text(json.dumps(data))
    assert type(table).load(path.parent) == table
    path.write_text(json.dumps(data | {"format": 9}))
    with pytest.raises(library.InputError, match="format 9"):
        type(table).load(path.parent)


def test_curse(dlm: Dlm, masked_dir: Path, text_file: Path) -> None:
    words = ("--data", str(text_file), "--split", "all", "--max-windows", "3", "--tokens-per-step", "8,2", "--sampler", "ancestral,topk")
    shown = printed(dlm, "curse", str(masked_dir), *words, "--seed", "4")
    watch = Watch()
    model = library.load(str(masked_dir))
    found = library.curse(model, text_file, split="all", max_windows=3, tokens_per_step=[8, 2], seed=4, progress=watch)
    assert plain(found) == shown
    watch.check()
    assert found.rows[-1].measured["topk"].band95 > 0
    with pytest.raises(library.InputError, match=r"lie in 1 \.\. 32"):
        library.curse(model, text_file, tokens_per_step=[64])


def test_settle(dlm: Dlm, masked_dir: Path, autoregressive_dir: Path) -> None:
    for seed in (1, 2):
        base = ("generate", "--model", str(masked_dir), "--length", "32", "--steps", "6", "--seed", str(seed))
        assert dlm(*base, "--save", f"{seed}.traj")[0] == 0
    shown = printed(dlm, "settle", "1.traj", "2.traj", "--judge", str(autoregressive_dir))
    runs: list[library.Trajectory | str | Path] = [library.Trajectory.load("1.traj"), "2.traj"]
    watch = Watch()
    found = library.settle(runs, library.load(str(autoregressive_dir)), progress=watch)
    assert plain(found) == shown
    assert [one.texts for one in found.runs] == [2]
    assert watch.calls == [(0, 1), (1, 1)]
    alone = plain(library.settle(["1.traj"]))
    assert alone["runs"][0]["edits_stderr"] is None
    assert math.isnan(library.settle(["1.traj"]).runs[0].edits_stderr)
    with pytest.raises(library.InputError, match=r"no file nowhere\.traj"):
        library.settle(["nowhere.traj"])


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("family")
    make_model(window=16, context=0).save_pretrained(root / "heavy")
    make_model(window=16, context=0, layers=1).save_pretrained(root / "light")
    make_model("autoregressive", window=16, context=0).save_pretrained(root / "judge")
    return root


def without_seconds(found: dict[str, Any]) -> dict[str, Any]:
    for row in found["rows"]:
        assert row.pop("seconds") > 0
    return found


def test_schedule_cost(dlm: Dlm, family: Path) -> None:
    heavy, light = f"{family}/heavy", f"{family}/light"
    shown = printed(dlm, "schedule", "cost", "sandwich:0.5", heavy, light, "--steps", "10")
    found = library.schedule.cost(library.load(heavy), library.load(light), "sandwich:0.5", steps=10)
    assert plain(found) == shown
    assert found.cost.saved_blocks == pytest.approx(0.25)


def test_schedule_sensitivity(dlm: Dlm, family: Path, text_file: Path) -> None:
    heavy, light, judge = (f"{family}/{name}" for name in ("heavy", "light", "judge"))
    words = ("--data", str(text_file), "--segments", "4", "--max-windows", "6", "-n", "3", "--swap", "2", "--judge", judge)
    shown = printed(dlm, "schedule", "sensitivity", heavy, light, *words)
    watch = Watch()
    settings: dict[str, Any] = {"data": text_file, "segments": 4, "max_windows": 6, "samples": 3, "swap": 2}
    found = library.schedule.sensitivity(heavy, {"L": light}, judge=library.load(judge), progress=watch, **settings)
    assert plain(found) == shown
    watch.check()
    assert [mean.count for mean in found.swap["L"]] == [3, 3]


@pytest.mark.parametrize("way", ["kl", "joint", "exhaustive", "halving"])
def test_schedule_search(dlm: Dlm, family: Path, text_file: Path, way: str) -> None:
    make_model(window=16, context=0).save_pretrained("heavy")
    light, judge = f"{family}/light", f"{family}/judge"
    words = ("--saved", "0.25", "--segments", "4", "--steps", "8", "-n", "8", "--count", "4", "--judge", judge, "--data", str(text_file))
    shown = printed(dlm, "schedule", "search", "heavy", light, "--search", way, *words, "--save")
    settings: dict[str, Any] = {"saved": 0.25, "segments": 4, "steps": 8, "samples": 8, "count": 4, "judge": judge, "data": text_file}
    watch = Watch()
    found = library.schedule.search("heavy", light, way=way, progress=watch, **settings)
    assert without_seconds(plain(found)) == without_seconds(shown)
    assert found.file is None
    assert watch.calls[-1][0] == watch.calls[-1][1]
    assert found.winner in {row.label for row in found.rows}
    assert json.loads(Path("heavy/schedule.json").read_text())["schedule"] == found.best
    with pytest.raises(library.InputError, match="tiny-masked is not on disk"):
        library.schedule.search(make_model(window=16, context=0), light, save=True)
    with pytest.raises(library.InputError, match="unknown search 'magic'"):
        library.schedule.search("heavy", light, way="magic")


def test_schedule_compare(dlm: Dlm, family: Path, text_file: Path) -> None:
    heavy, light, judge = (f"{family}/{name}" for name in ("heavy", "light", "judge"))
    words = ("--steps", "8", "--segments", "4", "-n", "4", "--judge", judge, "--data", str(text_file), "--max-windows", "2")
    shown = printed(dlm, "schedule", "compare", heavy, light, "L0.5 H0.5, H@4", *words)
    watch = Watch()
    settings: dict[str, Any] = {"steps": 8, "segments": 4, "samples": 4, "data": text_file, "max_windows": 2}
    found = library.schedule.compare(heavy, light, ["L0.5 H0.5", "H@4"], judge=judge, progress=watch, **settings)
    assert without_seconds(plain(found)) == without_seconds(shown)
    watch.check()


def test_bench_decode(dlm: Dlm, autoregressive_dir: Path) -> None:
    from dlm.workflows.bench import decode

    Path("prompts.txt").write_text("ROMEO:\nBut soft\n")
    words = ("--methods", "lookup:3", "--batch", "1,2", "--max-new-tokens", "8", "--rounds", "2", "--seed", "3", "--prompts", "prompts.txt")
    shown = printed(dlm, "bench", "decode", str(autoregressive_dir), *words)
    watch = Watch()
    found = decode(
        str(autoregressive_dir),
        methods=["lookup:3"],
        prompts=["ROMEO:", "But soft"],
        batches=[1, 2],
        max_new_tokens=8,
        rounds=2,
        seed=3,
        progress=watch,
    )
    watch.check()
    record = plain(found)
    for one in record, shown:
        for row in one["rows"]:
            assert row.pop("seconds") > row.pop("first") > 0
            assert row.pop("tokens_per_second") > 0
    assert record == shown


@pytest.mark.parametrize("verb", ["eval", "curse"])
def test_a_terminal_sees_progress(verb: str, masked_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """In a pseudo-terminal a bar is drawn on the error stream; in a pipe nothing is."""
    command = [sys.executable, "-m", "dlm", verb, str(masked_dir), "--data", str(text_file), "--split", "all", "--max-windows", "4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "TERM": "xterm"}
    piped = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    label = f"{'measuring' if verb == 'eval' else 'drawing with'} tiny-masked"
    assert label not in piped.stderr
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # at its end a terminal fails to read
            while part := os.read(ours, 1 << 16):
                shown += part
    os.close(ours)
    assert process.returncode == 0
    assert label in shown.decode()


@pytest.mark.parametrize("name", ["evaluate", "curse", "settle", "calibrate", "convert", "export", "fit"])
def test_a_keyword_that_there_is_not_gets_one_line(name: str) -> None:
    with pytest.raises(InputError, match=rf"^unknown option of dlm\.{name} 'devise'.* known: [^\n]*$"):
        getattr(library, name)("shakespeare-mask", devise="cpu")
    with pytest.raises(InputError, match="did you mean max_windows"):
        library.evaluate("shakespeare-mask", "shakespeare", max_window=3)  # type: ignore[call-arg]
