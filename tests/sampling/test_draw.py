"""MATHS.md 5.6: draws are exact to the tails, truncation means what it says, rows are independent.

Shapes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dlm.errors import InputError
from dlm.sampling.draw import Draw, _mix, categorical, generators, race, uniform


def p_value(counts_V: Tensor, probs_V: Tensor) -> float:
    """Chi-square over the tokens of positive probability; the others must not occur."""
    assert counts_V[probs_V == 0].sum() == 0
    expected_V = probs_V * counts_V.sum()
    kept = probs_V > 0
    assert expected_V[kept].min() >= 5
    statistic = ((counts_V - expected_V) ** 2 / expected_V)[kept].sum()
    return float(torch.special.gammaincc((kept.sum() - 1) / 2, statistic / 2))


def histogram(draw: Draw, logp_V: Tensor, count: int = 100_000, seed: int = 0) -> Tensor:
    tokens_BT = draw(logp_V.expand(1, count, -1), generators(seed, 1))
    return torch.bincount(tokens_BT[0], minlength=len(logp_V)).double()


LOGP = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.049, 0.001], dtype=torch.float64).log()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tokens_follow_the_distribution(dtype: torch.dtype) -> None:
    assert p_value(histogram(Draw(), LOGP.to(dtype)), LOGP.exp()) > 1e-3
    assert p_value(histogram(Draw(), LOGP.to(dtype) + 5.0), LOGP.exp()) > 1e-3  # need not be normalised


def test_a_wrong_distribution_is_noticed() -> None:
    wrong_V = LOGP.exp() + torch.tensor([0.01, -0.01, 0, 0, 0, 0], dtype=torch.float64)
    assert p_value(histogram(Draw(), LOGP), wrong_V) < 1e-3


def test_the_inverse_cdf_gives_each_token_its_exact_interval() -> None:
    logp_V = torch.tensor([0.25, 0.0, 0.5, 0.25], dtype=torch.float64).log()
    u_BT = torch.tensor([[0.0, 0.25 - 1e-15, 0.25, 0.75 - 1e-15, 0.75, 1 - 2**-53]], dtype=torch.float64)
    assert categorical(logp_V.expand(1, 6, -1), u_BT).tolist() == [[0, 0, 2, 2, 3, 3]]


def test_impossible_tokens_are_never_drawn() -> None:
    edge_BT = torch.tensor([[0.0, 2**-53, 0.3, 1 - 2**-53, 1.0]], dtype=torch.float64)
    for possible in ([2], [0], [5], [1, 3], [0, 5]):
        logp_V = torch.full((6,), -torch.inf)
        logp_V[possible] = torch.randn(len(possible), generator=torch.Generator().manual_seed(0))
        drawn = categorical(logp_V.expand(1, 5, -1), edge_BT)[0].tolist()
        assert set(drawn) <= set(possible)
        assert drawn[0] == possible[0]
        assert drawn[-1] == possible[-1]


def test_a_token_of_probability_1e_9_can_be_drawn_wherever_it_stands() -> None:
    for place in (0, 2500, 4999):
        probs_V = torch.full((5000,), 1e-9, dtype=torch.float64)
        probs_V[17] = 1 - 4999e-9
        cdf_V = probs_V.cumsum(-1)
        u_BT = (cdf_V[place] - 0.5e-9).reshape(1, 1)
        assert categorical(probs_V.log().expand(1, 1, -1), u_BT).item() == place
        assert categorical(probs_V.log().float().expand(1, 1, -1), u_BT).item() == place


def test_uniforms_resolve_such_a_token() -> None:
    u_BT = uniform(generators(0, 2), 50_000)
    assert u_BT.dtype == torch.float64
    assert u_BT.min() >= 0
    assert u_BT.max() < 1
    fine = (u_BT * 2.0**30).frac() != 0
    assert fine.double().mean() > 0.99  # more than the 24 bits of a float32


def tailed(vocab: int, mass: float) -> Tensor:
    """One likely token and an even tail of the given mass, as probabilities."""
    probs_V = torch.full((vocab,), mass / (vocab - 1), dtype=torch.float64)
    probs_V[0] = 1 - mass
    return probs_V


def test_drawn_tokens_have_the_entropy_of_the_distribution() -> None:
    rank = torch.arange(1, 5001, dtype=torch.float64)
    zipf_V = torch.cat([torch.tensor([0.9], dtype=torch.float64), 0.1 * rank**-1.0 / (rank**-1.0).sum()])
    for probs_V, count in ((zipf_V, 4000), (tailed(5000, 0.01), 4000)):
        logp_V = probs_V.log()
        entropy = float(-(probs_V * logp_V).sum())
        rng = generators(1, 1)
        surprise = torch.cat([-logp_V[Draw()(logp_V.float().expand(1, 500, -1), rng)[0]] for _ in range(count // 500)])
        error = float(surprise.std()) / math.sqrt(count)
        assert float(surprise.mean()) == pytest.approx(entropy, abs=4 * error)


def gumbel_float32_tail(probs_V: Tensor, count: int, rng: torch.Generator) -> int:
    """Draws that fall into the even tail when a float32 Gumbel-max draws them.

    The best of the V - 1 equal tail tokens is drawn at once: the greatest of n uniforms on the float32 grid has
    CDF ((k + 1) / 2^24)^n, so that four million draws from V = 5000 cost four million numbers.
    """
    grid, others = 2.0**24, len(probs_V) - 1
    best = (torch.rand(count, generator=rng, dtype=torch.float64) ** (1 / others) * grid).ceil() - 1
    tail = (probs_V[1].log() - torch.log(-torch.log((best / grid).float()))).float()
    first = (probs_V[0].log() - torch.log(-torch.log(torch.rand(count, generator=rng)))).float()
    return int((tail > first).sum())


def test_float32_gumbel_noise_loses_the_tail_that_the_inverse_cdf_keeps() -> None:
    """Zheng et al. 2409.02908: the greatest float32 uniform below 1 bounds the noise, and rare tokens never win."""
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    assert not (u.double() * 2.0**24).frac().any()  # the grid that the law above stands on
    bound = -math.log(-math.log(1 - 2.0**-24))
    assert bound == pytest.approx(16.64, abs=0.01)
    assert float(-torch.log(-torch.log(u)).max()) < bound + 1e-3
    count, probs_V = 4_000_000, tailed(5000, 1e-4)
    expected, rng = count * 1e-4, torch.Generator().manual_seed(0)
    gumbel = gumbel_float32_tail(probs_V, count, rng)
    assert gumbel < 0.5 * expected  # 400 are due
    # ours: the same count of uniforms against the edge of the tail, as `categorical` compares them
    exact = int((uniform(generators(0, 1), count) > 1 - 1e-4).sum())
    assert exact == pytest.approx(expected, abs=4 * math.sqrt(expected))
    loss_of_entropy = (expected - gumbel) / count * float(-probs_V[1].log())
    assert loss_of_entropy > 5 * math.sqrt(expected) / count * float(-probs_V[1].log())


def test_the_model_of_the_float32_gumbel_is_right_where_it_can_be_counted() -> None:
    probs_V = tailed(101, 0.3)
    rng = torch.Generator().manual_seed(0)
    modelled = gumbel_float32_tail(probs_V, 40_000, rng) / 40_000
    noise = -torch.log(-torch.log(torch.rand(40_000, 101, generator=rng)))
    plain = float(((probs_V.log().float() + noise).argmax(-1) > 0).double().mean())
    assert modelled == pytest.approx(0.3, abs=0.01)
    assert plain == pytest.approx(0.3, abs=0.01)


def test_temperature_is_a_power_of_the_probabilities() -> None:
    for temperature in (0.8, 1.0, 2.0):
        expected = LOGP.exp() ** (1 / temperature)
        shaped = Draw(temperature).shape(LOGP[None, None].float())
        assert shaped.dtype == torch.float64
        assert torch.allclose(shaped.exp()[0, 0], expected / expected.sum(), atol=1e-7)
        assert p_value(histogram(Draw(temperature), LOGP), expected / expected.sum()) > 1e-3


def test_temperature_0_takes_the_likeliest_and_no_random_number() -> None:
    logp_BTV = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    rng = generators(0, 2)
    assert torch.equal(Draw(0.0)(logp_BTV, rng), logp_BTV.argmax(-1))
    assert torch.equal(Draw(0.0, top_k=2, top_p=0.5)(logp_BTV, rng), logp_BTV.argmax(-1))
    assert torch.equal(uniform(rng, 3), uniform(generators(0, 2), 3))
    for almost in (1e-4, 1e-100, 5e-324):
        assert torch.equal(Draw(almost)(logp_BTV, rng), logp_BTV.argmax(-1))  # 0 is the limit


@pytest.mark.parametrize(("top_k", "kept"), [(1, 1), (2, 2), (5, 5), (6, 6), (100, 6), (0, 6)])
def test_top_k_keeps_k(top_k: int, kept: int) -> None:
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    shaped = Draw(top_k=top_k).shape(LOGP[order][None, None])[0, 0].exp()
    expected = torch.where(torch.arange(6) < kept, LOGP.exp(), 0.0)
    assert torch.allclose(shaped, (expected / expected.sum())[order])
    if kept < 6:
        assert p_value(histogram(Draw(top_k=top_k), LOGP), expected / expected.sum()) > 1e-3 or kept == 1


@pytest.mark.parametrize(("top_p", "kept"), [(1e-9, 1), (0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.94, 4), (0.9995, 6), (1.0, 6)])
def test_top_p_keeps_the_fewest_tokens_that_hold_p(top_p: float, kept: int) -> None:
    order = torch.randperm(6, generator=torch.Generator().manual_seed(2))
    shaped = Draw(top_p=top_p).shape(LOGP[order][None, None])[0, 0].exp()
    expected = torch.where(torch.arange(6) < kept, LOGP.exp(), 0.0)
    assert torch.allclose(shaped, (expected / expected.sum())[order])


def test_truncation_acts_after_the_temperature_and_together() -> None:
    flat = Draw(4.0, top_p=0.6).shape(LOGP[None, None])[0, 0]
    assert int((flat > -torch.inf).sum()) > int((Draw(1.0, top_p=0.6).shape(LOGP[None, None])[0, 0] > -torch.inf).sum())
    both = Draw(1.0, top_k=3, top_p=0.5).shape(LOGP[None, None])[0, 0]
    assert (both > -torch.inf).tolist() == [True, True] + [False] * 4
    assert torch.allclose(both.exp().sum(), torch.tensor(1.0, dtype=torch.float64))


def test_d22_top_p_is_measured_on_what_top_k_left() -> None:
    assert Draw(1.0, 2, 0.5).shape(torch.tensor([[[0.1, 0.2, 0.3, 0.4]]]).log()).exp().tolist() == [[[0, 0, 0, 1]]]
    rng = torch.Generator().manual_seed(3)
    logp_BTV = torch.randn(1, 40, 30, generator=rng).log_softmax(-1)
    for temperature, top_k, top_p in ((1.0, 3, 0.4), (0.7, 8, 0.9), (1.6, 20, 0.5), (1.0, 0, 0.8), (1.0, 5, 1.0)):
        warped_TV = TemperatureLogitsWarper(temperature)(torch.zeros(0), logp_BTV[0]) if temperature != 1 else logp_BTV[0]
        warped_TV = TopKLogitsWarper(top_k)(torch.zeros(0), warped_TV) if top_k else warped_TV
        warped_TV = TopPLogitsWarper(top_p)(torch.zeros(0), warped_TV) if top_p < 1 else warped_TV
        found_TV = Draw(temperature, top_k, top_p).shape(logp_BTV)[0].exp().float()
        assert torch.allclose(found_TV, warped_TV.softmax(-1), atol=1e-6), (temperature, top_k, top_p)


def test_masked_tokens_stay_impossible() -> None:
    logp_V = LOGP.clone()
    logp_V[2] = -torch.inf
    for draw in (Draw(), Draw(0.3), Draw(3.0, top_k=5), Draw(top_p=0.999)):
        assert draw.shape(logp_V[None, None])[0, 0, 2] == -torch.inf
        assert histogram(draw, logp_V, 2000)[2] == 0


@pytest.mark.parametrize("draw", [Draw(), Draw(0.7, top_k=4), Draw(1.3, top_p=0.8)])
def test_a_row_does_not_depend_on_its_neighbours(draw: Draw) -> None:
    logp_BTV = torch.randn(4, 9, 6, generator=torch.Generator().manual_seed(0))
    together = draw(logp_BTV, generators(5, 4))
    for row in range(4):
        assert torch.equal(draw(logp_BTV[row : row + 1], generators(5 + row, 1))[0], together[row])
    assert torch.equal(draw(logp_BTV[2:], generators(7, 2)), together[2:])
    assert not torch.equal(draw(logp_BTV, generators(6, 4)), together)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -0.1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"temperature": math.nan}, {"temperature": math.inf}]
)
def test_options_out_of_range_are_told(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Draw(**wrong)


def test_a_race_follows_the_distribution() -> None:
    u_BT = uniform(generators(3, 1), 100_000)
    drawn_N = race(LOGP.expand(1, 100_000, -1), u_BT)[0]
    assert p_value(torch.bincount(drawn_N, minlength=len(LOGP)).double(), LOGP.exp()) > 1e-3
    certain_BTV = torch.tensor([[[-torch.inf, 0.0], [0.0, -torch.inf]]])
    assert race(certain_BTV, u_BT[:, :2]).tolist() == [[1, 0]]


def test_clocks_of_different_tokens_and_numbers_are_independent() -> None:
    """Of two equally likely tokens either wins half of the time, whatever pair it is; and so it goes from one number to the next."""
    u_BT = uniform(generators(4, 1), 20_000)
    half_V = torch.full((64,), -torch.inf, dtype=torch.float64)
    for i, j in ((0, 1), (0, 63), (31, 32)):
        logp_V = half_V.clone()
        logp_V[[i, j]] = math.log(0.5)
        first_N = (race(logp_V.expand(1, 20_000, -1), u_BT)[0] == i).double()
        assert abs(float(first_N.mean()) - 0.5) < 0.015
        assert abs(float(torch.corrcoef(torch.stack([first_N[1:], first_N[:-1]]))[0, 1])) < 0.03


def test_the_mixing_is_splitmix64() -> None:
    wrap = (1 << 64) - 1
    for x in (0, 1, 2**62 + 12345, -7, -(2**63)):
        y = x & wrap
        y = (y ^ y >> 30) * 0xBF58476D1CE4E5B9 & wrap
        y = (y ^ y >> 27) * 0x94D049BB133111EB & wrap
        assert int(_mix(torch.tensor([x]))) & wrap == y ^ y >> 31


def test_two_laws_in_one_race_agree_as_often_as_the_formula_says() -> None:
    q_V = 0.7 * LOGP.exp() + 0.3 * LOGP.exp().flip(0)
    u_BT = uniform(generators(5, 1), 100_000)
    same_N = (race(LOGP.expand(1, 100_000, -1), u_BT) == race(q_V.log().expand(1, 100_000, -1), u_BT))[0].double()
    p_V = LOGP.exp()
    expected = float(sum(1 / torch.maximum(p_V / p_V[i], q_V / q_V[i]).sum() for i in range(len(p_V))))
    distance = float((p_V - q_V).abs().sum() / 2)
    assert (1 - distance) / (1 + distance) < expected < 1 - distance
    assert abs(float(same_N.mean()) - expected) < 4 * math.sqrt(expected * (1 - expected) / 100_000)
