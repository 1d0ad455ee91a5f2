"""The cost of a request is known before it is admitted: what would hang or fill the server is refused; a slow lane takes nobody's turn."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from conftest import make_model
from dlm.errors import InputError
from dlm.language_model import LanguageModel
from dlm.language_model.options import DecodingOptions

pytest.importorskip("fastapi")

from dlm.serve.engine import cost
from serve.serving import Served, Watch, shape, wait

WORDS = {
    "tiny-ar": """strided:64x64 strided:1e4 strided:10000 strided:257x64 strided:4x1e9 lookup:1e9 lookup:1000000000 lookup:4:1e9
        lookup:4:nan draft:int4,1e9 draft:int4:1000000000 draft:int8:auto:-1""",
    "shakespeare-mask": "speculative:1e9 speculative:1000000000 speculative:256",
    "tiny": """factor:1e300 factor:inf factor:nan entropy-bound:inf confidence:1.1 remdm-cap:2 tiny-topk:1000000001
        fast-dllm:0.9:99999999999 dream:entropy:inf ancestral:1""",
    "tiny-uniform": "worst:inf worst:1e10 predictor-corrector:-1",
}
HOSTILE: list[dict[str, Any]] = [
    *({"model": model, "sampler": word} for model, words in WORDS.items() for word in words.split()),
    *({"light": "shakespeare-mask-1", "schedule": word} for word in ("Linf H1", "L1e9 H1", "sandwich:1e9", "random:0.5,inf")),
]


@pytest.mark.parametrize("asked", HOSTILE, ids=lambda asked: str(list(asked.values())[-1]))
def test_a_setting_that_would_hang_or_fill_the_server_is_refused(served: Served, asked: dict[str, Any]) -> None:
    began = time.monotonic()
    for path in ("/v1/completions", "/v1/dlm/generate"):
        answer = served.post(path, {"prompt": "a", "max_tokens": 20} | asked)
        assert answer.status_code == 400, answer.text
        assert "\n" not in answer.text
    shape(served.post("/v1/completions", {"prompt": "a"} | asked).text)
    assert time.monotonic() - began < 2
    assert served.engine.running == served.engine.waiting == 0


def positions(lm: LanguageModel, **options: Any) -> tuple[list[int], cost.Cost]:
    """Of every forward pass of a text of 20 tokens, and its cost."""
    read: list[int] = []
    lm.sampler(**options)  # which times some passes
    hook = lm.network.register_forward_pre_hook(lambda _, given: read.append(given[0].numel()))
    try:
        canvas, plan = lm.canvas("ab", length=22), lm.resolve(DecodingOptions.of(options))
        list(lm.stream(canvas=canvas, seed=1, **options))
    finally:
        hook.remove()
    return read, cost.of(lm, plan, canvas)


@pytest.mark.parametrize(
    ("options", "exactly"),
    [
        ({"sampler": "autoregressive"}, True),
        ({"sampler": "lookup:5"}, True),
        ({"sampler": "strided:4x6"}, True),
        ({"sampler": "strided:3"}, False),
        ({"sampler": "draft:int8:3"}, True),
    ],
)
def test_the_cost_of_continuing_is_what_the_network_reads(options: dict[str, Any], exactly: bool) -> None:
    lm = make_model("autoregressive", window=32)
    read, known = positions(lm, **options)
    later = read[1:]  # the first pass reads the prompt
    assert max(later) <= known.positions
    assert not exactly or max(later) == known.positions
    assert len(read) <= known.forwards


@pytest.mark.parametrize("options", [{"sampler": "ancestral", "steps": 8}, {"sampler": "speculative:5"}, {"sampler": "first-hitting"}])
def test_the_cost_of_denoising_is_what_the_network_reads(options: dict[str, Any]) -> None:
    read, known = positions(make_model(window=32), **options)
    assert max(read) == known.positions
    assert len(read) <= known.forwards


def test_every_limit_refuses_what_is_above_it() -> None:
    lm = make_model("autoregressive", window=32)
    plan = lm.resolve(DecodingOptions(sampler="strided:8x32"))
    known = cost.of(lm, plan, lm.canvas("a", length=30))
    cost.CostLimits(known.positions, known.forwards, known.bytes).check(known, plan.word)
    for limits, said in (
        (cost.CostLimits(positions=known.positions - 1), f"reads {known.positions} positions"),
        (cost.CostLimits(forwards=known.forwards - 1), f"needs {known.forwards} forward passes"),
        (cost.CostLimits(bytes=known.bytes - 1), "GiB for one text"),
    ):
        with pytest.raises(InputError, match=said):
            limits.check(known, plan.word)
    plain = cost.of(lm, lm.resolve(DecodingOptions()), lm.canvas("a", length=30))
    cost.CostLimits(positions=0, bytes=0).check(plain, "autoregressive")


def test_a_slow_lane_takes_nobodys_turn(served: Served, watch: Watch, watch_ar: Watch) -> None:
    """Passes of one model take long: a text of another model is done after a few of them, not after one for each of its tokens."""
    watch.seconds = 0.25
    slow = threading.Thread(
        target=lambda: served.post("/v1/completions", {"model": "tiny", "max_tokens": 28, "steps": 28, "sampler": "topk"})
    )
    slow.start()
    try:
        wait(lambda: served.engine.running == 1)
        before, tokens = watch.calls, watch_ar.calls
        assert served.post("/v1/completions", {"model": "tiny-ar", "prompt": "a", "max_tokens": 28}).status_code == 200
        assert watch_ar.calls - tokens >= 28
        assert watch.calls - before <= 10  # in turns it would be 28
        assert slow.is_alive()
    finally:
        watch.seconds = 0
        slow.join(30)


def test_heavy_texts_leave_room_for_the_others(served: Served, watch_ar: Watch) -> None:
    """Of texts whose forward passes cost as much as several, so many run as make up a batch, beside it."""
    lm = make_model("autoregressive", window=32)
    heavy = cost.of(lm, lm.resolve(DecodingOptions(sampler="strided:20x24")), lm.canvas("a", length=30)).rows
    assert served.engine.max_batch / 2 < heavy <= served.engine.max_batch
    watch_ar.gate.clear()
    body = {"model": "tiny-ar", "prompt": "a", "max_tokens": 5, "temperature": 0}
    done: list[int] = []
    asked = [body | {"sampler": "strided:20x24", "seed": 1}] * 2 + [body | {"seed": 1}] * 6
    threads = [threading.Thread(target=lambda one=one: done.append(served.post("/v1/completions", one).status_code)) for one in asked]
    for thread in threads:
        thread.start()
    wait(lambda: served.engine.running + served.engine.waiting == 8)
    watch_ar.gate.set()
    most = 0
    while any(thread.is_alive() for thread in threads):
        costs = [job.cost for lane in list(served.engine._lanes.values()) for job in lane.jobs]
        most = max(most, sum(one > 1 for one in costs))
        time.sleep(0.001)
    assert done == [200] * 8
    assert most == 1
