"""The use cases on an accelerator made of CPU tensors: models loaded there, measured, converted and served."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import dlm as library
from accelerator import Accelerator, on_gpu
from conftest import TEXT, make_model
from dlm.adapters import attach, lora
from dlm.adapters.train import ConvertConfig
from dlm.sampling.autoregressive.draft import Draft
from dlm.train.loop import quiet
from dlm.workflows.convert import SelfDistillation, convert

CONVERT = ConvertConfig(stride=3, rank=4, alpha=8.0, steps=4, batch=4, length=16, warmup=1, log_every=2, eval_every=2, save_every=2)
MODELS: dict[str, dict[str, Any]] = {
    "masked": {},
    "uniform": {"noise": {"process": "uniform", "schedule": "linear"}},
    "semantic": {"noise": {"process": "semantic", "schedule": "linear"}},
    "hybrid": {"noise": {"process": "hybrid", "schedule": "geometric"}},
    "blocks": {"attention": "block_causal", "block_length": 8, "backend": "sdpa"},
    "autoregressive": {"objective": "autoregressive"},
}


def saved(path: Path, **model: Any) -> Path:
    make_model(**model).save_pretrained(path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("name", MODELS)
def test_evaluate(name: str, data: Path, tmp_path: Path, gpu: Accelerator) -> None:
    path = saved(tmp_path / "model", **MODELS[name])
    here, there = (
        library.evaluate(str(path), data, split="all", max_windows=8, passes=4, device=device, card=tmp_path / device)
        for device in ("cpu", "cuda")
    )
    assert there.nats_per_token == pytest.approx(here.nats_per_token, rel=1e-5)
    assert there.device == "cuda:0"


def test_curse_and_settle(tmp_path: Path, data: Path, gpu: Accelerator) -> None:
    path = saved(tmp_path / "model", window=16, context=0)
    judge = library.load(str(saved(tmp_path / "judge", objective="autoregressive", window=16)), device="cuda")
    here, there = (
        library.curse(str(path), data, split="all", tokens_per_step=(1, 4), max_windows=2, device=device).record()
        for device in ("cpu", "cuda")
    )
    assert json.dumps(there["rows"]) == json.dumps(here["rows"])
    run = library.load(str(path), device="cuda").generate("Ab", length=16, steps=8).trajectory
    assert library.settle([run], judge).runs[0].texts == 1


@pytest.mark.parametrize("changes", [{}, {"heads": 2}, {"full": True}, {"chain": 4}], ids=str)
def test_convert(changes: dict[str, Any], data: Path, tmp_path: Path, gpu: Accelerator) -> None:
    base = saved(tmp_path / "base", objective="autoregressive")
    lm, config = library.load(str(base), device="cuda"), replace(CONVERT, **changes)
    assert all(on_gpu(x) for x in lm.network.parameters())
    convert(lm, SelfDistillation(4), tmp_path / "made", config=replace(config, steps=4), progress=quiet, stop_after=2)
    lm = library.load(str(base), device="cuda")
    made = convert(lm, SelfDistillation(4), tmp_path / "made", config=config, resume=True, progress=quiet)
    assert made.step == 4
    if changes.get("full"):
        return
    texts = []
    for device in ("cpu", "cuda"):
        drafting = library.load(str(base), device=device)
        attach.with_adapter(drafting, tmp_path / "made")
        assert device == "cpu" or all(on_gpu(x) for x in lora.adapter_state(drafting.network).values())
        sampler = "heads:2" if "heads" in changes else "strided:3"
        texts.append(drafting.generate(["Ab", "Romeo"], length=30, sampler=sampler)[1].text)
    assert texts[0] == texts[1]


def test_a_draft_model(tmp_path: Path, gpu: Accelerator) -> None:
    path, light = saved(tmp_path / "model", objective="autoregressive"), saved(tmp_path / "light", objective="autoregressive", layers=1)
    texts = [
        library.load(str(path), device=device).generate("Ab", length=30, draft=Draft("model", str(light), 3)).text
        for device in ("cpu", "cuda")
    ]
    assert texts[0] == texts[1]


def test_a_schedule_of_models(tmp_path: Path, gpu: Accelerator) -> None:
    heavy, light = saved(tmp_path / "heavy"), saved(tmp_path / "light", layers=1)
    texts = [
        library.load(str(heavy), device=device).generate("Ab", length=30, steps=8, schedule="L4 H4", light=str(light)).text
        for device in ("cpu", "cuda")
    ]
    assert texts[0] == texts[1]
