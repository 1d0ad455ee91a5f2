"""The noise of GIDD's released models: masked noise with a bump of uniform replacements in the middle.

von Ruette et al. 2025 (arXiv 2503.04482, section 3.3; `gidd/diffusion_process.py`). Shapes: B rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlm.noise.mixture import MixtureNoise
from dlm.noise.replacement import Kernel


@dataclass(frozen=True)
class GiddNoise(MixtureNoise):
    """q(z_t | x) = (a x + c uniform + (1 - a) MASK) / (1 + c) with a of the schedule and c = B (a (1 - a))^(gamma / 2).

    p_uniform: the share of all tokens that is replaced where a is 1/2, so that B = 2^gamma p / (1 - p). 0 is masked noise.
    ValueError for gamma outside (0, 2], where uniform noise would turn back into text.
    """

    p_uniform: float = 0.2
    gamma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.p_uniform < 1:
            raise ValueError(f"p_uniform must lie in 0 .. 1, below 1, got {self.p_uniform}")
        if not 0 < self.gamma <= 2:
            raise ValueError(f"gamma must be above 0 and at most 2, got {self.gamma}")

    def _bump(self, a_B: Tensor) -> Tensor:
        """c (B,)."""
        return 2**self.gamma * self.p_uniform / (1 - self.p_uniform) * (a_B * (1 - a_B)).clamp(min=0) ** (self.gamma / 2)

    def _parts(self, t_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a_B = self.schedule.alpha(t_B)
        c_B = self._bump(a_B)
        return a_B / (1 + c_B), c_B / (1 + c_B), (1 - a_B) / (1 + c_B)

    def rate(self, t_B: Tensor) -> Kernel:
        """alpha d/dt (U / alpha) and alpha d/dt (M / alpha), where U / alpha = c / a and M / alpha = (1 - a) / a."""
        a_B, da_B, half = self.schedule.alpha(t_B), self.schedule.dalpha(t_B), self.gamma / 2
        c_B, none_B = self._bump(a_B), torch.zeros_like(t_B)
        uniform_B = -da_B * c_B / (1 + c_B) * ((1 - half) / a_B + half / (1 - a_B))
        mask_B = -da_B / (a_B * (1 + c_B))
        return Kernel(none_B, none_B, self._prior(uniform_B, mask_B))
