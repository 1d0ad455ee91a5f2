"""Noise schedules: alpha(t), the probability that a token is still untouched at time t.

t = 0 is data, t = 1 noise; alpha decreases. Every schedule gives value, derivative and inverse together, so that
a loss weight, a sampler's grid and a plot cannot disagree. Shapes: any.
Source: Shi et al. 2024 (arXiv 2406.04329) section 2 and table 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from dlm.errors import unknown
from dlm.protocols import NoiseSchedule


@dataclass(frozen=True)
class Linear:
    """alpha = 1 - t; exactly 1 at t = 0 and 0 at t = 1."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def dalpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def inverse(self, alpha: Tensor) -> Tensor:
        return 1 - alpha


@dataclass(frozen=True)
class Polynomial:
    """alpha = 1 - t^power; power 1 is linear. Exactly 1 and 0 at the ends."""

    power: float = 2.0

    def __post_init__(self) -> None:
        if not self.power > 0:
            raise ValueError(f"a polynomial schedule needs power > 0, got {self.power}")

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t**self.power

    def dalpha(self, t: Tensor) -> Tensor:
        return -self.power * t ** (self.power - 1)

    def inverse(self, alpha: Tensor) -> Tensor:
        return (1 - alpha) ** (1 / self.power)


@dataclass(frozen=True)
class Cosine:
    """alpha = 1 - cos(pi/2 (1 - t)); exactly 1 and 0 at the ends. Most steps fall where few tokens are masked."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - torch.cos(math.pi / 2 * (1 - t))

    def dalpha(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * torch.sin(math.pi / 2 * (1 - t))

    def inverse(self, alpha: Tensor) -> Tensor:
        return 1 - 2 / math.pi * torch.acos(1 - alpha)


@dataclass(frozen=True)
class Geometric:
    """alpha = exp(-beta_min^(1-t) beta_max^t): exp(-beta_min) at t = 0, exp(-beta_max) at t = 1, so both end terms count."""

    beta_min: float = 1e-5
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_min < self.beta_max:
            raise ValueError(f"a geometric schedule needs 0 < beta_min < beta_max, got {self.beta_min}, {self.beta_max}")

    def _sigma(self, t: Tensor) -> Tensor:
        return self.beta_min ** (1 - t) * self.beta_max**t

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-self._sigma(t))

    def dalpha(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self._sigma(t) * math.log(self.beta_max / self.beta_min)

    def inverse(self, alpha: Tensor) -> Tensor:
        return torch.log(-torch.log(alpha) / self.beta_min) / math.log(self.beta_max / self.beta_min)


@dataclass(frozen=True)
class LogLinear:
    """alpha = exp(-sigma(t)) with sigma = -log(1 - (1 - eps) t), that is 1 - (1 - eps) t: linear that stops at eps.

    The form that SEDD and MDLM train with (Lou et al. 2310.16834; Sahoo et al. 2406.07524).
    """

    eps: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.eps < 1:
            raise ValueError(f"a log-linear schedule needs 0 < eps < 1, got {self.eps}")

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - (1 - self.eps) * t

    def dalpha(self, t: Tensor) -> Tensor:
        return -(1 - self.eps) * torch.ones_like(t)

    def inverse(self, alpha: Tensor) -> Tensor:
        return (1 - alpha) / (1 - self.eps)


SCHEDULES: dict[str, Callable[..., NoiseSchedule]] = {
    "linear": Linear,
    "polynomial": Polynomial,
    "cosine": Cosine,
    "geometric": Geometric,
    "log-linear": LogLinear,
}


def register(name: str, schedule: type[Any]) -> None:
    """Make a schedule of your own known by a name, to settings and to config.json. It is a dataclass whose fields are numbers."""
    SCHEDULES[name] = schedule


def word(schedule: NoiseSchedule) -> str:
    """The word that `parse` turns into this schedule. ValueError for a class that is not registered."""
    name = next((name for name, known in SCHEDULES.items() if type(schedule) is known), "")
    if not name or not is_dataclass(schedule):
        raise ValueError(f"{type(schedule).__name__} has no name: dlm.noise.schedule.register gives a schedule one, a dataclass")
    values = ",".join(repr(float(getattr(schedule, f.name))) for f in fields(schedule))
    return f"{name}:{values}" if values else name


def is_whole(schedule: NoiseSchedule) -> bool:
    """Whether it runs from exactly 1 to exactly 0 (the cosine does, up to rounding), so that the bound has no end terms."""
    first, last = schedule.alpha(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    return bool(abs(first - 1) < 1e-12 and abs(last) < 1e-12)


def time_when(schedule: NoiseSchedule, revealed: Tensor) -> Tensor:
    """The t at which a chain that starts with everything masked has revealed that share, whatever alpha ends at."""
    last = schedule.alpha(torch.ones((), dtype=revealed.dtype, device=revealed.device))
    return schedule.inverse(last + revealed * (1 - last))


def parse(word: str) -> NoiseSchedule:
    """`"cosine"`, or with arguments `"polynomial:3"`, `"geometric:1e-5,20"`. ValueError names the known ones."""
    name, _, arguments = word.partition(":")
    if name not in SCHEDULES:
        raise unknown("noise schedule", name, SCHEDULES)
    try:
        return SCHEDULES[name](*(float(a) for a in arguments.split(",") if a))
    except (TypeError, ValueError) as error:
        raise ValueError(f"noise schedule {word!r}: {error}") from None
