"""Automata over tokens: a regular expression compiled for a vocabulary, walked over a text with holes.

A token is its bytes of UTF-8: a character may lie in several tokens, and a token may hold the end of one and the beginning of the next.

Shapes: B rows, L positions of the canvas, V vocabulary with the mask, S states, C classes of characters, N places inside a character,
X tables (of tokens that are written, and of given ones where these move otherwise), K kinds of tokens that the automaton cannot tell apart,
E its edges.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.spelling import REPLACEMENT, Part, Spelling

DEAD, START = 0, 1
MAX_MOVES = 2**27
"""Of an automaton, states times kinds of tokens, of eight bytes each."""

MAX_SECONDS = 10.0
"""CPU time that the library may take for one expression; that of any JSON object takes one."""

CONTINUES = range(0x80, 0xC0)
BYTES: dict[str, list[tuple[range, str]]] = {
    "character": [
        (range(0x80), ""),
        (range(0xC2, 0xE0), "1"),
        (range(0xE0, 0xE1), "E0"),
        (range(0xE1, 0xED), "2"),
        (range(0xED, 0xEE), "ED"),
        (range(0xEE, 0xF0), "2"),
        (range(0xF0, 0xF1), "F0"),
        (range(0xF1, 0xF4), "3"),
        (range(0xF4, 0xF5), "F4"),
    ],
    "1": [(CONTINUES, "")],
    "2": [(CONTINUES, "1")],
    "3": [(CONTINUES, "2")],
    "E0": [(range(0xA0, 0xC0), "1")],
    "ED": [(range(0x80, 0xA0), "1")],
    "F0": [(range(0x90, 0xC0), "2")],
    "F4": [(range(0x80, 0x90), "2")],
}
"""UTF-8 (RFC 3629, section 4): the bytes that may follow at each place in a character, and the place after them, "" its end."""


class Letters(NamedTuple):
    """An automaton over C classes of characters: step_SC, state 0 is dead; its start; where a text may end; the classes of characters, and
    that of all others."""

    step_SC: Tensor
    start: int
    accept_S: Tensor
    class_of: dict[str, int]
    others: int

    @classmethod
    def of_set(cls, characters: str) -> Letters:
        """Any text of these characters alone."""
        step_SC = torch.tensor([[DEAD, DEAD], [1, DEAD]])
        return cls(step_SC, 1, torch.tensor([False, True]), dict.fromkeys(characters, 0), 1)


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


@contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """Ends the work of this thread with an error after so much CPU time: determinisation can take exponential time, and the library knows
    no limit. The clock is read at calls and returns of functions, Python's and C's."""
    before, end = sys.getprofile(), time.thread_time() + seconds

    def look(*_event: object) -> None:
        if time.thread_time() > end:
            sys.setprofile(before)
            raise RuntimeError("it has too many states, make it simpler")

    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(before)


def _letters(regex: str) -> Letters:
    """The automaton of an expression. InputError as `plain`."""
    try:
        import interegular
    except ImportError:
        raise InputError("regular expressions need the constraints extra: pip install 'dlm[constraints]'") from None
    readable = plain(regex)
    try:
        with _bounded(MAX_SECONDS):
            fsm = interegular.parse_pattern(readable).to_fsm()
    except Exception as error:  # it raises bare Exceptions, and others by mistake
        reason = str(error).partition("\n")[0] or "an automaton lacks something that it uses"
        shown = repr(regex if len(regex) < 200 else regex[:200] + " ...")
        raise InputError(f"{shown} cannot be used as a constraint: {reason}") from None
    number = {state: n for n, state in enumerate(sorted(fsm.states), 1)}
    others = max(fsm.alphabet.values(), default=-1) + 1
    step_SC = torch.full((len(number) + 1, others + 1), DEAD)
    for state, moves in fsm.map.items():
        for symbol, after in moves.items():
            step_SC[number[state], symbol] = number[after]
    accept_S = torch.zeros(len(number) + 1, dtype=torch.bool)
    accept_S[[number[state] for state in fsm.finals]] = True
    symbols = dict(fsm.alphabet.items())
    class_of = {symbol: symbols[symbol] for symbol in symbols if isinstance(symbol, str)}
    rest = [fsm.alphabet[symbol] for symbol in symbols if not isinstance(symbol, str)]  # anything else
    if rest and rest[0] is not None:
        others = rest[0]
    return Letters(step_SC, number[fsm.initial], accept_S, class_of, others)


def _byte_moves(letters: Letters) -> list[dict[int, int]]:
    """For each place inside a character, 0 its beginning, where a byte leads: to a place N, or to the class -1 - C of a character.

    Places from which the same bytes lead to the same ends are one.
    """
    tree: dict[int, object] = {}
    for char, number in letters.class_of.items():
        if not "\ud800" <= char <= "\udfff":
            *way, last = char.encode()
            node = tree
            for byte in way:
                node = node.setdefault(byte, {})  # type: ignore[assignment]
            node[last] = number
    places: dict[tuple[tuple[int, int], ...], int] = {}
    plain_places: dict[str, int] = {}

    def place(kind: str, known: dict[int, object]) -> int:
        if not known and kind in plain_places:
            return plain_places[kind]
        moves = []
        for values, after in BYTES[kind]:
            for byte in values:
                below = known.get(byte)
                if after:
                    moves.append((byte, place(after, below if isinstance(below, dict) else {})))
                else:
                    moves.append((byte, -1 - (below if isinstance(below, int) else letters.others)))
        number = places.setdefault(tuple(moves), len(places) + 1)  # the beginning of a character is 0, and made last
        if not known:
            plain_places[kind] = number
        return number

    first = place("character", tree)
    return [dict(moves) for moves in (list(places)[first - 1], *places)]


class _Bytes:
    """An automaton over bytes: state s * N + n is state s of the letters, at place n inside a character."""

    def __init__(self, letters: Letters) -> None:
        moves = _byte_moves(letters)
        self.places, states = len(moves), len(letters.step_SC)
        self.start = letters.start * self.places
        self.accept_S = torch.zeros(states * self.places, dtype=torch.bool)
        self.accept_S[:: self.places] = letters.accept_S
        groups: dict[tuple[int | None, ...], list[int]] = {}  # of bytes that lead to the same
        for byte in range(256):
            groups.setdefault(tuple(one.get(byte) for one in moves), []).append(byte)
        self.next: list[Tensor] = []  # by group, int64 (S)
        self.group_of: dict[int, int] = {}
        here_S = torch.arange(states)[:, None] * self.places
        for ends, members in groups.items():
            after_SN = torch.full((states, self.places), DEAD)
            for n, end in enumerate(ends):
                if end is not None:
                    after_SN[:, n] = here_S[:, 0] + end if end >= 0 else letters.step_SC[:, -1 - end] * self.places
            after_SN[0] = DEAD
            self.group_of |= dict.fromkeys(members, len(self.next))
            self.next.append(after_SN.flatten())

    def classes(self, data: bytes) -> tuple[int, ...]:
        return tuple(self.group_of[byte] for byte in data)

    def fold(self, classes: tuple[int, ...], state_S: Tensor) -> Tensor:
        """The states after the bytes of these classes."""
        for one in classes:
            state_S = self.next[one][state_S]
        return state_S


def _trimmed(next_XSK: Tensor, start: int, accept_S: Tensor, kind_V: Tensor, regex: str) -> tuple[Tensor, Tensor, Tensor]:
    """next_XSK, accept_S and kind_V of the states on a way from the start to an end, and of the kinds that differ there."""
    reached_S, live_S = torch.zeros_like(accept_S), accept_S
    new_S = torch.tensor([start])
    while len(new_S):
        reached_S[new_S] = True
        after_S = torch.unique(next_XSK[:, new_S])
        new_S = after_S[~reached_S[after_S]]
    while not torch.equal(live_S, grown_S := live_S | live_S[next_XSK].any(2).any(0)):
        live_S = grown_S
    if not live_S[start]:
        raise InputError(f"no text of this model's tokens matches {regex!r}")
    kept_S = reached_S & live_S
    kept_S[start] = False
    order_S = torch.cat([torch.tensor([start]), kept_S.nonzero().flatten()])
    number_S = torch.full_like(next_XSK[0, :, 0], DEAD)
    number_S[order_S] = torch.arange(START, START + len(order_S))
    dead_X1K = torch.full_like(next_XSK[:, :1], DEAD)
    next_XSK, kind_K = torch.unique(torch.cat([dead_X1K, number_S[next_XSK[:, order_S]]], 1), dim=2, return_inverse=True)
    return next_XSK, torch.cat([torch.zeros(1, dtype=torch.bool), accept_S[order_S]]), kind_K[kind_V]


@dataclass(frozen=True, eq=False)
class Automaton:
    """next_XSK: int64, the state after a token of each kind, 0 dead, 1 the start; the last table is for given tokens. accept_S: where a
    text may end; kind_V: the kind of each token; free_V: tokens that may be written."""

    regex: str
    next_XSK: Tensor = field(repr=False)
    accept_S: Tensor = field(repr=False)
    kind_V: Tensor = field(repr=False)
    free_V: Tensor = field(repr=False)

    @classmethod
    def compile(cls, regex: str, pieces: Spelling | Mapping[int, str], vocab_size: int) -> Automaton:
        """As `constraints.Pattern.compile`."""
        return cls._made(regex, _letters(regex), pieces, vocab_size)

    @classmethod
    def written(cls, regex: str, spelling: Spelling, vocab_size: int) -> Automaton:
        """Written tokens together match an expression; given ones are free. InputError as of `compile`, and for one that is too large."""
        return _written(regex, spelling, vocab_size)

    @classmethod
    def of_set(cls, characters: str, pieces: Spelling | Mapping[int, str], vocab_size: int) -> Automaton:
        """Written tokens hold these characters alone; given ones are free, and stand between whole characters."""
        return cls._made(f"[{characters}]*", Letters.of_set(characters), pieces, vocab_size, skips_given=True)

    @classmethod
    def _made(
        cls, regex: str, letters: Letters, pieces: Spelling | Mapping[int, str], vocab_size: int, *, skips_given: bool = False
    ) -> Automaton:
        spelling = pieces if isinstance(pieces, Spelling) else Spelling.of(pieces)
        parts = {token: spelling.part(token) for token in (range(vocab_size) if isinstance(pieces, Spelling) else pieces)}
        parts = {token: part for token, part in parts.items() if 0 <= token < vocab_size and _usable(part)}
        automaton = _Bytes(letters)
        begins = skips_given or any(part.first is not None for part in parts.values())  # the first token is spelt otherwise
        column_of: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}  # by the classes of its bytes, also at the beginning
        kind_V = torch.zeros(vocab_size, dtype=torch.long)
        for token, part in parts.items():
            inner = automaton.classes(part.inner)
            first = inner if part.first is None else automaton.classes(part.first)
            kind_V[token] = column_of.setdefault((inner, first), len(column_of) + 1)
        size = len(automaton.accept_S)
        if size * len(column_of) > MAX_MOVES:
            raise InputError("the expression has too many states for this vocabulary: make it simpler")
        states_S = torch.arange(size)
        next_SK = torch.full((size + begins, len(column_of) + 1), DEAD)
        for (inner, first), column in column_of.items():
            next_SK[:size, column] = automaton.fold(inner, states_S)
            if begins:
                next_SK[size, column] = automaton.fold(first, torch.tensor(automaton.start))
        accept_S = torch.cat([automaton.accept_S, automaton.accept_S[[automaton.start] * begins]])
        tables = [next_SK]
        if skips_given:
            stays_S = torch.where(states_S % automaton.places == 0, states_S, DEAD)
            tables.append(torch.cat([stays_S, torch.tensor([automaton.start])])[:, None].expand_as(next_SK))
        start = size if begins else automaton.start
        trimmed = _trimmed(torch.stack(tables), start, accept_S, kind_V, regex)
        return cls(regex, *trimmed, torch.ones(vocab_size, dtype=torch.bool))

    @property
    def next_SK(self) -> Tensor:
        """The moves of written tokens."""
        return self.next_XSK[0]

    @property
    def frees_given(self) -> bool:
        """Whether given tokens move otherwise than written ones."""
        return len(self.next_XSK) > 1

    def both(self, other: Automaton) -> Automaton:
        """The text matches both: the product of the automata."""
        kinds_K2, kind_V = torch.unique(torch.stack([self.kind_V, other.kind_V], 1), dim=0, return_inverse=True)
        tables = range(max(len(self.next_XSK), len(other.next_XSK)))
        one_XSK, two_XSK = (
            torch.stack([automaton.next_XSK[min(x, len(automaton.next_XSK) - 1)] for x in tables])[:, :, kinds_K]
            for automaton, kinds_K in ((self, kinds_K2[:, 0]), (other, kinds_K2[:, 1]))
        )
        size = two_XSK.shape[1]
        alive_XSSK = (one_XSK > DEAD)[:, :, None] & (two_XSK > DEAD)[:, None]
        next_XSK = torch.where(alive_XSSK, one_XSK[:, :, None] * size + two_XSK[:, None], DEAD).flatten(1, 2)
        accept_S = (self.accept_S[:, None] & other.accept_S).flatten()
        regex = f"{self.regex} and {other.regex}"
        trimmed = _trimmed(next_XSK, START * size + START, accept_S, kind_V, regex)
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


@lru_cache(maxsize=16)
def _written(regex: str, spelling: Spelling, vocab_size: int) -> Automaton:
    return Automaton._made(regex, _letters(regex), spelling, vocab_size, skips_given=True)


def _usable(part: Part) -> bool:
    """Whether a token has a text, and one that is known."""
    return bool(part.inner) and REPLACEMENT.encode() not in part.inner


class Walk:
    """The states of a canvas under an automaton, float 0 or 1: reached from the start, or with a way to the end.

    given_BL: tokens that nothing wrote; None where the automaton reads these as all others.
    """

    def __init__(
        self, automaton: Automaton, z_BL: Tensor, hole_BL: Tensor, valid_BL: Tensor | None, given_BL: Tensor | None = None
    ) -> None:
        self.automaton, self.z_BL, self.hole_BL, device = automaton, z_BL, hole_BL, z_BL.device
        self.given_BL = given_BL if automaton.frees_given else None
        self.valid_BL = torch.ones_like(hole_BL) if valid_BL is None else valid_BL
        # columns of holes alone and of none, where all rows move alike
        self.open_L, self.closed_L = hole_BL.all(0).tolist(), (~hole_BL).all(0).tolist()
        from_E, to_E, _ = automaton.edges
        edge_SS = torch.zeros(len(automaton.next_SK), len(automaton.next_SK))
        edge_SS[from_E, to_E] = 1
        self.edge_SS, self.back_SS = edge_SS.to(device), edge_SS.T.contiguous().to(device)
        self.next_XKS, self.kind_V = automaton.next_XSK.mT.contiguous().to(device), automaton.kind_V.to(device)

    def to_BS(self, at: int, token_B: Tensor) -> Tensor:
        """Where the token of each row leads at this position, int64 (B, S)."""
        kind_B = self.kind_V[token_B]
        if self.given_BL is None:
            return self.next_XKS[0][kind_B]
        return torch.where(self.given_BL[:, at, None], self.next_XKS[-1][kind_B], self.next_XKS[0][kind_B])

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
        one_BS = torch.zeros_like(reach_BS).scatter_add_(1, self.to_BS(at, token_B), reach_BS)
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
            one_BS = ways[-1].gather(1, self.to_BS(at, self.z_BL[:, at]))
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
