"""The training loss and the validation bound. Shapes: B rows, T positions, W validation windows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from dlm.models.transformer import predict_beside
from dlm.noise import loss
from dlm.noise.learned import Drawn, training_loss
from dlm.noise.masked import MaskedNoise
from dlm.noise.process import Process
from dlm.train.config import TrainConfig


class RowsOf:
    """A process that corrupts rows `own` of a batch as it would corrupt the whole batch, so that the noise does not depend on the number
    of processes. Everything else is the process's own."""

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
        return self._by_count("corrupt_count", x_BT, count_B, free_BT, rng)

    def corrupt_order(self, x_BT: Tensor, count_B: Tensor, free_BT: Tensor, rng: torch.Generator) -> Any:
        return self._by_count("corrupt_order", x_BT, count_B, free_BT, rng)

    def _by_count(self, name: str, x_BT: Tensor, count_B: Tensor, free_BT: Tensor, rng: torch.Generator) -> Any:
        made = getattr(self.noise, name)(self._whole(x_BT), self._whole(count_B), self._whole(free_BT), rng)
        own = self._own(x_BT)
        return made[own] if isinstance(made, Tensor) else tuple(part[own] for part in made)

    def draw(self, *args: Any, **options: Any) -> Drawn:
        """Of learned noise: its own, with the corruptions of the whole batch."""
        drawn: Drawn = type(self.noise).draw(self, *args, **options)  # type: ignore[union-attr, arg-type]
        return drawn


Estimator = Callable[[nn.Module, Tensor, Tensor, torch.Generator, Tensor, int], Tensor]
"""(network, x_BT, free_BT, rng, t_B, block_length) -> (B,) nats summed over the free positions."""


def estimator(
    config: TrainConfig, noise: Process, teacher: loss.Predict | None = None, *, equal: bool = False, learns: bool = False
) -> Estimator:
    """The bound of the noise process, the distance from a teacher, or the exact autoregressive loss, as the config has it.

    equal: in training, every masked token, or every time of noise on vectors, weighted alike.
    learns: in training, with the gradient of the weights of the noise.
    """

    reads = getattr(noise, "reading", None)  # of noise on vectors

    plain = type(noise.noise if isinstance(noise, RowsOf) else noise) is MaskedNoise and config.objective == "diffusion"
    masks = plain and config.estimate == "any_order" and teacher is None and not learns and not config.compile

    def on_cpu(network: nn.Module) -> bool:
        """Whether the loss alone asks for logits, those of the masks, and the network works on a CPU."""
        return masks and getattr(network, "device", None) == torch.device("cpu")

    def predict(network: nn.Module) -> loss.Predict:
        if on_cpu(network):
            return lambda z_BT, t_B: network(z_BT, t_B, at_BQ=z_BT == noise.mask_id).float()
        return (lambda z_BT, t_B: network(z_BT, t_B).float()) if reads is None else cast(loss.Predict, reads(network))

    def beside(network: nn.Module) -> loss.PredictBeside:
        return _beside(network, noise.mask_id) if on_cpu(network) else partial(predict_beside, network)

    if config.blocks:
        return lambda network, x_BT, free_BT, rng, t_B, block_length: loss.blockwise(
            cast(MaskedNoise, noise), beside(network), x_BT, free_BT, rng, block_length, t_B, equal
        )
    if config.objective == "autoregressive":
        return lambda network, x_BT, free_BT, _rng, _t_B, _length: loss.autoregressive(noise, predict(network), x_BT, free_BT)
    bound = ESTIMATORS[config.estimate]
    if learns:
        bound = partial(training_loss, equal=equal)
    elif equal and reads is not None:
        bound = loss.denoising
    elif teacher is not None:
        bound = partial(loss.any_order, teacher=teacher, equal=equal)
    elif equal and config.estimate == "continuous":
        bound = loss.equal_masks
    elif equal:
        bound = partial(bound, equal=True)
    return lambda network, x_BT, free_BT, rng, t_B, _length: bound(noise, predict(network), x_BT, free_BT, rng, t_B)


def _beside(network: nn.Module, mask_id: int) -> loss.PredictBeside:
    """Predictions beside the clean text, at masks alone."""
    return lambda z_BT, x_BT, block_length: predict_beside(network, z_BT, x_BT, block_length, z_BT == mask_id)


ESTIMATORS: dict[str, Callable[..., Tensor]] = {
    "any_order": loss.any_order,
    "counted": loss.counted,
    "two_clocks": loss.two_clocks,
    "continuous": loss.continuous,
}


@dataclass(frozen=True)
class Objective:
    """The objective of a run, in nats per predicted token; resolved once from its config by `of`."""

    estimate: Estimator
    window: int
    context: int  # tokens at the beginning of a window that are given in a share of the rows; 0: none
    context_share: float
    block_length: int  # of validation
    block_lengths: tuple[int, ...]  # of training, one drawn each step

    @classmethod
    def of(
        cls, config: TrainConfig, noise: Process, teacher: loss.Predict | None = None, *, equal: bool = False, learns: bool = False
    ) -> Objective:
        """noise: a process, or `RowsOf` one. equal, learns: as of `estimator`."""
        context = config.context if config.objective == "diffusion" else 0
        length = config.network.block_length
        lengths = config.block_lengths or (length,)
        estimate = estimator(config, noise, teacher, equal=equal, learns=learns)
        return cls(estimate, config.network.window, context, config.context_share, length, lengths)

    def __call__(
        self, network: nn.Module, x_BT: Tensor, free_BT: Tensor, rng: torch.Generator, t_B: Tensor, block_length: int = 0
    ) -> Tensor:
        """(B,) nats per predicted token of each row. block_length: for block diffusion, by default the network's own."""
        return self.estimate(network, x_BT, free_BT, rng, t_B, block_length or self.block_length) / free_BT.sum(-1)

    def draw_block_length(self, rng: torch.Generator) -> int:
        """The one of a training step, so that one network learns several."""
        if self.block_lengths == (self.block_length,):
            return self.block_length
        return self.block_lengths[int(torch.randint(len(self.block_lengths), (1,), generator=rng))]

    def free(self, rows: int, rng: torch.Generator) -> Tensor:
        """bool (rows, T): which positions are predicted; in a share of the rows the first `context` tokens are given."""
        free_BT = torch.ones(rows, self.window, dtype=torch.bool)
        if self.context and self.context_share:
            given_B = torch.rand(rows, generator=rng) < self.context_share
            free_BT[given_B, : self.context] = False
        return free_BT


def levels_on(device: torch.device, t_B: Tensor) -> Tensor:
    """Noise levels on the device, in float64 where it has that (mps has not)."""
    return (t_B.float() if device.type == "mps" else t_B).to(device, non_blocking=True)


@torch.no_grad()
def validate(
    objective: Objective, network: nn.Module, windows_WT: Tensor, device: torch.device, passes: int, free_WT: Tensor | None = None
) -> tuple[float, float]:
    """(nats per predicted token, standard error over windows); the same noise at every call. free_WT: the positions to predict, by default
    all."""
    rng = torch.Generator().manual_seed(0)
    parts = []
    free_WT = torch.ones_like(windows_WT, dtype=torch.bool) if free_WT is None else free_WT
    for _ in range(passes):
        for x_BT, free_BT in zip(torch.split(windows_WT, 64), torch.split(free_WT, 64), strict=True):
            t_B = loss.draw_levels(len(x_BT), rng)
            device_rng = torch.Generator(device).manual_seed(int(torch.randint(1 << 62, (1,), generator=rng)))
            parts.append(objective(network, x_BT.to(device), free_BT.to(device), device_rng, levels_on(device, t_B)))
    values = torch.cat(parts).cpu().double().view(passes, -1).mean(0)
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()
