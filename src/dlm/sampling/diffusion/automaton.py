"""Automata over tokens: a regular expression compiled for a vocabulary, walked over a text with holes.

Shapes: B rows, L positions of the canvas, V vocabulary with the mask, S states, C classes of characters, K kinds of tokens that the
automaton cannot tell apart, E its edges.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, reduce

import torch
from torch import Tensor

from dlm.errors import InputError

DEAD, START = 0, 1


def plain(regex: str) -> str:
    """The expression as the library reads it. InputError for syntax that it lacks, or reads otherwise than Python."""
    try:
        re.compile(regex)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"{regex!r} is no regular expression: {error}") from None
    item = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)  # an escape or a class
    bare = item.sub("x", regex)
    begin, end = int(bare.startswith("^")), len(bare) - bare.endswith("$")  # the whole text is matched anyway
    if re.search(r"[\^$]", bare[begin:end]):
        raise InputError(f"{regex!r} cannot be used as a constraint: ^ and $ may stand at its ends alone")
    if re.search(r"\(\?(?:<?[=!]|>)|[*+?}]\+", bare):
        raise InputError(f"{regex!r} cannot be used as a constraint: it looks around or never goes back")
    anycase = re.search(r"\(\?[a-z]*i", bare)
    for one in item.findall(regex):
        letters = re.search(r"[^\W_]", re.sub(r"\\[wdsWDS]", "", one))
        if len(wide := re.findall(r"\\[WDS]", one)) > 1 or (wide and anycase and letters and one[0] == "["):
            raise InputError(f"{regex!r} cannot be used as a constraint: write the class {one} without {wide[0]}")
    after = len(regex) - (len(bare) - end)
    return item.sub(lambda one: re.sub(r"^\[(\^?)\]", r"[\1\\]", one[0]), regex[begin:after])  # []a] is a class of two


def _characters(regex: str) -> tuple[Tensor, int, Tensor, Callable[[str], int]]:
    """The automaton of an expression over C classes of characters: its moves, its start, where it may end, the class of a character."""
    try:
        import interegular
    except ImportError:
        raise InputError("regular expressions need the constraints extra: pip install 'dlm[constraints]'") from None
    readable = plain(regex)
    try:
        fsm = interegular.parse_pattern(readable).to_fsm()
    except Exception as error:  # it raises bare Exceptions, and others by mistake
        reason = str(error).partition("\n")[0] or "an automaton lacks something that it uses"
        raise InputError(f"{regex!r} cannot be used as a constraint: {reason}") from None
    number = {state: n for n, state in enumerate(sorted(fsm.states), 1)}
    none = max(fsm.alphabet.values(), default=-1) + 1  # the class of unknown characters
    step_SC = torch.full((len(number) + 1, none + 1), DEAD)
    for state, moves in fsm.map.items():
        for symbol, after in moves.items():
            step_SC[number[state], symbol] = number[after]
    accept_S = torch.zeros(len(number) + 1, dtype=torch.bool)
    accept_S[[number[state] for state in fsm.finals]] = True
    return step_SC, number[fsm.initial], accept_S, lambda c: none if fsm.alphabet[c] is None else fsm.alphabet[c]


def _trimmed(next_SK: Tensor, start: int, accept_S: Tensor, kind_V: Tensor, regex: str) -> tuple[Tensor, Tensor, Tensor]:
    """next_SK, accept_S and kind_V of the states on a way from the start to an end, and of the kinds that differ there."""
    reached_S, live_S = torch.zeros_like(accept_S), accept_S
    new_S = torch.tensor([start])
    while len(new_S):
        reached_S[new_S] = True
        after_S = torch.unique(next_SK[new_S])
        new_S = after_S[~reached_S[after_S]]
    while not torch.equal(live_S, grown_S := live_S | live_S[next_SK].any(1)):
        live_S = grown_S
    if not live_S[start]:
        raise InputError(f"no text of this model's tokens matches {regex!r}")
    kept_S = reached_S & live_S
    kept_S[start] = False
    order_S = torch.cat([torch.tensor([start]), kept_S.nonzero().flatten()])
    number_S = torch.full_like(next_SK[:, 0], DEAD)
    number_S[order_S] = torch.arange(START, START + len(order_S))
    dead_1K = torch.full_like(next_SK[:1], DEAD)
    next_SK, kind_K = torch.unique(torch.cat([dead_1K, number_S[next_SK[order_S]]]), dim=1, return_inverse=True)
    return next_SK, torch.cat([torch.zeros(1, dtype=torch.bool), accept_S[order_S]]), kind_K[kind_V]


@dataclass(frozen=True, eq=False)
class Automaton:
    """next_SK: int64, the state after a token of each kind, 0 dead, 1 the start; accept_S: where a text may end; kind_V: the kind of each
    token; free_V: tokens that may be written."""

    regex: str
    next_SK: Tensor = field(repr=False)
    accept_S: Tensor = field(repr=False)
    kind_V: Tensor = field(repr=False)
    free_V: Tensor = field(repr=False)

    @classmethod
    def compile(cls, regex: str, pieces: Mapping[int, str], vocab_size: int) -> Automaton:
        """As `constraints.Pattern.compile`."""
        step_SC, start, accept_S, class_of = _characters(regex)
        column_of: dict[tuple[int, ...], int] = {}  # by the classes of its characters
        kind_V = torch.zeros(vocab_size, dtype=torch.long)
        for token, piece in pieces.items():
            if 0 <= token < vocab_size and piece and "\ufffd" not in piece:
                kind_V[token] = column_of.setdefault(tuple(map(class_of, piece)), len(column_of) + 1)
        states_S = torch.arange(len(step_SC))
        columns = [torch.full_like(step_SC[:, 0], DEAD)]
        columns += (reduce(lambda state_S, c: step_SC[state_S, c], classes, states_S) for classes in column_of)
        trimmed = _trimmed(torch.stack(columns, 1), start, accept_S, kind_V, regex)
        return cls(regex, *trimmed, torch.ones(vocab_size, dtype=torch.bool))

    def both(self, other: Automaton) -> Automaton:
        """The text matches both: the product of the automata."""
        kinds_K2, kind_V = torch.unique(torch.stack([self.kind_V, other.kind_V], 1), dim=0, return_inverse=True)
        one_SK, two_SK = self.next_SK[:, kinds_K2[:, 0]], other.next_SK[:, kinds_K2[:, 1]]
        size = len(two_SK)
        alive_SSK = (one_SK > DEAD)[:, None] & (two_SK > DEAD)[None]
        next_SK = torch.where(alive_SSK, one_SK[:, None] * size + two_SK, DEAD).flatten(0, 1)
        accept_S = (self.accept_S[:, None] & other.accept_S).flatten()
        regex = f"{self.regex} and {other.regex}"
        trimmed = _trimmed(next_SK, START * size + START, accept_S, kind_V, regex)
        return Automaton(regex, *trimmed, self.free_V & other.free_V)

    @cached_property
    def edges(self) -> tuple[Tensor, Tensor, Tensor]:
        """The moves that a written token can make: from (E,), to (E,), and by which kinds, float (E, K)."""
        states, kinds = self.next_SK.shape
        free_K = torch.zeros(kinds, dtype=torch.bool)
        free_K[self.kind_V[self.free_V]] = True
        from_N, kind_N = ((self.next_SK != DEAD) & free_K).nonzero(as_tuple=True)
        pair_E, edge_N = torch.unique(from_N * states + self.next_SK[from_N, kind_N], return_inverse=True)
        by_EK = torch.zeros(len(pair_E), kinds)
        by_EK[edge_N, kind_N] = 1
        return pair_E // states, pair_E % states, by_EK


class Walk:
    """The states of a canvas under an automaton, float 0 or 1: reached from the start, or with a way to the end."""

    def __init__(self, automaton: Automaton, z_BL: Tensor, hole_BL: Tensor, valid_BL: Tensor | None) -> None:
        self.automaton, self.z_BL, self.hole_BL, device = automaton, z_BL, hole_BL, z_BL.device
        self.valid_BL = torch.ones_like(hole_BL) if valid_BL is None else valid_BL
        # columns of holes alone and of none, where all rows move alike
        self.open_L, self.closed_L = hole_BL.all(0).tolist(), (~hole_BL).all(0).tolist()
        from_E, to_E, _ = automaton.edges
        edge_SS = torch.zeros(len(automaton.next_SK), len(automaton.next_SK))
        edge_SS[from_E, to_E] = 1
        self.edge_SS, self.back_SS = edge_SS.to(device), edge_SS.T.contiguous().to(device)
        self.next_KS, self.kind_V = automaton.next_SK.T.contiguous().to(device), automaton.kind_V.to(device)

    def to_BS(self, token_B: Tensor) -> Tensor:
        """Where the token of each row leads, int64 (B, S)."""
        return self.next_KS[self.kind_V[token_B]]

    def start(self) -> Tensor:
        reach_BS = torch.zeros(len(self.z_BL), len(self.edge_SS), device=self.z_BL.device)
        reach_BS[:, START] = 1
        return reach_BS

    def forward(self, at: int, reach_BS: Tensor, token_B: Tensor | None = None, hole_B: Tensor | None = None) -> Tensor:
        """The states after position `at`, with other tokens and holes there if told; none on padding, where no one asks."""
        closed = False
        if token_B is None or hole_B is None:
            if self.open_L[at]:
                return (reach_BS @ self.edge_SS).clamp_(max=1)
            token_B, hole_B, closed = self.z_BL[:, at], self.hole_BL[:, at], self.closed_L[at]
        one_BS = torch.zeros_like(reach_BS).scatter_add_(1, self.to_BS(token_B), reach_BS)
        one_BS[:, DEAD] = 0
        if not closed:
            one_BS = torch.where(hole_B[:, None], reach_BS @ self.edge_SS, one_BS)
        return one_BS.clamp_(max=1)

    def backward(self) -> list[Tensor]:
        """The states before each position, and at the end, from which the rest can be filled. InputError where the start is none."""
        ways = [self.automaton.accept_S.to(self.edge_SS).expand(len(self.z_BL), -1)]
        for at in reversed(range(self.z_BL.shape[1])):
            if self.open_L[at]:
                ways.append((ways[-1] @ self.back_SS).clamp_(max=1))
                continue
            one_BS = ways[-1].gather(1, self.to_BS(self.z_BL[:, at]))
            if not self.closed_L[at]:
                one_BS = torch.where(self.hole_BL[:, at, None], (ways[-1] @ self.back_SS).clamp_(max=1), one_BS)
            ways.append(torch.where(self.valid_BL[:, at, None], one_BS, ways[-1]))
        ways.reverse()
        lost_B = ways[0][:, START] == 0
        if bool(lost_B.any()):
            self._refuse(int(lost_B.int().argmax()))
        return ways

    def _refuse(self, row: int) -> None:
        reach_BS, length = self.start(), int(self.valid_BL[row].sum())
        what, which = f"no match of {self.automaton.regex!r}", f" of row {row}" if len(self.z_BL) > 1 else ""
        for at in range(length):
            reach_BS = self.forward(at, reach_BS)
            if not bool(reach_BS[row].any()):
                raise InputError(f"{what} goes on with token {at + 1}{which}: change what is given, the length or the pattern")
        raise InputError(f"{what} ends with token {length}{which}: change what is given, the length or the pattern")
