"""A decoding rule of your own: unmask from left to right, several tokens per forward pass.

python examples/own_rule.py [STEPS]
"""

import sys
from dataclasses import dataclass, field
from typing import ClassVar

import torch

import dlm
from dlm.protocols import RNG
from dlm.sampling.diffusion.protocols import Step
from dlm.sampling.draw import ranked


@dataclass(frozen=True)
class LeftToRight:
    """The leftmost masks, an equal share of them in each step that is left."""

    revises: ClassVar[bool] = False  # a token that is written stays
    draw: dlm.Draw = field(default_factory=dlm.Draw)

    def __call__(self, step: Step, rng: RNG) -> torch.Tensor:
        token_BT = self.draw(step.logp_BTV, rng)
        left_BT = -torch.arange(step.z_BT.shape[1]).expand_as(step.z_BT).float()
        share_B = -(-step.open_BT.sum(-1) // step.left_B)  # rounded up
        return torch.where(ranked(left_BT, step.open_BT, share_B), token_BT, step.z_BT)


# Registered under a name, it is an option like the built-in samplers, with steps, temperature, blocks and constraints.
dlm.register_sampler(dlm.SamplerInfo("left-to-right", noise="masked", factory=LeftToRight, about="The leftmost masks first."))

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 64
model = dlm.load("shakespeare-mask")
for frame in model.stream("ROMEO:", sampler="left-to-right", steps=steps, length=120, temperature=0.7, seed=0):
    print(model.decode(frame).replace("\n", " "))
