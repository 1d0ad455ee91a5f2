"""GenMD4's noise: masks with a weight for each token of the vocabulary, so that some tokens are revealed before others.

Shi et al. 2024 (arXiv 2406.04329, section 6): a token v is masked with probability (1 - alpha_t)^w_v. A mask then tells something about its
token, and the text about the time: the network reads t, and p(x_i | z) is proportional to mu(x_i | z without z_i) (1 - alpha_t)^w, mu being
the prediction of the network. The chance of a mask to be revealed depends on that prediction, so no sampler can draw it beforehand.
Shapes: B rows, T positions, V vocabulary including the mask token. Losses in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dlm.noise.learned import Drawn, LearnedNoise
from dlm.noise.loss import bell, bell_density
from dlm.noise.masked import MaskedNoise
from dlm.noise.schedule import Linear
from dlm.protocols import NoiseSchedule

EARLY = 0.1  # of the times of a training step; few masks there teach the network, but without them no weight has a finite gradient


@dataclass(frozen=True)
class GenMD4Noise(LearnedNoise):
    """q(z_t = x) = 1 - (1 - alpha_t)^w_x, else z_t = mask_id. weights: one for each id, that of the mask means nothing; none: 1 each."""

    reads_time: ClassVar[bool] = True
    vocab_size: int
    mask_id: int
    schedule: NoiseSchedule = field(default_factory=Linear)
    weights: tuple[float, ...] = ()
    live: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        self.check_weights()
        self.check(0)

    def count(self, window: int) -> int:
        """One weight for each id, whatever the window."""
        return self.vocab_size

    def counts(self, live_N: Tensor) -> Tensor:
        """All but that of the mask."""
        return torch.cat([live_N[: self.mask_id], live_N[self.mask_id + 1 :]])

    def _weight_V(self, like: Tensor) -> Tensor:
        return self.weight_N(self.vocab_size, like)

    def _masked_share(self, t_B: Tensor) -> Tensor:
        return 1 - self.schedule.alpha(t_B)

    def _stays_BV(self, like: Tensor, t_B: Tensor, s_B: Tensor) -> Tensor:
        """The chance that a mask at t over each token is one at s < t (B, V)."""
        ratio_B = self._masked_share(s_B) / self._masked_share(t_B)
        stays_BV: Tensor = ratio_B[:, None] ** self._weight_V(like)
        return stays_BV

    def corrupt(self, x_BT: Tensor, t_B: Tensor, rng: torch.Generator) -> Tensor:
        """Draw z_t given x. int64 (B, T)."""
        share_BT = self._masked_share(t_B)[:, None] ** self._weight_V(x_BT)[x_BT]
        u_BT = torch.rand(x_BT.shape, generator=rng, device=x_BT.device)
        return torch.where(u_BT >= share_BT, x_BT, self.mask_id)

    def log_draw(self, z_BT: Tensor, x_BT: Tensor, t_B: Tensor, free_BT: Tensor) -> Tensor:
        """log q(z_t | x) of the free positions (B,)."""
        hidden_BT = self._weight_V(x_BT)[x_BT] * self._masked_share(t_B).log()[:, None]
        shown_BT = torch.log1p(-hidden_BT.clamp(max=-1e-12).exp())
        return (torch.where(z_BT == self.mask_id, hidden_BT, shown_BT) * free_BT).sum(-1)

    def times(self, u_B: Tensor, early: float = 0.5) -> tuple[Tensor, Tensor]:
        """Times of uniform draws, and what each counts for (B,): one over its density.

        Of them `early` have a masked share u^p, the others one from Beta(2, 2). Tokens of weight w cost about share^(w - 1), whose variance
        is finite where p w is above 1.
        """
        power = max(2.0, 1.5 / float(self.counts(self._weight_V(u_B).detach()).min()))
        late = 1 - early
        share_B = torch.where(u_B < late, bell(u_B / late), ((u_B - late) / early).clamp(min=0) ** power).clamp(1e-12, 1 - 1e-6)
        density_B = late * bell_density(share_B) + early * share_B ** (1 / power - 1) / power
        t_B = self.schedule.inverse(1 - share_B)
        return t_B, 1 / (density_B * -self.schedule.dalpha(t_B))

    def control(self, x_BT: Tensor, z_BT: Tensor, t_B: Tensor) -> Tensor:
        """A multiple of the rates of the masks less their mean (B, T): 0 on average at any t. Taken from `nelbo`, with which it moves, it
        lowers the variance. The factor is about the nats of a mask; any other would be right, and less steady."""
        weight_BT, share_B1 = self._weight_V(x_BT)[x_BT], self._masked_share(t_B)[:, None]
        rate_BT = -self.schedule.dalpha(t_B)[:, None] / share_B1 * weight_BT
        return math.log(self.vocab_size) / 2 * rate_BT * ((z_BT == self.mask_id).to(rate_BT.dtype) - share_B1**weight_BT)

    def renoise(self, z_BT: Tensor, s_B: Tensor, t_B: Tensor, u_BT: Tensor) -> Tensor:
        """Draw z_t given z_s, s <= t, from one uniform a position. int64 (B, T)."""
        weight_BT = self._weight_V(z_BT)[z_BT]
        keep_BT = (1 - self._masked_share(t_B)[:, None] ** weight_BT) / (1 - self._masked_share(s_B)[:, None] ** weight_BT)
        return torch.where(u_BT < keep_BT, z_BT, self.mask_id)

    def prior(self, u_BT: Tensor) -> Tensor:
        """z_1: all masks (the uniforms are not needed)."""
        return torch.full_like(u_BT, self.mask_id, dtype=torch.long)

    def prior_cost(self, x_BT: Tensor) -> Tensor:
        """0 (B, T): the schedule ends at exactly 0."""
        return torch.zeros(x_BT.shape, dtype=torch.float32 if x_BT.device.type == "mps" else torch.float64, device=x_BT.device)

    def log_probs(self, logits_BTV: Tensor, z_BT: Tensor, t_B: Tensor) -> Tensor:
        """log mu(x | z without z_i) (B, T, V): MASK has probability 0, a visible token is certain."""
        return MaskedNoise(self.vocab_size, self.mask_id).log_probs(logits_BTV, z_BT)

    def denoised(self, logp_BTV: Tensor, z_BT: Tensor, t_B: Tensor) -> Tensor:
        """log p(x_i | z) (B, T, V): at a mask mu(x) times the chance of x to be masked, normalised."""
        evidence_BV = self._masked_share(t_B).clamp(min=1e-30).log()[:, None] * self._weight_V(logp_BTV)
        return (logp_BTV + evidence_BV.to(logp_BTV.dtype)[:, None]).log_softmax(-1)

    def posterior(self, logp_BTV: Tensor, z_BT: Tensor, t_B: Tensor, s_B: Tensor) -> Tensor:
        """p(z_s | z_t), s < t, probabilities (B, T, V): a mask over y stays with its chance, and is y otherwise."""
        p_BTV = self.denoised(logp_BTV, z_BT, t_B).exp()
        stays_BTV = p_BTV * self._stays_BV(logp_BTV, t_B, s_B).to(p_BTV.dtype)[:, None]
        mask_V = (torch.arange(self.vocab_size, device=logp_BTV.device) == self.mask_id).to(p_BTV.dtype)
        moved_BTV = p_BTV - stays_BTV + stays_BTV.sum(-1, keepdim=True) * mask_V
        return torch.where((z_BT == self.mask_id)[..., None], moved_BTV, p_BTV)

    def nelbo(self, logp_BTV: Tensor, x_BT: Tensor, z_BT: Tensor, t_B: Tensor) -> Tensor:
        """-r_x (1 + log p(x | z)) + sum_y r_y p(y | z) at masks (B, T), r_v = -w_v alpha'_t / (1 - alpha_t) the rate of revealing v."""
        logp_BTV = self.denoised(logp_BTV, z_BT, t_B)
        clock_B11 = (-self.schedule.dalpha(t_B) / self._masked_share(t_B))[:, None, None]
        weight_V = self._weight_V(logp_BTV).to(logp_BTV.dtype)
        true_BT = weight_V[x_BT] * (1 + logp_BTV.gather(-1, x_BT[..., None]).squeeze(-1))
        cost_BT = (weight_V * logp_BTV.exp()).sum(-1) - true_BT
        return torch.where(z_BT == self.mask_id, clock_B11[..., 0] * cost_BT, 0.0)

    def nelbo_step(self, logp_BTV: Tensor, x_BT: Tensor, z_BT: Tensor, t_B: Tensor, s_B: Tensor) -> Tensor:
        """KL( q(z_s | z_t, x) || p(z_s | z_t) ) (B, T) for one step of a discrete grid, z drawn at t."""
        logp_BTV, stays_BV = self.denoised(logp_BTV, z_BT, t_B), self._stays_BV(logp_BTV, t_B, s_B).to(logp_BTV.dtype)
        stays_BT, stays_mean_BT = stays_BV.gather(1, x_BT), (logp_BTV.exp() * stays_BV[:, None]).sum(-1)
        nll_BT = -logp_BTV.gather(-1, x_BT[..., None]).squeeze(-1)
        late_BT = torch.where(stays_BT > 0, stays_BT * (stays_BT / stays_mean_BT).log(), 0.0)
        cost_BT = (1 - stays_BT) * nll_BT + late_BT
        return torch.where(z_BT == self.mask_id, cost_BT, 0.0)

    def cross_entropy(self, logp_BTV: Tensor, x_BT: Tensor, z_BT: Tensor, t_B: Tensor) -> Tensor:
        """-log p(x | z) at masks, 0 where the token is visible (B, T)."""
        nll_BT = -self.denoised(logp_BTV, z_BT, t_B).gather(-1, x_BT[..., None]).squeeze(-1)
        return torch.where(z_BT == self.mask_id, nll_BT, 0.0)

    def draw(
        self, predict: Callable[[Tensor, Tensor], Tensor], x_BT: Tensor, free_BT: Tensor, rng: torch.Generator, u_B: Tensor, *, equal: bool
    ) -> Drawn:
        """As `loss.continuous`, with the probability of the masks that were drawn."""
        t_B, weight_B = self.times(u_B, EARLY if equal else 0.5)
        z_BT = torch.where(free_BT, self.corrupt(x_BT, t_B, rng), x_BT)
        logp_BTV = self.log_probs(predict(z_BT, t_B), z_BT, t_B)
        network_B = weight_B * (self.held().nelbo(logp_BTV, x_BT, z_BT, t_B) * free_BT).sum(-1)
        bound_BT = self.nelbo(logp_BTV.detach(), x_BT, z_BT, t_B) - self.control(x_BT, z_BT, t_B)
        bound_B = weight_B * (bound_BT * free_BT).sum(-1)
        if equal:  # the rates fall as one over the share of masks
            share_B = self._masked_share(t_B)
            network_B = network_B * 2 * share_B * bell_density(share_B)
        return Drawn(network_B, bound_B, self.log_draw(z_BT, x_BT, t_B, free_BT))
