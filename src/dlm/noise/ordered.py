"""Ordered noise: masks with a weight for each position, which are any-order training with orders that are not uniform.

A position is masked with probability (1 - alpha_t)^w. Since that does not depend on the text, masks tell nothing about tokens and the time
integrates out, as for masked noise: generation is a race in which the next position is i with probability w_i over the sum of the weights
still masked (Plackett-Luce). Equal weights are masked noise; weights that fall by a large factor from position to position are the order
from left to right. Cf. 2511.19152 (multivariate schedules) and LO-ARM (2503.05979, an order that depends on the text).
Shapes: B rows, T positions, V vocabulary. Losses in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dlm.noise.learned import Drawn, LearnedNoise
from dlm.noise.loss import bell, count_masks
from dlm.noise.masked import MaskedNoise


@dataclass(frozen=True)
class OrderedNoise(MaskedNoise, LearnedNoise):
    """q(z_t = x) = 1 - (1 - alpha_t)^w_i at position i of a window, else z_t = mask_id. weights: one for each position; none: 1 each."""

    weights: tuple[float, ...] = ()
    live: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        self.check_weights()

    def count(self, window: int) -> int:
        """One weight for each position."""
        return window

    @property
    def uniform_order(self) -> bool:
        """Whether every order is as likely as any other."""
        return self.live is None and len(set(self.weights)) < 2

    def _weight_T(self, like_BT: Tensor) -> Tensor:
        return self.weight_N(like_BT.shape[1], like_BT)

    def _share_BT(self, z_BT: Tensor, t_B: Tensor) -> Tensor:
        """The chance of each position to be masked at t (B, T)."""
        share_BT: Tensor = (1 - self.schedule.alpha(t_B))[:, None] ** self._weight_T(z_BT)
        return share_BT

    def _stays_BT(self, z_BT: Tensor, t_B: Tensor, s_B: Tensor) -> Tensor:
        """The chance that a mask at t is one at s < t (B, T)."""
        ratio_B = (1 - self.schedule.alpha(s_B)) / (1 - self.schedule.alpha(t_B))
        stays_BT: Tensor = ratio_B[:, None] ** self._weight_T(z_BT)
        return stays_BT

    def corrupt(self, x_BT: Tensor, t_B: Tensor, rng: torch.Generator) -> Tensor:
        """Draw z_t given x. int64 (B, T)."""
        u_BT = torch.rand(x_BT.shape, generator=rng, device=x_BT.device)
        return torch.where(u_BT >= self._share_BT(x_BT, t_B), x_BT, self.mask_id)

    def corrupt_order(self, x_BT: Tensor, count_B: Tensor, free_BT: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mask the count_B free positions that a drawn order reveals last: z_BT, and the order from its end, int64 (B, T).

        A position is masked at the time u^(1/w) of a uniform draw; the order of generation is that of these times, downwards.
        """
        time_BT = torch.rand(x_BT.shape, generator=rng, device=x_BT.device).to(self._weight_T(x_BT)).log() / self._weight_T(x_BT).detach()
        order_BT = time_BT.masked_fill(~free_BT, torch.inf).argsort(-1)
        return torch.where(order_BT.argsort(-1) < count_B[:, None], self.mask_id, x_BT), order_BT

    def corrupt_count(self, x_BT: Tensor, count_B: Tensor, free_BT: Tensor, rng: torch.Generator) -> Tensor:
        """Mask exactly count_B of the free positions, those that a drawn order reveals last. int64 (B, T)."""
        return self.corrupt_order(x_BT, count_B, free_BT, rng)[0]

    def log_order(self, order_BT: Tensor, count_B: Tensor, free_BT: Tensor) -> Tensor:
        """log-probability of the part of an order of `corrupt_order` that is revealed, the last count_B being masked (B,)."""
        weight_BT = torch.where(free_BT, self._weight_T(order_BT), 0.0).gather(1, order_BT)
        place_T = torch.arange(order_BT.shape[1], device=order_BT.device)
        shown_BT = (place_T >= count_B[:, None]) & (place_T < free_BT.sum(-1, keepdim=True))
        step_BT = torch.where(shown_BT, weight_BT, 1.0).log() - torch.where(shown_BT, weight_BT.cumsum(-1), 1.0).log()
        return step_BT.sum(-1)

    def next_cost(self, cost_BT: Tensor, z_BT: Tensor, count_B: Tensor) -> tuple[Tensor, Tensor]:
        """The costs of the masks (0 elsewhere) weighted by the chance of each to be the next that is revealed: a sum, and that of the
        weights (B,)."""
        weight_BT = self._weight_T(z_BT).expand(z_BT.shape).to(cost_BT.dtype)
        left_B = torch.where(z_BT == self.mask_id, weight_BT, 0.0).sum(-1)
        return (weight_BT * cost_BT).sum(-1), left_B.masked_fill(left_B == 0, 1.0)

    def revealed_at(self, u_BT: Tensor) -> Tensor:
        """The alpha at which the reverse chain reveals each position, of uniform draws (B, T)."""
        weight_T = self._weight_T(u_BT)
        return torch.where(weight_T == 1, u_BT, 1 - (1 - u_BT) ** (1 / weight_T))

    def renoise(self, z_BT: Tensor, s_B: Tensor, t_B: Tensor, u_BT: Tensor) -> Tensor:
        """Draw z_t given z_s, s <= t, from one uniform a position. int64 (B, T)."""
        keep_BT = (1 - self._share_BT(z_BT, t_B)) / (1 - self._share_BT(z_BT, s_B))
        return torch.where(u_BT < keep_BT, z_BT, self.mask_id)

    def posterior(self, logp_BTV: Tensor, z_BT: Tensor, t_B: Tensor, s_B: Tensor) -> Tensor:
        """p(z_s | z_t), s < t, probabilities (B, T, V)."""
        stays_BT1 = self._stays_BT(z_BT, t_B, s_B).to(logp_BTV.dtype)[..., None]
        mask_V = (torch.arange(self.vocab_size, device=logp_BTV.device) == self.mask_id).to(logp_BTV.dtype)
        masked_BT1 = (z_BT == self.mask_id)[..., None]
        return torch.where(masked_BT1, (1 - stays_BT1) * logp_BTV.exp() + stays_BT1 * mask_V, logp_BTV.exp())

    def nelbo(self, logp_BTV: Tensor, x_BT: Tensor, z_BT: Tensor, t_B: Tensor) -> Tensor:
        """-w_i alpha'_t / (1 - alpha_t) [z = MASK] (-log mu(x | z)) (B, T)."""
        rate_B = -self.schedule.dalpha(t_B) / (1 - self.schedule.alpha(t_B))
        return rate_B[:, None] * self._weight_T(z_BT) * self.cross_entropy(logp_BTV, x_BT, z_BT)

    def nelbo_step(self, logp_BTV: Tensor, x_BT: Tensor, z_BT: Tensor, t_B: Tensor, s_B: Tensor) -> Tensor:
        """KL( q(z_s | z_t, x) || p(z_s | z_t) ) (B, T) for one step of a discrete grid, z drawn at t."""
        return (1 - self._stays_BT(z_BT, t_B, s_B)) * self.cross_entropy(logp_BTV, x_BT, z_BT)

    def draw(
        self, predict: Callable[[Tensor, Tensor], Tensor], x_BT: Tensor, free_BT: Tensor, rng: torch.Generator, u_B: Tensor, *, equal: bool
    ) -> Drawn:
        """As `loss.any_order`, with the order that was drawn."""
        free_B = free_BT.sum(-1)
        count_B = count_masks(bell(u_B) if equal else u_B, free_B)
        z_BT, order_BT = self.corrupt_order(x_BT, count_B, free_BT, rng)
        nll_BT = self.nll(predict(z_BT, count_B / free_B.clamp(min=1)), x_BT, z_BT)
        sum_B, left_B = self.held().next_cost(nll_BT, z_BT, count_B)
        network_B = sum_B * free_B / left_B
        sum_B, left_B = self.next_cost(nll_BT.detach(), z_BT, count_B)
        bound_B = sum_B * free_B / left_B
        if equal:
            network_B = network_B * count_B / ((free_B + 1) / 2)
            bound_B = bound_B / (free_B * _chance(count_B, free_B))
        return Drawn(network_B, bound_B, self.log_order(order_BT, count_B, free_BT).to(bound_B.dtype))


def _chance(count_B: Tensor, free_B: Tensor) -> Tensor:
    """The probability of a count under levels from Beta(2, 2), float64 (B,)."""
    below_B, above_B = (count_B - 1) / free_B.double(), count_B / free_B.double()
    return above_B**2 * (3 - 2 * above_B) - below_B**2 * (3 - 2 * below_B)
