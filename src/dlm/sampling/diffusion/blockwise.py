"""Rules of models that kept the head of an autoregressive base and write block by block (Fast-dLLM v2, Nemotron-Labs-Diffusion).

Shapes: B rows, T positions of the window, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from dlm.errors import in_range
from dlm.protocols import RNG
from dlm.sampling.diffusion.protocols import Rule, Step
from dlm.sampling.diffusion.transfer import narrow
from dlm.sampling.draw import MAX_SETTING, Draw, categorical, pick, ranked, uniform


@dataclass(frozen=True)
class Surest:
    """A token drawn for every mask; those whose probability reaches the threshold are written, and the surest in any case.

    above: whether the probability has to lie above the threshold. narrowed: it is that after temperature, top-p and top-k, else the
    model's own. However many steps there are, a block takes as many as its text needs.
    """

    revises: ClassVar[bool] = False
    threshold: float = 0.9
    above: bool = False
    narrowed: bool = False
    draw: Draw = field(default_factory=Draw)

    def __post_init__(self) -> None:
        in_range(self.threshold, 0, 1, "the threshold")

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        logp_BTV = step.logp_BTV
        if self.narrowed and self.draw.temperature:
            logp_BTV = narrow(logp_BTV, self.draw)
            token_BT = categorical(logp_BTV, uniform(rng, step.z_BT.shape[1]))
        else:
            token_BT = self.draw(logp_BTV, rng)
        sure_BT = pick(logp_BTV, token_BT).exp()
        reached_BT = sure_BT > self.threshold if self.above else sure_BT >= self.threshold
        first_BT = ranked(sure_BT, step.open_BT, torch.ones_like(step.left_B))
        return torch.where(step.open_BT & reached_BT | first_BT, token_BT, step.z_BT)


@dataclass(frozen=True)
class Tempered:
    """A rule that sees the distribution at this temperature, which moves its confidences and not the likeliest token."""

    revises: ClassVar[bool] = False
    rule: Rule
    temperature: float = 1.0

    def __post_init__(self) -> None:
        in_range(self.temperature, 0, MAX_SETTING, "the temperature", above=True)

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        return self.rule(replace(step, logp_BTV=(step.logp_BTV / self.temperature).log_softmax(-1)), rng)


@dataclass(frozen=True)
class FirstAlone:
    """The first token of a block alone, which the text before it predicts; then what `rule` writes, in sub-blocks from left to right.

    sub_length: tokens of a sub-block, counted from where the block begins; 0: the rest of the block is one.
    """

    revises: ClassVar[bool] = False
    rule: Rule = field(default_factory=Surest)
    sub_length: int = 0

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        assert step.begin_B is not None
        begin_B1, first_B1 = step.begin_B[:, None], step.open_BT.int().argmax(-1, keepdim=True)
        pos_T = torch.arange(step.z_BT.shape[1], device=step.z_BT.device)
        open_BT = step.open_BT & ((first_B1 != begin_B1) | (pos_T == begin_B1))
        if self.sub_length:
            number_B1 = (first_B1 - begin_B1).div(self.sub_length, rounding_mode="floor")
            open_BT &= pos_T < begin_B1 + (number_B1 + 1) * self.sub_length
        return self.rule(replace(step, open_BT=open_BT), rng)
