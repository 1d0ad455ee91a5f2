"""Mixtures of tokens as inputs in training under uniform noise (Duo, Sahoo et al. 2025, arXiv 2506.10892).

The noise, its bound and its samplers stay as they are: what the network reads in training alone changes.
Shapes: B rows of a process, T positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dlm.noise.uniform import UniformNoise
from dlm.train.config import TrainConfig

SHARE = 0.5
"""Of the steps in which mixtures are read; from then on the network reads what it reads in use."""


def temperature(config: TrainConfig, step: int) -> float:
    """Of the mixtures at a step: falls evenly from `config.mixtures` to 0."""
    return max(0.0, config.mixtures * (1 - step / (SHARE * config.steps)))


@dataclass(frozen=True)
class Mixed:
    """A network that reads mixtures whose likeliest token is z, for one batch of texts x.

    batch, own: rows of the whole batch and those of this process, so that the draws do not depend on the number of processes.
    """

    network: nn.Module
    noise: UniformNoise
    x_BT: Tensor
    free_BT: Tensor
    rng: torch.Generator
    temperature: float
    batch: int
    own: slice

    def __call__(self, z_BT: Tensor, t_B: Tensor, **how: Any) -> Tensor:
        """Logits (B, T, V)."""
        shape = (self.batch, *z_BT.shape[1:], self.noise.vocab_size)
        u_BTV = torch.rand(shape, generator=self.rng, device=z_BT.device)[self.own]
        mixed_BTV = self.noise.mixture(self.x_BT, z_BT, t_B, self.temperature, u_BTV)
        given_BTV = torch.nn.functional.one_hot(z_BT, self.noise.vocab_size).to(mixed_BTV)
        logits: Tensor = self.network(z_BT, t_B, mixed_BQV=torch.where(self.free_BT[..., None], mixed_BTV, given_BTV), **how)
        return logits
