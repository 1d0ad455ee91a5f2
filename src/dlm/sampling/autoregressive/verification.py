"""Which proposals of strided decoding hold, and the token after them: by common random numbers, or by p/q acceptance.

Shapes: B rows, K proposals, P places of their tree, D depths, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm.protocols import RNG
from dlm.sampling import rejection
from dlm.sampling.autoregressive.draft_tree import Tree
from dlm.sampling.autoregressive.protocols import DraftTokens
from dlm.sampling.batching import stacked
from dlm.sampling.draw import uniform

COUPLINGS = ("stream", "ratio")


def agree(token_BP: Tensor, proposals: DraftTokens, tree: Tree) -> tuple[Tensor, Tensor]:
    """(the place up to which proposals hold, the token after it), int64 (B,).

    A proposal holds where it is the token that the target draws there, and those before it hold. token_BP: what the target draws after
    every place of the tree, with one uniform for each depth.
    """
    tables, proposed = tree.tables(token_BP.device), proposals.token_BK.shape[1]
    same_BK = proposals.token_BK == token_BP[:, tables.after_K[:proposed]]
    index_P = torch.arange(proposed + 1, device=token_BP.device)
    fails_BK = ~same_BK | (index_P[:-1] >= proposals.count_B[:, None])
    reached_BP = ~(fails_BK[:, None] & tables.reads_PK[: proposed + 1, :proposed]).any(-1)
    place_B = (reached_BP * index_P).amax(-1)  # siblings differ: one of a depth, deeper ones behind
    return place_B, token_BP.gather(1, place_B[:, None]).squeeze(1)


def ratio(logp_BPV: Tensor, drafts: DraftTokens, test_BK: Tensor, last_B: Tensor) -> tuple[Tensor, Tensor]:
    """As `agree`, of a chain, by rejection sampling: draft token x is accepted with min(1, p(x) / q(x)).

    A draft token that was not drawn is certain, q(x) = 1. test_BK: uniforms that accept or reject, last_B: one that draws.
    """
    p_BPV, token_BK, logq_BKV = logp_BPV.exp(), drafts.token_BK, drafts.logq_BKV
    q_BKV = F.one_hot(token_BK, p_BPV.shape[-1]).to(p_BPV) if logq_BKV is None else logq_BKV.exp()
    return rejection.verify(p_BPV, q_BKV, token_BK, drafts.count_B, test_BK, last_B[:, None].expand(-1, p_BPV.shape[1]))


class Stream:
    """The n-th new token of a row is drawn with the n-th number of its generator, whatever call commits it.

    take: logits (B, P, V) and numbers (B, P) to tokens.
    """

    def __init__(self, rng: RNG, first_B: Tensor, count: int, take: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.take = take
        self.first_B, self.u_BN = first_B, uniform(rng, count).to(first_B.device)

    def join(self, other: Stream) -> None:
        self.first_B, self.u_BN = stacked(self.first_B, other.first_B), stacked(self.u_BN, other.u_BN)

    def keep(self, rows_K: Tensor) -> None:
        self.first_B, self.u_BN = self.first_B[rows_K], self.u_BN[rows_K]

    def fresh(self, known_B: Tensor, count: int) -> Tensor:
        """Numbers (B, count) of the tokens after the known ones."""
        return self.u_BN.gather(1, (known_B - self.first_B)[:, None] + torch.arange(count, device=known_B.device))

    def verify(self, logits_BPV: Tensor, proposals: DraftTokens, known_B: Tensor, tree: Tree) -> tuple[Tensor, Tensor]:
        u_BD = self.fresh(known_B, max(tree.depth) + 1)
        return agree(self.take(logits_BPV, u_BD[:, tree.tables(u_BD.device).depth_P[: logits_BPV.shape[1]]]), proposals, tree)


class Fresh:
    """New numbers every time, as many for a row alone as in a batch. shape: logits to the law that is drawn from."""

    def __init__(self, rng: RNG, stride: int, shape: Callable[[Tensor], Tensor]) -> None:
        self.rng, self.stride, self.shape = list(rng), stride, shape

    def join(self, other: Fresh) -> None:
        self.rng += other.rng

    def keep(self, rows_K: Tensor) -> None:
        self.rng = [self.rng[b] for b in rows_K.tolist()]

    def fresh(self, known_B: Tensor, count: int) -> Tensor:
        return uniform(self.rng, count).to(known_B.device)

    def verify(self, logits_BKV: Tensor, proposals: DraftTokens, known_B: Tensor, tree: Tree) -> tuple[Tensor, Tensor]:
        u_BK = self.fresh(known_B, self.stride)
        return ratio(self.shape(logits_BKV), proposals, u_BK[:, : logits_BKV.shape[1] - 1], u_BK[:, -1])
