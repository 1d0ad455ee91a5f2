"""Uniform noise: a token is itself with probability alpha_t, else uniform over the vocabulary.

D3PM, Austin et al. 2021 (arXiv 2107.03006); UDLM, Schiff et al. 2024 (2412.10193); Duo, Sahoo et al. 2025 (2506.10892).
Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
