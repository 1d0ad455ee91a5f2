"""Masked noise for a network of log scores, SEDD's (Lou et al. 2310.16834).

A score is p(z with y at i) / p(z). At a mask it is alpha / (1 - alpha) p(y | z without z_i), so that the softmax of the log scores is the
prediction of other masked models. SEDD's own loss does not normalise. Shapes: B rows, T positions, V vocabulary. Losses in nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlm.noise.masked import MaskedNoise


@dataclass(frozen=True)
class ScoreNoise(MaskedNoise):
    """As `MaskedNoise`, with the bound that SEDD trains beside it."""

    def unnormalised(self, scores_BTV: Tensor, z_BT: Tensor, t_B: Tensor) -> Tensor:
        """log mu (B, T, V) as the scores at masks have it, its sum left as it is; a visible token is certain."""
        alpha_B = self.schedule.alpha(t_B)
        ratio_B11 = (alpha_B / (1 - alpha_B)).log()[:, None, None].to(scores_BTV.dtype)
        certain_BTV = self.log_probs(torch.zeros_like(scores_BTV), z_BT)
        masked_BT1 = (z_BT == self.mask_id)[..., None]
        return torch.where(masked_BT1, (scores_BTV - ratio_B11).masked_fill(self._never(scores_BTV), -torch.inf), certain_BTV)

    def score_entropy(self, scores_BTV: Tensor, x_BT: Tensor, z_BT: Tensor, t_B: Tensor) -> Tensor:
        """The integrand of SEDD's bound (B, T): `nelbo`, plus its weight times sum mu - 1 - log sum mu, which is at least 0."""
        logmu_BTV = self.unnormalised(scores_BTV, z_BT, t_B)
        weight_B = -self.schedule.dalpha(t_B) / (1 - self.schedule.alpha(t_B))
        return self.nelbo(logmu_BTV, x_BT, z_BT, t_B) + weight_B[:, None] * (logmu_BTV.exp().sum(-1) - 1)
