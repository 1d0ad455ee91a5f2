"""Reverse moves that unmask: a rule says which masks become tokens now, and draws them; what is written stays.

Shapes: B rows, T positions of the window, V vocabulary, N steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.protocols import RNG, Step
from dlm.sampling.draw import Draw, ranked, uniform


@dataclass(frozen=True)
class Ancestral:
    """The exact reverse chain of the grid (MD4 section 3, MDLM eq. 7): each mask is revealed in step t -> s with
    (alpha_s - alpha_t) / (1 - alpha_t), whatever the network says.

    So the step at which each position is revealed is drawn first, and the network is called only where one is.
    """

    revises: ClassVar[bool] = False
    draw: Draw = field(default_factory=Draw)

    def due(self, open_BT: Tensor, alphas_N: Tensor, rng: RNG) -> Tensor:
        """First step whose alpha exceeds a uniform draw; all that is left goes in the last step."""
        u_BT = uniform(rng, open_BT.shape[1]).to(alphas_N)
        return torch.searchsorted(alphas_N, u_BT, right=True).clamp(max=len(alphas_N) - 1)

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        return torch.where(step.open_BT, self.draw(step.logp_BTV, rng), step.z_BT)


@dataclass(frozen=True)
class TopConfidence:
    """The most confident drawn tokens, an equal share of the masks in each step left (LLaDA, Nie et al. 2502.09992, `low_confidence`)."""

    revises: ClassVar[bool] = False
    draw: Draw = field(default_factory=Draw)

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        token_BT = self.draw(step.logp_BTV, rng)
        confidence_BT = step.logp_BTV.gather(-1, token_BT[..., None]).squeeze(-1)
        count_B = -(-step.open_BT.sum(-1) // step.left_B)
        return torch.where(ranked(confidence_BT, step.open_BT, count_B), token_BT, step.z_BT)


@dataclass(frozen=True)
class Threshold:
    """Every mask whose likeliest token has probability >= threshold, and at least one (Fast-dLLM, Wu et al. 2505.22618, alg. 1).

    The number of steps follows from the text; a step limit forces the share that TopConfidence would take.
    """

    revises: ClassVar[bool] = False
    threshold: float = 0.9
    draw: Draw = field(default_factory=Draw)

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise InputError(f"threshold must lie in (0, 1], got {self.threshold}")

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        top_BT = step.logp_BTV.max(-1).values.exp().masked_fill(~step.open_BT, 0.0)
        count_B = torch.maximum((top_BT >= self.threshold).sum(-1), -(-step.open_BT.sum(-1) // step.left_B))
        return torch.where(ranked(top_BT, step.open_BT, count_B), self.draw(step.logp_BTV, rng), step.z_BT)
