"""Remasking rules: for masked noise, tokens that were written may become masks again.

Shapes: B rows, T positions of the window, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dlm.errors import InputError, in_range
from dlm.protocols import RNG
from dlm.sampling.diffusion.protocols import Step
from dlm.sampling.diffusion.unmasking import drawn_at
from dlm.sampling.draw import MAX_SETTING, Draw, beside, pick, ranked, uniform

KINDS = ("cap", "rescale", "conf", "loop")


def _shadow_logp(step: Step) -> Tensor:
    """log p(x_i | the rest of z) (B, T, V), at a token with itself hidden."""
    assert step.shadow_BTV is not None
    masked_BT = step.z_BT == step.noise.mask_id
    hidden_BTV = step.noise.log_probs(step.shadow_BTV, torch.full_like(step.z_BT, step.noise.mask_id), step.t_B)
    return torch.where(masked_BT[..., None], step.logp_BTV, hidden_BTV)


@dataclass(frozen=True)
class Remask:
    """ReMDM (Wang et al. 2503.00307): in t -> s a token becomes a mask again with probability sigma, and masks are revealed the more.

    With sigma_max = min(1, (1 - alpha_s) / alpha_t), the largest that keeps the marginals: `cap` sigma = min(eta, sigma_max); `rescale`
    eta sigma_max; `conf` the rescaled one times a softmax over the tokens of minus the confidence with which each was written; `loop`
    cap, but only in the middle third of the steps, where alpha stands still.
    """

    revises: ClassVar[bool] = True
    kind: str = "cap"
    eta: float = 0.04
    draw: Draw = field(default_factory=Draw)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"remasking is one of {', '.join(KINDS)}, got {self.kind}")
        in_range(self.eta, 0, 1, "eta")

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        masked_BT = step.open_BT & (step.z_BT == step.noise.mask_id)
        alpha_t, alpha_s = self._alphas(step)
        most_B = ((1 - alpha_s) / alpha_t.clamp(min=1e-12)).clamp(max=1)
        sigma_B = self.eta * most_B if self.kind in ("rescale", "conf") else most_B.clamp(max=self.eta)
        if self.kind == "loop":  # before and after the loop nothing is remasked
            sigma_B = torch.where(alpha_t == alpha_s, sigma_B, 0.0)
        sigma_BT = sigma_B[:, None].expand_as(masked_BT) if self.kind != "conf" else self._least_sure(step, masked_BT) * sigma_B[:, None]
        token_BT, u_BT = self.draw(step.logp_BTV, rng), beside(uniform(rng, masked_BT.shape[1]), step.t_B)
        masks_B = sigma_B * (self.kind != "conf")  # whose softmax gives masks a sigma of 0
        reveal_B = (alpha_s - (1 - masks_B) * alpha_t) / (1 - alpha_t).clamp(min=1e-12)
        reveal_BT = masked_BT & ((u_BT < reveal_B[:, None]) | (step.s_B == 0)[:, None])
        remask_BT = step.open_BT & ~masked_BT & (u_BT < sigma_BT) & (step.s_B > 0)[:, None]
        if self.kind == "conf":
            sure_BT = pick(step.logp_BTV, token_BT)
            before_BT = step.memory.get("sure", torch.full_like(sure_BT, torch.nan))
            step.memory["sure"] = torch.where(reveal_BT, sure_BT, before_BT)
        return torch.where(reveal_BT, token_BT, torch.where(remask_BT, step.noise.mask_id, step.z_BT))

    def _alphas(self, step: Step) -> tuple[Tensor, Tensor]:
        """alpha at t and s; for `loop` the first third of the steps runs down to t = 0.1, where the second stays, the last to 0."""
        alpha = step.noise.schedule.alpha
        if self.kind != "loop":
            return alpha(step.t_B), alpha(step.s_B)

        def held(t_B: Tensor) -> Tensor:  # up to rounding: a step from third to third stands still
            return torch.where(t_B > 2 / 3 + 1e-9, 1 - 2.7 * (1 - t_B), torch.where(t_B < 1 / 3 - 1e-9, 0.3 * t_B, 0.1))

        return alpha(held(step.t_B)), alpha(held(step.s_B))

    def _least_sure(self, step: Step, masked_BT: Tensor) -> Tensor:
        """A softmax of minus the probability at writing over the tokens that stand (B, T)."""
        sure_BT = step.memory.get("sure", torch.full_like(step.t_B[:, None].expand_as(masked_BT), torch.nan)).exp()
        standing_BT = step.open_BT & ~masked_BT & ~sure_BT.isnan()
        return (-sure_BT).masked_fill(~standing_BT, -torch.inf).softmax(-1).nan_to_num(0.0)


@dataclass(frozen=True)
class Revoke:
    """Write every mask whose likeliest token reaches `threshold`; remask the tokens that the rest of the text then makes unlikely.

    A token is remasked whose probability, with itself hidden, is below `keep`. After WINO (Hong et al. 2507.18578), whose shadow block
    hides tokens in the same way. Tokens of the last step are not remasked.
    """

    revises: ClassVar[bool] = True
    checks: ClassVar[bool] = True
    threshold: float = 0.6
    keep: float = 0.9
    draw: Draw = field(default_factory=Draw)

    def __post_init__(self) -> None:
        in_range(self.threshold, 0, 1, "the threshold", above=True)
        in_range(self.keep, 0, 1, "the probability to keep a token")

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        masked_BT = step.open_BT & (step.z_BT == step.noise.mask_id)
        top_BT = step.logp_BTV.max(-1).values.exp().masked_fill(~masked_BT, 0.0)
        left_B = masked_BT.sum(-1)
        count_B = torch.maximum((top_BT >= self.threshold).sum(-1), -(-left_B // step.left_B))
        write_BT = ranked(top_BT, masked_BT, count_B)
        # fewer are remasked than are written, so that every step goes on
        stands_BT = step.open_BT & ~masked_BT
        sure_BT = pick(_shadow_logp(step), step.z_BT).exp().masked_fill(~stands_BT, 2.0)
        most_B = (count_B - 1).clamp(min=0) * (step.left_B > 1)
        drop_BT = ranked(-sure_BT, stands_BT & (sure_BT < self.keep), most_B)
        return drawn_at(write_BT, step, self.draw, rng).masked_fill(drop_BT, step.noise.mask_id)


@dataclass(frozen=True)
class Planned:
    """A planner keeps the best tokens, drawn or standing, as many as the grid says; the rest are masks again (P2, Peng et al. 2502.03540).

    The planner is the network itself: the probability of a token with itself hidden. eta: weight of the tokens that stand, 0 remasks
    none.
    """

    revises: ClassVar[bool] = True
    checks: ClassVar[bool] = True
    eta: float = 1.0
    draw: Draw = field(default_factory=Draw)

    def __post_init__(self) -> None:
        in_range(self.eta, 0, MAX_SETTING, "eta")

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        masked_BT = step.z_BT == step.noise.mask_id
        token_BT = torch.where(masked_BT, self.draw(step.logp_BTV, rng), step.z_BT)
        score_BT = pick(_shadow_logp(step), token_BT)
        score_BT = torch.where(masked_BT, score_BT, self.eta * score_BT if self.eta else torch.inf)  # before any, also a certain one
        count_B = (step.noise.schedule.alpha(step.s_B) * step.open_BT.sum(-1) - 1e-9).ceil().long()  # 0.3 of 10 is 3
        count_B = torch.where(step.left_B == 1, step.open_BT.sum(-1), count_B)
        keep_BT = ranked(score_BT, step.open_BT, count_B)
        return torch.where(step.open_BT, torch.where(keep_BT, token_BT, step.noise.mask_id), step.z_BT)
