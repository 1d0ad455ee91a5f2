"""Optimisers by name, the learning-rate schedule and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from dlm.errors import unknown
from dlm.models.block import Blocks, TimeEmbedding


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
    """The settings of an optimiser. lr: the peak; fused: one kernel for all parameters, on a GPU; bf16: Muon multiplies bfloat16."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    fused: bool = False
    bf16: bool = False


def adamw(network: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 1711.05101). Matrices decay; gains, biases and embeddings do not.

    The weights that read the time take a rate that is divided by the number of its sinusoids: all of them step at once, and their sum
    would outgrow the embeddings of the tokens that it is added to.
    """
    times = {module.linear.weight for module in network.modules() if isinstance(module, TimeEmbedding)}
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad and p not in times]
    decayed = [p for name, p in named if p.dim() >= 2 and "embed" not in name]
    plain = [p for name, p in named if p.dim() < 2 or "embed" in name]
    groups: list[Group] = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups += [{"params": [p], "weight_decay": settings.weight_decay, "lr_scale": 1 / p.shape[1]} for p in times if p.requires_grad]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=settings.fused or None)


class Muon(torch.optim.Optimizer):
    """Muon for the groups that say `muon`, AdamW for the others.

    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) steps by the nearest semi-orthogonal matrix to the Nesterov momentum, so
    that every direction of a matrix moves alike. Matrices of one shape are orthogonalised together; sharded ones are gathered first.
    dtype: of the products.
    """

    momentum = 0.95

    def __init__(self, groups: list[Group], dtype: torch.dtype = torch.float32, **settings: Any) -> None:
        self.dtype = dtype
        self.adamw = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], **settings)
        super().__init__(groups, self.adamw.defaults)

    def step(self, closure: Any = None) -> Any:
        self.adamw.state, self.adamw.param_groups = self.state, [group for group in self.param_groups if not group["muon"]]
        loss: Any = self.adamw.step(closure)
        for group in self.param_groups:
            if group["muon"]:
                self._step_matrices(group)
        return loss

    @torch.no_grad()
    def _step_matrices(self, group: Group) -> None:
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            buffer = state["momentum_buffer"].lerp_(p.grad, 1 - self.momentum)
            by_shape.setdefault(p.shape, []).append((p, _whole(p.grad.lerp(buffer, self.momentum))))
        for shape, pairs in by_shape.items():
            scale = math.sqrt(max(1.0, shape[0] / shape[1]))
            steps_NRC = orthogonal(torch.stack([update for _, update in pairs]).to(self.dtype))
            for (p, _), step_RC in zip(pairs, steps_NRC, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(_shard(step_RC.to(p.dtype), p), alpha=-group["lr"] * scale)


def orthogonal(matrices_NRC: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: five Newton-Schulz steps, singular values in 0.7 .. 1.2."""
    tall = matrices_NRC.shape[1] > matrices_NRC.shape[2]
    x = matrices_NRC.mT if tall else matrices_NRC
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    whole: Tensor = x.mT if tall else x
    return whole


def _whole(tensor: Tensor) -> Tensor:
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole


def _shard(whole: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return whole
    replicated = DTensor.from_local(whole, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
    return replicated.redistribute(placements=like.placements)


def muon(network: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Muon at ten times the learning rate for the matrices of the blocks; AdamW for embeddings, head, gains, biases and filters."""
    adam = adamw(network, settings)
    blocks = {p for module in network.modules() if isinstance(module, Blocks) for p in _matrices(module)}
    groups = [
        {key: group[key] for key in ("weight_decay", "lr_scale") if key in group}
        | {"params": [p for p in group["params"] if p not in blocks], "muon": False}
        for group in adam.param_groups
    ]
    matrices = [p for group in adam.param_groups for p in group["params"] if p in blocks]
    groups.append({"params": matrices, "weight_decay": settings.weight_decay / MUON_RATE, "lr_scale": MUON_RATE, "muon": True})
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    return Muon([g for g in groups if g["params"]], dtype, lr=settings.lr, betas=settings.betas, fused=settings.fused or None)


def _matrices(module: nn.Module) -> list[Tensor]:
    return [part.weight for part in module.modules() if isinstance(part, nn.Linear) and part.weight.requires_grad]


MUON_RATE = 10.0  # learning rate of Muon's matrices over that of the rest

OPTIMISERS: dict[str, Callable[[nn.Module, Settings], torch.optim.Optimizer]] = {"adamw": adamw, "muon": muon}
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
