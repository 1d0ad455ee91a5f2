"""The signatures of speculative decoding: drafters, the context that they draft from, and their KV cache.

Shapes: B rows, K draft tokens, M masks of a group, G groups, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from dlm.sampling.autoregressive.committed_text import CommittedText
from dlm.sampling.autoregressive.draft_tokens import DraftTokens
from dlm.sampling.autoregressive.draft_tree import Tree
from dlm.sampling.autoregressive.token_draw import TokenDraw


class RowCache(Protocol):
    """Keys and values of rows that grow at their own pace (`dlm.models.cache.RaggedCache`)."""

    length_B: Tensor
    """Positions that each row holds; a forward pass adds all that it reads."""

    def trim(self, length_B: Tensor) -> None:
        """Forget every position of a row from its new length on."""

    def close_up(self, first_B: Tensor, index_BK: Tensor) -> None:
        """Move the positions first + index of each row, in rising order, to first + 0, 1 .."""

    def join(self, other: Any) -> None:
        """Take in the rows of another cache of the same network."""

    def keep(self, rows_K: Tensor) -> None:
        """Go on with these rows alone."""


@dataclass
class DrafterMemory:
    """The KV cache of a draft model, and where the window of each row began when it last read; None before its first pass."""

    cache: RowCache | None = None
    begin_B: Tensor | None = None

    def join(self, other: DrafterMemory) -> None:
        """Take in the rows of another memory. ValueError unless both or neither began."""
        if (self.cache is None) != (other.cache is None):
            raise ValueError("a drafter knows the rows of one run alone: let them take their first step by themselves")
        if self.cache is not None and self.begin_B is not None and other.begin_B is not None:
            self.cache.join(other.cache)
            self.begin_B = torch.cat([self.begin_B, other.begin_B])

    def keep(self, rows_K: Tensor) -> None:
        """Go on with these rows alone."""
        if self.cache is not None and self.begin_B is not None:
            self.cache.keep(rows_K)
            self.begin_B = self.begin_B[rows_K]


@dataclass(frozen=True)
class Request:
    """The draft tokens that are asked for: limit_B at most in each row, nodes of a tree; u_BK: a uniform for each depth, to draw with."""

    limit_B: Tensor
    u_BK: Tensor
    tree: Tree
    draw: TokenDraw

    def grow(self, logits_of: Callable[[int, Tensor], Tensor], limit_B: Tensor) -> DraftTokens:
        """Draft tokens from the logits of what follows a path, as deep in each row as limit_B says (`Tree.grow`)."""
        token_BK, logq_BKV = self.tree.grow(logits_of, self.draw, self.u_BK, int(limit_B.max()))
        return DraftTokens(token_BK, self.tree.tables(limit_B.device).count_D[limit_B], logq_BKV)


@dataclass(frozen=True)
class LastPass:
    """Outputs of the forward pass that has just verified.

    mask_BMX: logits of the group of masks after the committed text, of the rows in masked_B; hidden states where `Drafter.reads_states`.
    state_BD: the hidden state that the last token was drawn from, where `Drafter.reads_states`.
    cache: the target's KV cache of the text but for its last token. capacity: positions that a cache of this run needs.
    """

    mask_BMX: Tensor
    masked_B: Tensor
    state_BD: Tensor | None
    cache: RowCache
    capacity: int


@dataclass(frozen=True)
class DraftContext:
    """All that a drafter may draft from; `memory` is its own."""

    text: CommittedText
    request: Request
    last: LastPass
    memory: DrafterMemory = field(default_factory=DrafterMemory)


class Drafter(Protocol):
    """The source of draft tokens; a frozen dataclass, so that it prints and goes into the run record."""

    @property
    def reads_states(self) -> bool:
        """Whether it reads hidden states, of the last token and of the masks that it adds to the forward pass, and no logits of those."""

    def groups(self, count_B: Tensor) -> Tensor:
        """Groups of masks that the next forward pass reads too: after how many draft tokens of a row each stands, int64 (B, G)."""

    def __call__(self, context: DraftContext) -> DraftTokens:
        """Draft tokens after the committed text. Their distribution may depend on that text alone."""
