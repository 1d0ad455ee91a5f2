"""The tokens that an autoregressive model may write next, so that its text matches an expression and has an end where its place ends.

Shapes: S states of the automaton, K kinds of tokens, V vocabulary, E edges.
"""

from __future__ import annotations

from torch import Tensor

from dlm.errors import InputError
from dlm.sampling.diffusion.automaton import DEAD, START, Automaton


class Guide:
    """One text. holes: tokens that it may have; prompted: whether something stands before it; stops: tokens that end it.

    InputError where no text of so many tokens matches.
    """

    def __init__(self, automaton: Automaton, holes: int, *, prompted: bool, stops: frozenset[int]) -> None:
        self.automaton, self.stops = automaton, sorted(stops)
        self.state = int(automaton.next_XSK[-1][START, 0]) if prompted and automaton.frees_given else START
        from_E, to_E, _ = automaton.edges
        self.ways = [automaton.accept_S.clone()]  # states with an end at most so many tokens away
        for _ in range(holes):
            way_S = self.ways[-1].clone()
            way_S[from_E[self.ways[-1][to_E]]] = True
            self.ways.append(way_S)
        if not bool(self.ways[-1][self.state]):
            raise InputError(f"no text of {holes} tokens has the form that was asked for: allow more tokens")

    def allowed(self, left: int) -> Tensor:
        """bool (V,). left: tokens that may follow."""
        automaton, to_K = self.automaton, self.automaton.next_SK[self.state]
        may_K = self.ways[left][to_K] & (to_K != DEAD)
        may_V = may_K[automaton.kind_V] & automaton.free_V
        may_V[self.stops] = bool(automaton.accept_S[self.state])
        return may_V

    def take(self, token: int) -> None:
        """The token was written."""
        if token not in self.stops:
            self.state = int(self.automaton.next_SK[self.state, self.automaton.kind_V[token]])

    @property
    def ended(self) -> bool:
        """Whether nothing can follow."""
        return bool(self.automaton.accept_S[self.state]) and bool((self.automaton.next_SK[self.state] == DEAD).all())
