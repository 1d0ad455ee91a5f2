"""Which draft tokens are accepted, and the token after them: by common random numbers, or by rejection sampling.

Shapes: B rows, K draft tokens, P places of their tree, D depths, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm.protocols import RNG
from dlm.sampling import rejection
from dlm.sampling.autoregressive.draft_tokens import DraftTokens
from dlm.sampling.autoregressive.draft_tree import Tree
from dlm.sampling.autoregressive.token_draw import TokenDraw
from dlm.sampling.batching import stacked
from dlm.sampling.draw import beside, uniform

COUPLINGS = ("stream", "ratio")


def accept_equal(token_BP: Tensor, drafts: DraftTokens, tree: Tree) -> tuple[Tensor, Tensor]:
    """(the place up to which draft tokens are accepted, the token after it), int64 (B,).

    A draft token is accepted where it is the token that the target draws there, and those before it are accepted. token_BP: the target's
    draws after every place of the tree, with one uniform for each depth.
    """
    tables, drafted = tree.tables(token_BP.device), drafts.token_BK.shape[1]
    same_BK = drafts.token_BK == token_BP[:, tables.after_K[:drafted]]
    index_P = torch.arange(drafted + 1, device=token_BP.device)
    fails_BK = ~same_BK | (index_P[:-1] >= drafts.count_B[:, None])
    reached_BP = ~(fails_BK[:, None] & tables.reads_PK[: drafted + 1, :drafted]).any(-1)
    place_B = (reached_BP * index_P).amax(-1)  # siblings differ: one of a depth, deeper ones behind
    return place_B, token_BP.gather(1, place_B[:, None]).squeeze(1)


def accept_by_ratio(logp_BPV: Tensor, drafts: DraftTokens, test_BK: Tensor, last_B: Tensor) -> tuple[Tensor, Tensor]:
    """As `accept_equal`, of a chain, by rejection sampling (`dlm.sampling.rejection`).

    logp: the target's log-probabilities. test_BK: uniforms that accept or reject, last_B: one that draws.
    """
    p_BPV, token_BK, logq_BKV = logp_BPV.exp(), drafts.token_BK, drafts.logq_BKV
    q_BKV = F.one_hot(token_BK, p_BPV.shape[-1]).to(p_BPV) if logq_BKV is None else logq_BKV.exp()
    return rejection.verify(p_BPV, q_BKV, token_BK, drafts.count_B, test_BK, last_B[:, None].expand(-1, p_BPV.shape[1]))


class Verification(Protocol):
    """How the rows of a run use their random numbers, and so which draft tokens they accept."""

    def draft_numbers(self, known_B: Tensor, count: int) -> Tensor:
        """Uniforms (B, count) that draft the tokens after the known ones."""

    def verify(self, logits_BPV: Tensor, drafts: DraftTokens, known_B: Tensor, tree: Tree) -> tuple[Tensor, Tensor]:
        """As `accept_equal`, from the target's logits after every place."""

    def join(self, other: Any) -> None:
        """Take in the rows of another of the same kind."""

    def keep(self, rows_K: Tensor) -> None:
        """Go on with these rows alone."""


class CommonNumbers:
    """Common random numbers: the n-th new token of a row is drawn with the n-th number of its generator, in whatever forward pass."""

    def __init__(self, rng: RNG, first_B: Tensor, count: int, draw: TokenDraw) -> None:
        self.draw, self.first_B, self.u_BN = draw, first_B, beside(uniform(rng, count), first_B)

    def draft_numbers(self, known_B: Tensor, count: int) -> Tensor:
        return self.u_BN.gather(1, (known_B - self.first_B)[:, None] + torch.arange(count, device=known_B.device))

    def verify(self, logits_BPV: Tensor, drafts: DraftTokens, known_B: Tensor, tree: Tree) -> tuple[Tensor, Tensor]:
        u_BD = self.draft_numbers(known_B, max(tree.depth) + 1)
        u_BP = u_BD[:, tree.tables(u_BD.device).depth_P[: logits_BPV.shape[1]]]
        return accept_equal(self.draw.tokens(logits_BPV, u_BP), drafts, tree)

    def join(self, other: CommonNumbers) -> None:
        self.first_B, self.u_BN = stacked(self.first_B, other.first_B), stacked(self.u_BN, other.u_BN)

    def keep(self, rows_K: Tensor) -> None:
        self.first_B, self.u_BN = self.first_B[rows_K], self.u_BN[rows_K]


class FreshNumbers:
    """Rejection sampling with new numbers in every forward pass, as many for a row alone as in a batch."""

    def __init__(self, rng: RNG, stride: int, draw: TokenDraw) -> None:
        self.rng, self.stride, self.draw = list(rng), stride, draw

    def draft_numbers(self, known_B: Tensor, count: int) -> Tensor:
        return beside(uniform(self.rng, count), known_B)

    def verify(self, logits_BPV: Tensor, drafts: DraftTokens, known_B: Tensor, tree: Tree) -> tuple[Tensor, Tensor]:
        u_BK = self.draft_numbers(known_B, self.stride)
        return accept_by_ratio(self.draw.log_probs(logits_BPV), drafts, u_BK[:, : logits_BPV.shape[1] - 1], u_BK[:, -1])

    def join(self, other: FreshNumbers) -> None:
        self.rng += other.rng

    def keep(self, rows_K: Tensor) -> None:
        self.rng = [self.rng[b] for b in rows_K.tolist()]
