"""The reference samplers of LLaDA2.0 and 2.1 as rules: every mask above a threshold is written; 2.1 also replaces written tokens.

Shapes: B rows, T positions of the window, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from dlm.errors import in_range
from dlm.protocols import RNG
from dlm.sampling.diffusion.protocols import Step
from dlm.sampling.diffusion.transfer import best
from dlm.sampling.diffusion.unmasking import share
from dlm.sampling.draw import MAX_SETTING, Draw, categorical, pick, uniform


def _drawn(step: Step, draw: Draw, rng: RNG) -> tuple[Tensor, Tensor]:
    """A token for every position and its probability, both of the distribution after temperature, top-k and top-p (B, T)."""
    if draw.temperature == 0:
        token_BT = step.logp_BTV.argmax(-1)
        return token_BT, pick(step.logp_BTV, token_BT).exp()
    logp_BTV = draw.shape(step.logp_BTV)
    token_BT = categorical(logp_BTV, uniform(rng, step.z_BT.shape[1]))
    return token_BT, pick(logp_BTV, token_BT).exp()


@dataclass(frozen=True)
class AboveThreshold:
    """Every mask whose token has a probability above the threshold, and at least the share of the step (LLaDA2.0, `generate`).

    block_length: of whose masks the share is a part, also in a block that begins in the prompt; 0: of the masks that are left.
    """

    revises: ClassVar[bool] = False
    pointwise: ClassVar[bool] = True
    threshold: float = 0.95
    block_length: int = 0
    draw: Draw = field(default_factory=Draw)

    def __post_init__(self) -> None:
        in_range(self.threshold, 0, 1, "the threshold")

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        token_BT, sure_BT = _drawn(step, self.draw, rng)
        count_B = torch.maximum((step.open_BT & (sure_BT > self.threshold)).sum(-1), self._share(step))
        return torch.where(best(sure_BT, step, count_B), token_BT, step.z_BT)

    def _share(self, step: Step) -> Tensor:
        if not self.block_length:
            return share(step)
        steps_B = torch.as_tensor(step.steps, device=step.left_B.device).expand_as(step.left_B)
        more_B = steps_B - step.left_B < self.block_length % steps_B  # the remainder goes to the first steps
        return torch.minimum(self.block_length // steps_B + more_B, step.open_BT.sum(-1))


@dataclass(frozen=True)
class Editing:
    """Every mask above the threshold and at least one; and of the tokens written before, those for which the network is sure of another
    (LLaDA2.1, `generate`).

    A block is done after a forward pass that had no masks to write and changed nothing, or after `max_post_steps` without masks.
    """

    revises: ClassVar[bool] = True
    edits: ClassVar[bool] = True
    threshold: float = 0.95
    editing_threshold: float = 0.9
    max_post_steps: int = 16
    draw: Draw = field(default_factory=Draw)

    def __post_init__(self) -> None:
        in_range(self.threshold, 0, 1, "the threshold")
        in_range(self.editing_threshold, 0, 1, "the editing threshold")
        in_range(self.max_post_steps, 0, MAX_SETTING, "max_post_steps")

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        masked_BT = step.open_BT & (step.z_BT == step.noise.mask_id)
        token_BT, sure_BT = _drawn(step, self.draw, rng)
        masks = replace(step, open_BT=masked_BT)
        count_B = torch.maximum((masked_BT & (sure_BT > self.threshold)).sum(-1), share(masks))
        edited_BT = step.open_BT & ~masked_BT & (sure_BT > self.editing_threshold)
        before_BT = step.memory.get("post_steps", torch.zeros_like(sure_BT)).nan_to_num(0.0)
        step.memory["post_steps"] = before_BT + ~masked_BT.any(-1, keepdim=True)
        return torch.where(best(sure_BT, masks, count_B) | edited_BT, token_BT, step.z_BT)

    def done(self, step: Step, next_BT: Tensor) -> Tensor:
        mask_id = step.noise.mask_id
        had_none_B, has_none_B = (~(step.open_BT & (x_BT == mask_id)).any(-1) for x_BT in (step.z_BT, next_BT))
        quiet_B = (next_BT == step.z_BT).all(-1)
        return has_none_B & (had_none_B & quiet_B | (step.memory["post_steps"].amax(-1) >= self.max_post_steps))
