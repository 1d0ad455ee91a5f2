"""Rows that join and leave: what a row becomes at each of its steps is what it becomes alone.

Shapes: B rows, L columns.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import make_model
from dlm.language_model import LanguageModel
from dlm.language_model.options import DecodingKeywords
from dlm.sampling.autoregressive.speculative import SpeculativeDecoder
from dlm.sampling.batching import Joinable, WrittenDistribution
from dlm.sampling.draw import generators
from dlm.trajectory import Canvas, Frame

MODELS: dict[str, LanguageModel] = {
    "mask": make_model(window=16, context=4),
    "block": make_model(window=16, context=4, attention="block_causal", block_length=4),
    "uniform": make_model(noise={"process": "uniform", "schedule": "linear"}, window=16, context=4),
    "hybrid": make_model(noise={"process": "hybrid", "schedule": "linear", "share": 0.2}, window=16, context=4),
    "ar": make_model("autoregressive", window=16, context=4),
    "mask, convolution": make_model(window=16, context=4, conv=3),
    "block, convolution": make_model(window=16, context=4, attention="block_causal", block_length=4, conv=3),
    "ar, convolution": make_model("autoregressive", window=16, context=4, conv=3),
}
SMALL = make_model("autoregressive", window=16, context=4, layers=1)
SMALL.name = "small"
MODELS["ar"].introduce(SMALL)
DIFFUSION: list[tuple[str, dict[str, Any]]] = [
    *[("mask", {"sampler": word}) for word in ("ancestral", "first-hitting", "topk", "confidence:0.05", "klass", "predictor-corrector")],
    *[("mask", {"sampler": word}) for word in ("remdm-cap", "remdm-conf", "revoke", "planner")],
    *[("mask", {"sampler": "ancestral", "cache": word}) for word in ("dual", "delayed:3", "drift:0.1")],
    ("mask", {"sampler": "ancestral", "guidance": 1.5}),
    ("mask", {"sampler": "ancestral", "allow": "abcdef "}),
    ("mask", {"sampler": "predictor-corrector", "until_settled": 2}),
    ("block", {"sampler": "ancestral"}),
    ("uniform", {"sampler": "ancestral"}),
    ("uniform", {"sampler": "worst:2", "until_settled": 2}),
    ("hybrid", {"sampler": "ancestral"}),
    ("block, convolution", {"sampler": "ancestral"}),
    *[("mask, convolution", {"sampler": "ancestral", "cache": word}) for word in ("dual", "prefix", "delayed:3", "drift:0.1")],
]
STRIDED: list[tuple[str, dict[str, Any]]] = [
    *[("ar", {"sampler": w}) for w in ("strided:3", "lookup:1", "lookup:3", "draft:small,3,0.1", "draft:int4,4")],
    *[("ar, convolution", {"sampler": w}) for w in ("strided:3", "draft:int4,4")],
]
ROWS: dict[str, list[list[int | None]]] = {
    "mask": [[1, 2, None, None, 3, None], [4] * 3 + [None] * 30, [None] * 9 + [5], [6] * 20 + [None] * 4],
    "block": [[1, 2, None, None, None], [4] * 3 + [None] * 30, [None] * 9, [6] * 20 + [None] * 4],
}
ROWS |= {"uniform": ROWS["mask"], "hybrid": ROWS["mask"], "ar": ROWS["block"]}
ROWS |= {f"{name}, convolution": ROWS[name] for name in ("mask", "block", "ar")}


def canvas_of(rows: list[list[int | None]], model: LanguageModel) -> Canvas:
    return Canvas.from_rows(rows, fill=model.tokenizer.mask_id)


def play(sampler: Any, rows: list[list[int | None]], model: LanguageModel) -> dict[int, list[Frame]]:
    """Frames of each row while rows come and go: 0 and 1 begin, 2 joins after two steps, 1 leaves for three steps, 3 joins at the end."""
    run = sampler.begin(canvas_of(rows[:2], model), rng=generators(50, 2))
    order, seen = [0, 1], {row: list[Frame]() for row in range(4)}

    def part(frame: Frame, place: int, length: int) -> Frame:
        draft_BT = None if frame.draft_BT is None else frame.draft_BT[place : place + 1, :length]
        at = slice(place, place + 1)
        return Frame(frame.tokens_BT[at, :length], frame.settled_BT[at, :length], frame.t_B[at], "", 0, draft_BT=draft_BT)

    def step() -> None:
        if not bool(run.live_B.any()):  # a great stride has ended them
            return
        live_B, frame = run.live_B.tolist(), run.step()
        for place, row in enumerate(order):
            if live_B[place]:
                seen[row].append(part(frame, place, len(rows[row])))

    def join(row: int) -> None:
        other = sampler.begin(canvas_of([rows[row]], model), rng=generators(50 + row, 1))
        if other.reads_first:
            seen[row].append(part(other.step(), 0, len(rows[row])))
        run.join(other)
        order.append(row)

    step()
    step()
    join(2)
    step()
    run.keep(torch.tensor([2, 0]))  # row 1 is gone: it begins anew
    order, seen[1] = [2, 0], []
    step()
    join(3)
    join(1)
    while bool(run.live_B.any()):
        step()
        done = [place for place, live in enumerate(run.live_B.tolist()) if live]
        if len(done) < len(order) and done:
            run.keep(torch.tensor(done))
            order = [order[place] for place in done]
    return seen


@pytest.mark.parametrize(("name", "options"), DIFFUSION + STRIDED, ids=str)
def test_a_row_is_as_alone_at_each_of_its_steps(name: str, options: DecodingKeywords) -> None:
    model, rows = MODELS[name], ROWS[name]
    steps: DecodingKeywords = {} if name.startswith("ar") else {"steps": 8}
    sampler: Any = model.sampler(**({"temperature": 0.9} | steps | options))
    seen = play(sampler, rows, model)
    for row, tokens in enumerate(rows):
        alone = list(sampler.steps(canvas_of([tokens], model), rng=generators(50 + row, 1)))
        alone = [frame for frame in alone if frame.forwards]
        assert len(seen[row]) == len(alone) > 1, row
        for mine, other in zip(seen[row], alone, strict=True):
            assert torch.equal(mine.tokens_BT, other.tokens_BT), row
            assert torch.equal(mine.settled_BT, other.settled_BT), row
            if other.draft_BT is not None:
                assert mine.draft_BT is not None, row
                assert torch.equal(mine.draft_BT, other.draft_BT), row
    assert len({tuple(seen[row][-1].tokens_BT[0].tolist()) for row in range(4)}) == 4


@pytest.mark.slow
@pytest.mark.parametrize("word", ["strided:auto", "lookup:auto", "draft:small,auto", "draft:int8,auto"])
def test_rows_join_whatever_the_stride_of_a_call(word: str) -> None:
    model, rows = MODELS["ar"], ROWS["ar"]
    sampler: Any = model.sampler(sampler=word)
    plain: Any = model.sampler(sampler="autoregressive")
    for _ in range(5):
        seen = play(sampler, rows, model)
        for row, tokens in enumerate(rows):
            *_, alone = plain.steps(canvas_of([tokens], model), rng=generators(50 + row, 1))
            assert torch.equal(seen[row][-1].tokens_BT, alone.tokens_BT), row
    assert len({stride for _, stride in sampler.draft_length._seconds}) > 1


@pytest.mark.parametrize("coupling", ["stream", "ratio"])
def test_proposals_that_were_drawn_join_those_that_were_not(coupling: str) -> None:
    model, rows = MODELS["ar"], ROWS["ar"]
    made: Any = model.sampler(sampler="draft:small,4")
    assert isinstance(made, SpeculativeDecoder)
    sampler = SpeculativeDecoder(made.denoiser, made.mask_id, made.window, made.make_cache, made.drafter, 4, coupling, context=4)
    seen = play(sampler, rows, model)
    for row, tokens in enumerate(rows):
        *_, alone = sampler.steps(canvas_of([tokens], model), rng=generators(50 + row, 1))
        assert torch.equal(seen[row][-1].tokens_BT, alone.tokens_BT), row


@pytest.mark.parametrize("name", ["mask", "uniform", "ar"])
def test_the_law_of_a_call_holds_what_was_drawn(name: str) -> None:
    """Greedy text is the likeliest token of the distribution that the run keeps, at the columns it names."""
    model, rows = MODELS[name], ROWS[name]
    options: dict[str, Any] = {"sampler": "strided:3"} if name == "ar" else {"sampler": "ancestral", "steps": 1 if name == "uniform" else 8}
    sampler: Any = model.sampler(temperature=0.0, **options)
    assert isinstance(sampler, Joinable)
    run, checked = sampler.begin(canvas_of(rows, model), rng=generators(0, 4)), 0
    before = run.frame()
    while bool(run.live_B.any()):
        frame, distribution = run.step(), run.distribution
        assert isinstance(distribution, WrittenDistribution)
        for row in range(len(rows)):
            column_C = (frame.settled_BT[row] & ~before.settled_BT[row]).nonzero().squeeze(-1)
            score_CV, known_C = distribution.at(row, column_C)
            assert known_C.all()
            score_CV = score_CV.index_fill(1, torch.tensor(model.tokenizer.mask_id), -torch.inf)
            assert torch.equal(score_CV.argmax(-1), frame.tokens_BT[row, column_C])
            checked += len(column_C)
        if name == "mask":  # not those of a whole window
            assert len(distribution.row_N) == int((frame.settled_BT & ~before.settled_BT).sum())
        before = frame
    assert checked == sum(row.count(None) for row in rows)


def test_rows_that_propose_take_their_first_step_by_themselves() -> None:
    sampler: Any = MODELS["ar"].sampler(sampler="draft:small,3")
    run = sampler.begin(canvas_of([[1, None, None, None]], MODELS["ar"]), rng=generators(0, 1))
    run.step()
    with pytest.raises(ValueError, match="first step"):
        run.join(sampler.begin(canvas_of([[2, None]], MODELS["ar"]), rng=generators(1, 1)))
