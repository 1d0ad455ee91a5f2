"""Path planning with the network's own confidence (P2, Peng et al. 2502.03540), as Open-dCoder's sampler runs it.

Shapes: B rows, T positions of the window, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dlm.protocols import RNG
from dlm.sampling.diffusion.protocols import Step
from dlm.sampling.diffusion.transfer import best, narrow
from dlm.sampling.draw import Draw, categorical, pick, uniform


@dataclass(frozen=True)
class PathPlanning:
    """A token drawn for every position, written or not; the least probable are masked, fewer in each step, other masks take theirs.

    Step i of n leaves int(N (1 - i / n)) of N positions masked; a written token that stays keeps its place, whatever was drawn there.
    """

    revises: ClassVar[bool] = True
    edits: ClassVar[bool] = True
    draw: Draw = field(default_factory=Draw)

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        logp_BTV = narrow(step.logp_BTV, self.draw)
        token_BT = logp_BTV.argmax(-1) if self.draw.temperature == 0 else categorical(logp_BTV, uniform(rng, step.z_BT.shape[1]))
        kept_BT = best(pick(logp_BTV, token_BT), step, step.open_BT.sum(-1) - self._masked(step))
        written_BT = torch.where(step.z_BT == step.noise.mask_id, token_BT, step.z_BT)
        return torch.where(step.open_BT, torch.where(kept_BT, written_BT, step.noise.mask_id), step.z_BT)

    def _masked(self, step: Step) -> Tensor:
        """Positions that are masked after this step, computed in float32 (B,)."""
        steps_B = torch.as_tensor(step.steps, device=step.left_B.device).expand_as(step.left_B)
        part_B = (1 - (steps_B - step.left_B + 1).double() / steps_B).float()
        return (step.open_BT.sum(-1).float() * part_B).long()

    def done(self, step: Step, next_BT: Tensor) -> Tensor:
        """Nothing moves once no mask is left."""
        return ~(step.open_BT & (next_BT == step.noise.mask_id)).any(-1)
