"""The reference samplers of LLaDA, Dream and dllm as rules: a token for every mask, a score, and how many of the best are transferred.

They differ from `TopScore` in the quota of a step, in the distribution that is scored and in the tokens that come last.
Shapes: B rows, T positions of the window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dlm.errors import InputError, in_range
from dlm.protocols import RNG
from dlm.sampling.diffusion.protocols import Step
from dlm.sampling.diffusion.unmasking import share
from dlm.sampling.draw import MAX_SETTING, Draw, beside, categorical, pick, uniform

FIRST_TIME, LAST_TIME = 1.0, 1e-3  # Dream's clock runs from t = 1 to its eps


def even(step: Step) -> Tensor:
    """LLaDA's `get_num_transfer_tokens`: equal parts, the remainder in the first steps (B,)."""
    return share(step)


def rounded(step: Step) -> Tensor:
    """dllm's: the masks left divided by the steps left, rounded half to even; steps that would transfer nothing are left out (B,)."""
    left_B = step.open_BT.sum(-1)
    steps_B = torch.minimum(step.left_B, 2 * left_B - 1).clamp(min=1)  # with more steps left the quotient rounds to 0
    return (left_B.double() / steps_B).round().long()


def by_time(step: Step) -> Tensor:
    """Dream's: int(masks (1 - s / t)), computed in float32 and possibly 0; all that is left in the last step (B,)."""
    left_B, moved_B = step.open_BT.sum(-1), 1 - _kept(step)
    return torch.where(step.left_B == 1, left_B, (left_B.float() * moved_B).long())


def _kept(step: Step) -> Tensor:
    """s / t of Dream's clock, float32 (B,)."""
    steps_B = torch.as_tensor(step.steps, device=step.left_B.device).expand_as(step.left_B)
    kept = []
    for steps, left in torch.stack([steps_B, step.left_B], -1).tolist():
        t_N = torch.linspace(FIRST_TIME, LAST_TIME, steps + 1)
        kept.append(t_N[steps - left + 1] / t_N[steps - left])
    return beside(torch.stack(kept), step.left_B)


QUOTAS: dict[str, Callable[[Step], Tensor]] = {"even": even, "rounded": rounded, "by-time": by_time}
SCORES = ("confidence", "random", "margin", "entropy", "order")


@dataclass(frozen=True)
class Transfer:
    """A token for every mask; the best of them, as many as the quota of the step allows, are written.

    quota: `even` (LLaDA, Nie et al. 2502.09992), `rounded` (dllm), `by-time` (Dream, Ye et al. 2508.15487), or a number (tiny-diffusion).
    score: `confidence`, of the chosen token (`low_confidence`, `maskgit_plus`); `random`; `margin` over the second choice (`topk_margin`);
    `entropy`, the least; `order`, from left to right.
    narrowed: the score reads the distribution after temperature, top-p and top-k (Dream), else the model's own.
    never: tokens that are not written (`logits_eos_inf`); last: tokens that may be chosen, with confidence 0 (`confidence_eos_eot_inf`).
    score_temperature: transferred positions are drawn in proportion to exp(score / temperature) (`alg_temp`); 0 takes the best.
    """

    revises: ClassVar[bool] = False
    pointwise: ClassVar[bool] = True
    waits: ClassVar[bool] = True  # a quota may be 0
    quota: str | int = "even"
    score: str = "confidence"
    narrowed: bool = False
    score_temperature: float = 0.0
    never: tuple[int, ...] = ()
    last: tuple[int, ...] = ()
    draw: Draw = field(default_factory=Draw)

    def __post_init__(self) -> None:
        if (isinstance(self.quota, str) and self.quota not in QUOTAS) or self.score not in SCORES:
            raise InputError(
                f"a quota is one of {', '.join(QUOTAS)} and a score one of {', '.join(SCORES)}, got {self.quota}, {self.score}"
            )
        if isinstance(self.quota, int):
            in_range(self.quota, 1, MAX_SETTING, "the tokens of a step")
        in_range(self.score_temperature, 0, MAX_SETTING, "the temperature of scores")

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        logp_BTV = without(step.logp_BTV, self.never)
        if self.narrowed:
            logp_BTV = narrow(logp_BTV, self.draw)
            token_BT = logp_BTV.argmax(-1) if self.draw.temperature == 0 else categorical(logp_BTV, uniform(rng, step.z_BT.shape[1]))
        else:
            token_BT = self.draw(logp_BTV, rng)
        score_BT = self._score(logp_BTV, token_BT, rng)
        if self.score_temperature:  # the greatest of scores with Gumbel noise: a draw without replacement
            u_BT = beside(uniform(rng, step.z_BT.shape[1]), step.z_BT)
            score_BT = score_BT.double() / self.score_temperature - (-u_BT.log()).log()
        best_BT = best(score_BT, step, self._count(step))
        return torch.where(best_BT, token_BT, step.z_BT)

    def _count(self, step: Step) -> Tensor:
        """Tokens that each row writes (B,)."""
        return step.open_BT.sum(-1).clamp(max=self.quota) if isinstance(self.quota, int) else QUOTAS[self.quota](step)

    def _score(self, logp_BTV: Tensor, token_BT: Tensor, rng: RNG) -> Tensor:
        """Finite, so that a token of confidence 0 comes before no token at all (B, T)."""
        if self.score == "random":
            return beside(uniform(rng, token_BT.shape[1]), token_BT)
        if self.score == "order":
            return -torch.arange(token_BT.shape[1], device=token_BT.device).double().expand(token_BT.shape)
        if self.score == "margin":
            first_BT, second_BT = logp_BTV.exp().topk(2, -1).values.unbind(-1)
            return first_BT - second_BT
        if self.score == "entropy":
            p_BTV = logp_BTV.exp()
            return (p_BTV * (p_BTV + 1e-10).log()).sum(-1)
        return pick(without(logp_BTV, self.last), token_BT).exp()


@dataclass(frozen=True)
class Origin:
    """Dream's `origin`: every mask is written with chance 1 - s / t, whatever the network predicts; all that are left in the last step."""

    revises: ClassVar[bool] = False
    pointwise: ClassVar[bool] = True
    waits: ClassVar[bool] = True
    draw: Draw = field(default_factory=Draw)

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        chance_B = torch.where(step.left_B == 1, 1.0, 1 - _kept(step))
        u_BT = beside(uniform(rng, step.z_BT.shape[1]), step.z_BT)
        return torch.where(step.open_BT & (u_BT < chance_B[:, None]), self.draw(step.logp_BTV, rng), step.z_BT)


def reference(quota: str, remasking: str, draw: Draw, *, never: tuple[int, ...] = (), last: tuple[int, ...] = ()) -> Transfer:
    """LLaDA's and dllm's rule by their word for the score. InputError for one that they do not have."""
    scores = {"low_confidence": "confidence", "random": "random"}
    if remasking not in scores:
        raise InputError(f"remasking is low_confidence or random, got {remasking!r}")
    return Transfer(quota, scores[remasking], never=never, last=last, draw=draw)


def dream(alg: str, draw: Draw, alg_temp: float = 0.0) -> Origin | Transfer:
    """Dream's rule by its word for the algorithm. InputError for one that it does not have."""
    scores = {"maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy"}
    if alg == "origin":
        return Origin(draw)
    if alg not in scores:
        raise InputError(f"alg is origin, {', '.join(scores)}, got {alg!r}")
    return Transfer("by-time", scores[alg], True, alg_temp, draw=draw)


def best(score_BT: Tensor, step: Step, count_B: Tensor) -> Tensor:
    """bool (B, T): the count_B open positions of highest score. Equals in the order of `torch.topk` over the text of a row, as in the
    references: where EOS is last, most scores are 0."""
    columns, score_BT = step.columns, score_BT.masked_fill(~step.open_BT, -torch.inf)
    if columns is not None:  # where they stand decides among equals
        score_BT = columns.put(score_BT.new_full((len(score_BT), columns.width), -torch.inf), score_BT)
    best_BT = torch.zeros_like(score_BT, dtype=torch.bool)
    length_B = torch.full_like(count_B, score_BT.shape[1]) if step.valid_BT is None else step.valid_BT.sum(-1)
    for row, (count, length) in enumerate(torch.stack([count_B, length_B], -1).tolist()):
        best_BT[row, score_BT[row, :length].topk(count).indices] = True
    return (best_BT if columns is None else columns.take(best_BT)) & step.open_BT


def without(logp_BTV: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """The log-probabilities once these tokens are excluded."""
    if not tokens:
        return logp_BTV
    excluded_BTV = logp_BTV.clone()
    excluded_BTV[..., list(tokens)] = -torch.inf
    certain_BT1 = (excluded_BTV == -torch.inf).all(-1, keepdim=True)  # a written token that is one of them
    return torch.where(certain_BT1, logp_BTV, excluded_BTV.log_softmax(-1))


def narrow(logp_BTV: Tensor, draw: Draw) -> Tensor:
    """Temperature, then top-p, then top-k, as Dream applies them, float64; temperature 0 narrows the distribution at temperature 1."""
    logp_BTV = Draw(1.0, 0, draw.top_p).shape(logp_BTV.double() / (draw.temperature or 1.0))
    return Draw(1.0, draw.top_k).shape(logp_BTV)
