"""A denoiser made of several, by the step. Every sampler takes it as it takes one network.

Shapes: B rows, Q positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dlm.model_scheduling.plan import ModelSchedule
from dlm.protocols import Denoiser


def _rows(how: dict[str, Any], index: Tensor) -> dict[str, Any]:
    """The same keyword arguments for some of the rows."""
    return {name: value[index] if isinstance(value, Tensor) else value for name, value in how.items()}


class Scheduled:
    """The model that the schedule gives the step to. Rows of one forward pass may be at different steps; each is read by its own model.

    taken: the keys of the last forward pass.
    """

    def __init__(self, denoisers: Mapping[str, Denoiser], schedule: ModelSchedule) -> None:
        self.denoisers, self.schedule, self.taken = denoisers, schedule, ""

    def __call__(self, z_BQ: Tensor, t_B: Tensor | None = None, **how: Any) -> Tensor:
        assert t_B is not None
        keys = self.schedule.keys(1 - t_B)
        self.taken = "".join(sorted(set(keys)))
        parts: list[Tensor] = []
        index_B = torch.empty(0, dtype=torch.long)
        for key in self.taken:
            rows = torch.tensor([b for b, own in enumerate(keys) if own == key], device=z_BQ.device)
            parts.append(self.denoisers[key](z_BQ[rows], t_B[rows], **_rows(how, rows)))
            index_B = torch.cat([index_B.to(rows), rows])
        return torch.cat(parts)[index_B.argsort()] if len(parts) > 1 else parts[0]


def make(word: str, denoisers: Mapping[str, Denoiser], steps: int) -> Scheduled:
    """The denoiser of `L0.5 H0.5` or `sandwich:0.25` for these models. InputError where it does not fit them or the number of steps."""
    schedule = ModelSchedule.parse(word)
    schedule.check(steps, list(denoisers))
    return Scheduled(denoisers, schedule)
