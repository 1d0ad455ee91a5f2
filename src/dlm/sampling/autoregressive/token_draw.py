"""From logits to tokens, for the target and its drafters alike: temperature, truncation, and coupled random numbers.

Shapes: B rows, K places, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlm.sampling.draw import Draw, scores


@dataclass(frozen=True)
class TokenDraw:
    """An exponential race (`dlm.sampling.draw.race`), so that similar distributions draw the same token with the same number."""

    draw: Draw
    mask_id: int

    def log_probs(self, logits_BKV: Tensor) -> Tensor:
        """Log-probabilities (B, K, V) with temperature and truncation, float64."""
        logits_BKV = self._unmasked(logits_BKV)
        return self.draw.shape(logits_BKV if self.draw.temperature == 0 else logits_BKV.log_softmax(-1))

    def scores(self, logits_BKV: Tensor, u_BK: Tensor) -> tuple[Tensor, Tensor | None]:
        """(scores whose greatest is drawn and whose next would be drawn without it, in nats; log-probabilities), both (B, K, V).

        u_BK: uniforms, (B, 1) for the same number at all places. At temperature 0 the token is certain: logits, and None.
        """
        if self.draw.temperature == 0:
            return self._unmasked(logits_BKV), None
        logp_BKV = self.log_probs(logits_BKV)
        return scores(logp_BKV, u_BK), logp_BKV

    def tokens(self, logits_BKV: Tensor, u_BK: Tensor) -> Tensor:
        """The tokens that these numbers draw, int64 (B, K)."""
        return self.scores(logits_BKV, u_BK)[0].argmax(-1)

    def _unmasked(self, logits_BKV: Tensor) -> Tensor:
        """float32, and the mask is never drawn."""
        return logits_BKV.float().index_fill(-1, torch.tensor(self.mask_id, device=logits_BKV.device), -torch.inf)
