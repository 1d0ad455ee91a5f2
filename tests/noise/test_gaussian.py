"""Gaussian noise on vectors: its bound is the entropy for the exact posterior and above it for any other guess."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dlm.noise import loss, process
from dlm.noise.gaussian import GaussianNoise
from oracle import Tiny, VectorBayes


def make(vocab: int, schedule: str = "linear") -> GaussianNoise:
    noise = process.make({"process": "gaussian", "schedule": schedule}, vocab + 1, vocab)
    assert isinstance(noise, GaussianNoise)
    return noise


def two_tokens(noise: GaussianNoise, share: float, guess: float) -> dict[str, float]:
    """The three parts for one token of two, of which the first has that share, with a guess of it: integrals by quadrature."""
    node_H, weight_H = (torch.tensor(part) for part in np.polynomial.hermite_e.hermegauss(80))
    node_Q, weight_Q = (torch.tensor(part) for part in np.polynomial.legendre.leggauss(400))
    t_B, weight_B = ((node_Q + 1) / 2) ** 3, weight_Q / 2 * 3 * ((node_Q + 1) / 2) ** 2  # close to 0, where the integrand turns
    law, logits = torch.tensor([share, 1 - share]), torch.tensor([guess, 1 - guess, 1.0]).log().double()

    def expected(t_B: Tensor, cost: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Mean over x and the vectors, at each time: only the difference of the two entries matters."""
        found = torch.zeros_like(t_B)
        for x, p in enumerate(law.tolist()):
            x_BT = torch.full((len(t_B), len(node_H)), x)
            draw_BTV = torch.stack([node_H, -node_H, 0 * node_H], -1).expand(len(t_B), -1, -1) / 2**0.5
            e_BTV = noise.evidence(x_BT, t_B, draw_BTV)
            found += p * (cost(noise.log_probs(logits, e_BTV), x_BT, e_BTV, t_B) * weight_H).sum(-1) / weight_H.sum()
        return found

    return {
        "prior": float(noise.prior_cost(torch.zeros(1, 1).long())),
        "diffusion": float((weight_B * expected(t_B, noise.nelbo)).sum()),
        "reconstruction": float(expected(torch.zeros(1, dtype=torch.float64), noise.cross_entropy)),
    }


@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial:2"])
@pytest.mark.parametrize("share", [0.5, 0.1])
def test_the_bound_of_one_token_of_two_is_its_entropy(share: float, schedule: str) -> None:
    noise, entropy = make(2, schedule), -share * math.log(share) - (1 - share) * math.log(1 - share)
    parts = two_tokens(noise, share, share)
    assert parts["prior"] == 0
    assert 0 < parts["reconstruction"] < 1e-3
    assert sum(parts.values()) == pytest.approx(entropy, abs=2e-4)
    wrong = sum(two_tokens(noise, share, 0.3).values())
    divergence = share * math.log(share / 0.3) + (1 - share) * math.log((1 - share) / 0.7)
    assert wrong == pytest.approx(entropy + divergence, abs=2e-4)  # that guess is the posterior of another source


def test_a_schedule_that_stops_early_pays_a_prior() -> None:
    """The parts change, and their sum is above the entropy by what the prior does not know about the mean."""
    parts, entropy = two_tokens(make(2, "log-linear:0.05"), 0.5, 0.5), math.log(2)
    assert parts["prior"] > 1e-3
    assert entropy < sum(parts.values()) < entropy + parts["prior"]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_estimator_gives_the_entropy_of_dependent_tokens(seed: int) -> None:
    tiny, noise, rng, rows = Tiny(3, 2, seed=seed), make(3), torch.Generator().manual_seed(0), 40_000
    x_BT = tiny.x_ST[torch.multinomial(tiny.p_S, rows, replacement=True, generator=rng)]
    free_BT, error = torch.ones_like(x_BT, dtype=torch.bool), rows**-0.5
    exact = loss.continuous(noise, VectorBayes(tiny), x_BT, free_BT, rng)
    text = float(-tiny.p_S[tiny.index(x_BT)].log().mean())  # of these rows; their bound varies less around it
    assert float(exact.mean()) == pytest.approx(text, abs=4 * float(exact.std()) * error)
    assert float(exact.std()) * error < 0.02
    bayes = VectorBayes(tiny)
    dull = loss.continuous(noise, lambda e_BTV, t_B: 0.2 * bayes(e_BTV, t_B), x_BT, free_BT, rng)
    assert float(dull.mean()) > text + 4 * float(dull.std()) * error


def test_what_is_given_is_certain_and_costs_nothing() -> None:
    """With the first token given the bound is the conditional entropy of the second."""
    tiny, noise, rng, rows = Tiny(3, 2, seed=2), make(3), torch.Generator().manual_seed(0), 40_000
    x_BT = tiny.x_ST[torch.multinomial(tiny.p_S, rows, replacement=True, generator=rng)]
    free_BT = torch.tensor([False, True]).expand(rows, -1)
    first_V = torch.zeros(3, dtype=torch.float64).index_add(0, tiny.x_ST[:, 0], tiny.p_S)
    text = float(-(tiny.p_S[tiny.index(x_BT)] / first_V[x_BT[:, 0]]).log().mean())
    found = loss.continuous(noise, VectorBayes(tiny), x_BT, free_BT, rng)
    assert float(found.mean()) == pytest.approx(text, abs=4 * float(found.std()) * rows**-0.5)
    e_BTV = loss.noised(noise, x_BT, free_BT, torch.ones(rows), rng)
    assert torch.equal(noise.blend(e_BTV)[:, 0], torch.nn.functional.one_hot(x_BT[:, 0], 4).float())


def test_steps_are_bayes_rule_for_a_known_token() -> None:
    """Evidence that moves with a known token has the law of fresh evidence: mean d^2 onehot(x) and variance d^2."""
    noise, rng, rows = make(3), torch.Generator().manual_seed(0), 40_000
    x_BT = torch.zeros(1, rows, dtype=torch.long)
    known_BTV = torch.tensor([0.0, -torch.inf, -torch.inf, -torch.inf])
    t_B, s_B = torch.tensor([0.7], dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64)
    draws = [torch.randn(1, rows, 4, generator=rng) for _ in range(2)]
    snr = float(noise.level(s_B)[0]) ** 2
    for how in (draws[1], None):
        y_BTV = noise.evidence(x_BT, t_B, draws[0]) / float(noise.level(t_B)[0])
        e_TV = noise.of_vectors(noise.moved(y_BTV, known_BTV, t_B, s_B, how), s_B)[0]
        assert torch.allclose(e_TV.mean(0), torch.tensor([snr, 0, 0, 0]), atol=5 * (snr / rows) ** 0.5)
        assert torch.allclose(e_TV.var(0), torch.tensor([snr, snr, snr, 0]), rtol=0.04, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "vocab", "message"),
    [({"process": "gaussian", "share": 0.1}, 5, "unexpected keyword"), ({"process": "gaussian"}, 2, "needs two tokens beside the mask")],
)
def test_wrong_settings_are_told(settings: dict[str, object], vocab: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        process.make(settings, vocab, vocab - 1)
