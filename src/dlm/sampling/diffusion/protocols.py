"""The signatures of diffusion sampling: rules, cache policies, guidance and constraints.

Shapes: B rows, T positions of the window, L positions of the canvas, A rows that move now, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from dlm.protocols import RNG, NoiseProcess
from dlm.sampling.diffusion.columns import Columns


class Cache(Protocol):
    """Keys and values of positions already read, each overwritten when it is read anew (`dlm.models.cache.WindowCache`)."""

    drift_BT: Tensor
    """How far the values at each position moved when they were read last, relative to their length."""

    def of(self, rows_A: Tensor, begin_A: Tensor | None = None) -> Any:
        """The part of these rows, to be given to a denoiser. begin_A: the position at which each one's window stands, by default 0."""

    def clear(self, rows_A: Tensor) -> None:
        """Forget all positions of these rows."""

    def hide(self, rows_A: Tensor, hidden_AT: Tensor) -> None:
        """Forget these positions."""

    def join(self, other: Any) -> None:
        """Take in the rows of another cache of the same network."""

    def keep(self, rows_K: Tensor) -> None:
        """Go on with these rows alone."""


@dataclass(frozen=True)
class Step:
    """The input of a rule: the active window of every row that moves now, each row at its own step.

    z_BT: the state; open_BT: the positions that the rule writes; logp_BTV: log mu of `noise.log_probs`; t_B -> s_B: the move;
    left_B: steps left, this one included, of `steps` for a window or block. memory: tensors that the rule keeps for its next step, by
    name, float (B, T, ...), nan where a block begins. shadow_BTV: logits with each position's own token hidden (CheckingRule).
    valid_BT: False past the end of a row's text; None where every position is text. begin_B: where the block of each row begins.
    columns: of a pointwise rule, which gets the positions to write alone: B rows of C columns in place of T positions, `valid_BT` apart.
    """

    z_BT: Tensor
    open_BT: Tensor
    logp_BTV: Tensor
    t_B: Tensor
    s_B: Tensor
    left_B: Tensor
    steps: int | Tensor
    noise: NoiseProcess
    memory: dict[str, Tensor] = field(default_factory=dict)
    shadow_BTV: Tensor | None = None
    valid_BT: Tensor | None = None
    columns: Columns | None = None
    begin_B: Tensor | None = None


class Rule(Protocol):
    """One reverse move inside the active window; a frozen dataclass, so that it prints and goes into the run record.

    revises: whether it may change a token again; else a written token is settled. `pointwise`, where it has it and it is true: it looks at
    nothing but the open positions, their logits and order, and so is given those alone (`Step.columns`).
    """

    revises: ClassVar[bool]

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        """The next z, int64 (B, T)."""


@runtime_checkable
class EndingRule(Rule, Protocol):
    """A revising rule that may be done with a block before its last step."""

    def done(self, step: Step, next_BT: Tensor) -> Tensor:
        """Whether the block of each row stays as it is now, bool (B,)."""


@runtime_checkable
class StagedRule(Rule, Protocol):
    """A rule that writes what it will write over: tokens of a first stage, then the text. A step may change nothing."""

    def settled(self, step: Step, next_BT: Tensor) -> Tensor:
        """Which of the positions that it wrote stay as they are, bool (B, T)."""


@runtime_checkable
class PlannedRule(Rule, Protocol):
    """A rule that knows before any forward pass which position moves when; the loop skips the steps in which none does."""

    def plan(self, open_BT: Tensor, alphas_N: Tensor, drawn_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The step at which each open position moves, int64 (B, T), and the alpha at which it does where no grid says so, else nan.

        alphas_N: the probability that a position masked at t = 1 is revealed by the end of each step, under noise that treats all alike.
        drawn_BT: a draw of the alpha at which the noise reveals each position.
        """


@runtime_checkable
class CheckingRule(Rule, Protocol):
    """A rule that reads the probability of the tokens that stand: it gets `Step.shadow_BTV`, at twice the cost of a forward pass."""

    checks: ClassVar[bool]


@runtime_checkable
class EditingRule(EndingRule, Protocol):
    """A rule that may replace tokens of its block by better ones, and knows when the block is done.

    `Step.logp_BTV` of an open position that is written is the network's own prediction there, not the certainty of its token.
    """

    edits: ClassVar[bool]


@dataclass(frozen=True)
class View:
    """The input of a cache policy: the rows that move now.

    z_BT: the window; hole_BT: all its open positions; block_BT: the block that is worked on; seen_BT: the token last read at each
    position, -1 for none; entered_B: rows that begin a block; age_B: passes since the whole window was read; drift_BT: of the cache.
    phase_B: a position at which some block begins.
    """

    z_BT: Tensor
    hole_BT: Tensor
    block_BT: Tensor
    seen_BT: Tensor
    entered_B: Tensor
    age_B: Tensor
    drift_BT: Tensor
    phase_B: Tensor


class CachePolicy(Protocol):
    """Which positions the next forward pass reads anew; keys and values of the others are those of an earlier pass."""

    def __call__(self, view: View) -> Tensor:
        """bool (B, T), the block among them."""


class Guidance(Protocol):
    """Changes logits towards a condition, by a guidance scale.

    pointwise: whether it looks at the logits of each position alone, so that it may be given those of some, (B, C, V).
    """

    pointwise: ClassVar[bool]

    def __call__(self, read: Callable[[Tensor, Tensor], Tensor], z_BT: Tensor, t_B: Tensor, given_BT: Tensor) -> Tensor:
        """Logits (B, T, V). read: the network, (z_BT, t_B) -> logits; given_BT: prompt and suffix."""


class Constraint(Protocol):
    """Which texts are allowed. joint: whether the tokens allowed at one position depend on the others."""

    joint: ClassVar[bool]

    def allowed(self, z_BL: Tensor, hole_BL: Tensor, valid_BL: Tensor | None = None) -> Tensor:
        """bool (B, L, V): the tokens of each hole with which some completion is left. InputError where none is."""

    def agree(self, z_BL: Tensor, hole_BL: Tensor, next_BL: Tensor, valid_BL: Tensor | None = None) -> Tensor:
        """bool (B, L): which of the tokens that `next` puts into holes can stand together, at least one."""
