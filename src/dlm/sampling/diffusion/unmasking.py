"""Unmasking rules: which masks become tokens in a step, and the tokens drawn for them; a written token stays.

Shapes: B rows, T positions of the window, V vocabulary, N steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dlm.errors import InputError, in_range
from dlm.protocols import RNG
from dlm.sampling.diffusion.columns import Columns
from dlm.sampling.diffusion.protocols import Step
from dlm.sampling.draw import MAX_SETTING, Draw, pick, ranked


def entropy(logp_BTV: Tensor) -> Tensor:
    """Nats (B, T)."""
    nats_BT: Tensor = torch.special.entr(logp_BTV.double().exp()).sum(-1)
    return nats_BT


def within(entropy_BT: Tensor, bound: float) -> Tensor:
    """How many of the positions of least entropy have sum H - max H <= bound (B,); inf where none is open."""
    order_BT = entropy_BT.sort(dim=-1).values
    return (order_BT.cumsum(-1) - order_BT <= bound).sum(-1)  # sorted: the largest so far is the last


def share(step: Step) -> Tensor:
    """The masks left divided by the steps left, rounded up (B,)."""
    return -(-step.open_BT.sum(-1) // step.left_B)


def drawn_at(at_BT: Tensor, step: Step, draw: Draw, rng: RNG) -> Tensor:
    """A token drawn at these positions, z elsewhere. On a CPU nothing is drawn elsewhere, where float64 numbers of a large vocabulary take
    most of a step; a GPU would wait longer to count the positions than it takes to draw at all of them."""
    if at_BT.device.type != "cpu":
        return torch.where(at_BT, draw(step.logp_BTV, rng), step.z_BT)
    columns = Columns.of(at_BT)
    return columns.put(step.z_BT, draw(columns.take(step.logp_BTV), columns.draws(rng)))


@dataclass(frozen=True)
class Ancestral:
    """The exact reverse chain of the grid (MD4 section 3, MDLM eq. 7): each mask is revealed in step t -> s with
    (alpha_s - alpha_t) / (1 - alpha_t), whatever the network predicts.

    So the step at which each position is revealed is drawn first, and steps that reveal none take no forward pass.
    """

    revises: ClassVar[bool] = False
    pointwise: ClassVar[bool] = True
    draw: Draw = field(default_factory=Draw)

    def plan(self, open_BT: Tensor, alphas_N: Tensor, drawn_BT: Tensor) -> tuple[Tensor, Tensor]:
        """First step whose alpha exceeds the draw; all that is left goes in the last step."""
        return torch.searchsorted(alphas_N, drawn_BT, right=True).clamp(max=len(alphas_N) - 1), torch.full_like(drawn_BT, torch.nan)

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        return torch.where(step.open_BT, self.draw(step.logp_BTV, rng), step.z_BT)


@dataclass(frozen=True)
class FirstHitting:
    """First-hitting sampler: the reverse chain without a grid, one token a forward pass, in random order, exact (Zheng et al. 2409.02908,
    section 4).

    The network sees the alpha at which each position is reached, of masked noise uniform on 0 .. 1; the budget of steps does not matter.
    """

    revises: ClassVar[bool] = False
    pointwise: ClassVar[bool] = True
    draw: Draw = field(default_factory=Draw)

    def plan(self, open_BT: Tensor, alphas_N: Tensor, drawn_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The order of the draws, and the draws themselves."""
        return drawn_BT.masked_fill(~open_BT, 2.0).argsort(-1).argsort(-1), drawn_BT

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        return torch.where(step.open_BT, self.draw(step.logp_BTV, rng), step.z_BT)


def _margin(logp_BTV: Tensor) -> Tensor:
    first_BT, second_BT = logp_BTV.exp().topk(2, -1).values.unbind(-1)
    return first_BT - second_BT


def _certainty(logp_BTV: Tensor) -> Tensor:
    return -entropy(logp_BTV)


SCORES = {"margin": _margin, "entropy": _certainty}  # those that need no drawn token


@dataclass(frozen=True)
class TopScore:
    """The best drawn tokens, an equal share of the masks in each step left.

    score: `confidence`, the probability of the drawn token (LLaDA, Nie et al. 2502.09992, `low_confidence`); `margin`, of the likeliest
    token over the second (Kim et al. 2502.06768); `entropy`, the least (Dream, 2508.15487). InputError for an unknown score.
    """

    revises: ClassVar[bool] = False
    pointwise: ClassVar[bool] = True
    draw: Draw = field(default_factory=Draw)
    score: str = "confidence"

    def __post_init__(self) -> None:
        if self.score not in ("confidence", *SCORES):
            raise InputError(f"unknown score {self.score!r}; known: confidence, {', '.join(SCORES)}")

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        if self.score != "confidence":
            return drawn_at(ranked(SCORES[self.score](step.logp_BTV), step.open_BT, share(step)), step, self.draw, rng)
        token_BT = self.draw(step.logp_BTV, rng)
        return torch.where(ranked(pick(step.logp_BTV, token_BT), step.open_BT, share(step)), token_BT, step.z_BT)


def _at_least_share(step: Step, top_BT: Tensor, count_B: Tensor, draw: Draw, rng: RNG) -> Tensor:
    """Write the count_B positions of highest `top`, at least the share that keeps within the steps left."""
    best_BT = ranked(top_BT, step.open_BT, torch.maximum(count_B, share(step)))
    return drawn_at(best_BT, step, draw, rng)


@dataclass(frozen=True)
class Threshold:
    """Every mask whose likeliest token has probability >= threshold, and at least one (Fast-dLLM, Wu et al. 2505.22618, alg. 1).

    The number of steps follows from the text; a step limit forces the share that TopScore would take.
    """

    revises: ClassVar[bool] = False
    pointwise: ClassVar[bool] = True
    threshold: float = 0.9
    draw: Draw = field(default_factory=Draw)

    def __post_init__(self) -> None:
        in_range(self.threshold, 0, 1, "the threshold", above=True)

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        top_BT = step.logp_BTV.max(-1).values.exp().masked_fill(~step.open_BT, 0.0)
        return _at_least_share(step, top_BT, (top_BT >= self.threshold).sum(-1), self.draw, rng)


@dataclass(frozen=True)
class Factor:
    """The n most confident masks with (n + 1) (1 - p_n) < factor, p_n of the likeliest token at the n-th (Fast-dLLM, section 3.3).

    At factor 1 greedy drawing of all n equals greedy drawing one by one (its theorem 1).
    """

    revises: ClassVar[bool] = False
    pointwise: ClassVar[bool] = True
    factor: float = 1.0
    draw: Draw = field(default_factory=Draw)

    def __post_init__(self) -> None:
        in_range(self.factor, 0, MAX_SETTING, "the factor", above=True)

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        top_BT = step.logp_BTV.max(-1).values.exp().masked_fill(~step.open_BT, 0.0)
        order_BT = top_BT.sort(dim=-1, descending=True).values
        n_T = torch.arange(1, top_BT.shape[1] + 1, device=top_BT.device)
        within_BT = ((n_T + 1) * (1 - order_BT) < self.factor) & (n_T <= step.open_BT.sum(-1, keepdim=True))
        count_B = (within_BT * n_T).amax(-1)
        return _at_least_share(step, top_BT, count_B, self.draw, rng)


@dataclass(frozen=True)
class EntropyBudget:
    """The masks of least entropy while sum H - max H <= bound nats, which bounds their mutual information (EB-sampler, 2505.24857)."""

    revises: ClassVar[bool] = False
    pointwise: ClassVar[bool] = True
    bound: float = 0.1
    draw: Draw = field(default_factory=Draw)

    def __post_init__(self) -> None:
        in_range(self.bound, 0, MAX_SETTING, "the entropy bound in nats")

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        entropy_BT = entropy(step.logp_BTV).masked_fill(~step.open_BT, torch.inf)
        return _at_least_share(step, -entropy_BT, within(entropy_BT, self.bound), self.draw, rng)


@dataclass(frozen=True)
class KLStable:
    """Masks whose distribution is confident (>= threshold) and has not moved since the last forward pass (KL <= kl nats); at least one
    (KLASS, 2511.05664)."""

    revises: ClassVar[bool] = False
    pointwise: ClassVar[bool] = True
    threshold: float = 0.6
    kl: float = 0.01
    draw: Draw = field(default_factory=Draw)

    def __post_init__(self) -> None:
        in_range(self.threshold, 0, 1, "the threshold", above=True)
        in_range(self.kl, 0, MAX_SETTING, "the KL divergence in nats")

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        last_BTV = step.memory.get("logp", torch.full_like(step.logp_BTV, torch.nan))
        step.memory["logp"] = step.logp_BTV
        p_BTV = step.logp_BTV.exp()
        moved_BT = torch.where(p_BTV > 0, p_BTV * (step.logp_BTV - last_BTV), 0.0).sum(-1)  # nan without a last pass
        top_BT = p_BTV.max(-1).values.masked_fill(~step.open_BT, 0.0)
        stable_BT = (moved_BT <= self.kl) & (top_BT >= self.threshold)
        return _at_least_share(step, top_BT + stable_BT, (stable_BT & step.open_BT).sum(-1), self.draw, rng)
