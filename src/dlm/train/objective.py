"""What is minimised and what is validated. Shapes: B rows, T positions, W validation windows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dlm.models.transformer import predict_beside
from dlm.noise import loss
from dlm.noise.process import Process
from dlm.train.config import TrainConfig


class RowsOf:
    """A process that corrupts rows `own` of a batch just as the whole batch would have them: what is drawn does not depend on the
    number of processes. Everything else is the process's own."""

    def __init__(self, noise: Process, *, batch: int, own: slice) -> None:
        self.noise, self.batch, self.own = noise, batch, own

    def __getattr__(self, name: str) -> Any:
        return getattr(self.noise, name)

    def _whole(self, rows: Tensor) -> Tensor:
        own = self._own(rows)
        whole = rows.new_ones(self.batch * (own.stop - own.start) // (self.own.stop - self.own.start), *rows.shape[1:])
        whole[own] = rows
        return whole

    def _own(self, rows: Tensor) -> slice:
        """Where `rows` lie in the whole batch: each row of it may be several here, one for each block."""
        parts = len(rows) // (self.own.stop - self.own.start)
        return slice(self.own.start * parts, self.own.stop * parts)

    def corrupt(self, x_BT: Tensor, t_B: Tensor, rng: torch.Generator) -> Tensor:
        return self.noise.corrupt(self._whole(x_BT), self._whole(t_B), rng)[self._own(x_BT)]

    def corrupt_count(self, x_BT: Tensor, count_B: Tensor, free_BT: Tensor, rng: torch.Generator) -> Any:
        made = self.noise.corrupt_count(self._whole(x_BT), self._whole(count_B), self._whole(free_BT), rng)
        own = self._own(x_BT)
        return made[own] if isinstance(made, Tensor) else tuple(part[own] for part in made)


@dataclass(frozen=True)
class Objective:
    """The bound of the noise process or the exact autoregressive loss, nats per predicted token."""

    config: TrainConfig
    noise: Any  # a process, or RowsOf one
    teacher: loss.Predict | None = None

    def __call__(
        self, network: nn.Module, x_BT: Tensor, free_BT: Tensor, rng: torch.Generator, t_B: Tensor, block_length: int = 0
    ) -> Tensor:
        """(B,) nats per predicted token of each row. block_length: for block diffusion, by default the network's own."""

        def predict(z_BT: Tensor, t_B: Tensor) -> Tensor:
            logits: Tensor = network(z_BT, t_B).float()
            return logits

        if self.config.network.attention == "block_causal":
            block_length = block_length or self.config.network.block_length
            nats_B = loss.blockwise(self.noise, partial(predict_beside, network), x_BT, free_BT, rng, block_length, t_B)
        elif self.config.objective == "autoregressive":
            nats_B = loss.autoregressive(self.noise, predict, x_BT, free_BT)
        elif self.teacher is not None:
            nats_B = loss.any_order(self.noise, predict, x_BT, free_BT, rng, t_B, self.teacher)
        else:
            nats_B = getattr(loss, self.config.estimate)(self.noise, predict, x_BT, free_BT, rng, t_B)
        return nats_B / free_BT.sum(-1)

    def block_length(self, rng: torch.Generator) -> int:
        """The one of a training step: drawn from the settings, so that one network learns several."""
        lengths = self.config.block_lengths
        return lengths[int(torch.randint(len(lengths), (1,), generator=rng))] if lengths else self.config.network.block_length

    def free(self, rows: int, rng: torch.Generator) -> Tensor:
        """Which positions are predicted: in a share of the rows the first `context` tokens are given."""
        config = self.config
        free_BT = torch.ones(rows, config.network.window, dtype=torch.bool)
        if config.objective == "diffusion" and config.context and config.context_share:
            given_B = torch.rand(rows, generator=rng) < config.context_share
            free_BT[given_B, : config.context] = False
        return free_BT


def levels_on(device: torch.device, t_B: Tensor) -> Tensor:
    """Noise levels on the device, in float64 where it has that (mps has not)."""
    return (t_B.float() if device.type == "mps" else t_B).to(device)


@torch.no_grad()
def validate(objective: Objective, network: nn.Module, windows_WT: Tensor, device: torch.device) -> tuple[float, float]:
    """(nats per token, standard error over windows) on whole windows without context; the same masks at every call."""
    config = objective.config
    passes = 1 if config.objective == "autoregressive" else config.eval_passes
    rng = torch.Generator().manual_seed(0)
    parts = []
    for _ in range(passes):
        for x_BT in torch.split(windows_WT, 64):
            free_BT, t_B = torch.ones_like(x_BT, dtype=torch.bool), loss.draw_levels(len(x_BT), rng)
            device_rng = torch.Generator(device).manual_seed(int(torch.randint(1 << 62, (1,), generator=rng)))
            parts.append(objective(network, x_BT.to(device), free_BT.to(device), device_rng, levels_on(device, t_B)).cpu())
    values = torch.cat(parts).double().view(passes, -1).mean(0)
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()
