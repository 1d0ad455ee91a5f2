"""Order-k count models of a sequence over a small vocabulary: the baseline that a network must be below.

    p_k(x | c) = (n(c x) + w p_{k-1}(x | c without its first token)) / (n(c) + w),    p_{-1} = 1 / V

An n is a count in the training sequences, w the weight of the next shorter context. Shapes: N tokens, K orders, R rows, T positions,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WEIGHT = 128.0


@dataclass(frozen=True)
class CountModel:
    """tables: for each order k the counts of a token after every context of k tokens, int64 (V^k, V)."""

    tables: tuple[np.ndarray, ...]
    weight: float = WEIGHT

    @classmethod
    def of(cls, sequences: Sequence[np.ndarray], order: int, vocabulary: int, weight: float = WEIGHT) -> CountModel:
        """Counts of every order up to `order` in these sequences, int (N,)."""
        tables = []
        for k in range(order + 1):
            counts = sum(
                (np.bincount(grams(one, k + 1, vocabulary), minlength=vocabulary ** (k + 1)) for one in sequences),
                np.zeros(vocabulary ** (k + 1), np.int64),
            )
            tables.append(counts.reshape(-1, vocabulary))
        return cls(tuple(tables), weight)

    def probabilities(self, sequence_N: np.ndarray) -> np.ndarray:
        """Of every token after those before it, under every order, float64 (K, N). A token near the beginning has a shorter context."""
        vocabulary, length = self.tables[0].shape[1], len(sequence_N)
        found_KN = np.empty((len(self.tables), length))
        p_N = np.full(length, 1 / vocabulary)
        for k, table in enumerate(self.tables):
            if k < length:
                counts_NV = table[grams(sequence_N, k, vocabulary)[: length - k]]
                own_N = np.take_along_axis(counts_NV, sequence_N[k:, None].astype(np.int64), 1)[:, 0]
                p_N[k:] = (own_N + self.weight * p_N[k:]) / (counts_NV.sum(1) + self.weight)
            found_KN[k] = p_N
        return found_KN

    def sample(self, rows: int, length: int, order: int, rng: np.random.Generator) -> np.ndarray:
        """Sequences of this order from nothing, int64 (R, T)."""
        vocabulary = self.tables[0].shape[1]
        x_RT = np.zeros((rows, length), np.int64)
        for t in range(length):
            p_RV = np.full((rows, vocabulary), 1 / vocabulary)
            for k in range(min(order, t) + 1):
                context_R = x_RT[:, t - k : t] @ vocabulary ** np.arange(k)[::-1] if k else np.zeros(rows, np.int64)
                counts_RV = self.tables[k][context_R]
                p_RV = (counts_RV + self.weight * p_RV) / (counts_RV.sum(1, keepdims=True) + self.weight)
            x_RT[:, t] = (p_RV.cumsum(1) < rng.random((rows, 1)) * p_RV.sum(1, keepdims=True)).sum(1)
        return x_RT


def grams(sequence_N: np.ndarray, size: int, vocabulary: int) -> np.ndarray:
    """The number of the run of `size` tokens that begins at each position, int64 (N - size + 1,): its digits in base V."""
    length = max(0, len(sequence_N) - size + 1)
    codes = np.zeros(length, np.int64)
    for i in range(size):
        codes = codes * vocabulary + sequence_N[i : i + length]
    return codes
