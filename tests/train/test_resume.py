"""A run that stopped, was interrupted or was killed equals one that did not, to the bit."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from dlm.errors import InputError
from dlm.language_model import LanguageModel
from dlm.train import state
from dlm.train.display import Display
from dlm.workflows.fit import fit
from train import tiny


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("dropout=0.2",),
        ("objective=autoregressive",),
        ("estimator=continuous", "noise_schedule=log-linear", "time_conditioning=true"),
        ("tied=true", "bf16=true"),
        ("optimizer=muon", "conv=3", "weights=equal"),
        ("noise=ordered", "weights=anneal"),
        ("noise=genmd4", "time_conditioning=true"),
        ("noise=uniform", "mixtures=0.3"),
    ],
    ids=" ".join,
)
def test_stop_and_resume(text: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    whole = tiny.run(text, tmp_path / "whole", *settings)
    for stop in (4, 7):  # neither a step of the log nor of the saves
        tiny.run(text, tmp_path / "parts", *settings, stop_after=stop, resume=stop > 4)
        assert state.read_meta(tmp_path / "parts" / state.FILE)["step"] == stop
    parts = tiny.run(text, tmp_path / "parts", *settings, resume=True)
    tiny.assert_same(tmp_path / "whole", tmp_path / "parts")
    assert {k: v for k, v in parts.items() if k != "tokens_per_second"} == {k: v for k, v in whole.items() if k != "tokens_per_second"}


def test_prolonging_a_run_that_has_not_begun_to_decay(text: Path, tmp_path: Path) -> None:
    tiny.run(text, tmp_path / "run", "steps=20", stop_after=8)  # decays from step 14
    tiny.run(text, tmp_path / "run", "steps=12", resume=True)
    tiny.run(text, tmp_path / "fresh", "steps=12")
    tiny.assert_same(tmp_path / "run", tmp_path / "fresh")


def test_a_half_written_last_line_is_dropped(text: Path, tmp_path: Path) -> None:
    tiny.run(text, tmp_path / "whole")
    tiny.run(text, tmp_path / "torn", stop_after=6)
    with (tmp_path / "torn" / "log.jsonl").open("a") as file:
        file.write(json.dumps({"step": 9, "train_nats": 1.0}) + '\n{"step": 10, "tra')
    tiny.run(text, tmp_path / "torn", resume=True)
    tiny.assert_same(tmp_path / "whole", tmp_path / "torn")


def test_what_a_resumed_run_changes_is_said(text: Path, tmp_path: Path) -> None:
    tiny.run(text, tmp_path / "run", stop_after=3)
    console = Console(file=io.StringIO())
    with Display(console) as shown:
        fit(tiny.config(text, "lr=0.02", "betas=0.8,0.9", "dropout=0.1"), tmp_path / "run", resume=True, progress=shown)
    expected = "changed since the last save: lr 0.01 -> 0.02, betas [0.9, 0.99] -> [0.8, 0.9], dropout 0.0 -> 0.1\n"
    assert isinstance(console.file, io.StringIO)
    assert expected in console.file.getvalue()


@pytest.mark.parametrize(
    ("setting", "was"),
    [
        ("noise_schedule=cosine", "noise_schedule=linear"),
        ("tokenizer=bytes", "tokenizer=chars"),
        ("noise=uniform", "noise=masked"),
        ("val_fraction=0.2", "val_fraction=0.1"),
        ("width=64", "width=32"),
        ("window=16", "window=32"),
        ("conv=3", "conv=0"),
        ("qk_norm=false", "qk_norm=True"),
    ],
)
def test_a_setting_that_a_run_keeps_is_refused_by_name(begun: tuple[Path, Path], setting: str, was: str) -> None:
    text, run = begun
    before = tiny.tensors(run)
    more = [f"width={64}", "heads=2"] if setting.startswith("width") else [setting]
    with pytest.raises(InputError, match=rf"was begun with .*{was}"):
        tiny.run(text, run, "steps=6", *more, resume=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny.tensors(run).items())


@pytest.fixture(scope="module")
def begun(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A text and a run of two steps on it."""
    run = tmp_path_factory.mktemp("runs") / "run"
    tiny.run(text, run, "steps=2")
    return text, run


def test_another_text_is_refused_wherever_it_lies(begun: tuple[Path, Path], tmp_path: Path) -> None:
    text, run = begun
    shutil.copytree(run, tmp_path / "run")
    moved, other = tmp_path / "moved.txt", tmp_path / "other.txt"
    moved.write_text(text.read_text())
    other.write_text(text.read_text()[::-1])
    with pytest.raises(InputError, match=r"was begun with another text than .*other\.txt holds now"):
        tiny.run(other, tmp_path / "run", "steps=4", resume=True)
    assert tiny.run(moved, tmp_path / "run", "steps=3", resume=True)["step"] == 3


def test_what_cannot_be_resumed(text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to resume"):
        tiny.run(text, tmp_path / "run", resume=True)
    tiny.run(text, tmp_path / "run", "steps=3")
    with pytest.raises(InputError, match="holds a run already: add --resume"):
        tiny.run(text, tmp_path / "run", "steps=6")
    with pytest.raises(InputError, match=r"at step 3 of 3 already: raise it with --set steps=N"):
        tiny.run(text, tmp_path / "run", "steps=3", resume=True)
    with pytest.raises(InputError, match=r"begun with layers=2, mlp=relu2: resume with --set layers=2 --set mlp=relu2$"):
        tiny.run(text, tmp_path / "run", "steps=6", "layers=1", "mlp=swiglu", "mlp_width=128", resume=True)
    file = tmp_path / "run" / state.FILE
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(InputError, match="no whole training state"):
        tiny.run(text, tmp_path / "run", resume=True)


def saved_step(file: Path) -> int:
    """The step of the last save, which may be replaced while it is read: torch opens the file a second time by its name."""
    for _ in range(100):
        try:
            return int(state.read_meta(file)["step"])
        except RuntimeError:
            time.sleep(0.001)
    raise AssertionError(f"{file} cannot be read")


FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["dlm.workflows.fit", "torch._dynamo"])  # torch is loaded once, not by every process that is killed


@pytest.mark.slow
def test_killed_at_any_moment(text: Path, tmp_path: Path) -> None:
    """SIGKILL soon after a save, with a save at every step, so that many kills fall into one."""
    settings, options = ("steps=80", "save_every=1", "log_every=7", "eval_every=1000", "dropout=0.1"), {"resume": False}
    out, file, moments, kills, step = tmp_path / "killed", tmp_path / "killed" / state.FILE, random.Random(0), 0, 0
    while kills < 8 and step < 60:
        process = FORK.Process(target=tiny.run, args=(text, out, *settings), kwargs=options)
        process.start()
        while not file.is_file() or saved_step(file) == step:
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.04))
        process.kill()
        process.join()
        kills, step, options = kills + 1, state.read_meta(file)["step"], {"resume": True}
        LanguageModel.from_pretrained(str(out))
    assert kills > 2
    assert step < 80
    tiny.run(text, out, *settings, resume=True)
    assert not list(out.glob(".*")), "a killed save left something behind"
    tiny.run(text, tmp_path / "whole", *settings)
    tiny.assert_same(out, tmp_path / "whole")


@pytest.mark.slow
def test_a_save_torn_at_every_file_operation(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a reader or a resumed run finds after a kill just before each rename of the first save and of the second."""

    class Killed(BaseException):
        pass

    tiny.run(text, tmp_path / "whole", "steps=6")
    replace, left = os.replace, 0

    def countdown(source: Any, target: Any) -> None:
        nonlocal left
        if Path(target).name != "log.jsonl":
            left -= 1
            if left < 0:
                raise Killed
        replace(source, target)

    for survived in range(12):
        out, left = tmp_path / f"after-{survived}", survived
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", countdown)
            with pytest.raises(Killed):
                tiny.run(text, out, "steps=6")
        if (out / state.FILE).is_file() or (out / "config.json").is_file():
            LanguageModel.from_pretrained(str(out))
        tiny.run(text, out, "steps=6", resume=(out / state.FILE).is_file())
        tiny.assert_same(out, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves(text: Path, tmp_path: Path, number: signal.Signals) -> None:
    settings = ("steps=2000", "save_every=2000", "eval_every=2000", "log_every=1")
    process, log = FORK.Process(target=tiny.run, args=(text, tmp_path / "run", *settings)), tmp_path / "run" / "log.jsonl"
    process.start()
    while not log.is_file() or len(log.read_text().splitlines()) < 4:
        assert process.is_alive()
        time.sleep(0.001)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 1
    step = state.read_meta(tmp_path / "run" / state.FILE)["step"]
    assert [line["step"] for line in tiny.curve(tmp_path / "run")] == list(range(1, step + 1))
    assert tiny.run(text, tmp_path / "run", f"steps={step + 2}", resume=True)["step"] == step + 2


def test_an_interrupt_says_how_to_go_on_and_a_second_does_not_wait(text: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)

    def press(times: int) -> Any:
        def preview(*_given: object) -> str:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
            return ""

        return preview

    with pytest.raises(KeyboardInterrupt, match=r"^stopped at step 5, saved; go on with --resume$"):
        tiny.run(text, tmp_path / "once", "save_every=100", preview=press(1))  # while it evaluates at step 4
    tiny.run(text, tmp_path / "once", resume=True)
    tiny.run(text, tmp_path / "whole", "save_every=100")
    tiny.assert_same(tmp_path / "once", tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        tiny.run(text, tmp_path / "twice", "save_every=100", preview=press(2))
    assert not (tmp_path / "twice" / state.FILE).exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_trains_in_a_thread_that_may_not_handle_signals(text: Path, tmp_path: Path) -> None:
    thread = threading.Thread(target=tiny.run, args=(text, tmp_path / "run", "steps=2"))
    thread.start()
    thread.join()
    assert state.read_meta(tmp_path / "run" / state.FILE)["step"] == 2
