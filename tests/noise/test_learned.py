"""Noise with learned weights: exact bounds for any weights, the gradient against finite differences, posteriors that compose, samplers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dlm.noise import loss, process
from dlm.noise.genmd4 import GenMD4Noise
from dlm.noise.learned import training_loss
from dlm.noise.masked import MaskedNoise
from dlm.noise.ordered import OrderedNoise
from dlm.sampling.diffusion.any_order_speculative import AnyOrderSpeculativeSampler
from dlm.sampling.diffusion.loop import DiffusionSampler
from dlm.sampling.diffusion.revealing import Revealing
from dlm.sampling.diffusion.unmasking import Ancestral, FirstHitting
from dlm.sampling.draw import generators
from dlm.trajectory import Canvas
from oracle import BayesDenoiser, ReplacementBayes, Tiny, chi_square_of_counts, chi_square_p, dense

TINY = Tiny(3, 3, seed=1)
WEIGHTS = {"ordered": (0.4, 2.5, 1.0), "genmd4": (0.5, 2.0, 1.0, 1.0)}  # the mean of the logarithms is 0
NAMES = list(WEIGHTS)
Predict = Callable[[Tensor, Tensor], Tensor]


def noise_of(name: str, weights: tuple[float, ...] = ()) -> Any:
    return process.make({"process": name, "weights": list(weights or WEIGHTS[name])}, TINY.vocab + 1, TINY.mask_id)


def bayes(noise: Any) -> Predict:
    """The exact leave-one-out prediction."""
    return BayesDenoiser(TINY) if isinstance(noise, OrderedNoise) else ReplacementBayes(TINY, partial(dense, noise))


def wrong(z_BT: Tensor, t_B: Tensor) -> Tensor:
    """A guess that depends on what it sees, and not on the time."""
    table_KV = torch.randn(17, TINY.vocab + 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    key_BT = (z_BT * torch.tensor([1, 5, 11])).sum(-1, keepdim=True) + torch.tensor([0, 3, 7])
    return table_KV[key_BT % 17]


NODES, NODE_WEIGHTS = (torch.tensor(part) for part in np.polynomial.legendre.leggauss(48))
PATTERN_MT = TINY.patterns().repeat_interleave(len(TINY.x_ST), 0)
X_MT = TINY.x_ST.repeat(len(TINY.patterns()), 1)
Z_MT = torch.where(PATTERN_MT, TINY.mask_id, X_MT)


def enumerated(noise: Any, predict: Predict) -> float:
    """The bound in nats a sequence: all texts and masks at Gauss-Legendre times t = u^8, at which small weights are smooth.

    Below 1e-13, where 1 - alpha_t has no digits left, the rates are those of 1e-13.
    """
    weights, u_N = torch.tensor(noise.weights, dtype=torch.float64), (NODES + 1) / 2
    exponent_MT = weights.expand(len(X_MT), -1) if isinstance(noise, OrderedNoise) else weights[X_MT]
    share_NMT = u_N[:, None, None] ** (8 * exponent_MT)
    chance_NM = torch.where(PATTERN_MT, share_NMT, 1 - share_NMT).prod(-1) * TINY.p_S.repeat(len(TINY.patterns()))
    x, z, t = X_MT.repeat(len(u_N), 1), Z_MT.repeat(len(u_N), 1), (u_N**8).clamp(min=1e-13).repeat_interleave(len(X_MT))
    nats_NM = noise.nelbo(noise.log_probs(predict(z, t), z, t), x, z, t).sum(-1).view(len(u_N), -1)
    return float((NODE_WEIGHTS / 2 * 8 * u_N**7 * (chance_NM * nats_NM).sum(-1)).sum())


def by_orders(weights: tuple[float, ...], predict: Predict) -> float:
    """The mean over all orders of the race of the loss of decoding in that order, in nats a sequence."""
    noise, total = MaskedNoise(TINY.vocab + 1, TINY.mask_id), 0.0
    for order in itertools.permutations(range(TINY.length)):
        chance, left, z_ST = 1.0, sum(weights), torch.full_like(TINY.x_ST, TINY.mask_id)
        nats_S = torch.zeros(len(z_ST), dtype=torch.float64)
        for i in order:
            chance, left = chance * weights[i] / left, left - weights[i]
            nats_S += noise.cross_entropy(noise.log_probs(predict(z_ST, nats_S), z_ST), TINY.x_ST, z_ST)[:, i]
            z_ST[:, i] = TINY.x_ST[:, i]
        total += chance * float((TINY.p_S * nats_S).sum())
    return total


def texts(rows: int) -> tuple[Tensor, Tensor]:
    x_BT = TINY.x_ST[torch.multinomial(TINY.p_S, rows, True, generator=torch.Generator().manual_seed(0))]
    return x_BT, torch.ones_like(x_BT, dtype=torch.bool)


def assert_mean(values: Tensor, expected: float | Tensor) -> None:
    """Along the first axis, within four standard errors."""
    error = values.std(0) / len(values) ** 0.5
    assert (abs(values.mean(0) - expected) < 4 * error).all(), (values.mean(0), expected, error)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_the_bayes_denoiser_reaches_the_entropy_with_any_weights(name: str, seed: int) -> None:
    drawn = torch.randn(len(WEIGHTS[name]), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise = noise_of(name, tuple((0.4 * drawn).exp().tolist()))
    assert enumerated(noise, bayes(noise)) == pytest.approx(TINY.entropy(), abs=2e-5)
    assert enumerated(noise, wrong) > TINY.entropy() + 0.1


def test_orders_and_times_are_the_same_bound() -> None:
    noise = noise_of("ordered")
    assert by_orders(noise.weights, wrong) == pytest.approx(enumerated(noise, wrong), abs=2e-5)
    assert by_orders(noise.weights, bayes(noise)) == pytest.approx(TINY.entropy(), abs=1e-12)
    assert by_orders((1.0, 1.0, 1.0), wrong) != pytest.approx(by_orders(noise.weights, wrong), abs=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_weights_to_a_power_are_the_same_bound(name: str) -> None:
    one, other = (noise_of(name, tuple(w * c for w in WEIGHTS[name])) for c in (1.0, 1.7))
    assert enumerated(one, wrong) == pytest.approx(enumerated(other, wrong), abs=2e-5)
    live = torch.tensor(WEIGHTS[name], dtype=torch.float64).log()
    assert torch.allclose(*(one.learning(live + shift).weight_N(len(live), live) for shift in (0.0, 3.0)))


@pytest.mark.parametrize("name", NAMES)
def test_estimators_have_the_bound_as_their_mean(name: str) -> None:
    noise, (x_BT, free_BT) = noise_of(name), texts(6000)
    expected, rng = enumerated(noise, wrong), torch.Generator().manual_seed(1)
    estimators: list[Callable[..., Tensor]] = [loss.continuous, loss.any_order] if name == "ordered" else [loss.continuous]
    for estimator in estimators:
        assert_mean(estimator(noise, wrong, x_BT, free_BT, rng), expected)
    for equal in (False, True):
        assert_mean(noise.draw(wrong, x_BT, free_BT, rng, loss.draw_levels(len(x_BT), rng), equal=equal).bound_B, expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_discrete_bound_falls_towards_the_continuous_one(name: str) -> None:
    noise, (x_BT, free_BT) = noise_of(name), texts(20_000)
    few, many = (
        loss.discrete(noise, bayes(noise), x_BT, free_BT, torch.Generator().manual_seed(1), steps).mean().item() for steps in (2, 128)
    )
    assert few > many + 0.1
    assert many == pytest.approx(TINY.entropy(), abs=0.05)


def gradients(noise: Any, predict: Predict, *, equal: bool, batches: int = 30, rows: int = 300) -> Tensor:
    """Gradients of the log-weights (batches, N), as training takes them."""
    found = []
    for seed in range(batches):
        live = torch.tensor(noise.weights, dtype=torch.float64).log().requires_grad_()
        rng = torch.Generator().manual_seed(seed)
        x_BT = TINY.x_ST[torch.multinomial(TINY.p_S, rows // 2, True, generator=rng)].repeat_interleave(2, 0)
        u_B = loss.draw_levels(rows // 2, rng).repeat_interleave(2, 0)
        training_loss(noise.learning(live), predict, x_BT, torch.ones_like(x_BT).bool(), rng, u_B, equal=equal).mean().backward()
        assert live.grad is not None
        found.append(live.grad)
    return torch.stack(found)


def differences(noise: Any, predict: Predict, step: float = 1e-3) -> Tensor:
    """Of the enumerated bound, the guess held, with respect to the log-weights of that process with their mean fixed."""
    log_N = torch.tensor(noise.weights, dtype=torch.float64).log()
    slope = []
    for n in range(len(log_N)):
        ends = []
        for sign in (1, -1):
            moved = log_N.clone()
            moved[n] += sign * step
            ends.append(enumerated(noise_of(name_of(noise), noise.learning(moved).fixed()), predict))
        slope.append((ends[0] - ends[1]) / (2 * step))
    return torch.tensor(slope, dtype=torch.float64)


def name_of(noise: Any) -> str:
    return process.name_of(type(noise))


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_the_enumerated_bound(name: str, equal: bool) -> None:
    noise = noise_of(name)
    expected = differences(noise, wrong)
    assert expected.abs().max() > 0.05
    assert abs(expected.sum()) < 1e-4  # along the gauge nothing changes
    found = gradients(noise, wrong, equal=equal)
    assert (found[:, TINY.mask_id :] == 0).all()  # the weight of the mask has no effect
    assert_mean(found[:, : TINY.mask_id], expected[: TINY.mask_id])


@pytest.mark.parametrize("name", NAMES)
def test_the_bayes_denoiser_leaves_no_gradient(name: str) -> None:
    noise = noise_of(name)
    predict = bayes(noise)
    assert differences(noise, predict).abs().max() < 2e-4
    assert_mean(gradients(noise, predict, equal=False)[:, :3], 0.0)


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_network_learns_the_exact_posterior_under_either_weighting(name: str, equal: bool) -> None:
    """The gradient of its loss with respect to the logits at every input vanishes for the exact posterior, and for no other guess."""
    noise, keys = noise_of(name), (TINY.vocab + 1) ** torch.arange(TINY.length)

    def slopes(guess: Predict, batches: int = 30, rows: int = 1000) -> Tensor:
        """Along random directions of all logits, (batches, 16)."""
        found, along = [], torch.randn(16, 64, TINY.length, TINY.vocab, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for seed in range(batches):
            moved_KTV = torch.zeros(64, TINY.length, TINY.vocab + 1, dtype=torch.float64, requires_grad=True)
            rng = torch.Generator().manual_seed(seed)
            x_BT = TINY.x_ST[torch.multinomial(TINY.p_S, rows, True, generator=rng)]
            predict = partial(lambda z, t, moved: guess(z, t) + moved[(z * keys).sum(-1)], moved=moved_KTV)
            drawn = noise.draw(predict, x_BT, torch.ones_like(x_BT).bool(), rng, loss.draw_levels(rows, rng), equal=equal)
            slope_KTV = torch.autograd.grad(drawn.network_B.mean(), moved_KTV)[0][..., : TINY.vocab]
            found.append((along * slope_KTV).flatten(1).sum(-1))
        return torch.stack(found)

    assert_mean(slopes(bayes(noise)), 0.0)
    found = slopes(wrong)
    assert (found.mean(0).abs() > 20 * found.std(0) / len(found) ** 0.5).any()


def test_a_second_draw_as_the_baseline_lowers_the_variance() -> None:
    noise = noise_of("ordered")
    paired = gradients(noise, wrong, equal=False)
    alone = []
    for seed in range(len(paired)):
        live, rng = torch.tensor(noise.weights, dtype=torch.float64).log().requires_grad_(), torch.Generator().manual_seed(seed)
        x_BT = TINY.x_ST[torch.multinomial(TINY.p_S, 300, True, generator=rng)]
        drawn = noise.learning(live).draw(wrong, x_BT, torch.ones_like(x_BT).bool(), rng, loss.draw_levels(300, rng), equal=False)
        (drawn.bound_B + drawn.bound_B.detach() * drawn.log_q_B).mean().backward()
        assert live.grad is not None
        alone.append(live.grad)
    assert paired.var(0).sum() < torch.stack(alone).var(0).sum() / 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("t", "s", "r"), [(1.0, 0.6, 0.1), (0.8, 0.5, 0.3)])
def test_posteriors_compose(name: str, t: float, s: float, r: float) -> None:
    """With one prediction for the whole way, t -> s -> r is t -> r, from every state."""
    noise = noise_of(name)
    z_BT = torch.tensor([[3, 3, 3], [3, 1, 3], [0, 2, 3]])
    logp_1TV = noise.log_probs(wrong(z_BT, torch.ones(3)), z_BT, torch.ones(3))
    t_B, s_B, r_B = (torch.full((3,), x, dtype=torch.float64) for x in (t, s, r))
    step_BTV = noise.posterior(logp_1TV, z_BT, t_B, s_B)
    assert torch.allclose(step_BTV.sum(-1), torch.ones(3, 3, dtype=torch.float64))
    masked_BTV = noise.posterior(logp_1TV, z_BT, s_B, r_B)
    stays_BT1 = torch.where(z_BT == 3, step_BTV[..., 3], 0.0)[..., None]
    shown_BTV = step_BTV * (torch.arange(4) != 3)
    way_BTV = torch.where((z_BT == 3)[..., None], shown_BTV + stays_BT1 * masked_BTV, step_BTV)
    assert torch.allclose(way_BTV, noise.posterior(logp_1TV, z_BT, t_B, r_B), atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_noise_on_noise_is_noise(name: str) -> None:
    noise, rows = noise_of(name), 20_000
    x_BT = torch.tensor([[0, 1, 2]]).expand(rows, -1)
    rng, s_B, t_B = torch.Generator().manual_seed(0), *(torch.full((rows,), t, dtype=torch.float64) for t in (0.3, 0.7))
    once_BT = noise.corrupt(x_BT, t_B, rng)
    twice_BT = noise.renoise(noise.corrupt(x_BT, s_B, rng), s_B, t_B, torch.rand(x_BT.shape, generator=rng))
    expected_T = torch.tensor([0.7**w for w in noise.weights[:3]])
    for z_BT in (once_BT, twice_BT):
        assert torch.allclose((z_BT == 3).double().mean(0), expected_T.double(), atol=0.015)


def test_equal_weights_are_masked_noise_to_the_bit() -> None:
    x_BT, free_BT = texts(400)
    free_BT = free_BT.clone()
    free_BT[::3, 0] = False
    masked = MaskedNoise(TINY.vocab + 1, TINY.mask_id)
    for ordered in (OrderedNoise(4, 3), OrderedNoise(4, 3, weights=(1.0, 1.0, 1.0)), OrderedNoise(4, 3).learning(torch.zeros(3).double())):
        for equal in (False, True):
            one, other = (
                loss.any_order(noise, lambda z, t: wrong(z, t).float(), x_BT, free_BT, torch.Generator().manual_seed(1), equal=equal)
                for noise in (masked, ordered)
            )
            assert torch.equal(one, other)
        rng = torch.Generator().manual_seed(1)
        drawn = ordered.draw(lambda z, t: wrong(z, t).float(), x_BT, free_BT, rng, loss.draw_levels(400, rng), equal=False)
        one = loss.any_order(masked, lambda z, t: wrong(z, t).float(), x_BT, free_BT, torch.Generator().manual_seed(1))
        assert torch.equal(one, drawn.network_B)
        assert torch.equal(one, drawn.bound_B)


def test_genmd4_with_equal_weights_teaches_the_network_as_masked_noise_that_reads_the_time() -> None:
    """Both have the same mean, and the times that the weights of GenMD4 need besides cost it little."""
    x_BT, free_BT = texts(40_000)
    held, masked, rng = GenMD4Noise(4, 3), MaskedNoise(4, 3), torch.Generator().manual_seed(1)
    one_B = held.draw(wrong, x_BT, free_BT, rng, loss.draw_levels(len(x_BT), rng), equal=True).network_B
    other_B = loss.equal_masks(masked, wrong, x_BT, free_BT, rng)
    error = (one_B.var() + other_B.var()).sqrt() / len(x_BT) ** 0.5
    assert abs(one_B.mean() - other_B.mean()) < 4 * error
    assert other_B.var() < one_B.var() < 1.15 * other_B.var()
    t_B, weight_B = held.times(torch.linspace(0, 1, 100_001, dtype=torch.float64)[1:-1], 0.1)
    assert float(weight_B.mean()) == pytest.approx(1, abs=0.01)  # times of any density have their lengths as weights
    assert t_B.min() < 1e-8


def test_a_row_with_nothing_to_predict_costs_nothing() -> None:
    x_BT, free_BT = texts(4)
    free_BT[1] = False
    nats_B = loss.any_order(noise_of("ordered"), wrong, x_BT, free_BT, torch.Generator().manual_seed(0))
    assert nats_B[1] == 0
    assert (nats_B[[0, 2, 3]] > 0).all()


ROWS = 1500


def frames(noise: Any, rule: Any, steps: int) -> list[Any]:
    sampler = DiffusionSampler(bayes(noise), noise, TINY.length, rule, steps)  # type: ignore[arg-type]
    return list(sampler.steps(holes(), rng=generators(0, ROWS)))


def holes() -> Canvas:
    one = Canvas.from_rows([[None] * TINY.length], fill=TINY.mask_id)
    return Canvas(*(x.repeat(ROWS, 1) for x in (one.tokens_BT, one.free_BT, one.valid_BT)))


@pytest.mark.parametrize(
    ("name", "rule", "steps"), [("ordered", FirstHitting(), 1), ("ordered", Ancestral(), 100), ("genmd4", Revealing(), 40)]
)
def test_samplers_with_the_bayes_denoiser_reproduce_the_distribution(name: str, rule: Any, steps: int) -> None:
    made = frames(noise_of(name), rule, steps)
    assert made[-1].settled_BT.all()
    assert chi_square_p(made[-1].tokens_BT, TINY.p_S, TINY) > 1e-3
    for before, after in itertools.pairwise(made):  # a token that is written stays
        assert torch.equal(before.tokens_BT[before.settled_BT], after.tokens_BT[before.settled_BT])


def test_samplers_follow_the_learned_order() -> None:
    noise = noise_of("ordered")
    weights = torch.tensor(noise.weights, dtype=torch.float64)
    sampler = AnyOrderSpeculativeSampler(bayes(noise), noise, TINY.length)  # type: ignore[arg-type]
    first = next(sampler.steps(holes(), rng=generators(1, ROWS)))
    for frame in (frames(noise, FirstHitting(), 1)[0], first):
        assert (frame.settled_BT.sum(-1) == 1).all()
        assert chi_square_of_counts(frame.settled_BT.sum(0), weights / weights.sum()) > 1e-3
    one_B = (begun := frames(noise, Ancestral(), 400)[0].settled_BT).sum(-1) == 1  # few steps reveal two at once
    assert one_B.double().mean() > 0.98
    assert chi_square_of_counts(begun[one_B].sum(0), weights / weights.sum()) > 1e-3


def test_tokens_of_high_weight_come_first() -> None:
    noise = noise_of("genmd4")
    early = next(frame for frame in frames(noise, Revealing(), 20) if frame.t_B.max() <= 0.5)
    chance_V = torch.stack([(TINY.p_S[:, None] * (TINY.x_ST == v)).sum() for v in range(TINY.vocab)]) / TINY.length
    expected_V = chance_V * (1 - 0.5 ** torch.tensor(noise.weights[: TINY.vocab], dtype=torch.float64))
    shown_V = torch.stack([(early.tokens_BT == v).double().mean() for v in range(TINY.vocab)])
    assert torch.allclose(shown_V, expected_V, atol=0.03)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"process": "ordered", "weights": [1.0, 0.0]}, "above 0"),
        ({"process": "genmd4", "weights": [1.0, float("inf"), 1.0, 1.0]}, "above 0"),
        ({"process": "ordered", "schedule": "log-linear"}, "from exactly 1"),
        ({"process": "genmd4", "weights": [1.0, 2.0]}, "2 weights"),
    ],
)
def test_weights_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        process.make(settings, 4, 3)


def test_weights_of_another_window_are_refused() -> None:
    noise = noise_of("ordered")
    with pytest.raises(ValueError, match="3 weights"):
        noise.check(4)
    with pytest.raises(ValueError, match="3 weights"):
        noise.corrupt(torch.zeros(2, 4, dtype=torch.long), torch.tensor([0.5, 0.5]), torch.Generator())
    with pytest.raises(ValueError, match="pairs"):
        training_loss(noise, wrong, *texts(3), torch.Generator(), torch.rand(3))


def test_settings_survive_json() -> None:
    for name in NAMES:
        noise = noise_of(name)
        assert process.make(process.settings(noise), 4, 3) == noise
    live = torch.randn(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    learning = GenMD4Noise(4, 3).learning(live)
    fixed = GenMD4Noise(4, 3, weights=learning.fixed())
    assert torch.equal(learning.weight_N(4, live), fixed.weight_N(4, live))
