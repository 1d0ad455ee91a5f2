"""Draft tokens: what may come next in each row, until the target has verified it.

Shapes: B rows, K draft tokens, N rows that stay, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from dlm.sampling.batching import stacked


@dataclass(frozen=True)
class DraftTokens:
    """The first count_B of token_BK, which are nodes of the tree that the decoder verifies.

    logq_BKV: log-probabilities that they were drawn from; None where they are certain.
    """

    token_BK: Tensor
    count_B: Tensor
    logq_BKV: Tensor | None = None

    @classmethod
    def none(cls, count_B: Tensor) -> DraftTokens:
        """For rows like those of count_B."""
        return cls(count_B.new_zeros(len(count_B), 0), count_B.new_zeros(len(count_B)))

    def trimmed(self) -> DraftTokens:
        """Without the columns that no row counts."""
        most = int(self.count_B.max()) if len(self.count_B) else 0
        return DraftTokens(self.token_BK[:, :most], self.count_B, None if self.logq_BKV is None else self.logq_BKV[:, :most])

    def join(self, other: DraftTokens) -> DraftTokens:
        """The draft tokens of both."""
        logq_BKV = None
        if self.logq_BKV is not None or other.logq_BKV is not None:
            logq_BKV = stacked(self._drawn_like(other), other._drawn_like(self))
        return DraftTokens(stacked(self.token_BK, other.token_BK), stacked(self.count_B, other.count_B), logq_BKV)

    def keep(self, rows_N: Tensor) -> DraftTokens:
        """Those of these rows."""
        logq_BKV = None if self.logq_BKV is None else self.logq_BKV[rows_N]
        return DraftTokens(self.token_BK[rows_N], self.count_B[rows_N], logq_BKV).trimmed()

    def _drawn_like(self, other: DraftTokens) -> Tensor:
        """Log-probabilities, of certain tokens log q = 0 at the token."""
        if self.logq_BKV is not None:
            return self.logq_BKV
        assert other.logq_BKV is not None
        return F.one_hot(self.token_BK, other.logq_BKV.shape[-1]).to(other.logq_BKV).log()
