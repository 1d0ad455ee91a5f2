"""The signatures that everything else is written against.

Shapes: B rows, T positions of the whole canvas, Q positions queried in one call, V vocabulary.
Time: t = 0 is data, t = 1 is noise; alpha_t is the probability that a token is still untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from dlm.trajectory import Canvas, Frame

RNG = Sequence[torch.Generator]
"""One generator a row, so that what a row draws does not depend on its neighbours."""


class NoiseSchedule(Protocol):
    """alpha decreases on [0, 1]; `alpha(0)` and `alpha(1)` are the end points, not always 1 and 0."""

    def alpha(self, t: Tensor) -> Tensor:
        """alpha_t."""

    def dalpha(self, t: Tensor) -> Tensor:
        """d alpha / dt, negative."""

    def inverse(self, alpha: Tensor) -> Tensor:
        """The t with alpha(t) = alpha."""


class NoiseProcess(Protocol):
    """A forward process q(z_t | x) that corrupts every token independently, and what follows from it."""

    @property
    def vocab_size(self) -> int:
        """Tokens with the mask."""

    @property
    def mask_id(self) -> int: ...

    @property
    def schedule(self) -> NoiseSchedule: ...

    def corrupt(self, x_BT: Tensor, t_B: Tensor, rng: torch.Generator) -> Tensor:
        """Draw z_t given x; int64 (B, T)."""

    def renoise(self, z_BT: Tensor, s_B: Tensor, t_B: Tensor, u_BT: Tensor) -> Tensor:
        """Draw z_t given z_s, s <= t, from one uniform a position; int64 (B, T)."""

    def prior(self, u_BT: Tensor) -> Tensor:
        """Draw z_1 from one uniform a position; int64 (B, T)."""

    def log_probs(self, logits_BTV: Tensor, z_BT: Tensor, t_B: Tensor) -> Tensor:
        """Network output -> log mu(x_i | z without z_i), normalised, with what the process knows for certain put in."""

    def denoised(self, logp_BTV: Tensor, z_BT: Tensor, t_B: Tensor) -> Tensor:
        """log mu -> log p(x_i | z), z_i included."""

    def posterior(self, logp_BTV: Tensor, z_BT: Tensor, t_B: Tensor, s_B: Tensor) -> Tensor:
        """p(z_s | z_t) for s < t, probabilities (B, T, V)."""

    def nelbo(self, logp_BTV: Tensor, x_BT: Tensor, z_BT: Tensor, t_B: Tensor) -> Tensor:
        """Integrand of the continuous-time bound at t, nats per position (B, T)."""

    def nelbo_step(self, logp_BTV: Tensor, x_BT: Tensor, z_BT: Tensor, t_B: Tensor, s_B: Tensor) -> Tensor:
        """KL of one step of a discrete grid, nats per position (B, T)."""

    def prior_cost(self, x_BT: Tensor) -> Tensor:
        """KL( q(z_1 | x) || p(z_1) ), nats per position (B, T)."""

    def cross_entropy(self, logp_BTV: Tensor, x_BT: Tensor, z_BT: Tensor, t_B: Tensor) -> Tensor:
        """-log p(x_i | z) (B, T)."""


class Cache(Protocol):
    """Keys and values of positions already read, each overwritten when it is read anew (`dlm.models.cache.WindowCache`)."""

    drift_BT: Tensor
    """How far the values at each position moved when they were read last, relative to their length."""

    def of(self, rows_A: Tensor) -> Any:
        """The part of these rows, to be given to a denoiser."""

    def clear(self, rows_A: Tensor) -> None:
        """Forget what these rows hold."""


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


class Denoiser(Protocol):
    """A network. Q = T is plain diffusion, Q = 1 autoregression, Q = block block diffusion."""

    def __call__(
        self,
        z_BQ: Tensor,
        t_B: Tensor | None = None,
        *,
        pos_BQ: Tensor | None = None,
        valid_BT: Tensor | None = None,
        cache: Any = None,
        pattern: str = "",
        own_BQQ: Tensor | None = None,
        at_BQ: Tensor | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """Logits (B, Q, V). at_BQ: the only positions whose logits are asked for. own_BQQ: which of these positions each one reads,
        besides what a `RowCache` holds. states: gets the last hidden states (B, Q, D), for a proposer that reads them.

        pattern `shadow`: z is [text | masks], and a mask guesses its position without seeing the text there.
        """


@dataclass(frozen=True)
class Step:
    """What a rule sees: the active window of every row that moves now, each row at its own step.

    z_BT: the state; open_BT: the positions that the rule writes; logp_BTV: log mu of `noise.log_probs`; t_B -> s_B: the move;
    left_B: steps left, this one included, of `steps` for a window or block. memory: what the rule keeps for its next step, by
    name, float (B, T, ...), nan where a block begins. shadow_BTV: logits with each position's own token hidden (CheckingRule).
    """

    z_BT: Tensor
    open_BT: Tensor
    logp_BTV: Tensor
    t_B: Tensor
    s_B: Tensor
    left_B: Tensor
    steps: int
    noise: NoiseProcess
    memory: dict[str, Tensor] = field(default_factory=dict)
    shadow_BTV: Tensor | None = None


class Rule(Protocol):
    """One reverse move inside the active window; a frozen dataclass, so that it prints and goes into the run record.

    revises: whether it may change a token again; else what it writes is settled.
    """

    revises: ClassVar[bool]

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        """The next z, int64 (B, T)."""


@runtime_checkable
class PlannedRule(Rule, Protocol):
    """A rule that knows before the network is asked which position moves when; the loop skips the steps in which none does."""

    def plan(self, open_BT: Tensor, alphas_N: Tensor, rng: RNG) -> tuple[Tensor, Tensor]:
        """The step at which each open position moves, int64 (B, T), and the alpha at which it does where no grid says so, else nan.

        alphas_N: the chance that a position masked at t = 1 is revealed by the end of each step.
        """


@runtime_checkable
class CheckingRule(Rule, Protocol):
    """A rule that asks what the network thinks of the tokens that stand: it gets `Step.shadow_BTV`, at twice the cost of a call."""

    checks: ClassVar[bool]


@dataclass(frozen=True)
class View:
    """What a cache policy sees of the rows that move now.

    z_BT: the window; hole_BT: all its open positions; block_BT: the block that is worked on; seen_BT: the token last read at each
    position, -1 for none; entered_B: rows that begin a block; age_B: calls since the whole window was read; drift_BT: of the cache.
    """

    z_BT: Tensor
    hole_BT: Tensor
    block_BT: Tensor
    seen_BT: Tensor
    entered_B: Tensor
    age_B: Tensor
    drift_BT: Tensor


class CachePolicy(Protocol):
    """Which positions the next call reads anew; keys and values of the others are those of an earlier call."""

    def __call__(self, view: View) -> Tensor:
        """bool (B, T), the block among them."""


class Guidance(Protocol):
    """Logits bent towards a condition."""

    def __call__(self, read: Callable[[Tensor, Tensor], Tensor], z_BT: Tensor, t_B: Tensor, given_BT: Tensor) -> Tensor:
        """Logits (B, T, V). read: the network, (z_BT, t_B) -> logits; given_BT: what the text was begun with."""


class Constraint(Protocol):
    """What a text must keep to. joint: whether what one position may hold depends on the others."""

    joint: ClassVar[bool]

    def allowed(self, z_BL: Tensor, hole_BL: Tensor, valid_BL: Tensor | None = None) -> Tensor:
        """bool (B, L, V): the tokens of each hole with which some completion is left. InputError where none is."""

    def agree(self, z_BL: Tensor, hole_BL: Tensor, next_BL: Tensor, valid_BL: Tensor | None = None) -> Tensor:
        """bool (B, L): which of the tokens that `next` puts into holes can stand together, at least one."""


@dataclass(frozen=True)
class Proposals:
    """What may come next in each row: the first count_B of token_BK, the nodes of the tree that the sampler verifies. logq_BKV: log of what
    they were drawn from, None if not drawn."""

    token_BK: Tensor
    count_B: Tensor
    logq_BKV: Tensor | None = None


@dataclass(frozen=True)
class Round:
    """What a proposer sees after a call of strided decoding. M masks of a group.

    text_BL: the committed text, known_B columns of it; begin_B: where the window begins that a row is in; most_B: proposals wanted at
    most; u_BK: a uniform for each, to draw it with; guess_BMX: logits of the group of masks after the text, of the rows in guessed_B, or
    their hidden states where `Proposer.reads_states`;
    shape: logits (B, K, V) to the log-probabilities that the sampler draws from; lead(logits, u_BK): the tokens drawn, how far each lies
    before the second choice in nats, and those log-probabilities, None where the tokens are certain;
    grow(law, most_B): the proposals that the sampler wants of a law, as of `dlm.sampling.tree.Tree.grow`; what has no law gives the first
    token for each place. capacity: positions that a cache of this run needs.
    cache: what the network has read of the text, all but its last token. memory: what the proposer keeps for its next round. state_BD: the
    hidden state that the last token was drawn from, where `Proposer.reads_states`.
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
    grow: Callable[[Callable[[int, Tensor], Tensor], Tensor], Proposals]
    capacity: int
    cache: RowCache
    memory: dict[str, Any]
    state_BD: Tensor | None = None


class Proposer(Protocol):
    """Where the tokens come from that strided decoding verifies; a frozen dataclass, so that it prints and goes into the run record."""

    @property
    def reads_states(self) -> bool:
        """Whether it wants hidden states, of the last token and of the masks that it added to the call, and no logits of those."""

    def groups(self, count_B: Tensor) -> Tensor:
        """Groups of masks that the next call reads too: after how many of a row's proposals each stands, int64 (B, G)."""

    def __call__(self, round: Round) -> Proposals:
        """What comes after the committed text, as far as it can tell. The law of what it draws may depend on that text alone."""


class Sampler(Protocol):
    """Anything that fills a canvas."""

    def steps(self, canvas: Canvas, *, rng: RNG) -> Iterator[Frame]:
        """Yield a Frame after every step; the last one has no free position unsettled."""
