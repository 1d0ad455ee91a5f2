"""Uniform noise: a token is itself with probability alpha_t, else uniform over the vocabulary.

D3PM, Austin et al. 2021 (arXiv 2107.03006); UDLM, Schiff et al. 2024 (2412.10193); Duo, Sahoo et al. 2025 (2506.10892).
Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlm.noise import argmax
from dlm.noise.replacement import Kernel, ReplacementNoise


@dataclass(frozen=True)
class UniformNoise(ReplacementNoise):
    """q(z_t = y | x) = alpha_t [y = x] + (1 - alpha_t) / (V - 1), the mask token left out."""

    def _kernel(self, keep_B: Tensor) -> Kernel:
        return Kernel(keep_B, torch.zeros_like(keep_B), (1 - keep_B)[:, None] * self._on(keep_B, "_data_V"))

    def kernel(self, t_B: Tensor) -> Kernel:
        return self._kernel(self.schedule.alpha(t_B))

    def between(self, s_B: Tensor, t_B: Tensor) -> Kernel:
        return self._kernel(self.schedule.alpha(t_B) / self.schedule.alpha(s_B))

    def rate(self, t_B: Tensor) -> Kernel:
        """-alpha'_t / alpha_t, spread over the vocabulary."""
        away_B = -self.schedule.dalpha(t_B) / self.schedule.alpha(t_B)
        return Kernel(torch.zeros_like(away_B), torch.zeros_like(away_B), away_B[:, None] * self._on(away_B, "_data_V"))

    def mixture(self, x_BT: Tensor, z_BT: Tensor, t_B: Tensor, temperature: float, u_BTV: Tensor) -> Tensor:
        """Weights of tokens (B, T, V) that a network may read in place of z in training: softmax(w / temperature), the mask's weight 0.

        w = a onehot(x) + s N(0, I), a^2 + s^2 = 1, drawn given that its argmax is z, from one uniform an entry. For alpha by the formula
        of `argmax.kept` z and w together are Gaussian noise on one-hot vectors (Duo). temperature 0 gives onehot(z).
        """
        token_V = torch.arange(self.vocab_size, device=x_BT.device) != self.mask_id
        rank_V = token_V.cumsum(0) - 1  # of each token among those that are no mask
        signal_B, _ = argmax.Signals.of(self.vocab_size - 1).at(self.schedule.alpha(t_B).clamp(0, 1))
        if temperature == 0:
            return torch.nn.functional.one_hot(z_BT, self.vocab_size).to(u_BTV.dtype)
        w_BTV = argmax.vectors(rank_V[x_BT], rank_V[z_BT], signal_B, u_BTV[..., token_V])
        scale_B11 = (1 + signal_B.square()).sqrt().to(w_BTV)[:, None, None] * temperature
        return torch.zeros_like(u_BTV).masked_scatter(token_V.expand_as(u_BTV), (w_BTV / scale_B11).softmax(-1))
