"""Masked (absorbing) noise: a token is itself with probability alpha_t, else MASK.

MD4, Shi et al. 2024 (arXiv 2406.04329); MDLM, Sahoo et al. 2024 (2406.07524).
Shapes: B rows, T positions, V vocabulary including the mask token. Losses in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm.noise.schedule import Linear
from dlm.protocols import NoiseSchedule


def _per_row(t_B: Tensor, like: Tensor) -> Tensor:
    return t_B.reshape(-1, *([1] * (like.dim() - 1)))


@dataclass(frozen=True)
class MaskedNoise:
    """q(z_t = x) = alpha_t, else z_t = mask_id. vocab_size counts the mask token.

    tokens: ids from here on pad the vocabulary and are no tokens; 0 for a vocabulary without padding.
    """

    vocab_size: int
    mask_id: int
    schedule: NoiseSchedule = field(default_factory=Linear)
    tokens: int = 0

    def _never(self, like: Tensor) -> Tensor:
        """bool (V,): the ids that no text has, the mask and padding of the vocabulary."""
        id_V = torch.arange(self.vocab_size, device=like.device)
        return (id_V == self.mask_id) | (id_V >= self.tokens) if self.tokens else id_V == self.mask_id

    def corrupt(self, x_BT: Tensor, t_B: Tensor, rng: torch.Generator) -> Tensor:
        """Draw z_t given x. int64 (B, T)."""
        keep_BT = torch.rand(x_BT.shape, generator=rng, device=x_BT.device) < _per_row(self.schedule.alpha(t_B), x_BT)
        return torch.where(keep_BT, x_BT, self.mask_id)

    def corrupt_count(self, x_BT: Tensor, count_B: Tensor, free_BT: Tensor, rng: torch.Generator) -> Tensor:
        """Mask a uniformly random set of exactly count_B positions among the free ones. int64 (B, T)."""
        order_BT = torch.rand(x_BT.shape, generator=rng, device=x_BT.device).masked_fill(~free_BT, 2.0)
        rank_BT = order_BT.argsort(-1).argsort(-1)
        return torch.where(rank_BT < count_B[:, None], self.mask_id, x_BT)

    @property
    def uniform_order(self) -> bool:
        """Whether every order in which masks are revealed is as likely as any other."""
        return True

    def next_cost(self, cost_BT: Tensor, z_BT: Tensor, count_B: Tensor) -> tuple[Tensor, Tensor]:
        """The costs of count_B masks (0 elsewhere) weighted by the chance of each to be the next that is revealed: a sum, and that of the
        weights (B,)."""
        return cost_BT.sum(-1), count_B

    def revealed_at(self, u_BT: Tensor) -> Tensor:
        """The alpha at which the reverse chain reveals each position, of uniform draws (B, T)."""
        return u_BT

    def renoise(self, z_BT: Tensor, s_B: Tensor, t_B: Tensor, u_BT: Tensor) -> Tensor:
        """Draw z_t given z_s, s <= t, from one uniform a position. int64 (B, T)."""
        keep_B = self.schedule.alpha(t_B) / self.schedule.alpha(s_B)
        return torch.where(u_BT < _per_row(keep_B, z_BT), z_BT, self.mask_id)

    def prior(self, u_BT: Tensor) -> Tensor:
        """z_1: all masks (the uniforms are not needed)."""
        return torch.full_like(u_BT, self.mask_id, dtype=torch.long)

    def log_probs(self, logits_BTV: Tensor, z_BT: Tensor, t_B: Tensor | None = None) -> Tensor:
        """log mu(x | z) (B, T, V): MASK has probability 0, a visible token is certain (MDLM's SUBS)."""
        logp_BTV = logits_BTV.masked_fill(self._never(logits_BTV), -torch.inf).log_softmax(-1)
        certain_BTV = torch.where(z_BT[..., None] == torch.arange(self.vocab_size, device=z_BT.device), 0.0, -torch.inf)
        return torch.where((z_BT == self.mask_id)[..., None], logp_BTV, certain_BTV.to(logp_BTV.dtype))

    def posterior(self, logp_BTV: Tensor, z_BT: Tensor, t_B: Tensor, s_B: Tensor) -> Tensor:
        """p(z_s | z_t), s < t, probabilities (B, T, V): a mask stays with (1 - alpha_s)/(1 - alpha_t), else it is drawn from mu."""
        stay_B = (1 - self.schedule.alpha(s_B)) / (1 - self.schedule.alpha(t_B))
        stay_B11 = _per_row(stay_B, logp_BTV).to(logp_BTV.dtype)
        mask_V = (torch.arange(self.vocab_size, device=logp_BTV.device) == self.mask_id).to(logp_BTV.dtype)
        masked_BT1 = (z_BT == self.mask_id)[..., None]
        return torch.where(masked_BT1, (1 - stay_B11) * logp_BTV.exp() + stay_B11 * mask_V, logp_BTV.exp())

    def denoised(self, logp_BTV: Tensor, z_BT: Tensor, t_B: Tensor) -> Tensor:
        """log p(x_i | z) (B, T, V), which under masked noise equals `log_probs`."""
        return logp_BTV

    def prior_cost(self, x_BT: Tensor) -> Tensor:
        """KL( q(z_1 | x) || p(z_1) ) (B, T). p(z_1): MASK with 1 - alpha_1, else uniform over tokens, so alpha_1 log(V - 1)."""
        alpha = self.schedule.alpha(torch.ones((), dtype=torch.float64, device=x_BT.device))
        return (alpha * math.log(self.vocab_size - 1)).expand(x_BT.shape)

    def cross_entropy(self, logp_BTV: Tensor, x_BT: Tensor, z_BT: Tensor, t_B: Tensor | None = None) -> Tensor:
        """-log mu(x | z) at masks, 0 where the token is visible (B, T)."""
        nll_BT = -logp_BTV.gather(-1, x_BT[..., None]).squeeze(-1)
        return torch.where(z_BT == self.mask_id, nll_BT, 0.0)

    def nll(self, logits_BTV: Tensor, x_BT: Tensor, z_BT: Tensor) -> Tensor:
        """`cross_entropy` of `log_probs` (B, T), normalised at masks alone: with a large vocabulary that is most of a training step."""
        if logits_BTV.is_cuda:  # to find the masks there would wait for the device
            logits_BVT = logits_BTV.masked_fill(self._never(logits_BTV), -torch.inf).transpose(1, 2)
            return F.cross_entropy(logits_BVT, x_BT.masked_fill(z_BT != self.mask_id, -100), reduction="none")
        at_M = self._masks(z_BT)
        nll_M = F.cross_entropy(self._logits_at(logits_BTV, at_M), x_BT.flatten()[at_M], reduction="none")
        return self._placed(nll_M, at_M, z_BT)

    def kl(self, heavy_BTV: Tensor, light_BTV: Tensor, z_BT: Tensor) -> Tensor:
        """KL(heavy || light) of two networks' logits at masks, 0 where the token is visible: nats (B, T)."""
        at_M = self._masks(z_BT)
        heavy_MV, light_MV = (self._logits_at(logits, at_M).log_softmax(-1) for logits in (heavy_BTV, light_BTV))
        p_MV = heavy_MV.exp()
        kl_M = torch.where(p_MV > 0, p_MV * (heavy_MV - light_MV), 0.0).sum(-1)
        return self._placed(kl_M, at_M, z_BT)

    def _masks(self, z_BT: Tensor) -> Tensor:
        """Where the masks are in the flattened text (M,): found once, for each index by a bool would wait for the GPU anew."""
        return (z_BT.flatten() == self.mask_id).nonzero().squeeze(-1)

    def _logits_at(self, logits_BTV: Tensor, at_M: Tensor) -> Tensor:
        """Logits of the masked positions (M, V), -inf for ids that no text has."""
        return logits_BTV.flatten(0, 1)[at_M].masked_fill(self._never(logits_BTV), -torch.inf)

    @staticmethod
    def _placed(values_M: Tensor, at_M: Tensor, z_BT: Tensor) -> Tensor:
        """The values at their masks, 0 elsewhere (B, T)."""
        return values_M.new_zeros(z_BT.numel()).index_copy(0, at_M, values_M).view(z_BT.shape)

    def nelbo(self, logp_BTV: Tensor, x_BT: Tensor, z_BT: Tensor, t_B: Tensor) -> Tensor:
        """-alpha'_t / (1 - alpha_t) [z = MASK] (-log mu(x | z)) (B, T): the integrand of MD4 eq. 5, to be averaged over t ~ U(0, 1)."""
        weight_B = -self.schedule.dalpha(t_B) / (1 - self.schedule.alpha(t_B))
        return _per_row(weight_B, x_BT) * self.cross_entropy(logp_BTV, x_BT, z_BT)

    def nelbo_step(self, logp_BTV: Tensor, x_BT: Tensor, z_BT: Tensor, t_B: Tensor, s_B: Tensor) -> Tensor:
        """KL( q(z_s | z_t, x) || p(z_s | z_t) ) (B, T) for one step of a discrete grid, z drawn at t (MD4 section 2)."""
        weight_B = (self.schedule.alpha(s_B) - self.schedule.alpha(t_B)) / (1 - self.schedule.alpha(t_B))
        return _per_row(weight_B, x_BT) * self.cross_entropy(logp_BTV, x_BT, z_BT)
