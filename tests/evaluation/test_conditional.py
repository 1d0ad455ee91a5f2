"""The conditional bound of masked diffusion against enumeration."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import make_model
from dlm.errors import InputError
from dlm.evaluation.conditional import Estimator, Masks, Pair
from dlm.noise.masked import MaskedNoise
from oracle import BayesDenoiser, Tiny


def estimator(tiny: Tiny, **settings: Any) -> Estimator:
    """With the exact posterior for a network."""
    denoiser = BayesDenoiser(tiny)

    def predict(z_BT: Tensor, x_BT: Tensor, *, want_BT: Tensor, valid_BT: Tensor | None) -> Tensor:
        return denoiser(z_BT)

    return Estimator(MaskedNoise(tiny.vocab + 1, tiny.mask_id), predict, tiny.length, True, **settings)


def conditional(tiny: Tiny, pair: Pair) -> float:
    """log p(continuation | context) by summing over all sequences."""
    n = len(pair.context)
    head_S = (tiny.x_ST[:, :n] == torch.tensor(pair.context, dtype=torch.long)).all(-1)
    both_S = head_S & (tiny.x_ST[:, n : len(pair)] == torch.tensor(pair.continuation)).all(-1)
    return math.log(float(tiny.p_S[both_S].sum() / tiny.p_S[head_S].sum()))


PAIRS = [Pair((0,), (1, 2)), Pair((), (2, 1, 0)), Pair((2, 0), (1,)), Pair((1,), (1,)), Pair((), (0, 2))]


def test_every_pattern_of_the_exact_posterior_gives_the_conditional_probability() -> None:
    """All orders give the same number there; text after the pair is summed out."""
    tiny = Tiny(seed=1, concentration=3.0)
    scores = dict(estimator(tiny, samples=7, batch=4).scores(PAIRS))
    assert [scores[i].logp for i in range(len(PAIRS))] == pytest.approx([conditional(tiny, pair) for pair in PAIRS], abs=1e-5)
    assert {score.stderr for score in scores.values()} == {0.0}


def test_drawn_patterns_of_the_exact_posterior_have_it_for_a_mean() -> None:
    tiny, pair = Tiny(seed=1, concentration=3.0), Pair((), (2, 1, 0))
    drawn = [next(estimator(tiny, samples=2, seed=seed).scores([pair]))[1] for seed in range(400)]
    logp = torch.tensor([score.logp for score in drawn], dtype=torch.float64)
    assert float(logp.mean()) == pytest.approx(conditional(tiny, pair), abs=4 * float(logp.std()) / 20)
    assert any(score.stderr > 0 for score in drawn)


def test_patterns_drawn_and_all_patterns_have_the_same_expectation() -> None:
    every = Masks.draw([4], 15, torch.Generator())
    drawn = Masks.draw([4], 14, torch.Generator().manual_seed(0))
    assert every.exact
    assert not drawn.exact
    assert every.weight_SN.sum(0).tolist() == pytest.approx([1.0] * 4)
    many = [Masks.draw([4], 2, torch.Generator().manual_seed(seed)).weight_SN.sum(0) for seed in range(2000)]
    assert torch.stack(many).mean(0).tolist() == pytest.approx([1.0] * 4, abs=0.06)


def test_the_monte_carlo_error_covers_the_bound_of_a_network() -> None:
    """A random network, whose orders differ: the drawn estimate against the mean over every pattern, in units of its own error."""
    table = torch.randn(5**4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def predict(z_BT: Tensor, x_BT: Tensor, *, want_BT: Tensor, valid_BT: Tensor | None) -> Tensor:
        return table[(z_BT * 5 ** torch.arange(4)).sum(-1)]

    def of(samples: int, seed: int = 0) -> tuple[float, float]:
        made = Estimator(MaskedNoise(4, 3), predict, 4, True, samples=samples, seed=seed, batch=16)
        score = next(made.scores([Pair((), (0, 1, 2, 1))]))[1]
        return score.logp, score.stderr

    whole, _ = of(15)
    apart = [(logp - whole) / stderr for logp, stderr in (of(14, seed) for seed in range(300))]
    assert abs(sum(apart) / len(apart)) < 0.25
    assert sum(x * x for x in apart) / len(apart) < 1.3


def test_greedy_is_the_surest_token_first() -> None:
    tiny = Tiny(seed=3, concentration=0.3)
    denoiser = BayesDenoiser(tiny)
    z_1T = torch.full((1, 3), tiny.mask_id)
    for _ in range(3):
        logp_TV = denoiser(z_1T)[0].masked_fill((z_1T[0] != tiny.mask_id)[:, None], -math.inf)
        at = int(logp_TV.amax(-1).argmax())
        z_1T[0, at] = logp_TV[at].argmax()
    written = tuple(z_1T[0].tolist())
    texts = [tuple(x) for x in tiny.x_ST.tolist()]
    scores = dict(estimator(tiny, batch=5).scores([Pair((), text) for text in texts]))
    assert [text for i, text in enumerate(texts) if scores[i].is_greedy] == [written]


def test_a_batch_changes_nothing() -> None:
    lm = make_model()

    def predict(z_BT: Tensor, x_BT: Tensor, *, want_BT: Tensor, valid_BT: Tensor | None) -> Tensor:
        logits_BQV: Tensor = lm.network(z_BT, valid_BT=valid_BT, at_BQ=want_BT)
        return logits_BQV

    assert isinstance(lm.noise, MaskedNoise)
    pairs = [Pair((1, 2, 3), (4, 5)), Pair((), tuple(range(9))), Pair((7,) * 20, (8,) * 12), Pair((9,), (3,))]
    for fills in (True, False):
        alone = Estimator(lm.noise, predict, lm.window, fills, samples=6)
        together = Estimator(lm.noise, predict, lm.window, fills, samples=6, batch=5)
        one = [next(alone.scores([pair]))[1] for pair in pairs]
        many = dict(together.scores(pairs[::-1]))
        for i, score in enumerate(one):
            assert many[len(pairs) - 1 - i].logp == pytest.approx(score.logp, abs=1e-4)
            assert many[len(pairs) - 1 - i].is_greedy == score.is_greedy


def test_a_continuation_beyond_the_window_is_named() -> None:
    with pytest.raises(InputError, match="continuation of 4 tokens is longer than the window of 3"):
        next(estimator(Tiny()).scores([Pair((), (0, 1, 2, 0))]))
    assert Pair((0, 1, 2), (1, 2)).within(3) == Pair((2,), (1, 2))
    assert Pair((0, 1, 2), (1, 2, 0)).within(3) == Pair((), (1, 2, 0))
