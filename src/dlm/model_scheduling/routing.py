"""Denoisers made of several: by the step, or by how unsure the light one is. Every sampler takes them as it takes one network.

Shapes: B rows, Q positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.model_scheduling.plan import HEAVY, LIGHT, ModelSchedule
from dlm.protocols import Denoiser


def _rows(how: dict[str, Any], index: Tensor) -> dict[str, Any]:
    """The same keyword arguments for some of the rows."""
    return {name: value[index] if isinstance(value, Tensor) else value for name, value in how.items()}


class Scheduled:
    """The model whose turn it is. Rows of one call may be at different steps; each is read by its own model.

    taken: the keys of the last call.
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


class Unsure:
    """The light model, and the heavy one again for rows where the light one is unsure: mean entropy of its guesses at the positions
    that are due (at all masks where the order follows from the logits) above `bits`."""

    def __init__(self, denoisers: Mapping[str, Denoiser], mask_id: int, bits: float) -> None:
        if not {HEAVY, LIGHT} <= denoisers.keys():
            raise InputError("a schedule by uncertainty needs a heavy and a light model")
        self.denoisers, self.mask_id, self.bits, self.taken = denoisers, mask_id, bits, ""

    def __call__(self, z_BQ: Tensor, t_B: Tensor | None = None, **how: Any) -> Tensor:
        logits_BQV = self.denoisers[LIGHT](z_BQ, t_B, **how)
        at_BQ = how.get("at_BQ")
        due_BQ = z_BQ == self.mask_id if at_BQ is None else at_BQ
        never_V = torch.arange(logits_BQV.shape[-1], device=z_BQ.device) == self.mask_id
        entropy_BQ = torch.special.entr(logits_BQV.masked_fill(never_V, -torch.inf).softmax(-1)).sum(-1)
        mean_B = (entropy_BQ * due_BQ).sum(-1) / due_BQ.sum(-1).clamp(min=1) / torch.log(torch.tensor(2.0))
        rows = (mean_B > self.bits).nonzero().squeeze(-1)
        self.taken = HEAVY + LIGHT if len(rows) else LIGHT
        if len(rows):
            times = t_B[rows] if t_B is not None else None
            logits_BQV = logits_BQV.index_copy(0, rows, self.denoisers[HEAVY](z_BQ[rows], times, **_rows(how, rows)).to(logits_BQV))
        return logits_BQV


def make(word: str, denoisers: Mapping[str, Denoiser], mask_id: int, steps: int) -> Scheduled | Unsure:
    """What `L0.5 H0.5`, `sandwich:0.25` or `unsure:1.5` (bits) means for these models. InputError where it does not fit them."""
    name, _, value = word.partition(":")
    if name == "unsure":
        try:
            bits = float(value)
        except ValueError:
            raise InputError(
                f"unsure takes the bits of entropy above which the heavy model is asked, as in unsure:1.5, not {word!r}"
            ) from None
        return Unsure(denoisers, mask_id, bits)
    schedule = ModelSchedule.parse(word)
    schedule.check(steps, list(denoisers))
    return Scheduled(denoisers, schedule)
