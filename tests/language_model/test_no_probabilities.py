"""Weights that are no numbers: refused at load by name, and no sampler writes text from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bases import publish, transformer
from conftest import Dlm, make_model
from dlm.errors import InputError
from dlm.language_model import LanguageModel, load
from dlm.sampling import registry
from dlm.sampling.draw import check_sound, sound
from dlm.trajectory import Frame

NOISES: dict[str, dict[str, Any]] = {
    "masked": {"process": "masked", "schedule": "linear"},
    "uniform": {"process": "uniform", "schedule": "linear"},
    "hybrid": {"process": "hybrid", "schedule": "linear", "share": 0.2},
}
SAMPLERS = [(noise, one.name) for noise in NOISES for one in registry.known("masked" if noise == "masked" else "replacement")]
NAN, INF = float("nan"), float("inf")


def broken(lm: LanguageModel, name: str, value: float = NAN) -> LanguageModel:
    """One weight of a tensor, of the embedding of `b`, is no number."""
    with torch.no_grad():
        tensor = dict(lm.network.named_parameters())[name]
        row = lm.tokenizer.encode("b")[0] if name == "embed.weight" else 0
        tensor[row if tensor.ndim == 1 else (row, 0)] = value
    return lm


def refuses(lm: LanguageModel, prompt: str = "Ab", **options: Any) -> None:
    """No frame of a run has a written token before it ends in one line."""
    frames: list[Frame] = []
    with pytest.raises(InputError, match="gives no probabilities") as error:
        frames.extend(lm.stream(prompt, length=24, **options))
    assert "\n" not in str(error.value)
    assert all(bool((frame.tokens_BT[:, 2:] == lm.tokenizer.mask_id).all()) or frame.forwards == 0 for frame in frames)


@pytest.mark.parametrize(("noise", "sampler"), SAMPLERS)
def test_no_diffusion_sampler_writes_without_probabilities(noise: str, sampler: str) -> None:
    lm = broken(make_model(noise=NOISES[noise]), "norm.weight")
    for temperature in (1.0, 0.0):
        refuses(lm, sampler=sampler, steps=4, temperature=temperature)


@pytest.mark.parametrize(
    ("name", "value"), [("embed.weight", NAN), ("embed.weight", INF), ("head.weight", NAN), ("blocks.0.mlp.up.weight", NAN)]
)
def test_wherever_the_weight_stands(name: str, value: float) -> None:
    refuses(broken(make_model(), name, value), sampler="topk", steps=4, temperature=0.0)
    refuses(broken(make_model("autoregressive"), name, value))


@pytest.mark.parametrize("options", [{"cache": "dual", "block_length": 8}, {"guidance": 2.0}, {"allow": "abc"}], ids=str)
def test_with_caches_guidance_and_constraints(options: dict[str, Any]) -> None:
    refuses(broken(make_model(), "norm.weight"), sampler="topk", steps=4, **options)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.0}, {"cache": False}, {"sampler": "lookup:4"}, {"sampler": "strided:4"}], ids=str
)
def test_no_autoregressive_decoding_writes_without_probabilities(options: dict[str, Any]) -> None:
    refuses(broken(make_model("autoregressive"), "norm.weight"), **options)


@pytest.mark.parametrize("name", ["b", "B"])
def test_an_embedding_of_a_token_that_the_text_lacks_does_no_harm(name: str) -> None:
    lm = broken(make_model("autoregressive"), "embed.weight")
    if name == "b":
        refuses(lm, "Ab", temperature=0.0)
    else:
        free = make_model("autoregressive").generate("AB", length=24, temperature=0.0).text
        assert "b" not in free[:3]
        assert lm.generate("AB", length=3, temperature=0.0).text == free[:3]


def test_what_is_sound() -> None:
    for row, expected in (([0.0, 1.0], True), ([0.0, -INF], True), ([-INF, -INF], False), ([0.0, NAN], False), ([INF, 0.0], False)):
        logits = torch.tensor([[0.0, 0.0], row])
        assert bool(sound(logits)) == expected == bool(logits.softmax(-1).isfinite().all())
    check_sound(torch.zeros(0, 3))


def poison(path: Path, name: str, value: float) -> None:
    state = load_file(path / "model.safetensors")
    state[name].view(-1)[-3:] = value
    save_file(state, path / "model.safetensors")


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_weights_that_are_no_numbers_are_told_at_load(tmp_path: Path, dlm: Dlm, value: float) -> None:
    make_model().save_pretrained(tmp_path / "ours")
    poison(tmp_path / "ours", "blocks.1.mlp.up.weight", value)
    told = dlm.told("generate", "Ab", "--model", str(tmp_path / "ours"))
    assert "3 of the 4096 weights of blocks.1.mlp.up.weight are NaN or infinite" in told


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_of_other_checkpoints_too(tmp_path: Path, dtype: str) -> None:
    path = publish(transformer("Llama", num_hidden_layers=1), tmp_path / "base")
    assert load(str(path), dtype=dtype).generate("so", max_new_tokens=2).tokens
    poison(path, "model.layers.0.mlp.down_proj.weight", NAN)
    with pytest.raises(InputError, match=r"3 of the 1536 weights of blocks\.0\.mlp\.down\.weight"):
        load(str(path), dtype=dtype)


def test_large_weights_are_numbers(tmp_path: Path) -> None:
    """Their sum is infinite, none of them is."""
    path = publish(transformer("Llama", num_hidden_layers=1), tmp_path / "base")
    poison(path, "model.layers.0.mlp.down_proj.weight", 3e38)
    assert load(str(path)).network.blocks
