"""Gaussian noise on one-hot vectors, whose argmax is uniform noise: the signal of a kept share, and the vectors given their argmax.

Duo, Sahoo et al. 2025 (arXiv 2506.10892): of n tokens, d onehot(x) + N(0, I) has its greatest entry at x with a probability that is
alpha + (1 - alpha) / n for the alpha of `kept`, and at every other token alike. Shapes: B rows, T positions, V vocabulary, G points of a
grid, K points of a table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

MOST_SIGNAL, TABLE = 16.0, 2049
POINTS, REACH = 768, 9.0  # of a grid of the greatest entry, and how far beyond the noise it goes


def _density(u: Tensor) -> Tensor:
    """log of the standard normal density."""
    return -0.5 * u.square() - 0.5 * math.log(2 * math.pi)


def kept(signal: Tensor, tokens: int) -> Tensor:
    """alpha of a signal d (any shape, float64): n / (n - 1) [integral of phi(u - d) Phi(u)^(n - 1) du - 1 / n], by the trapezoidal rule."""
    u_G = torch.linspace(-REACH, MOST_SIGNAL + REACH, 1024, dtype=torch.float64, device=signal.device)
    log_G = (tokens - 1) * torch.special.log_ndtr(u_G)
    hit = (_density(u_G - signal[..., None]) + log_G).exp().sum(-1) * (u_G[1] - u_G[0])
    alpha: Tensor = ((hit - 1 / tokens) * tokens / (tokens - 1)).clamp(0, 1)
    return alpha


@dataclass(frozen=True)
class Signals:
    """signal(alpha) for so many tokens: the inverse of `kept`, a straight line between the points of a table."""

    alpha_K: Tensor
    signal_K: Tensor

    @classmethod
    @cache
    def of(cls, tokens: int) -> Signals:
        signal_K = torch.linspace(0, MOST_SIGNAL, TABLE, dtype=torch.float64)
        alpha_K = torch.cat([kept(part, tokens) for part in signal_K.split(512)])
        rises_K = torch.cat([torch.tensor([True]), alpha_K[1:] > alpha_K[:-1].cummax(0).values])  # up to where rounding makes it flat
        return cls(alpha_K[rises_K], signal_K[rises_K])

    def at(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """(d, d d / d alpha) at these shares, exactly the derivative of the lines between the points."""
        alpha_K, signal_K = (table.to(alpha.device, alpha.dtype) for table in (self.alpha_K, self.signal_K))
        left = (torch.searchsorted(alpha_K, alpha.contiguous(), right=True) - 1).clamp(0, len(alpha_K) - 2)
        slope = (signal_K[left + 1] - signal_K[left]) / (alpha_K[left + 1] - alpha_K[left])
        return (signal_K[left] + slope * (alpha - alpha_K[left])).clamp(0, MOST_SIGNAL), slope


def vectors(x_BT: Tensor, z_BT: Tensor, signal_B: Tensor, u_BTV: Tensor) -> Tensor:
    """d onehot(x) + N(0, I) given that its greatest entry is at z: (B, T, V), from one uniform an entry, in their dtype.

    The greatest entry comes first, by the inverse of its distribution on a grid; the others are normal below it.
    """
    tokens = u_BTV.shape[-1]
    d_B11 = signal_B.to(u_BTV)[:, None, None]
    own_BTV, greatest_BTV = (torch.nn.functional.one_hot(token_BT, tokens).bool() for token_BT in (x_BT, z_BT))
    top_BT = _greatest(x_BT == z_BT, d_B11[:, 0, 0], u_BTV.gather(-1, z_BT[..., None]).squeeze(-1), tokens)
    mean_BTV = torch.where(own_BTV, d_B11, 0.0)
    below_BTV = (u_BTV * torch.special.ndtr(top_BT[..., None] - mean_BTV)).clamp(min=torch.finfo(u_BTV.dtype).tiny)
    drawn_BTV = torch.minimum(mean_BTV + torch.special.ndtri(below_BTV), top_BT[..., None])
    return torch.where(greatest_BTV, top_BT[..., None], drawn_BTV)


def _greatest(own_BT: Tensor, signal_B: Tensor, u_BT: Tensor, tokens: int) -> Tensor:
    """The greatest entry (B, T), where it is that of the token itself and where it is not."""
    grid_BG = torch.linspace(-REACH, REACH, POINTS, dtype=u_BT.dtype, device=u_BT.device) + torch.zeros_like(signal_B)[:, None]
    grid_BG = grid_BG + signal_B[:, None] * torch.linspace(0, 1, POINTS, dtype=u_BT.dtype, device=u_BT.device)
    log_phi = torch.special.log_ndtr
    of_own_BG = _density(grid_BG - signal_B[:, None]) + (tokens - 1) * log_phi(grid_BG)
    of_other_BG = _density(grid_BG) + log_phi(grid_BG - signal_B[:, None]) + (tokens - 2) * log_phi(grid_BG)
    found = []
    for log_BG in (of_own_BG, of_other_BG):
        weight_BG = (log_BG - log_BG.amax(-1, keepdim=True)).exp()
        middle_BG = (weight_BG[:, 1:] + weight_BG[:, :-1]) / 2
        cdf_BG = torch.nn.functional.pad(middle_BG.cumsum(-1), (1, 0))
        cdf_BG = cdf_BG / cdf_BG[:, -1:]
        right_BT = torch.searchsorted(cdf_BG, u_BT.contiguous()).clamp(1, POINTS - 1)
        low_BT, high_BT = cdf_BG.gather(1, right_BT - 1), cdf_BG.gather(1, right_BT)
        share_BT = ((u_BT - low_BT) / (high_BT - low_BT).clamp(min=torch.finfo(u_BT.dtype).tiny)).clamp(0, 1)
        step_B1 = grid_BG[:, 1:2] - grid_BG[:, :1]
        found.append(grid_BG.gather(1, right_BT - 1) + share_BT * step_B1)
    return torch.where(own_BT, found[0], found[1])
