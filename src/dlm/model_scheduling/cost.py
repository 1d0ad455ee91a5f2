"""FLOPs of a schedule by three conventions, and a meter for the forward passes that happen. Shapes: B rows, Q positions."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dlm.model_scheduling.plan import HEAVY, ModelSchedule
from dlm.protocols import Denoiser


@dataclass(frozen=True)
class CallCost:
    """FLOPs of one row of a window through a network: its blocks, and the output head at every position."""

    blocks: float
    head: float
    window: int


class Sizes(Protocol):
    """The config of a network."""

    def forward_flops(self) -> tuple[float, float]:
        """FLOPs of a token: of the blocks, and of the output head."""
        ...


class Network(Protocol):
    """A network that knows its FLOPs."""

    @property
    def config(self) -> Sizes: ...


def call_costs(networks: Mapping[str, Network], window: int) -> dict[str, CallCost]:
    """Of networks by key."""
    each = {key: network.config.forward_flops() for key, network in networks.items()}
    return {key: CallCost(blocks * window, head * window, window) for key, (blocks, head) in each.items()}


@dataclass(frozen=True)
class ScheduleCost:
    """FLOPs of one text of a window, and the shares saved against the heavy model in the same sampler.

    blocks: the blocks alone, in every step (2604.02340 counts so); with_head: and the head at every position, in every step;
    executed: of the forward passes that happen, each position given a head once, in the step that unmasks it.
    """

    blocks: float
    with_head: float
    executed: float
    calls: float
    saved_blocks: float
    saved_with_head: float
    saved_executed: float

    def record(self) -> dict[str, float]:
        return asdict(self)


def expected_calls(steps: int, length: int) -> list[float]:
    """Chance of each of `steps` equal steps to unmask anything in a text of `length` masks (linear schedule, ancestral)."""
    return [1 - (1 - 1 / steps) ** length] * steps


def cost(schedule: ModelSchedule, models: Mapping[str, CallCost], steps: int, free: int | None = None) -> ScheduleCost:
    """Of a whole window of which `free` positions (all) are unmasked in `steps` steps by an order that no logit decides."""
    keys = schedule.each(steps)
    schedule.check(steps, list(models))
    own, heavy = [models[key] for key in keys], models[HEAVY]
    free = heavy.window if free is None else free
    happens = expected_calls(steps, free)
    calls = sum(happens)

    def total(each: list[CallCost]) -> tuple[float, float, float]:
        blocks = sum(one.blocks for one in each)
        heads = sum(one.head / one.window for one in each) * free / steps
        done = sum(share * one.blocks for share, one in zip(happens, each, strict=True)) + heads
        return blocks, blocks + sum(one.head for one in each), done

    mine, alone = total(own), total([heavy] * steps)
    return ScheduleCost(*mine, calls, *(1 - a / b for a, b in zip(mine, alone, strict=True)))


class Metered:
    """A denoiser that counts: rows read, FLOPs of blocks and of heads, seconds."""

    def __init__(self, denoiser: Denoiser, price: CallCost) -> None:
        self.denoiser, self.price = denoiser, price
        self.rows, self.blocks, self.head, self.seconds = 0, 0.0, 0.0, 0.0

    def __call__(self, z_BQ: Tensor, t_B: Tensor | None = None, **how: Any) -> Tensor:
        begin = time.perf_counter()
        logits_BQV = self.denoiser(z_BQ, t_B, **how)
        if z_BQ.is_cuda:
            torch.cuda.synchronize(z_BQ.device)
        self.seconds += time.perf_counter() - begin
        at_BQ = how.get("at_BQ")
        self.rows += len(z_BQ)
        self.blocks += len(z_BQ) * self.price.blocks
        self.head += (z_BQ.numel() if at_BQ is None else int(at_BQ.sum())) * self.price.head / self.price.window
        return logits_BQV
