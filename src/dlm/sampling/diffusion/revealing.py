"""The reverse chain of noise whose masks are revealed at the network's own rates: which ones, and their tokens, are one draw."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dlm.protocols import RNG
from dlm.sampling.diffusion.protocols import Step
from dlm.sampling.diffusion.revising import reverse
from dlm.sampling.draw import Draw


@dataclass(frozen=True)
class Revealing:
    """The reverse chain of the grid under GenMD4's noise (Shi et al. 2406.04329, section 6); a token that is written stays.

    A mask becomes y with p(y | z) times the chance of y to be revealed in t -> s, so no step can be planned before the forward pass.
    """

    revises: ClassVar[bool] = False
    waits: ClassVar[bool] = True  # a step may reveal nothing
    draw: Draw = field(default_factory=Draw)

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        return torch.where(step.open_BT, reverse(step, self.draw, step.s_B, rng), step.z_BT)
