"""The learned weights of a noise process in training: their optimiser, their average, and their part of the training state."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dlm.noise.learned import LearnedNoise
from dlm.train.optimisers import EMA

PART = "noise."
WEIGHTS, AVERAGE = "log_weights", "average"


class NoiseWeights(nn.Module):
    """Log-weights, learned by AdamW at a rate of their own: their gradient is noisier than that of the network, and clipped with it they
    would slow it down. `average` follows them as the network's does."""

    def __init__(
        self, noise: LearnedNoise, window: int, device: torch.device, *, lr: float, betas: tuple[float, float], ema: float
    ) -> None:
        super().__init__()
        like = torch.zeros((), device=device)
        self.log_weights = nn.Parameter(noise.weight_N(noise.count(window), like).log())
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=lr, betas=betas, weight_decay=0.0)
        self.lr, self.ema = lr, EMA(self, ema)

    def update(self, step: int, share: float) -> None:
        """One step at that share of the learning rate, after the gradient has been averaged over the processes."""
        self.optimizer.param_groups[0]["lr"] = self.lr * share
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(step)

    def state(self) -> dict[str, Tensor]:
        """Tensors of the training state by name."""
        moments = {name: value for values in self.optimizer.state.values() for name, value in values.items()}
        found = {WEIGHTS: self.log_weights.detach(), AVERAGE: self.ema.average[0]} | moments
        return {PART + name: value.detach().cpu().clone() for name, value in found.items()}

    @torch.no_grad()
    def put_back(self, tensors: Mapping[str, Tensor]) -> None:
        """All that `state` gave, bit for bit."""
        found = {name.removeprefix(PART): value for name, value in tensors.items() if name.startswith(PART)}
        self.log_weights.copy_(found.pop(WEIGHTS))
        self.ema.average = [found.pop(AVERAGE).to(self.log_weights.device)]
        device = self.log_weights.device
        self.optimizer.state[self.log_weights] = {k: v if k == "step" else v.to(device) for k, v in found.items()}
