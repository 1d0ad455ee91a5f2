"""Constraints that hold by construction: the tokens that leave the rest of a text fillable, in any order of filling.

Shapes: B rows, A rows that move now, L positions of the canvas, T of the window, V vocabulary with the mask, S states of an automaton,
K kinds of tokens that it cannot tell apart, E its edges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.sampling import windows
from dlm.sampling.diffusion.automaton import Automaton, Walk
from dlm.sampling.diffusion.columns import Columns
from dlm.sampling.diffusion.noisy_text import Active, NoisyText
from dlm.sampling.diffusion.protocols import Constraint
from dlm.spelling import Spelling

CHUNK_POSITIONS = 64
"""Positions whose tokens are looked up at once."""


def _standing(z_BL: Tensor, vocab_size: int) -> Tensor:
    return z_BL[..., None] == torch.arange(vocab_size, device=z_BL.device)


def _as_set(tokens: Sequence[int] | Tensor, vocab_size: int) -> Tensor:
    """bool (V,) from ids or from itself."""
    tokens = torch.as_tensor(tokens).cpu()
    if tokens.dtype == torch.bool:
        if tokens.shape != (vocab_size,):
            raise InputError(f"allowed tokens need a flag for each of {vocab_size} tokens, got the shape {tuple(tokens.shape)}")
        return tokens
    allowed_V = torch.zeros(vocab_size, dtype=torch.bool)
    tokens = tokens.long().flatten()
    strange = tokens[(tokens < 0) | (tokens >= vocab_size)].tolist()
    if strange:
        raise InputError(f"allowed tokens must lie in 0 .. {vocab_size - 1}, got {strange[0]}")
    allowed_V[tokens] = True
    return allowed_V


@dataclass(frozen=True)
class AllowedTokens:
    """The same tokens at every hole; given tokens are free. ids: token ids, or a bool tensor (V,), kept as a tuple.

    mask_id: the token never allowed, -1 the last one. InputError when no token is left.
    """

    joint: ClassVar[bool] = False
    ids: Sequence[int] | Tensor
    vocab_size: int
    mask_id: int = -1

    def __post_init__(self) -> None:
        ids = _as_set(self.ids, self.vocab_size).nonzero().flatten().tolist()
        kept = tuple(i for i in ids if i != self.mask_id % self.vocab_size)
        if not kept:
            raise InputError("no token is allowed: nothing can be written")
        object.__setattr__(self, "ids", kept)

    def allowed_V(self) -> Tensor:
        """bool (V,)."""
        return _as_set(self.ids, self.vocab_size)

    def allowed(self, z_BL: Tensor, hole_BL: Tensor, valid_BL: Tensor | None = None) -> Tensor:
        return torch.where(hole_BL[..., None], self.allowed_V().to(z_BL.device), _standing(z_BL, self.vocab_size))

    def agree(self, z_BL: Tensor, hole_BL: Tensor, next_BL: Tensor, valid_BL: Tensor | None = None) -> Tensor:
        return hole_BL & (next_BL != z_BL) & self.allowed_V().to(z_BL.device)[next_BL]


@dataclass(frozen=True, eq=False)
class Pattern:
    """The whole text, given parts included, matches a regular expression: an automaton over tokens, walked from both ends."""

    joint: ClassVar[bool] = True
    automaton: Automaton

    @classmethod
    def compile(cls, regex: str, pieces: Spelling | Mapping[int, str], vocab_size: int) -> Pattern:
        r"""From an expression in Python's syntax; `\w`, `\d`, `\s` are ASCII, `^` and `$` may stand at the ends alone.

        pieces: how tokens spell text, a character in one token or in several, or the text of each. Tokens without text match nothing, as
        does the mask. InputError for an expression that is wrong, is not regular, or that no tokens spell.
        """
        return cls(Automaton.compile(regex, pieces, vocab_size))

    @classmethod
    def of_set(cls, characters: str, pieces: Spelling | Mapping[int, str], vocab_size: int) -> Pattern:
        """Written text holds these characters alone, each whole; given text is free. InputError where no tokens spell them."""
        return cls(Automaton.of_set(characters, pieces, vocab_size))

    def restricted(self, ids: Sequence[int] | Tensor) -> Pattern:
        """The same, with only these tokens (ids, or a bool tensor (V,)) at holes; given tokens stay free."""
        automaton = self.automaton
        return Pattern(replace(automaton, free_V=automaton.free_V & _as_set(ids, len(automaton.kind_V))))

    def both(self, other: Pattern) -> Pattern:
        """The text matches both: the product of the automata. InputError where none does."""
        return Pattern(self.automaton.both(other.automaton))

    def allowed(self, z_BL: Tensor, hole_BL: Tensor, valid_BL: Tensor | None = None, given_BL: Tensor | None = None) -> Tensor:
        walk = Walk(self.automaton, z_BL, hole_BL, valid_BL, given_BL)
        from_E, to_E, by_EK = (x.to(z_BL.device) for x in self.automaton.edges)
        ways, reached = walk.backward(), [walk.start()]
        for at in range(z_BL.shape[1] - 1):
            reached.append(walk.forward(at, reached[-1]))
        may_BLV = _standing(z_BL, len(self.automaton.kind_V))
        kind_V, free_V = self.automaton.kind_V.to(z_BL.device), self.automaton.free_V.to(z_BL.device)
        for at in range(0, z_BL.shape[1], CHUNK_POSITIONS):  # many positions at once
            part = slice(at, at + CHUNK_POSITIONS)
            hole_BC = hole_BL[:, part]
            before_NS, after_NS = torch.stack(reached[part], 1)[hole_BC], torch.stack(ways[1:][part], 1)[hole_BC]
            may_NK = (before_NS[:, from_E] * after_NS[:, to_E]) @ by_EK > 0
            may_BLV[:, part][hole_BC] = may_NK[:, kind_V] & free_V
        return may_BLV

    def agree(
        self, z_BL: Tensor, hole_BL: Tensor, next_BL: Tensor, valid_BL: Tensor | None = None, given_BL: Tensor | None = None
    ) -> Tensor:
        walk = Walk(self.automaton, z_BL, hole_BL, valid_BL, given_BL)
        ways, reach_BS = walk.backward(), walk.start()
        keep_BL = hole_BL & (next_BL != z_BL) & self.automaton.free_V.to(z_BL.device)[next_BL]
        asked_L = keep_BL.any(0).tolist()
        for at, asked in enumerate(asked_L):
            if not asked:
                reach_BS = walk.forward(at, reach_BS)
                continue
            keep_BL[:, at] &= (reach_BS * ways[at + 1].gather(1, walk.to_BS(at, next_BL[:, at]))).sum(-1) > 0
            token_B = torch.where(keep_BL[:, at], next_BL[:, at], z_BL[:, at])
            reach_BS = walk.forward(at, reach_BS, token_B, hole_BL[:, at] & ~keep_BL[:, at])
        return keep_BL


def both(*constraints: AllowedTokens | Pattern) -> AllowedTokens | Pattern:
    """One constraint for all of them, as exact as each: a token is allowed where one filling satisfies all."""

    def join(one: AllowedTokens | Pattern, two: AllowedTokens | Pattern) -> AllowedTokens | Pattern:
        if isinstance(one, Pattern):
            return one.both(two) if isinstance(two, Pattern) else one.restricted(two.allowed_V())
        if isinstance(two, Pattern):
            return two.restricted(one.allowed_V())
        return replace(one, ids=one.allowed_V() & two.allowed_V())

    if not constraints:
        raise InputError("nothing to combine: give at least one constraint")
    return reduce(join, constraints)


class WindowedConstraint:
    """A constraint of whole texts, as the windows of one run see it."""

    def __init__(self, constraint: Constraint, text: NoisyText) -> None:
        self.constraint, self.text = constraint, text

    def narrow(self, logp_ATV: Tensor, active: Active, columns: Columns | None = None) -> Tensor:
        """The log-probabilities without the tokens that nothing could follow, normalised; those of the columns alone (A, C, V).

        InputError where no token is left.
        """
        text, rows_A, self.start_A = self.text, active.rows_A, active.start_A
        self.canvas = text.z_BL[rows_A, : text.length], ~text.settled_BL[rows_A], text.valid_BL[rows_A]
        self.given_AL = text.given_BL[rows_A, : text.length]
        if isinstance(self.constraint, Pattern):
            allowed_ALV = self.constraint.allowed(*self.canvas, self.given_AL)
        else:
            allowed_ALV = self.constraint.allowed(*self.canvas)
        allowed_ALV |= ~self.canvas[2][..., None]  # padding is as free as the window past the end
        allowed_ATV = self._window(allowed_ALV)
        logp_ATV = logp_ATV.masked_fill(~(allowed_ATV if columns is None else columns.take(allowed_ATV)), -torch.inf)
        if bool((logp_ATV.amax(-1) == -torch.inf).any()):
            raise InputError("the model, its guidance and the constraint have no token in common: allow more")
        return logp_ATV.log_softmax(-1)

    def keep(self, next_AT: Tensor, z_AT: Tensor, move_AT: Tensor) -> Tensor:
        """Of the tokens that a rule wrote into the windows of `narrow`, those that can stand together."""
        z_AL, hole_AL, valid_AL = self.canvas
        written_AL = torch.cat([z_AL, z_AL.new_zeros(len(z_AL), self.text.window)], 1)
        windows.put(written_AL, torch.arange(len(z_AL), device=z_AL.device), self.start_A, next_AT, move_AT)
        next_AL = written_AL[:, : z_AL.shape[1]]
        if isinstance(self.constraint, Pattern):
            keep_AL = self.constraint.agree(z_AL, hole_AL, next_AL, valid_AL, self.given_AL)
        else:
            keep_AL = self.constraint.agree(z_AL, hole_AL, next_AL, valid_AL)
        keep_AL = keep_AL | ~valid_AL
        return torch.where(self._window(keep_AL), next_AT, z_AT)

    def _window(self, x_AL: Tensor) -> Tensor:
        """Past the end nothing is forbidden."""
        past_AL = x_AL.new_ones(len(x_AL), self.text.window, *x_AL.shape[2:])
        return windows.take(torch.cat([x_AL, past_AL], 1), self.start_A, self.text.window)
