"""A saved state is for one verb, one optimiser and this version or an earlier one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import make_model
from dlm.adapters.train import ConvertConfig
from dlm.errors import InputError
from dlm.train import optimisers, state
from dlm.train.loop import quiet
from dlm.workflows.convert import convert
from dlm.workflows.fit import fit
from train import tiny


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_text(tmp_path_factory.mktemp("text") / "text.txt")


def rewrite(file: Path, *without: str, **changes: object) -> None:
    """The same tensors, another meta."""
    with safe_open(file, framework="pt") as opened:
        meta = json.loads(opened.metadata()["meta"])
    meta = {key: value for key, value in meta.items() if key not in without} | changes
    save_file(load_file(file), file, metadata={"meta": json.dumps(meta)})


def momentum(network: nn.Module, settings: optimisers.Settings) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [*network.parameters()], "lr_scale": 0.5}], lr=settings.lr, momentum=0.9)


def test_another_optimiser_resumes_to_the_bit_and_is_not_mixed_up(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(optimisers.OPTIMISERS, "momentum", momentum)
    tiny.run(text, tmp_path / "whole", "steps=6", "optimizer=momentum")
    tiny.run(text, tmp_path / "parts", "steps=6", "optimizer=momentum", stop_after=4)
    with pytest.raises(InputError, match="begun with optimizer=momentum, whose state muon cannot take: resume with momentum") as error:
        tiny.run(text, tmp_path / "parts", "steps=6", resume=True)
    assert "\n" not in str(error.value)
    tiny.run(text, tmp_path / "parts", "steps=6", "optimizer=momentum", resume=True)
    tiny.assert_same(tmp_path / "whole", tmp_path / "parts")
    tiny.run(text, tmp_path / "adamw", "optimizer=adamw", stop_after=3)
    with pytest.raises(InputError, match="begun with optimizer=adamw"):
        tiny.run(text, tmp_path / "adamw", "steps=6", "optimizer=momentum", resume=True)


def test_a_group_may_have_a_rate_of_its_own() -> None:
    optimizer = momentum(nn.Linear(2, 2), optimisers.Settings(lr=1.0))
    optimisers.set_learning_rate(optimizer, 0.2)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_state_from_before_format_numbers_resumes_to_the_bit(text: Path, tmp_path: Path) -> None:
    tiny.run(text, tmp_path / "whole", "steps=6", "optimizer=adamw")
    tiny.run(text, tmp_path / "parts", "steps=6", "optimizer=adamw", stop_after=4)
    file = tmp_path / "parts" / state.FILE
    before = {key: value for key, value in state.read_meta(file)["config"].items() if key != "optimizer"}
    rewrite(file, "format", "dlm_version", "verb", config=before)
    tiny.run(text, tmp_path / "parts", "steps=6", "optimizer=adamw", resume=True)
    tiny.assert_same(tmp_path / "whole", tmp_path / "parts")


def test_a_state_of_a_later_format(text: Path, tmp_path: Path) -> None:
    tiny.run(text, tmp_path / "run", stop_after=3)
    rewrite(tmp_path / "run" / state.FILE, format=99)
    with pytest.raises(InputError, match=r"has format 99, .* upgrade dlm"):
        tiny.run(text, tmp_path / "run", resume=True)


def test_a_run_of_the_other_verb(text: Path, tmp_path: Path) -> None:
    base = make_model("autoregressive", alphabet="".join(sorted(set(text.read_text()))))
    config = ConvertConfig(stride=3, rank=2, alpha=4.0, chain=0, steps=4, batch=2, length=16)
    convert(base, str(text), tmp_path / "adapter", config=config, progress=quiet, stop_after=2)
    tiny.run(text, tmp_path / "run", stop_after=3)
    with pytest.raises(InputError, match="holds a run of dlm convert, not of dlm train: choose another --out"):
        tiny.run(text, tmp_path / "adapter", resume=True)
    with pytest.raises(InputError, match="holds a run of dlm train, not of dlm convert: choose another --out"):
        convert(base, str(text), tmp_path / "run", config=config, progress=quiet, resume=True)
    rewrite(tmp_path / "adapter" / state.FILE, "format", "dlm_version", "verb")
    assert convert(base, str(text), tmp_path / "adapter", config=config, progress=quiet, resume=True).step == 4


def test_a_result_is_frozen_and_its_record_is_json(text: Path, tmp_path: Path) -> None:
    result = fit(tiny.config(text), tmp_path / "run", progress=quiet)
    record = json.loads(json.dumps(result.record()))
    assert record["format"] == 1
    assert record["model"] == str(tmp_path / "run")
    assert record["step"] == result.step == 12
    assert record["val_nats"] == result.val_nats
    with pytest.raises(AttributeError):
        result.step = 3  # type: ignore[misc]
    short = fit(replace(tiny.config(text), seed=1), tmp_path / "short", progress=quiet, stop_after=1)
    assert short.val_nats is None
    assert "val_nats" not in short.record()
