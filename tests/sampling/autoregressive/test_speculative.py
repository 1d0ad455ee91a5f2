"""Speculative decoding writes the text of the plain sampler, whatever the drafter.

Shapes: B rows, L columns, K draft tokens, Q positions of one forward pass, V vocabulary, S = V^T sequences.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dlm.errors import InputError
from dlm.inference import quantize
from dlm.sampling.autoregressive.draft_length import AdaptiveDraftLength
from dlm.sampling.autoregressive.draft_tree import Tree
from dlm.sampling.autoregressive.drafters import (
    DraftModel,
    MaskDrafter,
    SelfDraft,
)
from dlm.sampling.draw import Draw, generators
from dlm.trajectory import Canvas, Frame
from sampling.autoregressive.decoders import (
    BASE,
    CONVOLVED,
    DRAFTERS,
    DRAWS,
    MASK,
    PROMPTS,
    WINDOW,
    assert_plain,
    canvas_of,
    decoder,
)

# --- the same text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", DRAWS, ids=str)
@pytest.mark.parametrize("stride", [1, 2, 5])
@pytest.mark.parametrize("name", DRAFTERS)
def test_the_text_is_that_of_the_plain_sampler(name: str, stride: int, draw: Draw) -> None:
    """Rows of different prompts, through several windows, in one batch: each the text of the plain sampler alone."""
    for new, seed in ((25, 3), (5, 11)):
        frames = list(decoder(DRAFTERS[name], stride, draw=draw).steps(canvas_of(PROMPTS, new), rng=generators(seed, len(PROMPTS))))
        assert_plain(frames[-1], PROMPTS, new, seed, draw)
        assert len(frames) == frames[-1].forwards <= new
        assert stride > 1 or len(frames) == new


@pytest.mark.parametrize("name", DRAFTERS)
def test_many_seeds(name: str) -> None:
    prompts = [[1, 2]] * 40
    *_, frame = decoder(DRAFTERS[name], 3).steps(canvas_of(prompts, 9), rng=generators(100, 40))
    assert_plain(frame, prompts, 9, 100, Draw())
    assert len(frame.tokens_BT.unique(dim=0)) > 30


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_base_with_short_convolutions(name: str) -> None:
    own = {"itself": DraftModel(CONVOLVED, CONVOLVED.ragged_cache, MASK), "rounded": SelfDraft(quantize.quantized_copy(CONVOLVED, 8), MASK)}
    sampler = decoder(own.get(name, DRAFTERS[name]), 5, CONVOLVED)
    *_, frame = sampler.steps(canvas_of(PROMPTS, 25), rng=generators(3, len(PROMPTS)))
    assert_plain(frame, PROMPTS, 25, 3, Draw(), made=CONVOLVED)
    if name in own:
        assert frame.forwards < 15  # nearly everything holds


@pytest.mark.parametrize("draw", DRAWS[:2], ids=str)
@pytest.mark.parametrize("name", ["tree", "restart", "lookup", "itself", "rounded"])
def test_a_base_without_start_token(name: str, draw: Draw) -> None:
    own = {"itself": DraftModel(BASE, BASE.ragged_cache, None), "rounded": SelfDraft(quantize.quantized_copy(BASE, 8), None)}
    drafter = own.get(name, DRAFTERS[name])
    prompts = [[1, 2, 3], [4], [5] * 14]
    *_, frame = decoder(drafter, draw=draw, start=None).steps(canvas_of(prompts, 20), rng=generators(3, 3))
    assert_plain(frame, prompts, 20, 3, draw, start=None)


@pytest.mark.parametrize("coupling", ["stream", "ratio"])
@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_text_does_not_depend_on_the_coupling(name: str, coupling: str) -> None:
    *_, frame = decoder(DRAFTERS[name], draw=Draw(0.0), coupling=coupling).steps(canvas_of(PROMPTS, 20), rng=generators(0, 5))
    assert_plain(frame, PROMPTS, 20, 0, Draw(0.0))


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_text_ends_at_its_end_token(name: str) -> None:
    stop, ended = frozenset({3, 8}), 0
    *_, frame = decoder(DRAFTERS[name], stop=stop).steps(canvas_of(PROMPTS, 30), rng=generators(3, 5))
    assert_plain(frame, PROMPTS, 30, 3, Draw(), stop=stop)
    for row, prompt in enumerate(PROMPTS):
        new = frame.tokens_BT[row, len(prompt) : len(prompt) + 30].tolist()
        ends = [j for j, token in enumerate(new) if token in stop]
        assert len(ends) <= 1
        assert all(token == MASK for token in new[ends[0] + 1 :] if ends)
        ended += bool(ends and ends[0] < 29)
    assert ended >= 3


@pytest.mark.parametrize("name", DRAFTERS)
def test_ratio_rows_are_as_each_alone(name: str) -> None:
    sampler = decoder(DRAFTERS[name], coupling="ratio", floor=0.2)
    *_, together = sampler.steps(canvas_of(PROMPTS, 25), rng=generators(3, 5))
    for row, prompt in enumerate(PROMPTS):
        *_, alone = sampler.steps(canvas_of([prompt], 25), rng=generators(3 + row, 1))
        assert torch.equal(alone.tokens_BT[0], together.tokens_BT[row, : len(prompt) + 25]), row


@pytest.mark.parametrize("name", DRAFTERS)
def test_frames_show_committed_text_and_tallies_add_up(name: str) -> None:
    canvas, committed_B = canvas_of(PROMPTS, 20), torch.zeros(5, dtype=torch.long)
    before: Frame | None = None
    for forwards, (frame, tally) in enumerate(decoder(DRAFTERS[name]).rounds(canvas, rng=generators(3, 5)), 1):
        assert frame.forwards == forwards
        assert frame.model == "ar"
        assert tally.positions >= 1
        assert torch.equal((frame.tokens_BT == MASK) & canvas.valid_BT, ~frame.settled_BT)
        assert (tally.accepted_B <= tally.drafted_B).all()
        assert (tally.drafted_B <= 3).all()
        assert frame.draft_BT is not None
        assert frame.settled_BT[frame.draft_BT == MASK].all()
        if before is not None:  # what a call verifies is what the frame before it showed
            assert before.draft_BT is not None
            assert torch.equal((before.draft_BT >= 0).sum(1), tally.drafted_B)
            shown_B = (before.draft_BT == frame.tokens_BT).sum(1)  # of a tree, the first choices
            assert torch.equal(shown_B, tally.accepted_B) or (", " in name and (shown_B <= tally.accepted_B).all())
        assert torch.equal(tally.committed_B, torch.where(tally.committed_B > 0, tally.accepted_B + 1, 0))
        if before is not None:
            assert torch.equal(frame.tokens_BT[before.settled_BT], before.tokens_BT[before.settled_BT])
            assert (frame.t_B <= before.t_B).all()
        committed_B, before = committed_B + tally.committed_B, frame
    assert committed_B.tolist() == [20] * 5
    assert before is not None
    assert before.settled_BT.all()


# --- the cache ---------------------------------------------------------------------------------------------------


# --- how many tokens a call --------------------------------------------------------------------------------------


# --- as many as pay ----------------------------------------------------------------------------------------------


# --- prompt lookup -----------------------------------------------------------------------------------------------


# --- bad input, and the words ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        {"stride": 0},
        {"floor": -0.1},
        {"floor": float("nan")},
        {"floor": 1.1},
        {"coupling": "loose"},
        {"context": WINDOW},
        {"draft_length": AdaptiveDraftLength(3)},
        {"draft_length": AdaptiveDraftLength(4), "coupling": "ratio"},
        {"tree": Tree.likeliest(6, 3), "coupling": "ratio"},
        {"tree": Tree.likeliest(6, 3), "draft_length": AdaptiveDraftLength(4)},
        {"tree": Tree.likeliest(6, 2)},
    ],
)
def test_bad_settings(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        decoder(MaskDrafter(), **bad)


def test_what_it_cannot_continue() -> None:
    with pytest.raises(InputError, match="cannot fill holes"):
        next(decoder(MaskDrafter()).steps(Canvas.from_rows([[1, None, 2]], fill=MASK), rng=generators(0, 1)))
    with pytest.raises(InputError, match="at least one token"):
        next(decoder(MaskDrafter(), start=None).steps(canvas_of([[]], 3), rng=generators(0, 1)))
    with pytest.raises(InputError, match="needs context"):
        decoder(MaskDrafter(), start=None, context=0)
    assert list(decoder(MaskDrafter()).steps(Canvas.from_rows([[1, 2]], fill=MASK), rng=generators(0, 1))) == []
