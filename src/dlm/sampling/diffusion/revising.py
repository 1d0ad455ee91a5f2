"""Revising rules: tokens may change again; for replacement noise, and with remasking for masked noise.

Every rule writes all open positions in every step; the last step writes the final token. `mu` is the leave-one-out distribution
p(x_i | z without z_i), `denoised` is p(x_i | z), which counts the token standing there.
Shapes: B rows, T positions of the window, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dlm.errors import in_range
from dlm.protocols import RNG
from dlm.sampling.diffusion.protocols import Rule, Step
from dlm.sampling.diffusion.unmasking import drawn_at, entropy, within
from dlm.sampling.draw import MAX_SETTING, Draw, beside, categorical, pick, ranked, uniform

PART_NUMBERS = 2**20
"""Probabilities that are worked on at once: those of a window of a large vocabulary take gigabytes, several times over."""


def reverse(step: Step, draw: Draw, to_B: Tensor, rng: RNG) -> Tensor:
    """z at `to_B` from the plug-in posterior; the final token where that is 0."""
    u_BT = uniform(rng, step.z_BT.shape[1])
    width = len(step.z_BT) * step.logp_BTV.shape[-1]
    parts = (x.split(max(1, PART_NUMBERS // width), 1) for x in (step.z_BT, step.logp_BTV, u_BT))
    return torch.cat([_reverse_part(step, draw, to_B, *part) for part in zip(*parts, strict=True)], 1)


def _reverse_part(step: Step, draw: Draw, to_B: Tensor, z_BT: Tensor, logp_BTV: Tensor, u_BT: Tensor) -> Tensor:
    """`reverse` of some of the positions."""
    # a shape that leaves only tokens which cannot have become z_i would leave nothing
    possible_BTV = step.noise.denoised(logp_BTV, z_BT, step.t_B) > -torch.inf
    logp_BTV = draw.shape(logp_BTV.masked_fill(~possible_BTV, -torch.inf))
    move_BTV = step.noise.posterior(logp_BTV, z_BT, step.t_B, to_B).log()
    final_BTV = step.noise.denoised(logp_BTV, z_BT, step.t_B)
    return categorical(torch.where((to_B > 0)[:, None, None], move_BTV, final_BTV), u_BT)


@dataclass(frozen=True)
class Reverse:
    """The reverse chain of the grid, exact for the network's marginals (D3PM, Austin et al. 2107.03006, eq. 4)."""

    revises: ClassVar[bool] = True
    draw: Draw = field(default_factory=Draw)

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        return torch.where(step.open_BT, reverse(step, self.draw, step.s_B, rng), step.z_BT)


@dataclass(frozen=True)
class PredictorCorrector:
    """Overshoot t -> s by `corrector` more steps of that length, then add the noise back.

    Forward noise is exact, so the marginal at s is that of the reverse move, but tokens drawn together are drawn anew.
    For masks this is remasking. Cf. Campbell et al. 2205.14987; the psi-samplers of 2602.21185; ReMDM, 2503.00307.
    """

    revises: ClassVar[bool] = True
    corrector: float = 1.0
    draw: Draw = field(default_factory=Draw)

    def __post_init__(self) -> None:
        in_range(self.corrector, 0, MAX_SETTING, "the corrector")

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        below_B = (step.s_B - self.corrector * (step.t_B - step.s_B)).clamp(min=0)
        z_BT = reverse(step, self.draw, below_B, rng)
        noised_BT = step.noise.renoise(z_BT, below_B, step.s_B, beside(uniform(rng, z_BT.shape[1]), z_BT))
        return torch.where(step.open_BT, torch.where((step.s_B > 0)[:, None], noised_BT, z_BT), step.z_BT)


@dataclass(frozen=True)
class Refine:
    """Draw every position from p(x_i | z) in every step, with no noise put back (the first sampler of tiny-diffusion)."""

    revises: ClassVar[bool] = True
    draw: Draw = field(default_factory=Draw)

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        drawn_BT = self.draw(step.noise.denoised(step.logp_BTV, step.z_BT, step.t_B), rng)
        return torch.where(step.open_BT, drawn_BT, step.z_BT)


@dataclass(frozen=True)
class EntropyBound:
    """Draw all, keep the positions of least entropy while sum H - max H <= bound (nats), put the prior's noise on the rest.

    The sum bounds the mutual information of the kept tokens (EB-sampler, Ben-Hamu et al. 2505.24857); with re-noising it is
    DiffusionGemma's sampler. The last step keeps all. How much is noise does not follow the grid here, so p(x_i | z) is taken
    near the level that explains itself, the share of tokens expected to be wrong, by a few rounds from that of the grid.
    """

    revises: ClassVar[bool] = True
    bound: float = 0.1
    draw: Draw = field(default_factory=Draw)

    def __post_init__(self) -> None:
        in_range(self.bound, 0, MAX_SETTING, "the entropy bound in nats")

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        logp_BTV = self._denoised(step)
        drawn_BT = self.draw(logp_BTV, rng)
        entropy_BT = entropy(logp_BTV).masked_fill(~step.open_BT, torch.inf)
        count_B = torch.where(step.left_B == 1, step.open_BT.sum(-1), within(entropy_BT, self.bound))
        keep_BT = ranked(-entropy_BT, step.open_BT, count_B)
        noise_BT = step.noise.prior(beside(uniform(rng, drawn_BT.shape[1]), drawn_BT))
        return torch.where(step.open_BT, torch.where(keep_BT, drawn_BT, noise_BT), step.z_BT)

    def _denoised(self, step: Step, rounds: int = 8) -> Tensor:
        t_B, count_B = step.t_B, step.open_BT.sum(-1).clamp(min=1)
        for _ in range(rounds):
            logp_BTV = step.noise.denoised(step.logp_BTV.double(), step.z_BT, t_B)
            stays_BT = pick(logp_BTV, step.z_BT).exp()
            wrong_B = torch.where(step.open_BT, 1 - stays_BT, 0.0).sum(-1) / count_B  # a given token may be impossible at t
            t_B = step.noise.schedule.inverse(1 - wrong_B.clamp(1e-3, 1 - 1e-3)).to(t_B)
        return logp_BTV


@dataclass(frozen=True)
class StableBound:
    """DiffusionGemma's sampler: `EntropyBound` by the network's own distribution, which hears of the step by itself, until the likeliest
    tokens have stood for `stable` steps and their mean entropy is below `confidence` nats; what is left are the likeliest tokens
    (transformers, `generation_diffusion_gemma.py`).
    """

    revises: ClassVar[bool] = True
    bound: float = 0.1
    stable: int = 1
    confidence: float = 0.005
    draw: Draw = field(default_factory=Draw)

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        guess_BT, drawn_BT = step.logp_BTV.argmax(-1), self.draw(step.logp_BTV, rng)
        entropy_BT = entropy(step.logp_BTV)
        keep_BT = ranked(-entropy_BT, step.open_BT, within(entropy_BT.masked_fill(~step.open_BT, torch.inf), self.bound))
        noise_BT = step.noise.prior(beside(uniform(rng, drawn_BT.shape[1]), drawn_BT))
        last_BT, stood_BT = (step.memory.get(name, torch.full_like(entropy_BT, torch.nan)) for name in ("guess", "stood"))
        same_B1 = ((guess_BT == last_BT) | ~step.open_BT).all(-1, keepdim=True)
        step.memory["guess"] = guess_BT.double()
        step.memory["stood"] = torch.where(same_B1, stood_BT.nan_to_num(0.0) + 1, 0.0)
        step.memory["entropy"] = entropy_BT
        next_BT = torch.where((self.done(step, guess_BT) | (step.left_B == 1))[:, None], guess_BT, torch.where(keep_BT, drawn_BT, noise_BT))
        return torch.where(step.open_BT, next_BT, step.z_BT)

    def done(self, step: Step, next_BT: Tensor) -> Tensor:
        """Rows whose likeliest tokens are stable and sure, bool (B,)."""
        open_B = step.open_BT.sum(-1).clamp(min=1)
        mean_B = torch.where(step.open_BT, step.memory["entropy"], 0.0).sum(-1) / open_B
        return (step.memory["stood"][:, 0] >= self.stable) & (mean_B < self.confidence)


@dataclass(frozen=True)
class ChangeWorst:
    """Draw anew where a better token gains most, mu(best) - mu(z_i) (GIDD, von Ruette et al. 2503.04482; 2512.10858).

    edits: how often a position is drawn on average over all steps, which sets how many change in one.
    """

    revises: ClassVar[bool] = True
    edits: float = 2.0
    draw: Draw = field(default_factory=Draw)

    def __post_init__(self) -> None:
        in_range(self.edits, 0, MAX_SETTING, "the edits a position", above=True)

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        mu_BTV = step.logp_BTV.exp()
        stands_BT = pick(mu_BTV, step.z_BT)
        gain_BT = mu_BTV.max(-1).values - stands_BT
        count_B = (self.edits * step.open_BT.sum(-1) / step.steps).ceil().long()
        # a mask or a forbidden token is never text: at the end it must go at any cost
        never_BT = step.open_BT & (stands_BT == 0)
        count_B = torch.where(step.left_B == 1, torch.maximum(count_B, never_BT.sum(-1)), count_B)
        worst_BT = ranked(gain_BT + never_BT, step.open_BT & ((gain_BT > 0) | never_BT), count_B)
        return drawn_at(worst_BT, step, self.draw, rng)


@dataclass(frozen=True)
class GreedyTail:
    """Another rule, then `steps` last steps that put the likeliest token of p(x_i | z) everywhere."""

    revises: ClassVar[bool] = True
    inner: Rule
    steps: int = 1

    def __post_init__(self) -> None:
        in_range(self.steps, 1, MAX_SETTING, "the greedy tail in steps")

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        likeliest_BT = step.noise.denoised(step.logp_BTV, step.z_BT, step.t_B).argmax(-1)
        tail_BT = (step.left_B <= self.steps)[:, None] & step.open_BT
        return torch.where(tail_BT, likeliest_BT, self.inner(step, rng))
