"""The signatures of speculative decoding: drafters, their draft tokens, and a KV cache of rows that grow at their own pace.

Shapes: B rows, L columns of the text, K draft tokens, M masks of a group, G groups, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class RowCache(Protocol):
    """Keys and values of rows that grow at their own pace (`dlm.models.cache.RaggedCache`)."""

    length_B: Tensor
    """Positions that each row holds; a call adds all that it reads."""

    def trim(self, length_B: Tensor) -> None:
        """Forget every position of a row from its new length on."""

    def close_up(self, first_B: Tensor, index_BK: Tensor) -> None:
        """Move the positions first + index of each row, in rising order, to first + 0, 1 .."""

    def join(self, other: Any) -> None:
        """Take in the rows of another cache of the same network."""

    def keep(self, rows_K: Tensor) -> None:
        """Go on with these rows alone."""


@dataclass(frozen=True)
class DraftTokens:
    """What may come next in each row: the first count_B of token_BK, the nodes of the tree that the sampler verifies. logq_BKV: log of what
    they were drawn from, None if not drawn."""

    token_BK: Tensor
    count_B: Tensor
    logq_BKV: Tensor | None = None


@dataclass(frozen=True)
class Round:
    """What a drafter sees after a call of strided decoding. M masks of a group.

    text_BL: the committed text, known_B columns of it; begin_B: where the window begins that a row is in; most_B: proposals wanted at
    most; u_BK: a uniform for each, to draw it with; guess_BMX: logits of the group of masks after the text, of the rows in guessed_B, or
    their hidden states where `Drafter.reads_states`;
    shape: logits (B, K, V) to the log-probabilities that the sampler draws from; lead(logits, u_BK): the tokens drawn, how far each lies
    before the second choice in nats, and those log-probabilities, None where the tokens are certain;
    grow(law, most_B): the proposals that the sampler wants of a law, as of `Tree.grow`; what has no law gives the first
    token for each place. capacity: positions that a cache of this run needs.
    cache: what the network has read of the text, all but its last token. memory: what the drafter keeps for its next round. state_BD: the
    hidden state that the last token was drawn from, where `Drafter.reads_states`.
    """

    text_BL: Tensor
    begin_B: Tensor
    known_B: Tensor
    most_B: Tensor
    u_BK: Tensor
    guess_BMX: Tensor
    guessed_B: Tensor
    shape: Callable[[Tensor], Tensor]
    lead: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]
    grow: Callable[[Callable[[int, Tensor], Tensor], Tensor], DraftTokens]
    capacity: int
    cache: RowCache
    memory: dict[str, Any]
    state_BD: Tensor | None = None


class Drafter(Protocol):
    """Where the tokens come from that strided decoding verifies; a frozen dataclass, so that it prints and goes into the run record."""

    @property
    def reads_states(self) -> bool:
        """Whether it wants hidden states, of the last token and of the masks that it added to the call, and no logits of those."""

    def groups(self, count_B: Tensor) -> Tensor:
        """Groups of masks that the next call reads too: after how many of a row's proposals each stands, int64 (B, G)."""

    def __call__(self, round: Round) -> DraftTokens:
        """What comes after the committed text, as far as it can tell. The law of what it draws may depend on that text alone."""
