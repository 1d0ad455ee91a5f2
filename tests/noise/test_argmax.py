"""Gaussian noise on one-hot vectors has uniform noise as its argmax, and mixtures are drawn from it given that argmax."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dlm.noise import argmax
from dlm.noise.uniform import UniformNoise
from oracle import chi_square_of_counts


def at(t: float, rows: int = 1) -> Tensor:
    return torch.full((rows,), t, dtype=torch.float64)


@pytest.mark.parametrize(("tokens", "alpha"), [(2, 0.3), (5, 0.05), (5, 0.5), (40, 0.9)])
def test_the_argmax_is_uniform_noise_with_the_share_of_the_formula(tokens: int, alpha: float) -> None:
    rng, count = torch.Generator().manual_seed(0), 50_000
    signal, _ = argmax.Signals.of(tokens).at(at(alpha))
    w = torch.randn(count, tokens, generator=rng, dtype=torch.float64)
    w[:, 1] += signal
    law = torch.full((tokens,), (1 - alpha) / tokens, dtype=torch.float64)
    law[1] += alpha
    assert chi_square_of_counts(torch.bincount(w.argmax(-1), minlength=tokens), law) > 1e-3
    law += torch.tensor([0.02, -0.02] + [0.0] * (tokens - 2))  # and the test can tell
    assert chi_square_of_counts(torch.bincount(w.argmax(-1), minlength=tokens), law) < 1e-6


@pytest.mark.parametrize("tokens", [2, 65, 1000])
def test_signals_invert_the_formula_and_know_their_slope(tokens: int) -> None:
    alpha = torch.tensor([0.0, 1e-3, 0.2, 0.7, 0.999], dtype=torch.float64)
    signal, slope = argmax.Signals.of(tokens).at(alpha)
    assert torch.allclose(argmax.kept(signal, tokens), alpha, atol=2e-5)
    near = argmax.Signals.of(tokens).at(alpha + 1e-9)[0]
    assert torch.allclose((near - signal) / 1e-9, slope, rtol=1e-3)


def test_two_tokens_have_a_closed_form() -> None:
    """P(N(d, 1) > N(0, 1)) = Phi(d / sqrt 2)."""
    signal = torch.tensor([0.0, 0.4, 1.7], dtype=torch.float64)
    assert torch.allclose(argmax.kept(signal, 2), 2 * torch.special.ndtr(signal / 2**0.5) - 1, atol=1e-9)


@pytest.mark.parametrize("t", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("tokens", [3, 20])
def test_vectors_given_their_argmax_are_gaussian_again(tokens: int, t: float) -> None:
    """Averaged over z of the discrete noise, w - d onehot(x) is N(0, I): moments, and the correlation of two entries."""
    rng, rows = torch.Generator().manual_seed(1), 30_000
    noise = UniformNoise(tokens + 1, tokens)
    x_BT = torch.randint(tokens, (1, rows), generator=rng)
    z_BT = noise.corrupt(x_BT, at(t), rng)
    signal_B, _ = argmax.Signals.of(tokens).at(1 - at(t))
    w_BTV = argmax.vectors(x_BT, z_BT, signal_B, torch.rand(1, rows, tokens, generator=rng, dtype=torch.float64))
    assert torch.equal(w_BTV.argmax(-1), z_BT)
    own_BTV = torch.nn.functional.one_hot(x_BT, tokens).double()
    noise_TV = (w_BTV - signal_B * own_BTV)[0]
    for part in (noise_TV[own_BTV[0].bool()], noise_TV[:, 0], noise_TV[:, 1]):
        error = len(part) ** -0.5
        assert abs(float(part.mean())) < 4.5 * error
        assert abs(float(part.var()) - 1) < 4.5 * 2**0.5 * error
        assert abs(float((part**4).mean()) - 3) < 4.5 * 96**0.5 * error
    assert abs(float((noise_TV[:, 0] * noise_TV[:, 1]).mean())) < 4.5 * rows**-0.5


def test_mixtures_are_laws_without_the_mask_whose_likeliest_token_is_z() -> None:
    rng, noise = torch.Generator().manual_seed(2), UniformNoise(7, 3)  # the mask may be any id
    x_BT = torch.tensor([0, 1, 2, 4, 5, 6]).repeat(3, 4)
    t_B = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    z_BT = noise.corrupt(x_BT, t_B, rng)
    u_BTV = torch.rand(3, 24, 7, generator=rng)
    for temperature in (1.0, 0.1):
        mixed_BTV = noise.mixture(x_BT, z_BT, t_B, temperature, u_BTV)
        assert torch.allclose(mixed_BTV.sum(-1), torch.ones(3, 24), atol=1e-5)
        assert not mixed_BTV[..., 3].any()
        assert torch.equal(mixed_BTV.argmax(-1), z_BT)
    sharp_BTV = noise.mixture(x_BT, z_BT, t_B, 1e-6, u_BTV)
    assert torch.allclose(sharp_BTV, noise.mixture(x_BT, z_BT, t_B, 0.0, u_BTV), atol=1e-3)
    assert torch.equal(noise.mixture(x_BT, z_BT, t_B, 0.0, u_BTV), torch.nn.functional.one_hot(z_BT, 7).float())
