"""MATHS.md 2 to 5 for noise that replaces tokens: kernels, rates, bounds, posteriors, the two meanings of a head."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dlm.noise import loss, process
from dlm.noise.masked import MaskedNoise
from dlm.noise.replacement import ReplacementNoise
from oracle import ReplacementBayes, Tiny, dense

VOCAB, MASK = 4, 4  # data tokens 0..3, then the mask
SETTINGS: dict[str, dict[str, Any]] = {
    "uniform": {"process": "uniform"},
    "hybrid": {"process": "hybrid", "share": 0.5},
    "hybrid-low": {"process": "hybrid", "share": 0.1},
    "gidd": {"process": "gidd", "p_uniform": 0.2},
    "gidd-round": {"process": "gidd", "p_uniform": 0.3, "gamma": 2.0},
    "semantic": {"process": "semantic", "clusters": [0, 1, 0, 1, 2]},
    "semantic-3": {"process": "semantic", "clusters": [0, 1, 1, 1, 2], "lead": 3.0},
    "semantic-mask": {"process": "semantic", "clusters": [0, 1, 0, 1, 2], "to": "mask"},
}


def make(name: str, schedule: str = "linear", vocab: int = VOCAB, **more: Any) -> ReplacementNoise:
    settings = SETTINGS[name] | {"schedule": schedule} | more
    if "clusters" in settings:
        settings["clusters"] = [c % 2 for c in settings["clusters"][:vocab]] + [2]
    noise = process.make(settings, vocab + 1, vocab)
    assert isinstance(noise, ReplacementNoise)
    return noise


def at(t: float) -> Tensor:
    return torch.tensor([t], dtype=torch.float64)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial:2"])
@pytest.mark.parametrize("name", SETTINGS)
def test_kernels_are_what_the_definition_says(name: str, schedule: str) -> None:
    noise, hot = make(name, schedule), torch.eye(VOCAB + 1, dtype=torch.float64)[None, :VOCAB]
    for t in (0.0, 0.2, 0.6, 0.99):
        mixed = noise._given(noise.kernel(at(t)), hot)[0]
        assert torch.allclose(mixed, dense(noise, t)[:VOCAB], atol=1e-12)
        for z in range(VOCAB + 1):
            fits = noise._likelihood(noise.kernel(at(t)), torch.tensor([[z]]), torch.float64)[0, 0]
            assert torch.allclose(fits[:VOCAB], dense(noise, t)[:VOCAB, z], atol=1e-12)


@pytest.mark.parametrize("name", SETTINGS)
def test_moves_compose_and_rates_drive_them(name: str) -> None:
    """q_s move(s, t) = q_t, and d q_t / dt = q_t R_t with the rates that the bound uses."""
    noise, eye = make(name, "cosine"), torch.eye(VOCAB + 1, dtype=torch.float64)[None]
    s, t, h = 0.3, 0.7, 1e-6
    move = noise._given(noise.between(at(s), at(t)), eye)[0]
    assert torch.allclose((dense(noise, s) @ move)[:VOCAB], dense(noise, t)[:VOCAB], atol=1e-12)
    rate = noise.rate(at(t))
    jumps = rate.local_B[0] * noise._smooth(eye)[0] + rate.prior_BV[0]
    jumps = jumps - torch.diag(jumps.sum(-1))
    slope = (dense(noise, t + h) - dense(noise, t - h)) / (2 * h)
    assert torch.allclose((dense(noise, t) @ jumps)[:VOCAB], slope[:VOCAB], atol=1e-7)
    assert (rate.prior_BV >= 0).all()
    assert (rate.local_B >= 0).all()


def dense_bound(noise: Any, mu_V: Tensor, x: int, z: int, t: float) -> float:
    """MATHS.md 4, term by term."""
    q, rate = dense(noise, t), noise.rate(at(t))
    cluster = torch.tensor(noise.clusters or range(VOCAB + 1))
    model = mu_V @ q
    total = 0.0
    for y in range(VOCAB + 1):
        near = float(cluster[y] == cluster[z]) / int((cluster == cluster[z]).sum())
        into = float(rate.prior_BV[0, z]) + float(rate.local_B[0]) * near
        g, gm = float(q[x, y] / q[x, z]), float(model[y] / model[z])
        if y != z and into > 0:
            total += into * (gm - g + (g * (math.log(g) - math.log(gm)) if g > 0 else 0.0))
    return total


@pytest.mark.parametrize("name", SETTINGS)
def test_the_closed_form_is_the_dense_sum(name: str) -> None:
    noise, rng = make(name), torch.Generator().manual_seed(0)
    for t in (0.001, 0.1, 0.5, 0.9, 0.999):
        for x, z in itertools.product(range(VOCAB), range(VOCAB + 1)):
            if dense(noise, t)[x, z] == 0:
                continue
            logits = torch.randn(1, 1, VOCAB + 1, dtype=torch.float64, generator=rng) * 3
            logp = noise.log_probs(logits, torch.tensor([[z]]), at(t))
            value = noise.nelbo(logp, torch.tensor([[x]]), torch.tensor([[z]]), at(t))
            assert float(value) == pytest.approx(dense_bound(noise, logp.exp()[0, 0], x, z, t), rel=1e-8, abs=1e-9)
            assert float(value) >= 0


def test_uniform_is_udlm_equation_18_and_hybrid_is_gidd() -> None:
    """The two published closed forms, each on its own."""
    rng, t = torch.Generator().manual_seed(1), 0.4
    for x, z in itertools.product(range(VOCAB), range(VOCAB)):
        noise = make("uniform")
        logp = noise.log_probs(torch.randn(1, 1, VOCAB + 1, dtype=torch.float64, generator=rng), torch.tensor([[z]]), at(t))
        mu, alpha, dalpha, hot = logp.exp()[0, 0, :VOCAB], 1 - t, -1.0, torch.eye(VOCAB, dtype=torch.float64)[x]
        xbar, mbar = VOCAB * alpha * hot + 1 - alpha, VOCAB * alpha * mu + 1 - alpha
        inner = VOCAB / xbar[z] - VOCAB / mbar[z] - (xbar / xbar[z] * (mbar[z] * xbar / (mbar * xbar[z])).log()).sum()
        udlm = dalpha / (VOCAB * alpha) * inner
        assert float(noise.nelbo(logp, torch.tensor([[x]]), torch.tensor([[z]]), at(t))) == pytest.approx(float(udlm), abs=1e-10)
    for x, z in itertools.product(range(VOCAB), range(VOCAB + 1)):
        noise = make("hybrid")
        logp = noise.log_probs(torch.randn(1, 1, VOCAB + 1, dtype=torch.float64, generator=rng), torch.tensor([[z]]), at(t))
        q, model = dense(noise, t)[x], logp.exp()[0, 0] @ dense(noise, t)
        itakura = q[z] / model[z] - (q[z] / model[z]).log() - 1
        weight = float(noise.rate(at(t)).prior_BV[0, z] / q[z])
        gidd = weight * float((q * (q / model).log()).sum() + itakura)
        assert float(noise.nelbo(logp, torch.tensor([[x]]), torch.tensor([[z]]), at(t))) == pytest.approx(gidd, abs=1e-10)


def expected(noise: Any, tiny: Tiny, t_N: Tensor, s_N: Tensor | None = None, *, network: str = "leave-one-out") -> Tensor:
    """E over x ~ p and z ~ q_t of the integrand (or of the step t -> s) at every time, enumerated, with the Bayes denoiser `network`."""
    z_ZT = torch.tensor(list(itertools.product(range(tiny.vocab + 1), repeat=tiny.length)))
    z_RT, t_R = z_ZT.repeat(len(t_N), 1), t_N.repeat_interleave(len(z_ZT))
    logp_RTV = noise.log_probs(ReplacementBayes(tiny, partial(dense, noise), network)(z_RT, t_R), z_RT, t_R)
    kernel_NXZ, total_N = dense(noise, t_N), torch.zeros(len(t_N), dtype=torch.float64)
    for x_T, p in zip(tiny.x_ST, tiny.p_S, strict=True):
        x_RT, chance_NZ = x_T.expand_as(z_RT), kernel_NXZ[:, x_T, z_ZT].prod(-1)
        if s_N is None:
            nats_RT = noise.nelbo(logp_RTV, x_RT, z_RT, t_R)
        else:
            nats_RT = noise.nelbo_step(logp_RTV, x_RT, z_RT, t_R, s_N.repeat_interleave(len(z_ZT)))
        nats_NZ = nats_RT.sum(-1).view(len(t_N), -1)
        total_N += p * torch.where(chance_NZ > 0, chance_NZ * nats_NZ, 0.0).sum(-1)
    return total_N


def integrated(noise: Any, tiny: Tiny, points: int = 32, network: str = "leave-one-out") -> float:
    """Gauss-Legendre in u with t = sin^4, for roots of t, times its logarithm, and of 1 - t."""
    nodes, weights = (torch.tensor(part) for part in np.polynomial.legendre.leggauss(points))
    u_N = math.pi / 4 * (nodes + 1)
    slope_N = math.pi * u_N.sin() ** 3 * u_N.cos()
    return float((weights * slope_N * expected(noise, tiny, u_N.sin() ** 4, network=network)).sum())


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_integrated_bound_is_the_entropy_with_the_bayes_denoiser(name: str, schedule: str) -> None:
    tiny = Tiny(3, 2, seed=1)
    coarse, fine = (integrated(make(name, schedule, vocab=3), tiny, points) for points in (6, 40))
    assert fine == pytest.approx(tiny.entropy(), abs=2e-4)
    assert abs(fine - tiny.entropy()) <= abs(coarse - tiny.entropy()) + 1e-9


@pytest.mark.parametrize("name", SETTINGS)
def test_each_head_needs_its_own_network(name: str) -> None:
    """The posterior head with the posterior network gives the entropy too; mixed up, both are worse."""
    tiny = Tiny(3, 2, seed=1)
    right = integrated(make(name, vocab=3, head="posterior"), tiny, network="posterior")
    assert right == pytest.approx(tiny.entropy(), abs=2e-4)
    for head, network in (("leave-one-out", "posterior"), ("posterior", "leave-one-out")):
        assert integrated(make(name, vocab=3, head=head), tiny, network=network) > tiny.entropy() + 0.02


@pytest.mark.parametrize("name", SETTINGS)
def test_denoised_counts_the_token_that_stands_there(name: str) -> None:
    """With either head and its network: mu is p(x_i | z without z_i), and `denoised` makes p(x_i | z) of it."""
    tiny, words = Tiny(3, 2, seed=5), ("leave-one-out", "posterior")
    states = torch.tensor(list(itertools.product(range(4), repeat=2)))
    for head, t in itertools.product(words, (0.1, 0.6, 0.95)):
        noise, times = make(name, vocab=3, head=head), at(t).expand(len(states))
        kernel = dense(noise, t)
        seen = (tiny.p_S[:, None] * kernel[tiny.x_ST[:, None], states].prod(-1)).sum(0) > 0
        laws = {word: ReplacementBayes(tiny, partial(dense, noise), word)(states, times)[seen] for word in words}
        expected = laws["leave-one-out"].exp()
        if head == "posterior":  # says nothing about tokens that cannot have become z_i
            expected = expected * (kernel[:, states[seen]].permute(1, 2, 0) > 0)
        mu = noise.log_probs(laws[head], states[seen], times[seen])
        assert torch.allclose(mu.exp(), expected / expected.sum(-1, keepdim=True), atol=1e-9)
        assert torch.allclose(noise.denoised(mu, states[seen], times[seen]).exp(), laws["posterior"].exp(), atol=1e-9)
        assert (laws["posterior"].exp() - laws["leave-one-out"].exp()).abs().max() > 0.01


@pytest.mark.parametrize("name", SETTINGS)
def test_the_discrete_bound_decreases_to_the_continuous_one(name: str) -> None:
    tiny, noise = Tiny(3, 2, seed=2), make(name, "cosine", vocab=3)
    grids = [torch.linspace(0, 1, n + 1, dtype=torch.float64) for n in (1, 2, 4, 8, 32)]
    bounds = [float(expected(noise, tiny, grid[1:], grid[:-1]).sum()) for grid in grids]
    assert all(a > b for a, b in itertools.pairwise(bounds)), bounds
    assert bounds[-1] > tiny.entropy()
    assert bounds[-1] - tiny.entropy() < 0.15 * (bounds[0] - tiny.entropy())


@pytest.mark.parametrize("name", SETTINGS)
def test_posteriors_are_bayes_rule_and_compose_for_a_known_token(name: str) -> None:
    noise, x, (r, s, t) = make(name), 2, (0.2, 0.5, 0.9)
    known = torch.full((1, 1, VOCAB + 1), -torch.inf, dtype=torch.float64)
    known[..., x] = 0
    for z in range(VOCAB + 1):
        if dense(noise, t)[x, z] == 0:
            continue
        at_s = noise.posterior(known, torch.tensor([[z]]), at(t), at(s))[0, 0]
        bayes = dense(noise, s)[x] * noise._given(noise.between(at(s), at(t)), torch.eye(VOCAB + 1, dtype=torch.float64)[None])[0][:, z]
        assert torch.allclose(at_s, bayes / bayes.sum(), atol=1e-12)
        at_r = noise.posterior(known, torch.tensor([[z]]), at(t), at(r))[0, 0]
        moves = torch.stack([noise.posterior(known, torch.tensor([[y]]), at(s), at(r))[0, 0] for y in range(VOCAB + 1)])
        assert torch.allclose(at_s @ moves.nan_to_num(), at_r, atol=1e-10)


def test_gidd_without_uniform_noise_is_masked() -> None:
    rng = torch.Generator().manual_seed(0)
    logits, t, z_BT = torch.randn(1, 3, VOCAB + 1, dtype=torch.float64, generator=rng), at(0.3), torch.tensor([[0, MASK, MASK]])
    x_BT = torch.tensor([[0, 1, 2]])
    mine, masks = (
        n.nelbo(n.log_probs(logits, z_BT, t), x_BT, z_BT, t) for n in (make("gidd", p_uniform=0.0), MaskedNoise(VOCAB + 1, MASK))
    )
    assert torch.allclose(mine, masks, atol=1e-12)


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5])
def test_half_way_gidd_has_its_share_of_uniform_noise(p: float) -> None:
    """The paper's definition of p_u: of all tokens at t = 1/2, the share that uniform noise has replaced."""
    uniform_BV = make("gidd", p_uniform=p).kernel(at(0.5)).prior_BV[:, :MASK]
    assert float(uniform_BV.sum()) == pytest.approx(p)


def test_hybrid_ends_are_masked_and_uniform_noise() -> None:
    rng = torch.Generator().manual_seed(0)
    logits, t = torch.randn(1, 3, VOCAB + 1, dtype=torch.float64, generator=rng), at(0.3)
    x_BT = torch.tensor([[0, 1, 2]])
    for share, other, z_BT in (
        (0.0, MaskedNoise(VOCAB + 1, MASK), torch.tensor([[0, MASK, MASK]])),
        (1.0, make("uniform"), torch.tensor([[0, 3, 1]])),
    ):
        noise = make("hybrid", share=share)
        mine, theirs = (n.nelbo(n.log_probs(logits, z_BT, t), x_BT, z_BT, t) for n in (noise, other))
        assert torch.allclose(mine, theirs, atol=1e-12)
        for s in (0.0, 0.1):
            mine, theirs = (n.posterior(n.log_probs(logits, z_BT, t), z_BT, t, at(s)) for n in (noise, other))
            assert torch.allclose(mine, theirs, atol=1e-12)


@pytest.mark.parametrize("name", SETTINGS)
def test_draws_follow_the_kernels(name: str) -> None:
    noise, rng, count = make(name), torch.Generator().manual_seed(0), 40_000
    for x in (0, 3):
        x_BT = torch.full((1, count), x)
        u_BT = torch.rand(1, count, generator=rng, dtype=torch.float64)
        for drawn, law in (
            (noise.corrupt(x_BT, at(0.6), rng), dense(noise, 0.6)[x]),
            (
                noise.renoise(x_BT, at(0.2), at(0.7), u_BT),
                noise._given(noise.between(at(0.2), at(0.7)), torch.eye(VOCAB + 1).double()[None])[0][x],
            ),
            (noise.prior(u_BT), dense(noise, 1.0)[0]),
        ):
            share = torch.bincount(drawn[0], minlength=VOCAB + 1).double() / count
            assert torch.allclose(share, law, atol=0.012)
            assert not share[law == 0].any()


@pytest.mark.parametrize("schedule", ["geometric:0.05,4", "log-linear:0.1"])
@pytest.mark.parametrize("name", SETTINGS)
def test_end_terms_keep_the_bound_above_the_entropy(name: str, schedule: str) -> None:
    tiny, noise = Tiny(3, 2, seed=3), make(name, schedule, vocab=3)
    ends = 0.0
    prior, q0 = noise.prior_cost(tiny.x_ST), dense(noise, 0.0)
    ends += float((tiny.p_S[:, None] * prior).sum())
    states = torch.tensor(list(itertools.product(range(4), repeat=2)))
    zero = torch.zeros(len(states), dtype=torch.float64)
    logp = noise.log_probs(ReplacementBayes(tiny, partial(dense, noise))(states, zero), states, zero)
    for x_T, p in zip(tiny.x_ST, tiny.p_S, strict=True):
        nll = noise.cross_entropy(logp, x_T.expand_as(states), states, zero).sum(-1)
        chance = q0[x_T, states].prod(-1)
        ends += float(p * (chance * nll)[chance > 0].sum())
    assert tiny.entropy() - 1e-6 < integrated(noise, tiny, 60) + ends < tiny.entropy() + 0.5


@pytest.mark.parametrize("name", SETTINGS)
def test_the_monte_carlo_estimators_agree_with_the_entropy(name: str) -> None:
    tiny, noise, rng = Tiny(3, 2, seed=4), make(name, vocab=3), torch.Generator().manual_seed(0)
    rows = torch.multinomial(tiny.p_S, 20_000, replacement=True, generator=rng)
    x_BT, free_BT = tiny.x_ST[rows], torch.ones(20_000, 2, dtype=torch.bool)
    bayes = ReplacementBayes(tiny, partial(dense, noise))
    exact = loss.continuous(noise, bayes, x_BT, free_BT, rng)
    assert float(exact.mean()) == pytest.approx(tiny.entropy(), abs=4 * float(exact.std()) / 20_000**0.5)
    counted = loss.counted(noise, bayes, x_BT, free_BT, rng)
    assert float(counted.mean()) == pytest.approx(tiny.entropy(), abs=4 * float(counted.std()) / 20_000**0.5)
    assert float(counted.std()) < float(exact.std())
    stepped = loss.discrete(noise, bayes, x_BT, free_BT, rng, 16)
    above = float(stepped.mean()) - tiny.entropy()
    assert -4 * float(stepped.std()) / 20_000**0.5 < above < 0.3


@pytest.mark.parametrize("name", SETTINGS)
def test_a_count_is_of_free_positions_and_its_level_is_the_likely_one(name: str) -> None:
    """Given k of n noised, 1 - keep is Beta(k, n - k + 1); the weight turns means over it into integrals over t."""
    noise, rng, rows = make(name, "cosine"), torch.Generator().manual_seed(0), 4000
    x_BT = torch.randint(VOCAB, (rows, 6), generator=rng)
    free_BT = torch.rand(rows, 6, generator=rng) < 0.7
    free_BT[:, 0] = True
    n_B = free_BT.sum(-1)
    count_B = (torch.rand(rows, generator=rng) * (n_B + 1)).long()
    z_BT, t_B, weight_B = noise.corrupt_count(x_BT, count_B, free_BT, rng)
    changed_BT = z_BT != x_BT
    assert not changed_BT[~free_BT].any()
    assert (changed_BT.sum(-1) <= count_B).all()
    assert not changed_BT[count_B == 0].any()
    share_B, some_B = 1 - noise.kernel(t_B).keep_B, count_B > 0
    mean_B = count_B / (n_B + 1)
    spread_B = (mean_B * (1 - mean_B) / (n_B + 2)).sqrt()
    z_B = ((share_B - mean_B) / spread_B)[some_B]
    assert abs(float(z_B.mean())) < 4 / len(z_B) ** 0.5
    assert float(z_B.std()) == pytest.approx(1.0, abs=0.06)
    assert float(weight_B.mean()) == pytest.approx(1.0, abs=4 * float(weight_B.std()) / rows**0.5)  # the integral of 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"process": "pink"}, "unknown noise 'pink'; known: masked, uniform, semantic, hybrid, gidd, score"),
        ({"process": "hybrid", "share": 2}, "must lie in 0 .. 1"),
        ({"process": "gidd", "p_uniform": 1}, "must lie in 0 .. 1"),
        ({"process": "gidd", "gamma": 3}, "above 0 and at most 2"),
        ({"process": "uniform", "share": 0.5}, "unexpected keyword"),
        ({"process": "uniform", "head": "odd"}, "unknown head 'odd'; known: leave-one-out, posterior"),
        ({"process": "semantic"}, "0 tokens have a cluster, the vocabulary has 5 with the mask"),
        ({"process": "semantic", "clusters": [0, 0, 2, 2, 3]}, "without a gap"),
        ({"process": "semantic", "clusters": [0, 0, 1, 1, 1]}, "the mask shares a cluster"),
        ({"process": "semantic", "clusters": [0, 0, 1, 1, 2], "lead": 0.5}, "at least 1"),
        ({"process": "semantic", "clusters": [0, 0, 1, 1, 2], "to": "nothing"}, "unknown prior"),
    ],
)
def test_settings_that_cannot_be_are_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        process.make(settings, VOCAB + 1, MASK)


def test_words() -> None:
    assert process.parse("hybrid:0.3") == {"process": "hybrid", "share": 0.3}
    assert process.parse("uniform") == {"process": "uniform"}
    for word in ("uniform:2", "hybrid:x", "magic"):
        with pytest.raises(ValueError, match=word.partition(":")[0]):
            process.parse(word)
