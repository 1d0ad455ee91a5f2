"""AdamW groups, the learning-rate schedule and the moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


def learning_rate(step: int, *, peak: float, steps: int, warmup: int, decay_share: float) -> float:
    """Warm-up, stable, linear decay to 0 (Hagele et al. 2405.18392).

    The stable part does not depend on `steps`: a run may be prolonged from any checkpoint before the decay.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    decay = max(1, round(steps * decay_share))
    return peak * min(1.0, (steps - step) / decay)


def adamw(network: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float, fused: bool = False) -> torch.optim.AdamW:
    """Matrices decay; gains, biases and embeddings do not."""
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if p.dim() >= 2 and "embed" not in name]
    plain = [p for name, p in named if p.dim() < 2 or "embed" in name]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused or None)


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
