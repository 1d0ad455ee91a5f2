"""Rules for noise of classes: a mask becomes a class or a word, a class becomes a word, and a word stays.

Shapes: B rows, T positions of the window, V ids: words, mask and class tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dlm.errors import in_range
from dlm.noise.classes import ClassNoise
from dlm.protocols import RNG
from dlm.sampling.diffusion.protocols import Step
from dlm.sampling.diffusion.revising import reverse
from dlm.sampling.draw import Draw, beside, ranked, uniform


def classes_of(step: Step) -> ClassNoise:
    """The noise of a step."""
    assert isinstance(step.noise, ClassNoise)
    return step.noise


@dataclass(frozen=True)
class TwoClocks:
    """The reverse chain of the grid. The time at which each token is revealed does not depend on the network."""

    revises: ClassVar[bool] = False
    draw: Draw = field(default_factory=Draw)

    def settled(self, step: Step, next_BT: Tensor) -> Tensor:
        """Words."""
        return classes_of(step).words(next_BT)

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        return torch.where(step.open_BT, reverse(step, self.draw, step.s_B, rng), step.z_BT)


@dataclass(frozen=True)
class ClassesFirst:
    """Classes for all masks in the first `share` of the steps, then words, in random order and equal parts: the chain rule in two stages.

    A window of one step takes both at once: words for masks.
    """

    revises: ClassVar[bool] = False
    share: float = 0.5
    draw: Draw = field(default_factory=Draw)

    def __post_init__(self) -> None:
        in_range(self.share, 0, 1, "the share of the steps for classes", above=True)

    def settled(self, step: Step, next_BT: Tensor) -> Tensor:
        """Words."""
        return classes_of(step).words(next_BT)

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        noise, masks_BT = classes_of(step), step.open_BT & (step.z_BT == step.noise.mask_id)
        steps_B = torch.as_tensor(step.steps, device=step.left_B.device).expand_as(step.left_B)
        first_B = torch.minimum((self.share * steps_B).ceil().long(), steps_B - 1)  # the last step writes words
        first_left_B = first_B - (steps_B - step.left_B)
        of_masks_B1 = (masks_BT.any(-1) & (first_left_B > 0))[:, None]
        turn_BT = torch.where(of_masks_B1, masks_BT, step.open_BT)
        left_B = torch.where(of_masks_B1.squeeze(1), first_left_B, step.left_B)
        order_BT = beside(uniform(rng, step.z_BT.shape[1]), step.z_BT)
        at_BT = ranked(order_BT, turn_BT, -(-turn_BT.sum(-1) // left_B))
        word_BT = self.draw(step.logp_BTV, rng)
        return torch.where(at_BT, torch.where(of_masks_B1, noise.class_tokens(word_BT), word_BT), step.z_BT)
