"""Hybrid noise: masks and uniform replacements in one process, in GIDD's form.

GIDD, von Ruette et al. 2025 (arXiv 2503.04482), with the mixture of the scaling study (2512.10858): at signal-to-noise
ratio alpha / (1 - alpha), the share sigmoid(log SNR + b) of the noise is uniform and the rest is masked. So nearly clean text holds
wrong tokens, and nearly pure noise holds masks. Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlm.noise.mixture import MixtureNoise
from dlm.noise.replacement import Kernel


@dataclass(frozen=True)
class HybridNoise(MixtureNoise):
    """q(z_t | x) = alpha x + U uniform + M MASK with U + M = 1 - alpha.

    share: sigmoid(b), the uniform part of the noise where alpha is 1/2. 0 is masked noise, 1 uniform noise.
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share <= 1:
            raise ValueError(f"the share of uniform noise must lie in 0 .. 1, got {self.share}")

    def _parts(self, t_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, U, M (B,)."""
        alpha_B = self.schedule.alpha(t_B)
        keep_B, lost_B = alpha_B * self.share, (1 - alpha_B) * (1 - self.share)
        uniform_B = torch.where(keep_B + lost_B > 0, keep_B / (keep_B + lost_B).clamp(min=1e-300), self.share)
        return alpha_B, (1 - alpha_B) * uniform_B, (1 - alpha_B) * (1 - uniform_B)

    def rate(self, t_B: Tensor) -> Kernel:
        """alpha d/dt (U / alpha) and alpha d/dt (M / alpha), the rates into the vocabulary and into MASK."""
        alpha_B, dalpha_B, share, none_B = self.schedule.alpha(t_B), self.schedule.dalpha(t_B), self.share, torch.zeros_like(t_B)
        mixed_B, lost_B = alpha_B * share + (1 - alpha_B) * (1 - share), (1 - alpha_B) * (1 - share)
        uniform_B = -dalpha_B * alpha_B * (share / mixed_B) ** 2
        mask_B = -dalpha_B * lost_B * (2 * mixed_B - lost_B) / (alpha_B * mixed_B**2)
        return Kernel(none_B, none_B, self._prior(uniform_B, mask_B))
