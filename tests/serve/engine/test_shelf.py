"""From a request to a plan: which requests are lossless, and which are refused."""

from __future__ import annotations

from typing import Any

import pytest

from conftest import make_model
from dlm.errors import InputError

pytest.importorskip("fastapi")

from dlm.serve.engine.shelf import Plan, Shelf
from dlm.serve.protocol import schema
from serve.conftest import named
from serve.serving import Served


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    block = make_model(attention="block_causal", block_length=8)
    uniform = make_model(noise={"process": "uniform", "schedule": "linear"})
    return Shelf([named(block, "block"), named(make_model(), "mask"), named(uniform, "uniform")])


def plan(shelf: Shelf, **asked: Any) -> Plan:
    return shelf.plan(schema.Decoding(lossless=True, **asked), 0)


LOSSLESS: list[tuple[dict[str, Any], str]] = [
    ({"model": "block"}, "first-hitting"),
    ({"model": "mask"}, "speculative"),
    ({"model": "mask", "sampler": "speculative:4"}, "speculative:4"),
    ({"model": "block", "sampler": "first-hitting", "steps": 32}, "first-hitting"),
]


@pytest.mark.parametrize(("asked", "word"), LOSSLESS)
def test_lossless_means_an_exact_sampler(shelf: Shelf, asked: dict[str, Any], word: str) -> None:
    assert plan(shelf, **asked).word == word


LOSSY: list[tuple[dict[str, Any], str]] = [
    ({"model": "block", "steps": 4}, "4 steps for a window of 32 tokens approximate"),
    ({"model": "mask", "steps": 4}, "4 steps for a window of 32 tokens approximate"),
    ({"model": "block", "sampler": "ancestral"}, "'ancestral' approximates: lossless goes with first-hitting, speculative$"),
    ({"model": "mask", "sampler": "ancestral", "steps": 32}, "lossless goes with first-hitting, speculative$"),
    ({"model": "mask", "sampler": "speculative:4,0.5"}, "approximates"),
    ({"model": "mask", "sampler": "topq"}, "did you mean topk"),
    ({"model": "uniform"}, "its noise replaces tokens: leave lossless away"),
    ({"model": "uniform", "sampler": "ancestral", "steps": 32}, "leave lossless away"),
]


@pytest.mark.parametrize(("asked", "said"), LOSSY)
def test_what_approximates_is_never_called_lossless(shelf: Shelf, asked: dict[str, Any], said: str) -> None:
    """One property of a sampler answers; the grid of `ancestral` approximates whatever its steps."""
    with pytest.raises(InputError, match=said):
        plan(shelf, **asked)


def test_such_a_request_gets_400(served: Served) -> None:
    refused = served.post("/v1/completions", {"model": "shakespeare-mask", "prompt": "a", "lossless": True, "steps": 4})
    assert refused.status_code == 400
    assert "4 steps for a window of 256 tokens approximate" in refused.json()["error"]["message"]


def test_top_k_reaches_the_plan(shelf: Shelf) -> None:
    """Requests that differ in it share no forward pass; 0 and none are the same."""
    plans = [shelf.plan(schema.Decoding.model_validate({"model": "mask", "top_k": k}), 0) for k in (None, 0, 5)]
    assert plans[2].decoding.draw.top_k == 5
    assert plans[0].lane == plans[1].lane
    assert plans[0].lane != plans[2].lane
