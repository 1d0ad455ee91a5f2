"""The loop learns, says so, refuses what cannot work, and never spoils a save."""

from __future__ import annotations

import errno
import io
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors.torch
import torch
from rich.console import Console
from safetensors.torch import load_file

from dlm.errors import InputError
from dlm.language_model import LanguageModel
from dlm.train import data, display, learner, objective, processes, setup, state, training
from dlm.train.display import Display
from dlm.train.loop import Progress
from dlm.train.optimisers import Muon
from dlm.workflows.fit import fit, sample
from train import tiny


@pytest.fixture(autouse=True)
def without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same lines on every machine."""
    monkeypatch.setattr(training, "multiplies_bf16", lambda _device: False)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["diffusion", "autoregressive"])
def test_learns_a_periodic_text(tmp_path: Path, kind: str) -> None:
    """Of a window of abab... only the first letter is news: log 2 over 16 tokens."""
    (tmp_path / "text.txt").write_text("ab" * 1500)
    settings = ("window=16", "batch=16", "steps=300", "warmup=20", "ema=0.9", "eval_windows=64", "eval_passes=8")
    often = ("eval_every=300", "save_every=300", "log_every=10")
    figures = tiny.run(tmp_path / "text.txt", tmp_path / "run", f"objective={kind}", *settings, *often)
    entropy = math.log(2) / 16
    assert entropy - 4 * figures["val_stderr"] - 0.01 < figures["val_nats"] < entropy + 0.07
    losses = [line["train_nats"] for line in tiny.curve(tmp_path / "run") if "train_nats" in line]
    assert losses[0] > 5 * losses[-1]


@pytest.mark.parametrize(
    "settings",
    [
        ("estimator=continuous",),
        ("estimator=continuous", "time_conditioning=true", "noise_schedule=cosine"),
        ("estimator=continuous", "noise_schedule=geometric:1e-4,20"),
        ("tokenizer=bytes", "mlp=swiglu", "kv_heads=1", "qkv_bias=true"),
        ("attention=block_causal", "block_length=8"),
        ("attention=block_causal", "block_length=8", "bf16=true"),
        ("context=0", "dropout=0.1", "decay_share=0"),
        ("bf16=true",),
    ],
    ids=" ".join,
)
def test_variants_train(text: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    figures = tiny.run(text, tmp_path / "run", *settings)
    assert figures["step"] == 12
    assert all(math.isfinite(value) for value in figures.values())
    assert figures["val_stderr"] > 0
    LanguageModel.from_pretrained(str(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of the compiler's own modules
def test_compiled(text: Path, tmp_path: Path) -> None:
    settings = ("layers=1", "steps=4", "eval_windows=4", "lr=0.001")
    plain = tiny.run(text, tmp_path / "plain", *settings)
    compiled = tiny.run(text, tmp_path / "compiled", *settings, "compile=true")
    assert compiled["val_nats"] == pytest.approx(plain["val_nats"], rel=1e-4)
    assert tiny.tensors(tmp_path / "plain").keys() == tiny.tensors(tmp_path / "compiled").keys()


def test_tensorboard(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    tiny.run(text, tmp_path / "run", "tensorboard=true")
    events = list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))
    assert len(events) == 1
    assert b"val_nats" in events[0].read_bytes()


def test_the_log(text: Path, tmp_path: Path) -> None:
    figures = tiny.run(text, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train_nats" in line] == [5, 10, 12]
    assert [line["step"] for line in lines if "val_nats" in line] == [4, 8, 12]
    assert lines[0].keys() == {"step", "val_nats", "val_stderr", "epochs"}
    assert lines[1].keys() == {"step", "train_nats", "lr", "gradient_norm", "tokens_per_second"}
    assert figures["best_val_nats"] == min(line["val_nats"] for line in lines if "val_nats" in line)


def test_the_export_is_the_average(text: Path, tmp_path: Path) -> None:
    tiny.run(text, tmp_path / "run", "steps=6")
    exported, saved = load_file(tmp_path / "run" / "model.safetensors"), tiny.tensors(tmp_path / "run")
    assert all(torch.equal(value, saved[f"ema.{name}"]) for name, value in exported.items())
    assert not any(torch.equal(value, saved[f"model.{name}"]) for name, value in exported.items())
    tiny.run(text, tmp_path / "no-average", "steps=6", "ema=0")
    assert torch.equal(tiny.tensors(tmp_path / "no-average")["ema.head.weight"], saved["model.head.weight"])


def test_validation_is_of_the_average(text: Path, tmp_path: Path) -> None:
    figures = tiny.run(text, tmp_path / "run")
    model = LanguageModel.from_pretrained(str(tmp_path / "run"))
    config = tiny.config(text)
    config = replace(config, network=model.config.network)
    documents = data.split(data.read(str(text)), config.val_fraction)[1]
    windows_WT = data.Stream.encode(documents, model.tokenizer, model.window).windows(config.eval_windows)
    own, device = objective.Objective.of(config, model.noise), torch.device("cpu")
    nats, stderr = objective.validate(own, model.network, windows_WT, device, config.eval_passes)
    assert nats == pytest.approx(figures["val_nats"], rel=1e-6)
    assert stderr == pytest.approx(figures["val_stderr"], rel=1e-5)


def test_a_run_directory_is_a_checkpoint(text: Path, tmp_path: Path) -> None:
    tiny.run(text, tmp_path / "run", "steps=3")
    files = {p.name for p in (tmp_path / "run").iterdir()}
    weights, texts = (
        {"model.safetensors", state.FILE},
        {"config.json", "generation_config.json", "tokenizer.json", "README.md", "log.jsonl"},
    )
    assert files == weights | texts
    model = LanguageModel.from_pretrained(str(tmp_path / "run"))
    assert len(model.generate(max_new_tokens=8, seed=0).text) == 8
    card = (tmp_path / "run" / "README.md").read_text()
    assert model.card(str(tmp_path / "run")) == card
    name = re.search(r"dlm\.load\((.*?)\)", card)
    assert name is not None
    assert LanguageModel.from_pretrained(json.loads(name[1])).config == model.config
    assert model.defaults == {"steps": 32, "sampler": "ancestral", "temperature": 1.0}
    saved = state.read_meta(tmp_path / "run" / state.FILE)["config"]
    assert saved == json.loads(json.dumps(tiny.config(text, "steps=3").to_dict()))
    assert model.config.training["parameters"] == model.network.parameters_count()


def test_very_many_epochs_of_a_small_text_are_told(text: Path, tmp_path: Path) -> None:
    """A step reads 4 windows of 32 tokens of the 5,109 that train: 90 epochs take 3,592 steps."""
    warned = [training_of(text, tmp_path, f"steps={steps}").warning() for steps in (3592, 9978, 20_000)]
    assert warned[:2] == ["", ""]
    assert warned[2].startswith("warning: 20000 steps are 501 epochs of 5,109 tokens")
    assert "--set steps=3592 makes 90" in warned[2]


def test_the_faster_precision_of_a_cpu_is_told(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {}
    for has, asked in itertools.product((False, True), (False, True)):
        monkeypatch.setattr(training, "multiplies_bf16", lambda _device, has=has: has)
        monkeypatch.setattr(learner, "multiplies_bf16", lambda _device, has=has: has)
        task = training_of(text, tmp_path, f"bf16={asked}")
        told[has, asked] = task.precision()
        assert cast(Muon, task.learner.optimizer).dtype == (torch.bfloat16 if has and asked else torch.float32)
    assert told[True, True] == told[False, False] == ""
    assert "--set bf16=true takes about half the time" in told[True, False]
    assert told[False, True].startswith("warning: this CPU emulates bfloat16")


def training_of(text: Path, out: Path, *settings: str) -> training.Training:
    config = tiny.config(text, *settings)
    return training.Training(config, setup.resolve(config), processes.accelerate(config.batch, bf16=False), out, {})


def show(text: Path, out: Path, *settings: str, **options: Any) -> str:
    file = io.StringIO()
    console = Console(file=file, **{"width": 80} | options.pop("console", {}))
    with Display(console) as shown:
        fit(tiny.config(text, *settings), out, progress=shown, **options)
    return file.getvalue()


def test_lines_for_a_pipe(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "SECONDS_BETWEEN_LINES", 0.0)
    first, *lines = show(text, tmp_path / "run").splitlines()
    assert " parameters, " in first
    assert ", on cpu, into " in first
    assert lines[0].startswith("step 4: validation ")
    assert lines[1].startswith("step 5/12: ")
    assert " nats per token, " in lines[1]
    assert " tokens/s, eta 0:00:" in lines[1]
    assert [line.split()[1] for line in lines] == ["4:", "5/12:", "8:", "10/12:", "12/12:", "12:"]


def test_few_lines_for_a_pipe_of_a_fast_run(text: Path, tmp_path: Path) -> None:
    lines = show(text, tmp_path / "run", "log_every=1", "eval_every=100").splitlines()
    assert len([line for line in lines if "tokens/s" in line]) == 2  # the first and the last


def test_a_bar_for_a_terminal(text: Path, tmp_path: Path) -> None:
    shown = show(text, tmp_path / "run", console={"force_terminal": True, "width": 140})
    assert "12/12" in shown
    assert "eta" in shown
    assert "tokens/s" in shown
    assert "nan" not in shown


@pytest.mark.parametrize(
    ("progress", "expected"),
    [
        (Progress("training", 3, 12), "3/12 .* - nats, - tokens/s"),
        (Progress("training", 7, 12, nats=1.25, tokens_per_second=9000.0), "7/12 .* 1.250 nats, 9,000 tokens/s"),
        (Progress("base writes", 8, 40, measured=False), r"8/40 \S+ eta \S+\s*$"),
    ],
)
def test_a_figure_that_is_not_there_yet_is_a_dash(progress: Progress, expected: str) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=140, color_system=None)
    with Display(console) as shown:
        shown(progress)
    assert isinstance(console.file, io.StringIO)
    assert re.search(expected, console.file.getvalue().splitlines()[-2])  # the last one shows the cursor again


def test_a_callback_is_told_of_every_step(text: Path, tmp_path: Path) -> None:
    told: list[Progress] = []
    fit(tiny.config(text), tmp_path / "run", progress=told.append)
    steps = [one for one in told if not one.text and not one.logged]
    assert [one.done for one in steps] == list(range(1, 13))
    assert {one.total for one in told} == {12}
    assert [one.nats is None for one in steps] == [True] * 4 + [False] * 8
    assert [one.done for one in told if one.logged] == [5, 10, 12]
    assert [one.text.split()[2] for one in told if one.text][1:] == ["validation"] * 3


@pytest.mark.parametrize("attention", ["full", "block_causal", "causal"])
def test_a_preview_under_autocast(text: Path, tmp_path: Path, attention: str) -> None:
    """Caches are in the type of the weights, keys and values in bfloat16."""
    objective = "autoregressive" if attention == "causal" else "diffusion"
    more = ("block_length=8",) if attention == "block_causal" else ()
    settings = (f"objective={objective}", f"attention={attention}", *more, "conv=3", "steps=1", "eval_every=1", "bf16=true")
    shown = show(text, tmp_path / "run", *settings, preview=sample)
    assert len(shown.splitlines()[-2].strip()) > 8


def test_a_preview_may_hold_anything(text: Path, tmp_path: Path) -> None:
    shown = show(text, tmp_path / "run", preview=lambda network, config, tokenizer: "[/b] [red] \\[")
    assert shown.count("[/b] [red] \\[") == 3


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("speed=3", r"--set speed=3: did you mean seed\? known keys are attention, .* width"),
        ("steps", "--set steps: known keys"),
        ("network=3", "known keys"),
        ("vocab_size=3", "known keys"),
        ("steps=many", "--set steps=many: 'many' is no whole number"),
        ("steps=0", "steps must be at least 1, got 0"),
        ("eval_windows=1", "eval_windows must be at least 2"),
        ("bf16=maybe", "--set bf16=maybe: give true or false"),
        ("lr=nan", "lr must be above 0, got nan"),
        ("lr=-1", "lr must be above 0"),
        ("clip=0", "clip must be above 0"),
        ("warmup=-1", "warmup must be at least 0"),
        ("ema=1", "ema must be at least 0 and below 1"),
        ("dropout=1", "--set dropout=1: dropout must"),
        ("betas=0.9", "betas must be two numbers"),
        ("betas=0.9,1.0", "betas must be two numbers"),
        ("betas=a,b", "--set betas=a,b: 'a' is no number"),
        ("val_fraction=1", "val_fraction must lie between 0 and 1"),
        ("decay_share=2", "decay_share must lie in 0 .. 1"),
        ("context=32", "context 32 must lie in 0 .. 31"),
        ("objective=magic", "unknown objective 'magic'; known: diffusion, autoregressive"),
        ("objective=autoregressive", "--set attention=causal"),
        ("estimator=magic", "unknown estimator 'magic'"),
        ("noise_schedule=magic", "unknown noise schedule 'magic'"),
        ("estimator=any_order noise_schedule=geometric:1e-4,20", "does not run from 1 to 0"),
        ("estimator=any_order time_conditioning=true", "needs --set estimator=continuous"),
        ("estimator=any_order noise=uniform", "uniform noise has no estimator any_order: --set estimator=auto"),
        ("estimator=counted", "masked noise has no estimator counted: --set estimator=auto"),
        ("estimator=counted noise=uniform noise_schedule=log-linear", "does not run from 1 to 0"),
        (
            "noise=odd",
            "unknown noise 'odd'; did you mean ordered[?] known: masked, .*, ordered, genmd4",
        ),
        ("noise=uniform:2", "uniform noise has no setting, got 'uniform:2'"),
        ("noise=hybrid:x", "'x' is no number"),
        ("noise=uniform clusters=groups.json", "uniform noise has no clusters"),
        ("head=odd", "unknown head 'odd'; known: leave-one-out, posterior"),
        ("mlp=magic", "unknown mlp"),
        ("heads=0", "--set heads=0"),
        ("kv_heads=3", "--set kv_heads=3: 2 heads need"),
    ],
)
def test_settings_that_cannot_be(word: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        tiny.CONFIG.with_settings(word.split())
    assert "\n" not in str(error.value)


def test_settings_count_together_in_any_order() -> None:
    words = ["time_conditioning=true", "window=8", "estimator=continuous", "context=4", "width=64", "betas=0.8,0.9", "compile=1"]
    one, other = tiny.CONFIG.with_settings(words), tiny.CONFIG.with_settings(words[::-1])
    assert one == other
    assert (one.network.window, one.network.mlp_width, one.betas, one.compile) == (8, 256, (0.8, 0.9), True)


def test_runs_of_either_precision_in_one_process(text: Path, tmp_path: Path) -> None:
    for number, word in enumerate(("bf16=true", "bf16=false")):
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("ACCELERATE_MIXED_PRECISION", "no")
            tiny.run(text, tmp_path / f"run-{number}", word, "steps=1", "qk_norm=false")


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_keeps_the_last_save(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Saves fall on 3, 6, ...; the loss of step 6 is NaN, or only the update that it makes."""
    calls, forward = 0, objective.Objective.__call__

    def diverge(self: objective.Objective, network: Any, x_BT: Any, *rest: Any) -> torch.Tensor:
        nonlocal calls
        nats_B = forward(self, network, x_BT, *rest)
        calls += len(x_BT) == 4  # validation has 8 windows
        if calls == 6 and where == "loss":
            return nats_B * math.nan
        if calls == 6 and nats_B.requires_grad:
            nats_B.register_hook(lambda gradient: gradient * math.nan)
        return nats_B

    tiny.run(text, tmp_path / "whole", "steps=12", stop_after=3)
    monkeypatch.setattr(objective.Objective, "__call__", diverge)
    with pytest.raises(InputError, match=r"nan at step 6: lower --set lr \(now 0.01\); the last save is kept"):
        tiny.run(text, tmp_path / "run", "steps=12", "log_every=100")
    for file in (state.FILE, "model.safetensors"):
        first, second = load_file(tmp_path / "whole" / file), load_file(tmp_path / "run" / file)
        assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_full_disk_keeps_the_last_save(text: Path, tmp_path: Path) -> None:
    """ENOSPC in the export, then in the state, half of the file written."""
    out = tmp_path / "run"

    def full(tensors: Any, path: Any, metadata: Any = None) -> None:
        Path(path).write_bytes(b"\0" * 1000)
        raise OSError(errno.ENOSPC, "No space left on device")

    places: list[Callable[[pytest.MonkeyPatch], None]] = [
        lambda patched: patched.setattr(safetensors.torch, "save_file", full),
        lambda patched: patched.setattr(state, "save_file", full),
    ]
    tiny.run(text, out, stop_after=3)
    for place in places:
        before = {p.name: p.read_bytes() for p in out.iterdir() if p.name != "log.jsonl"}
        with pytest.MonkeyPatch.context() as patched:
            place(patched)
            with pytest.raises(OSError, match="No space left"):
                tiny.run(text, out, resume=True)
        after = {p.name: p.read_bytes() for p in out.iterdir() if p.name != "log.jsonl"}
        assert after.keys() == before.keys()
        assert after[state.FILE] == before[state.FILE]
        LanguageModel.from_pretrained(str(out))
    tiny.run(text, out, resume=True)
    tiny.run(text, tmp_path / "whole")
    tiny.assert_same(out, tmp_path / "whole")
