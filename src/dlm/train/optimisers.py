"""Optimisers by name, the learning-rate schedule and the moving average of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dlm.errors import unknown


def learning_rate(step: int, *, peak: float, steps: int, warmup: int, decay_share: float) -> float:
    """Warm-up, stable, linear decay to 0 (Hagele et al. 2405.18392).

    The stable part does not depend on `steps`: a run may be prolonged from any checkpoint before the decay.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    decay = max(1, round(steps * decay_share))
    return peak * min(1.0, (steps - step) / decay)


Group = dict[str, Any]
"""Parameters with settings of their own, as torch's optimisers take them."""


@dataclass(frozen=True)
class Settings:
    """The settings of an optimiser. lr: the peak; fused: one kernel for all parameters, on a GPU."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    fused: bool = False


def adamw(network: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 1711.05101). Matrices decay; gains, biases and embeddings do not."""
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if p.dim() >= 2 and "embed" not in name]
    plain = [p for name, p in named if p.dim() < 2 or "embed" in name]
    groups: list[Group] = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=settings.fused or None)


OPTIMISERS: dict[str, Callable[[nn.Module, Settings], torch.optim.Optimizer]] = {"adamw": adamw}
"""By the name in the config and in a saved state. All that an optimiser keeps between steps is in its `state`, tensor by tensor."""


def make(name: str, network: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """The optimiser of that name for the parameters that require gradients. InputError for an unknown one."""
    if name not in OPTIMISERS:
        raise unknown("optimizer", name, OPTIMISERS)
    return OPTIMISERS[name](network, settings)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Of every group; one with an `lr_scale` takes so many times as much."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


class EMA:
    """Exponential moving average of the parameters, sharded as they are.

    Warmed up so that the first steps do not drag: decay min(d, (1 + n) / (10 + n)) at step n.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = network
        self.parameters = list(network.parameters())
        self.decay = decay
        self.average = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The network holds the average inside the block, its own weights again after it."""
        own = [p.detach().clone() for p in self.parameters]
        self._write(self.average)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)
        for module in self.network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a forward without a backward leaves gathered copies, now out of date
