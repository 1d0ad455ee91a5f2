"""Replacement noise: a token becomes another one; the base of uniform, semantic and mixed noise.

Each is a family of kernels q(y | x) = keep [y = x] + local [y in the cluster of x] / size + prior(y), closed under
composition: the marginal at t, the move from s to t and the rate of change at t are all of this form, and a process is
the three of them. Everything else follows: the bound is the one of a continuous-time Markov chain (Campbell et al.
2205.14987; Lou et al. 2310.16834), with the network's prediction mu in place of x ("plug-in").

The best mu is then the *leave-one-out* posterior p(x_i | z without z_i), which for masks is the same as the ordinary one,
p(x_i | z), and for replacement noise is not. `log_probs` gives the former, `denoised` the latter.
Shapes: B rows, T positions, V vocabulary including the mask token, C clusters. Losses in nats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from dlm.noise.schedule import Linear
from dlm.protocols import NoiseSchedule

HEADS = ("leave-one-out", "posterior")


@dataclass(frozen=True)
class Kernel:
    """Three parts of q(y | x) at one time a row: keep_B, local_B, prior_BV; for a rate only local and prior matter."""

    keep_B: Tensor
    local_B: Tensor
    prior_BV: Tensor


@dataclass(frozen=True)
class ReplacementNoise(ABC):
    """vocab_size counts the mask token, which is never data. head: the meaning of the network's softmax, leave-one-out or posterior."""

    vocab_size: int
    mask_id: int
    schedule: NoiseSchedule = field(default_factory=Linear)
    head: str = "leave-one-out"
    clusters: tuple[int, ...] = ()  # cluster of each token; only the semantic process reads it

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise ValueError(f"unknown head {self.head!r}; known: {', '.join(HEADS)}")

    @abstractmethod
    def kernel(self, t_B: Tensor) -> Kernel:
        """q(z_t | x)."""

    @abstractmethod
    def between(self, s_B: Tensor, t_B: Tensor) -> Kernel:
        """q(z_t | z_s), s < t."""

    @abstractmethod
    def rate(self, t_B: Tensor) -> Kernel:
        """Rates of jumps at t: to a token of the same cluster (all of them together), to each token whatever stood there."""

    @cached_property
    def _data_V(self) -> Tensor:
        """Uniform over the data vocabulary."""
        share = torch.full((self.vocab_size,), 1 / (self.vocab_size - 1), dtype=torch.float64)
        share[self.mask_id] = 0
        return share

    @cached_property
    def _mask_V(self) -> Tensor:
        """All on the mask token."""
        return torch.nn.functional.one_hot(torch.tensor(self.mask_id), self.vocab_size).double()

    @cached_property
    def _cluster_V(self) -> Tensor:
        return torch.tensor(self.clusters or range(self.vocab_size))

    @cached_property
    def _size_V(self) -> Tensor:
        """Size of the cluster of each token."""
        return torch.bincount(self._cluster_V)[self._cluster_V]

    @cached_property
    def _members(self) -> Tensor:
        """The members of every cluster (C, most), padded with the first."""
        groups = [(self._cluster_V == c).nonzero().squeeze(-1).tolist() for c in range(int(self._cluster_V.max()) + 1)]
        most = max(len(group) for group in groups)
        return torch.tensor([group + group[:1] * (most - len(group)) for group in groups])

    @cached_property
    def _moved(self) -> dict[tuple[str, torch.device, torch.dtype], Tensor]:
        return {}

    def _on(self, like: Tensor, table: str, dtype: torch.dtype | None = None) -> Tensor:
        """One of the tables above in the device and dtype of a tensor, moved there once."""
        key = table, like.device, dtype or like.dtype
        if key not in self._moved:
            self._moved[key] = getattr(self, table).to(*key[1:])
        return self._moved[key]

    def _smooth(self, p_BTV: Tensor) -> Tensor:
        """Each probability replaced by the mean over its cluster."""
        cluster_V, clusters = self._on(p_BTV, "_cluster_V", torch.long), len(self._members)
        sum_BTC = p_BTV.new_zeros(*p_BTV.shape[:-1], clusters).index_add(-1, cluster_V, p_BTV)
        return sum_BTC[..., cluster_V] / self._on(p_BTV, "_size_V")

    def _given(self, kernel: Kernel, p_BTV: Tensor) -> Tensor:
        """sum_x q(y | x) p(x), over y."""
        mixed_BTV = kernel.keep_B[:, None, None].to(p_BTV) * p_BTV + kernel.prior_BV[:, None].to(p_BTV)
        return mixed_BTV + kernel.local_B[:, None, None].to(p_BTV) * self._smooth(p_BTV) if self.clusters else mixed_BTV

    def _likelihood(self, kernel: Kernel, z_BT: Tensor, dtype: torch.dtype) -> Tensor:
        """q(z | x), over x."""
        prior_BT1 = kernel.prior_BV.to(dtype).expand(len(z_BT), -1).gather(1, z_BT)[..., None]
        stays_BT1 = kernel.keep_B[:, None, None].to(dtype) + prior_BT1
        fits_BTV = prior_BT1.expand(*z_BT.shape, self.vocab_size).scatter(-1, z_BT[..., None], stays_BT1)
        if not self.clusters:
            return fits_BTV
        hot_BTV = torch.nn.functional.one_hot(z_BT, self.vocab_size).to(dtype)
        return fits_BTV + kernel.local_B[:, None, None].to(dtype) * self._smooth(hot_BTV)

    def _draw(self, kernel: Kernel, x_BT: Tensor, u_BT: Tensor) -> Tensor:
        """One token a position from q(. | x), from one uniform a position."""
        keep_B1, local_B1, prior_BV = kernel.keep_B[:, None], kernel.local_B[:, None], kernel.prior_BV
        rest_BT = (u_BT - keep_B1 - local_B1).clamp(min=0)
        cdf_BV = prior_BV.cumsum(-1).expand(len(x_BT), -1).contiguous()
        last = self.vocab_size - 1 - (prior_BV > 0).any(0).flip(0).int().argmax()  # a tensor: nobody waits for it
        y_BT = torch.searchsorted(cdf_BV, rest_BT, right=True).clamp(max=last)
        if self.clusters:
            size_BT, cluster_BT = self._on(x_BT, "_size_V")[x_BT], self._on(x_BT, "_cluster_V")[x_BT]
            nth_BT = ((u_BT - keep_B1) / local_B1.clamp(min=1e-30) * size_BT).long().clamp(min=0)
            near_BT = self._on(x_BT, "_members")[cluster_BT, torch.minimum(nth_BT, size_BT - 1)]
            y_BT = torch.where(u_BT < keep_B1 + local_B1, near_BT, y_BT)
        return torch.where(u_BT < keep_B1, x_BT, y_BT)

    def corrupt(self, x_BT: Tensor, t_B: Tensor, rng: torch.Generator) -> Tensor:
        """Draw z_t given x. int64 (B, T)."""
        u_BT = torch.rand(x_BT.shape, generator=rng, device=x_BT.device, dtype=t_B.dtype)
        return self._draw(self.kernel(t_B), x_BT, u_BT)

    def corrupt_count(self, x_BT: Tensor, count_B: Tensor, free_BT: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Noise on a random set of exactly count_B free positions, at a level that fits: (z_BT, t_B, weight_B) for `loss.counted`.

        With k of n positions noised (a noised one may draw its own token again), their share kappa is Beta(k + 1, n - k + 1); it is
        drawn from Beta(k, n - k + 1), the k-th smallest of n uniforms, and the weight holds the quotient of the two.
        """
        kind = torch.float32 if x_BT.device.type == "mps" else torch.float64
        order_BT, u_BT, first_B = (
            torch.rand(shape, generator=rng, device=x_BT.device, dtype=kind) for shape in (x_BT.shape, x_BT.shape, x_BT.shape[:1])
        )
        free_B, order_BT = free_BT.sum(-1), order_BT.masked_fill(~free_BT, 2.0)
        noised_BT = order_BT.argsort(-1).argsort(-1) < count_B[:, None]
        kth_B = order_BT.sort(-1).values.gather(1, (count_B - 1).clamp(min=0)[:, None]).squeeze(1)
        share_B = torch.where(count_B > 0, kth_B, 1 - (1 - first_B) ** (1 / (free_B + 1))).clamp(1e-9, 1 - 1e-6)
        t_B = self._level(share_B)
        kernel, rate = self.kernel(t_B), self.rate(t_B)
        z_BT = torch.where(noised_BT, self._draw(kernel, x_BT, kernel.keep_B[:, None] + u_BT * (1 - kernel.keep_B[:, None])), x_BT)
        slope_B = kernel.keep_B * (rate.local_B + rate.prior_BV.sum(-1))  # d kappa / dt
        return z_BT, t_B, torch.where(count_B > 0, share_B * (free_B + 1) / count_B.clamp(min=1), 1.0) / slope_B

    def _level(self, share_B: Tensor) -> Tensor:
        """The t at which that share is not kept, by bisection."""
        low_B, high_B = torch.zeros_like(share_B), torch.ones_like(share_B)
        for _ in range(60):
            middle_B = (low_B + high_B) / 2
            below_B = 1 - self.kernel(middle_B).keep_B < share_B
            low_B, high_B = torch.where(below_B, middle_B, low_B), torch.where(below_B, high_B, middle_B)
        return high_B

    def renoise(self, z_BT: Tensor, s_B: Tensor, t_B: Tensor, u_BT: Tensor) -> Tensor:
        """Draw z_t given z_s, s <= t. int64 (B, T)."""
        return self._draw(self.between(s_B, t_B), z_BT, u_BT)

    def prior(self, u_BT: Tensor) -> Tensor:
        """Draw z_1 from uniforms. int64 (B, T)."""
        cdf_V = self._on(u_BT, "_prior_V").cumsum(0)
        return torch.searchsorted(cdf_V, u_BT * cdf_V[-1], right=True).clamp(max=int(self._prior_V.nonzero().max()))

    @cached_property
    def _prior_V(self) -> Tensor:
        """p(z_1); the share of x that the schedule keeps at t = 1 counts as uniform."""
        last = self.kernel(torch.ones(1, dtype=torch.float64))
        return last.prior_BV[0] + (last.keep_B + last.local_B) * self._data_V

    def log_probs(self, logits_BTV: Tensor, z_BT: Tensor, t_B: Tensor) -> Tensor:
        """log mu(x | z without z_i) (B, T, V), whatever the head predicts."""
        logits_BTV = logits_BTV.masked_fill(torch.arange(self.vocab_size, device=logits_BTV.device) == self.mask_id, -torch.inf)
        if self.head == "posterior":
            fits_BTV = self._likelihood(self.kernel(t_B), z_BT, logits_BTV.dtype)
            logits_BTV = torch.where(fits_BTV > 0, logits_BTV - fits_BTV.log(), -torch.inf)
        return logits_BTV.log_softmax(-1)

    def denoised(self, logp_BTV: Tensor, z_BT: Tensor, t_B: Tensor) -> Tensor:
        """log p(x_i | z), z_i included (B, T, V): mu(x) q(z_i | x), normalised."""
        return (logp_BTV + self._likelihood(self.kernel(t_B), z_BT, logp_BTV.dtype).log()).log_softmax(-1)

    def posterior(self, logp_BTV: Tensor, z_BT: Tensor, t_B: Tensor, s_B: Tensor) -> Tensor:
        """p(z_s | z_t), s < t, probabilities (B, T, V): q(z_t | z_s) sum_x q(z_s | x) mu(x), normalised."""
        joint_BTV = self._likelihood(self.between(s_B, t_B), z_BT, logp_BTV.dtype) * self._given(self.kernel(s_B), logp_BTV.exp())
        return joint_BTV / joint_BTV.sum(-1, keepdim=True)

    def nelbo(self, logp_BTV: Tensor, x_BT: Tensor, z_BT: Tensor, t_B: Tensor) -> Tensor:
        """sum_{y != z} R(y -> z) q(y | x) / q(z | x) (r - 1 - log r), r(y) = (qm(y) / qm(z)) / (q(y | x) / q(z | x)) (B, T).

        The bound of a Markov chain with its ratio of ratios r pulled out; qm is q(. | x) with mu in place of x. All terms are at
        least 0. r - 1 comes from mu - [y = x] directly, so nothing cancels when q forgets x (t near 1).
        """
        kernel, rate, dtype = self.kernel(t_B), self.rate(t_B), logp_BTV.dtype
        tiny = torch.finfo(dtype).tiny
        hot_BTV, mu_BTV = torch.nn.functional.one_hot(x_BT, self.vocab_size).to(dtype), logp_BTV.exp()
        true_BTV, model_BTV = self._given(kernel, hot_BTV), self._given(kernel, mu_BTV)
        off_BTV = kernel.keep_B[:, None, None].to(dtype) * (mu_BTV - hot_BTV)  # model - true
        if self.clusters:
            off_BTV = off_BTV + kernel.local_B[:, None, None].to(dtype) * self._smooth(mu_BTV - hot_BTV)
        ratio_BTV = off_BTV / true_BTV.clamp(min=tiny)
        true_z, model_z, ratio_z = (part.gather(-1, z_BT[..., None]) for part in (true_BTV, model_BTV, ratio_BTV))
        extra_BTV = (ratio_BTV - ratio_z) * true_z / model_z.clamp(min=tiny)  # r - 1
        near_BTV = extra_BTV.abs() < 0.5
        log_far = (model_BTV.clamp(min=tiny) / true_BTV.clamp(min=tiny)).log() - (model_z / true_z.clamp(min=tiny)).clamp(min=tiny).log()
        log_BTV = torch.where(near_BTV, torch.log1p(torch.where(near_BTV, extra_BTV, 0.0)), log_far)
        # where only the model has a transition (share 0 of a hybrid), q r remains
        cost_BTV = torch.where(true_BTV > 0, true_BTV * (extra_BTV - log_BTV), off_BTV * true_z / model_z.clamp(min=tiny))
        into_BTV = rate.prior_BV.to(dtype).expand(len(z_BT), -1).gather(1, z_BT)[..., None]
        if self.clusters:
            fellow_BTV = self._smooth(torch.nn.functional.one_hot(z_BT, self.vocab_size).to(dtype))
            into_BTV = into_BTV + rate.local_B[:, None, None].to(dtype) * fellow_BTV
        return (into_BTV / true_z.clamp(min=tiny) * cost_BTV).sum(-1)

    def nelbo_step(self, logp_BTV: Tensor, x_BT: Tensor, z_BT: Tensor, t_B: Tensor, s_B: Tensor) -> Tensor:
        """KL( q(z_s | z_t, x) || p(z_s | z_t) ) (B, T) for one step of a discrete grid, z drawn at t."""
        hot_BTV = torch.nn.functional.one_hot(x_BT, self.vocab_size).to(logp_BTV.dtype)
        true_BTV, model_BTV = (self.posterior(p, z_BT, t_B, s_B) for p in (hot_BTV.log(), logp_BTV))
        cost_BTV: Tensor = torch.special.xlogy(true_BTV, true_BTV / model_BTV.clamp(min=torch.finfo(model_BTV.dtype).tiny))
        return cost_BTV.sum(-1)

    def prior_cost(self, x_BT: Tensor) -> Tensor:
        """KL( q(z_1 | x) || p(z_1) ) (B, T); 0 for a schedule that ends at exactly 0."""
        hot_BTV = torch.nn.functional.one_hot(x_BT, self.vocab_size).double()
        last_BTV = self._given(self.kernel(torch.ones(len(x_BT), device=x_BT.device, dtype=torch.float64)), hot_BTV)
        cost_BTV: Tensor = torch.special.xlogy(last_BTV, last_BTV / self._on(last_BTV, "_prior_V").clamp(min=1e-300))
        return cost_BTV.sum(-1)

    def cross_entropy(self, logp_BTV: Tensor, x_BT: Tensor, z_BT: Tensor, t_B: Tensor) -> Tensor:
        """-log p(x | z) (B, T), z_i included."""
        return -self.denoised(logp_BTV, z_BT, t_B).gather(-1, x_BT[..., None]).squeeze(-1)
