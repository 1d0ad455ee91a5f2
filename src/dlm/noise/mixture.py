"""Masks and uniform replacements in one process: the base of hybrid noise and of GIDD's.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from dlm.noise.replacement import Kernel, ReplacementNoise


@dataclass(frozen=True)
class MixtureNoise(ReplacementNoise):
    """q(z_t | x) = alpha x + U uniform + M MASK with U + M = 1 - alpha."""

    @abstractmethod
    def _parts(self, t_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, U, M (B,). U / alpha and M / alpha grow with t."""

    def _prior(self, uniform_B: Tensor, mask_B: Tensor) -> Tensor:
        return uniform_B[:, None] * self._on(uniform_B, "_data_V") + mask_B[:, None] * self._on(mask_B, "_mask_V")

    def kernel(self, t_B: Tensor) -> Kernel:
        alpha_B, uniform_B, mask_B = self._parts(t_B)
        return Kernel(alpha_B, torch.zeros_like(alpha_B), self._prior(uniform_B, mask_B))

    def between(self, s_B: Tensor, t_B: Tensor) -> Kernel:
        """q(z_t | z_s): the part of q(z_t | x) beyond the remainder of q(z_s | x)."""
        (alpha_t, uniform_t, mask_t), (alpha_s, uniform_s, mask_s) = self._parts(t_B), self._parts(s_B)
        left_B = alpha_t / alpha_s
        new = ((now - left_B * before).clamp(min=0) for now, before in ((uniform_t, uniform_s), (mask_t, mask_s)))
        return Kernel(left_B, torch.zeros_like(left_B), self._prior(*new))
