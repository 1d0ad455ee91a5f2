"""MATHS.md 5 for masked noise: exact bounds, schedule invariance, discrete to continuous, posteriors that compose."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dlm.noise import loss, schedule
from dlm.noise.masked import MaskedNoise
from dlm.noise.schedule import LogLinear
from dlm.noise.score import ScoreNoise
from oracle import BayesDenoiser, Tiny

EXACT = ["linear", "polynomial:2", "polynomial:0.7", "cosine"]


def noise_of(tiny: Tiny, word: str) -> MaskedNoise:
    return MaskedNoise(tiny.vocab + 1, tiny.mask_id, schedule.parse(word))


def expected_integrand(tiny: Tiny, noise: MaskedNoise, t: float, s: float | None = None) -> float:
    """E over x ~ p and z ~ q(z_t | x), enumerated, of the loss integrand (or of the step t -> s), nats per sequence."""
    denoiser, alpha = BayesDenoiser(tiny), float(noise.schedule.alpha(torch.tensor(t, dtype=torch.float64)))
    total = 0.0
    for pattern_T in tiny.patterns():
        z_ST = torch.where(pattern_T, tiny.mask_id, tiny.x_ST)
        chance = (1 - alpha) ** int(pattern_T.sum()) * alpha ** int((~pattern_T).sum())
        t_S = torch.full((len(z_ST),), t, dtype=torch.float64)
        logp = noise.log_probs(denoiser(z_ST), z_ST, t_S)
        if s is None:
            nats_S = noise.nelbo(logp, tiny.x_ST, z_ST, t_S).sum(-1)
        else:
            nats_S = noise.nelbo_step(logp, tiny.x_ST, z_ST, t_S, torch.full_like(t_S, s)).sum(-1)
        total += chance * float((tiny.p_S * nats_S).sum())
    return total


def integrated_bound(tiny: Tiny, noise: MaskedNoise, points: int = 64) -> float:
    """Gauss-Legendre over alpha, where the integrand is a polynomial for every schedule."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    ends: list[float] = noise.schedule.alpha(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    total = 0.0
    for node, weight in zip(nodes, weights, strict=True):
        alpha = torch.tensor(ends[1] + (ends[0] - ends[1]) * (node + 1) / 2, dtype=torch.float64)
        t = noise.schedule.inverse(alpha)
        per_alpha = expected_integrand(tiny, noise, float(t)) / float(-noise.schedule.dalpha(t))
        total += float(weight) * per_alpha * (ends[0] - ends[1]) / 2
    return total


def end_terms(tiny: Tiny, noise: MaskedNoise) -> float:
    """Prior and reconstruction, enumerated."""
    alpha0, alpha1 = noise.schedule.alpha(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    total: float = tiny.length * alpha1 * math.log(tiny.vocab)
    denoiser = BayesDenoiser(tiny)
    for pattern_T in tiny.patterns():
        z_ST = torch.where(pattern_T, tiny.mask_id, tiny.x_ST)
        chance = (1 - alpha0) ** int(pattern_T.sum()) * alpha0 ** int((~pattern_T).sum())
        nll_ST = noise.cross_entropy(noise.log_probs(denoiser(z_ST), z_ST), tiny.x_ST, z_ST)
        total += chance * float((tiny.p_S * nll_ST.sum(-1)).sum())
    return total


@pytest.mark.parametrize("word", EXACT)
@pytest.mark.parametrize("shape", [(3, 3), (4, 2), (2, 4)])
def test_bound_equals_entropy_with_the_bayes_denoiser(word: str, shape: tuple[int, int]) -> None:
    tiny = Tiny(*shape, seed=1)
    assert integrated_bound(tiny, noise_of(tiny, word)) == pytest.approx(tiny.entropy(), abs=1e-10)


@pytest.mark.parametrize("word", ["geometric", "geometric:0.01,3", "log-linear", "log-linear:0.2"])
def test_bound_with_its_end_terms_is_above_the_entropy_and_close_when_the_ends_are(word: str) -> None:
    tiny = Tiny(3, 3, seed=2)
    bound = integrated_bound(tiny, noise_of(tiny, word)) + end_terms(tiny, noise_of(tiny, word))
    assert bound >= tiny.entropy() - 1e-10
    if ":" not in word:
        assert bound == pytest.approx(tiny.entropy(), abs=5e-3)


@pytest.mark.parametrize("word", ["geometric:0.01,3", "log-linear:0.2"])
def test_bound_depends_on_the_schedule_through_its_ends_alone(word: str) -> None:
    tiny, noise = Tiny(3, 3, seed=3), noise_of(Tiny(3, 3, seed=3), word)
    alpha0, alpha1 = noise.schedule.alpha(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    linear = noise_of(tiny, "linear")
    nodes, weights = np.polynomial.legendre.leggauss(64)
    middle, half = (alpha0 + alpha1) / 2, (alpha0 - alpha1) / 2
    same_ends = sum(w * half * expected_integrand(tiny, linear, 1 - (middle + half * n)) for n, w in zip(nodes, weights, strict=True))
    assert integrated_bound(tiny, noise) == pytest.approx(same_ends, abs=1e-9)


def test_discrete_bound_decreases_to_the_continuous_one() -> None:
    tiny = Tiny(3, 3, seed=4)
    for word in ("linear", "cosine"):
        noise = noise_of(tiny, word)
        bounds = [
            sum(expected_integrand(tiny, noise, (i + 1) / steps, i / steps) for i in range(steps)) for steps in (1, 2, 4, 8, 16, 64, 256)
        ]
        assert all(a > b for a, b in itertools.pairwise(bounds)), (word, bounds)
        assert bounds[-1] > tiny.entropy()
        assert bounds[-1] - tiny.entropy() < 0.01 * (bounds[0] - tiny.entropy())


def test_posterior_is_bayes_rule_and_composes() -> None:
    tiny = Tiny(3, 2, seed=5)
    noise = noise_of(tiny, "cosine")
    t, s, r = (torch.tensor([v], dtype=torch.float64) for v in (0.9, 0.5, 0.2))
    logits = torch.randn(1, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z_BT = torch.tensor([[tiny.mask_id, 1]])
    logp = noise.log_probs(logits, z_BT)
    at_s, at_r = noise.posterior(logp, z_BT, t, s), noise.posterior(logp, z_BT, t, r)
    assert torch.allclose(at_s.sum(-1), torch.ones(1, 2, dtype=torch.float64))
    assert torch.equal(at_s[0, 1], torch.tensor([0.0, 1, 0, 0], dtype=torch.float64))
    stays = at_s[0, 0, tiny.mask_id]
    from_s = noise.posterior(logp, z_BT, s, r)
    composed = torch.cat([at_s[0, 0, :3] + stays * from_s[0, 0, :3], (stays * from_s[0, 0, 3])[None]])
    assert torch.allclose(composed, at_r[0, 0], atol=1e-12)
    # Bayes on the forward process for a known x: q(z_s | z_t = MASK, x)
    alpha_t, alpha_s = (float(noise.schedule.alpha(v)) for v in (t, s))
    known = torch.full((1, 2, 4), -torch.inf, dtype=torch.float64)
    known[..., 2] = 0.0
    visible = float(noise.posterior(known, z_BT, t, s)[0, 0, 2])
    assert visible == pytest.approx(alpha_s * (1 - alpha_t / alpha_s) / (1 - alpha_t), abs=1e-12)


def test_log_probs_never_gives_a_mask_and_carries_visible_tokens_over() -> None:
    noise = MaskedNoise(5, 4)
    z_BT = torch.tensor([[4, 2]])
    logp = noise.log_probs(torch.randn(1, 2, 5), z_BT)
    assert logp[0, 0, 4] == -torch.inf
    assert torch.allclose(logp[0, 0].exp().sum(), torch.tensor(1.0))
    assert logp[0, 1].exp().tolist() == [0, 0, 1, 0, 0]


def test_corrupt_masks_the_right_share_and_nothing_else() -> None:
    noise, rng = MaskedNoise(5, 4, schedule.Polynomial(2.0)), torch.Generator().manual_seed(0)
    x_BT = torch.randint(4, (2, 50_000), generator=rng)
    z_BT = noise.corrupt(x_BT, torch.tensor([0.3, 0.8], dtype=torch.float64), rng)
    assert torch.equal(z_BT[z_BT != 4], x_BT[z_BT != 4])
    assert (z_BT == 4).double().mean(-1).tolist() == pytest.approx([0.09, 0.64], abs=0.01)
    count_B, free_BT = torch.tensor([1, 7]), torch.ones(2, 20, dtype=torch.bool)
    free_BT[:, :10] = False
    z_BT = noise.corrupt_count(x_BT[:, :20], count_B, free_BT, rng)
    assert (z_BT == 4).sum(-1).tolist() == [1, 7]
    assert not (z_BT == 4)[:, :10].any()


def _estimates(tiny: Tiny, estimator: str, passes: int) -> Tensor:
    noise, rng = noise_of(tiny, "linear"), torch.Generator().manual_seed(0)
    predict = BayesDenoiser(tiny)
    rows = torch.multinomial(tiny.p_S, passes, replacement=True, generator=rng)
    x_BT, free_BT = tiny.x_ST[rows], torch.ones(passes, tiny.length, dtype=torch.bool)
    if estimator == "discrete":
        return loss.discrete(noise, predict, x_BT, free_BT, rng, 1000)
    bound = loss.continuous if estimator == "continuous" else loss.any_order
    return bound(noise, predict, x_BT, free_BT, rng)


@pytest.mark.parametrize("estimator", ["continuous", "any_order", "discrete"])
def test_monte_carlo_estimators_agree_with_the_entropy(estimator: str) -> None:
    tiny = Tiny(3, 3, seed=6)
    nats = _estimates(tiny, estimator, 20_000)
    error = float(nats.std() / len(nats) ** 0.5)
    assert float(nats.mean()) == pytest.approx(tiny.entropy(), abs=4 * error + 2e-3 * (estimator == "discrete"))
    assert error < 0.05


def test_equal_weights_are_the_mean_over_bell_shaped_counts() -> None:
    """sum over k of P(k) n 2/(n + 1) E[nats of all masks | k], with P(k) = F(k/n) - F((k - 1)/n), F(t) = 3 t^2 - 2 t^3."""
    tiny = Tiny(3, 3, seed=6)
    noise, n = noise_of(tiny, "linear"), tiny.length
    exact = 0.0
    for bits in range(1, 2**n):
        masked_T = torch.tensor([bits >> i & 1 for i in range(n)], dtype=torch.bool)
        k = int(masked_T.sum())
        low, high = (k - 1) / n, k / n
        share = (3 * high**2 - 2 * high**3) - (3 * low**2 - 2 * low**3)
        z_ST = torch.where(masked_T, tiny.mask_id, tiny.x_ST)
        nll_ST = noise.nll(BayesDenoiser(tiny)(z_ST, None), tiny.x_ST, z_ST)
        exact += share / math.comb(n, k) * 2 * n / (n + 1) * float((tiny.p_S * nll_ST.sum(-1)).sum())
    rng, passes = torch.Generator().manual_seed(0), 20_000
    x_BT = tiny.x_ST[torch.multinomial(tiny.p_S, passes, replacement=True, generator=rng)]
    nats = loss.any_order(noise, BayesDenoiser(tiny), x_BT, torch.ones_like(x_BT).bool(), rng, equal=True)
    assert float(nats.mean()) == pytest.approx(exact, abs=4 * float(nats.std() / passes**0.5))
    assert abs(exact - tiny.entropy()) > 0.05  # no bound: another weighting


@pytest.mark.parametrize("word", ["linear", "cosine"])
def test_equal_weights_of_a_network_that_reads_the_time_are_the_mean_over_bell_shaped_shares(word: str) -> None:
    """2 * integral of 6 s (1 - s) E[nats of all masks | share s] ds. A chance s^k (1 - s)^(n - k) of a set of k masks integrates to
    12 B(k + 2, n - k + 2), whatever the schedule. The network is told the time of that share."""
    tiny = Tiny(3, 3, seed=6)
    noise, bayes, n, exact = noise_of(tiny, word), BayesDenoiser(tiny), tiny.length, 0.0

    def predict(z_BT: Tensor, t_B: Tensor) -> Tensor:
        share_B = 1 - noise.schedule.alpha(t_B)
        told.append(((z_BT == tiny.mask_id).double().mean(-1) - share_B).mean() * len(z_BT) ** 0.5)
        return bayes(z_BT)

    for masked_T in tiny.patterns():
        k = int(masked_T.sum())
        z_ST = torch.where(masked_T, tiny.mask_id, tiny.x_ST)
        nll_ST = noise.nll(bayes(z_ST), tiny.x_ST, z_ST)
        chance = math.gamma(k + 2) * math.gamma(n - k + 2) / math.gamma(n + 4)
        exact += 12 * chance * float((tiny.p_S * nll_ST.sum(-1)).sum())
    told: list[Tensor] = []
    rng, passes = torch.Generator().manual_seed(0), 20_000
    x_BT = tiny.x_ST[torch.multinomial(tiny.p_S, passes, replacement=True, generator=rng)]
    nats = loss.equal_masks(noise, predict, x_BT, torch.ones_like(x_BT).bool(), rng)
    assert float(nats.mean()) == pytest.approx(exact, abs=4 * float(nats.std() / passes**0.5))
    assert abs(float(told[0])) < 4 * 0.3  # the share of masks has a standard deviation below that at every time
    assert abs(exact - tiny.entropy()) > 0.05  # no bound: another weighting


def test_bell_shaped_levels_follow_beta_2_2() -> None:
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    t = loss.bell(u)
    torch.testing.assert_close(3 * t**2 - 2 * t**3, u, atol=1e-12, rtol=0)


def test_integrating_the_time_out_lowers_the_variance() -> None:
    tiny = Tiny(3, 3, seed=6)
    assert _estimates(tiny, "any_order", 20_000).std() < 0.8 * _estimates(tiny, "continuous", 20_000).std()


def test_scores_that_are_ratios_have_the_bound_of_masks_and_others_cost_more() -> None:
    """Scores c times the true ratios cost c - 1 - log c at every mask, times the weight of t."""
    noise, rng = ScoreNoise(5, 4, LogLinear()), torch.Generator().manual_seed(0)
    z_BT, x_BT, t_B = torch.tensor([[4, 1, 4]]), torch.tensor([[0, 1, 3]]), torch.tensor([0.3], dtype=torch.float64)
    logp_BTV = noise.log_probs(torch.randn(1, 3, 5, generator=rng, dtype=torch.float64), z_BT)
    alpha, weight = float(noise.schedule.alpha(t_B)), float(-noise.schedule.dalpha(t_B) / (1 - noise.schedule.alpha(t_B)))
    plain_BT = noise.nelbo(logp_BTV, x_BT, z_BT, t_B)
    for c in (0.5, 1.0, 3.0):
        scores_BTV = logp_BTV + math.log(c * alpha / (1 - alpha))
        extra = weight * (c - 1 - math.log(c))
        found_BT = noise.score_entropy(scores_BTV, x_BT, z_BT, t_B)
        assert torch.allclose(found_BT, plain_BT + torch.tensor([[extra, 0, extra]]), atol=1e-12)
        assert torch.allclose(noise.log_probs(scores_BTV, z_BT), logp_BTV, atol=1e-12)


def test_autoregressive_loss_is_the_exact_likelihood() -> None:
    tiny = Tiny(3, 2, seed=7)
    noise = noise_of(tiny, "linear")
    joint = tiny.p_S.view(3, 3)

    def predict(z_BT: Tensor, t_B: Tensor) -> Tensor:
        assert (z_BT[:, 0] == tiny.mask_id).all()
        first = joint.sum(1).log().expand(len(z_BT), 3)
        second = (joint / joint.sum(1, keepdim=True)).log()[z_BT[:, 1]]
        logits = torch.stack([first, second], 1)
        return torch.cat([logits, torch.full_like(logits[..., :1], 3.0)], -1)  # a mask logit must not matter

    nats = loss.autoregressive(noise, predict, tiny.x_ST, torch.ones_like(tiny.x_ST, dtype=torch.bool))
    assert torch.allclose(nats, -tiny.p_S.log(), atol=1e-10)


def test_one_draw_spreads_the_levels_over_the_batch() -> None:
    t_B = loss.draw_levels(8, torch.Generator().manual_seed(3))
    assert torch.equal((t_B * 8).floor().sort().values, torch.arange(8, dtype=torch.float64))


def test_a_row_with_nothing_to_predict_costs_nothing() -> None:
    tiny = Tiny(3, 3)
    free_BT = torch.tensor([[True] * 3, [False] * 3])
    nats = loss.any_order(noise_of(tiny, "linear"), BayesDenoiser(tiny), tiny.x_ST[:2], free_BT, torch.Generator().manual_seed(0))
    assert nats[0] > 0
    assert nats[1] == 0


def test_nll_at_masks_alone_is_the_cross_entropy_and_has_its_gradient() -> None:
    noise, rng = MaskedNoise(6, 2), torch.Generator().manual_seed(0)
    logits_BTV = torch.randn(4, 7, 6, generator=rng, dtype=torch.float64, requires_grad=True)
    x_BT = torch.tensor([0, 1, 3, 4, 5])[torch.randint(5, (4, 7), generator=rng)]
    z_BT = torch.where(torch.rand(4, 7, generator=rng) < 0.5, 2, x_BT)
    slow_BT = noise.cross_entropy(noise.log_probs(logits_BTV, z_BT), x_BT, z_BT)
    quick_BT = noise.nll(logits_BTV, x_BT, z_BT)
    assert torch.allclose(quick_BT, slow_BT, atol=1e-12)
    assert bool((quick_BT[z_BT != 2] == 0).all())
    slow, quick = (torch.autograd.grad(nll_BT.sum(), logits_BTV)[0] for nll_BT in (slow_BT, quick_BT))
    assert torch.allclose(quick, slow, atol=1e-12)
    assert bool((noise.nll(logits_BTV, x_BT, x_BT) == 0).all())
