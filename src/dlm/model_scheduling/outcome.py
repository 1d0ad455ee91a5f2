"""One schedule measured on some seeds: figures of every text, FLOPs, seconds and forward passes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from dlm.evaluation.statistics import Mean


@dataclass(frozen=True)
class Outcome:
    """figures: of every text, by name; blocks, head: FLOPs of all; seconds of all; calls: forward passes of a text by model; the texts."""

    schedule: str
    seeds: tuple[int, int]
    figures: dict[str, list[float]]
    blocks: float
    head: float
    seconds: float
    calls: dict[str, float]
    tokens: list[list[int]] = field(default_factory=list, repr=False, compare=False)

    @property
    def texts(self) -> int:
        return self.seeds[1] - self.seeds[0]

    def __add__(self, other: Outcome) -> Outcome:
        """The same schedule on further seeds."""
        assert self.schedule == other.schedule
        assert self.seeds[1] == other.seeds[0]
        calls = {key: (self.calls[key] * self.texts + other.calls[key] * other.texts) / (self.texts + other.texts) for key in self.calls}
        sums = {name: getattr(self, name) + getattr(other, name) for name in ("blocks", "head", "seconds")}
        figures = {name: values + other.figures[name] for name, values in self.figures.items()}
        seeds = self.seeds[0], other.seeds[1]
        return replace(self, seeds=seeds, figures=figures, calls=calls, tokens=self.tokens + other.tokens, **sums)

    def mean(self, name: str) -> Mean:
        """Of a figure, over texts."""
        return Mean.of(torch.tensor(self.figures[name], dtype=torch.float64))

    def against(self, other: Outcome, name: str) -> Mean:
        """Of the paired difference of a figure to the same seeds under `other`."""
        count = min(self.texts, other.texts)
        mine, theirs = (torch.tensor(one.figures[name][:count], dtype=torch.float64) for one in (self, other))
        return Mean.of(mine - theirs)

    def saved(self, other: Outcome) -> float:
        """Share of the FLOPs of `other`'s blocks, in forward passes that happened, for each text."""
        return 1 - self.blocks / self.texts / (other.blocks / other.texts)
