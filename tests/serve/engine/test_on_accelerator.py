"""The engine on an accelerator made of CPU tensors: its thread, rows that join and leave, and what it tells of each token."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from accelerator import Accelerator
from conftest import make_model
from serve.serving import serving

pytest.importorskip("fastapi")

ASKED: list[dict[str, Any]] = [
    {"model": "tiny-masked", "prompt": "Ab", "max_tokens": 20, "steps": 6, "sampler": "topk", "logprobs": 2},
    {"model": "tiny-masked", "prompt": "Abcd", "max_tokens": 31, "steps": 9, "sampler": "topk", "seed": 3},
    {"model": "tiny-masked", "prompt": "c", "max_tokens": 12, "steps": 4, "sampler": "confidence:0.1"},
    {"model": "tiny-uniform", "prompt": "c", "max_tokens": 12, "steps": 5, "n": 2},
    {"model": "tiny-autoregressive", "prompt": "c", "max_tokens": 12, "logprobs": 1, "seed": 1},
    {"model": "tiny-autoregressive", "prompt": "ca", "max_tokens": 15, "sampler": "lookup:3"},
]


def answers(device: str) -> list[Any]:
    """Of all requests at once."""
    models = [make_model(), make_model(noise={"process": "uniform", "schedule": "linear"}), make_model("autoregressive")]
    for lm in models:
        lm.network.to(device)
    with serving(models, device=device) as served, ThreadPoolExecutor(len(ASKED)) as pool:
        found = list(pool.map(lambda one: served.post("/v1/completions", {"seed": 7} | one), ASKED))
        native = served.native({"model": "tiny-masked", "prompt": "Ab", "max_tokens": 20, "steps": 6, "seed": 5})
    assert [one.status_code for one in found] == [200] * len(ASKED), [one.text for one in found]
    return [*(one.json()["choices"] for one in found), [data for name, data in native if name != "end"]]


def test_the_same_answers(gpu: Accelerator) -> None:
    here, there = answers("cpu"), answers("cuda")
    for one, other in zip(here[:-1], there[:-1], strict=True):
        assert [choice["text"] for choice in one] == [choice["text"] for choice in other]
    assert len(here[-1]) == len(there[-1])
    assert gpu.count("read") > 0
