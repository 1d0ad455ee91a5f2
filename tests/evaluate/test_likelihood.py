"""The reported number: exact where it says so, its error honest, its estimators in agreement."""

from __future__ import annotations

import math

import pytest
import torch

from dlm.evaluate import likelihood
from dlm.noise.masked import MaskedNoise
from oracle import BayesDenoiser, Tiny


def _windows(tiny: Tiny, count: int, seed: int = 0) -> torch.Tensor:
    return tiny.x_ST[torch.multinomial(tiny.p_S, count, replacement=True, generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize("estimator", likelihood.ESTIMATORS)
def test_the_bound_of_the_bayes_denoiser_is_the_entropy(estimator: str) -> None:
    tiny = Tiny(3, 3, seed=1)
    noise, windows = MaskedNoise(4, 3), _windows(Tiny(3, 3, seed=1), 4000)
    result = likelihood.evaluate(
        noise, BayesDenoiser(tiny), windows, characters=windows.numel(), estimator=estimator, steps=1000, batch=500
    )
    exact = -tiny.p_S.log()[tiny.index(windows)].mean().item() / 3  # of these very windows: only Monte-Carlo error is left
    assert result.is_bound and result.stderr < 0.02
    assert result.nats_per_token == pytest.approx(exact, abs=4 * result.stderr)
    assert result.bits_per_char == pytest.approx(result.nats_per_token / math.log(2))


@pytest.mark.parametrize("estimator", ["any-order", "continuous"])
def test_the_stated_error_is_the_spread_over_seeds(estimator: str) -> None:
    tiny = Tiny(3, 3, seed=2)
    noise, windows = MaskedNoise(4, 3), _windows(tiny, 100)
    runs = [likelihood.evaluate(noise, BayesDenoiser(tiny), windows, characters=300, estimator=estimator, seed=seed) for seed in range(60)]
    spread = torch.tensor([r.nats_per_token for r in runs]).std().item()
    stated = torch.tensor([r.stderr for r in runs])
    assert 0.5 * float(stated.mean()) < spread < 1.25 * float(stated.mean())  # stratified levels may lower the true error, never raise it
    assert float(stated.max()) < 1.5 * float(stated.median())  # no run meets a weight that the others have not seen


def test_autoregressive_is_exact_and_counts_characters() -> None:
    noise, windows = MaskedNoise(4, 3), torch.zeros(5, 4, dtype=torch.long)

    def predict(z_BT: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*z_BT.shape, 4)

    result = likelihood.evaluate(noise, predict, windows, characters=40, estimator="autoregressive")
    assert result.nats_per_token == pytest.approx(math.log(3)) and result.stderr == 0 and not result.is_bound
    assert result.bits_per_char == pytest.approx(math.log2(3) / 2)


def test_a_single_pass_has_no_error_to_state() -> None:
    with pytest.raises(ValueError, match="2 passes"):
        likelihood.evaluate(MaskedNoise(4, 3), BayesDenoiser(Tiny()), Tiny().x_ST, characters=1, passes=1)
