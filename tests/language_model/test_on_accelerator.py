"""Every sampler on an accelerator made of CPU tensors: the same text as on the CPU, and a bound on how often a forward pass waits."""

from __future__ import annotations

from typing import Any

import pytest

from accelerator import Accelerator
from conftest import make_model
from dlm.sampling import registry

NOISES: dict[str, dict[str, Any]] = {
    "masked": {"process": "masked", "schedule": "linear"},
    "uniform": {"process": "uniform", "schedule": "linear"},
    "semantic": {"process": "semantic", "schedule": "linear"},
    "hybrid": {"process": "hybrid", "schedule": "linear", "share": 0.2},
}
SAMPLERS = [(noise, one.name) for noise in NOISES for one in registry.known("masked" if noise == "masked" else "replacement")]
WAITS = 11
"""Times that a forward pass of a diffusion sampler waits, the frame that it leaves for the trajectory included."""
MORE = {
    "ancestral": 12.5,
    "first-hitting": 12,
    "llada": 12,
    "llada2": 12,
    "mdlm": 12,
    "bd3lm": 17,
    "klass": 12,
    "dream": 13,
    "speculative": 14,
    "tiny-topk": 13,
}
OPTIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "blocks": (11, {"block_length": 8}),
    "draws": (11, {"temperature": 0.5, "top_k": 5, "top_p": 0.9}),
    "guidance": (12, {"guidance": 2.0}),
    "allow": (15, {"allow": "abc"}),
    "prefix": (16, {"cache": "prefix", "block_length": 8}),
    "dual": (16, {"cache": "dual", "block_length": 8}),
    "delayed": (16, {"cache": "delayed:4", "block_length": 8}),
    "drift": (16, {"cache": "drift:0.2", "block_length": 8}),
}
PROMPTS = ["Ab", "Abc de"]


def writes_the_same(gpu: Accelerator, waits: float, prompts: list[str] = PROMPTS, /, *, model: dict[str, Any], **options: Any) -> None:
    """On the GPU as on the CPU, with at most so many waits a forward pass."""
    made = make_model(**model)
    here = made.generate(prompts, **options)
    made.network.to("cuda")
    gpu.syncs.clear()
    there = made.generate(prompts, **options)
    assert [one.text for one in there] == [one.text for one in here]
    assert gpu.count() / there[0].forwards <= waits, gpu.syncs


@pytest.mark.parametrize(("noise", "sampler"), SAMPLERS)
def test_a_sampler(noise: str, sampler: str, gpu: Accelerator) -> None:
    model = {"noise": NOISES[noise], "backend": "sdpa"}  # FlexAttention compiles for a real GPU
    writes_the_same(gpu, MORE.get(sampler, WAITS) if noise == "masked" else WAITS, model=model, sampler=sampler, length=40, steps=6)


@pytest.mark.parametrize(("name", "conv"), [*((name, 0) for name in OPTIONS), ("blocks", 5), ("dual", 5), ("drift", 5)])
def test_options(name: str, conv: int, gpu: Accelerator) -> None:
    waits, options = OPTIONS[name]
    writes_the_same(gpu, waits, model={"conv": conv}, sampler="topk", length=40, steps=6, **options)


def test_stopping_early(gpu: Accelerator) -> None:
    writes_the_same(gpu, 10.5, model={"noise": NOISES["uniform"]}, length=40, steps=6, until_settled=3)


def test_a_pattern(gpu: Accelerator) -> None:
    writes_the_same(gpu, 45, ["Ab", "Ab: a"], model={}, sampler="topk", length=40, steps=8, pattern="Ab: ([a-z]+ )+(yes|no)[.]")


@pytest.mark.parametrize("conv", [0, 5])
def test_block_diffusion(conv: int, gpu: Accelerator) -> None:
    model = {"attention": "block_causal", "block_length": 8, "backend": "sdpa", "conv": conv}
    writes_the_same(gpu, 20, model=model, length=40, steps=6)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 5}, {"cache": False}], ids=str)
@pytest.mark.parametrize("conv", [0, 3])
def test_autoregressive(options: dict[str, Any], conv: int, gpu: Accelerator) -> None:
    writes_the_same(gpu, 7.5, model={"objective": "autoregressive", "conv": conv}, length=40, **options)


def test_draft_tokens(gpu: Accelerator) -> None:
    writes_the_same(gpu, 17, model={"objective": "autoregressive"}, sampler="lookup:4", length=40)
