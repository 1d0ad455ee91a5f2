"""Every number of a sampler's settings has a lower and an upper bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from dlm.errors import InputError
from dlm.noise.masked import MaskedNoise
from dlm.sampling.autoregressive.draft_length import MAX_STRIDE, AdaptiveDraftLength
from dlm.sampling.autoregressive.draft_tree import MAX_NODES, Tree
from dlm.sampling.autoregressive.drafters import MAX_LEAD_NATS, MAX_NGRAM, MedusaDrafter, PromptLookup, SelfDraft
from dlm.sampling.autoregressive.speculative import SpeculativeDecoder
from dlm.sampling.diffusion.any_order_speculative import MAX_DRAFT_TOKENS, AnyOrderSpeculativeSampler
from dlm.sampling.diffusion.cache_policies import Delayed, Drift, Exact
from dlm.sampling.diffusion.guidance import Classifier, ClassifierFree
from dlm.sampling.diffusion.loop import MAX_STEPS, DiffusionSampler
from dlm.sampling.diffusion.remasking import Planned, Remask, Revoke
from dlm.sampling.diffusion.revising import ChangeWorst, EntropyBound, GreedyTail, PredictorCorrector, Refine
from dlm.sampling.diffusion.transfer import Transfer
from dlm.sampling.diffusion.unmasking import EntropyBudget, Factor, KLStable, Threshold
from dlm.sampling.draw import MAX_SETTING, Draw
from oracle import Noted

NETWORK, NOISE, TINY = Noted(3, 8), MaskedNoise(4, 3), 1e-6


def decoder(**settings: Any) -> SpeculativeDecoder:
    return SpeculativeDecoder(NETWORK, 3, 8, lambda rows, positions: pytest.fail("no cache is made"), **settings)


def any_order(**settings: Any) -> AnyOrderSpeculativeSampler:
    return AnyOrderSpeculativeSampler(NETWORK, NOISE, 8, **settings)


def loop(**settings: Any) -> DiffusionSampler:
    return DiffusionSampler(NETWORK, NOISE, 8, **settings)


RANGES: list[tuple[Callable[[Any], Any], float, float]] = [
    (lambda x: Draw(x), 0, MAX_SETTING),
    (lambda x: Draw(top_k=x), 0, MAX_SETTING),
    (lambda x: Draw(top_p=x), TINY, 1),
    (lambda x: Threshold(x), TINY, 1),
    (lambda x: Factor(x), TINY, MAX_SETTING),
    (lambda x: EntropyBudget(x), 0, MAX_SETTING),
    (lambda x: KLStable(x), TINY, 1),
    (lambda x: KLStable(kl=x), 0, MAX_SETTING),
    (lambda x: Remask("cap", x), 0, 1),
    (lambda x: Revoke(x), TINY, 1),
    (lambda x: Revoke(keep=x), 0, 1),
    (lambda x: Planned(x), 0, MAX_SETTING),
    (lambda x: PredictorCorrector(x), 0, MAX_SETTING),
    (lambda x: EntropyBound(x), 0, MAX_SETTING),
    (lambda x: ChangeWorst(x), TINY, MAX_SETTING),
    (lambda x: GreedyTail(Refine(), x), 1, MAX_SETTING),
    (lambda x: Transfer(score_temperature=x), 0, MAX_SETTING),
    (lambda x: Exact(x), 1, MAX_SETTING),
    (lambda x: Delayed(x), 1, MAX_SETTING),
    (lambda x: Drift(x), 0, MAX_SETTING),
    (lambda x: Drift(probes=x), 0, MAX_SETTING),
    (lambda x: ClassifierFree(x, 3), 0, MAX_SETTING),
    (lambda x: Classifier(lambda hot: hot, x, 3), 0, MAX_SETTING),
    (lambda x: loop(budget=x), 1, MAX_STEPS),
    (lambda x: loop(block_length=x), 0, 8),
    (lambda x: loop(until_settled=x, rule=Revoke()), 0, MAX_STEPS),
    (lambda x: any_order(draft_tokens=x), 1, MAX_DRAFT_TOKENS),
    (lambda x: any_order(tolerance=x), 0, MAX_SETTING),
    (lambda x: decoder(stride=x), 1, MAX_STRIDE),
    (lambda x: decoder(floor=x), 0, 1),
    (lambda x: AdaptiveDraftLength(x), 1, MAX_STRIDE),
    (lambda x: Tree.likeliest(x, 0), 0, MAX_NODES),
    (lambda x: PromptLookup(x), 1, MAX_NGRAM),
    (lambda x: MedusaDrafter(lambda state, count: state, x), 1, MAX_STRIDE - 1),
    (lambda x: SelfDraft(NETWORK, None, x), 0, MAX_LEAD_NATS),
]


@pytest.mark.parametrize(("make", "low", "high"), RANGES)
def test_the_ends_of_a_range_are_taken_and_nothing_past_them(make: Callable[[Any], Any], low: float, high: float) -> None:
    for inside in (low, high):
        make(inside)
    for outside in (low - 1, high + 1, math.inf, -math.inf, math.nan):
        with pytest.raises(InputError, match=r"must be (at least|above) .* and at most"):
            make(outside)


@pytest.mark.parametrize("make", [make for make, low, _ in RANGES if low == TINY])
def test_zero_is_outside_of_an_open_range(make: Callable[[Any], Any]) -> None:
    with pytest.raises(InputError, match="must be above 0"):
        make(0.0)
