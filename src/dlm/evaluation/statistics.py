"""Means with their error, rank correlation and the Pareto front: one place for all of them.

Shapes: N independent values (texts, windows), X anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

CONFIDENCE = 0.95
Item = TypeVar("Item")


def standard_error(values_NX: Tensor) -> Tensor:
    """Standard error of the mean over the first dimension, float64 (X). nan entries do not count; fewer than two values give nan."""
    values_NX = values_NX.double()
    count_X = (~values_NX.isnan()).sum(0)
    square_X = (values_NX - values_NX.nanmean(0)).square().nansum(0)
    return (square_X / (count_X - 1) / count_X).sqrt().where(count_X > 1, math.nan)


def interval(values_NX: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the first dimension and half the width of its 95 % confidence interval, float64 (X), nan entries left out.

    Student's t: with few values the interval is wider than the normal one of 1.96 standard errors.
    """
    count_X = (~values_NX.isnan()).sum(0)
    return values_NX.double().nanmean(0), standard_error(values_NX) * _quantile(count_X)


def _quantile(count_X: Tensor) -> Tensor:
    """Of Student's t for means of so many values."""
    from scipy import stats

    quantile_X = stats.t.ppf(0.5 + CONFIDENCE / 2, (count_X - 1).clamp(min=1).cpu().numpy())
    return torch.as_tensor(quantile_X, dtype=torch.float64, device=count_X.device)


@dataclass(frozen=True)
class Mean:
    """A mean of `count` independent values, and its standard error (nan for a single value)."""

    value: float
    stderr: float
    count: int = 0

    @classmethod
    def of(cls, values_N: Tensor) -> Mean:
        return cls(float(values_N.double().mean()), float(standard_error(values_N)), len(values_N))

    @property
    def band95(self) -> float:
        """Half the width of the 95 % confidence interval, by Student's t."""
        return self.stderr * float(_quantile(torch.tensor(self.count)))

    def record(self) -> dict[str, float]:
        return {"mean": self.value, "band95": self.band95}


@dataclass(frozen=True)
class Curve:
    """A mean for each of S points, and half the width of its 95 % confidence interval (nan for a single value)."""

    mean_S: Tensor
    band_S: Tensor

    @classmethod
    def of(cls, values_NS: Tensor) -> Curve:
        return cls(*interval(values_NS))

    def record(self) -> dict[str, list[float]]:
        return {"mean": self.mean_S.tolist(), "band95": self.band_S.tolist()}


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation, ties at their average rank; nan for fewer than three pairs, or where one side is constant."""
    from scipy import stats

    if len(a) < 3 or min(a) == max(a) or min(b) == max(b):
        return math.nan
    return float(stats.spearmanr(a, b).statistic)


def pareto_front(items: Iterable[Item], cost: Callable[[Item], float], loss: Callable[[Item], float]) -> list[Item]:
    """The items that no other beats in both cost and loss, cheapest first; of equal ones the first."""
    front: list[Item] = []
    for item in sorted(items, key=lambda one: (cost(one), loss(one))):
        if not front or loss(item) < loss(front[-1]):
            front.append(item)
    return front
