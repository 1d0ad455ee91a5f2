"""Training on an accelerator made of CPU tensors: every tensor of a step lies there, and the host seldom waits for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from accelerator import Accelerator, on_gpu
from dlm.train import processes, setup
from dlm.train.training import Training
from train import tiny

SETTINGS = {
    "masked": (),
    "continuous": ("estimator=continuous", "noise_schedule=cosine"),
    "geometric": ("noise_schedule=geometric",),
    "time": ("time_conditioning=true",),
    "uniform": ("noise=uniform",),
    "posterior": ("noise=uniform", "head=posterior"),
    "semantic": ("noise=semantic",),
    "hybrid": ("noise=hybrid",),
    "hybrid-continuous": ("noise=hybrid", "estimator=continuous"),
    "blocks": ("attention=block_causal", "block_length=8", "block_lengths=4,8"),
    "autoregressive": ("objective=autoregressive",),
    "bf16": ("bf16=true",),
    "muon": ("optimizer=muon", "conv=3", "weights=equal"),
}
REST = ("log_every=100", "eval_every=2", "save_every=100", "steps=2")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return tiny.write_text(tmp_path / "text.txt")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step(name: str, text: Path, tmp_path: Path, gpu: Accelerator) -> None:
    config = tiny.config(text, *SETTINGS[name])
    accelerator = processes.accelerate(config.batch, bf16=config.bf16)
    task = Training(config, setup.resolve(config), accelerator, tmp_path / "run", {})
    task.update(0)  # moves the tables of the noise
    gpu.syncs.clear()
    update = task.update(1)
    assert gpu.count() == 0, gpu.syncs
    learner = task.learner
    moments = [x for values in learner.optimizer.state.values() for x in values.values()]
    tensors = (update.nats, update.gradient_norm, *learner.network.parameters(), *learner.ema.average, *moments)
    assert {on_gpu(x) for x in tensors} == {True}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_learns_the_same(name: str, text: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    settings = (*REST, *(() if name == "muon" else ("optimizer=adamw",)), *SETTINGS[name])
    here = tiny.run(text, tmp_path / "here", *settings)
    request.getfixturevalue("gpu")
    there = tiny.run(text, tmp_path / "there", *settings)
    assert there["val_nats"] == pytest.approx(here["val_nats"], rel=3e-3 if name == "muon" else 1e-4)  # muon rounds to bfloat16 there


def test_a_run_resumes(text: Path, tmp_path: Path, gpu: Accelerator) -> None:
    tiny.run(text, tmp_path / "whole")
    tiny.run(text, tmp_path / "stopped", stop_after=7)
    tiny.run(text, tmp_path / "stopped", resume=True)
    tiny.assert_same(tmp_path / "whole", tmp_path / "stopped")


def test_validation_waits_once(text: Path, tmp_path: Path, gpu: Accelerator) -> None:
    config = tiny.config(text, "objective=autoregressive", "eval_windows=80")
    task = Training(config, setup.resolve(config), processes.accelerate(config.batch, bf16=False), tmp_path / "run", {})
    gpu.syncs.clear()
    task.validate(0)
    assert gpu.count("read") == 1, gpu.syncs
