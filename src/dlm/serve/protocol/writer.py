"""From settled tokens to text that is never taken back: no half characters, no beginning of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dlm.text.tokenizer import Tokenizer

PROMPT_TOKENS = 4
"""The last tokens of the prompt are decoded along, because some tokenizers write the first token of a text in another way."""
HALF = "\ufffd"


@dataclass(frozen=True)
class Piece:
    """A token and the text that it adds, "" for all but the last of those that share a character; offset: where that text begins."""

    token: int
    text: str
    offset: int


class Writer:
    """Takes the tokens of one answer in their order.

    ends: tokens that end it, which are no text; stops: strings that end it and are left out. pieces: of the tokens that count;
    text: all so far, up to a stop; finished: `stop` once it has ended itself.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], ends: frozenset[int] = frozenset(), stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.ends, self.stops = tokenizer, ends, [stop for stop in stops if stop]
        self.ids = list(before[-PROMPT_TOKENS:])
        self.shown, self.read = 0, len(self.ids)  # ids up to `read` have been shown, those from `shown` on are decoded again
        self.text, self.given, self.finished = "", 0, ""
        self.pieces: list[Piece] = []

    def add(self, tokens: Sequence[int]) -> str:
        """The text that is now final."""
        for token in tokens:
            if self.finished:
                break
            if token in self.ends:
                self._flush()
                self.finished = "stop"
                break
            self.ids.append(token)
            self._put(token, self._decoded(final=False))
        return self._give(final=bool(self.finished))

    def finish(self) -> str:
        """The rest: nothing follows."""
        if not self.finished:
            self._flush()
        return self._give(final=True)

    def _flush(self) -> None:
        """Show the parts of a character whose rest does not come."""
        if rest := self._decoded(final=True):
            last = self.pieces.pop()
            self._put(last.token, rest)

    def _decoded(self, final: bool) -> str:
        """The text of the tokens that have none yet."""
        shown = self.tokenizer.decode(self.ids[self.shown : self.read])
        whole = self.tokenizer.decode(self.ids[self.shown :])
        if not final and whole.endswith(HALF):
            return ""
        if len(whole) > len(shown):
            self.shown, self.read = self.read, len(self.ids)
        return whole[len(shown) :]

    def _put(self, token: int, text: str) -> None:
        self.pieces.append(Piece(token, text, len(self.text)))
        self.text += text
        found = [at for stop in self.stops if (at := self.text.find(stop, max(0, len(self.text) - len(text) - len(stop)))) >= 0]
        if found:
            self.text, self.finished = self.text[: min(found)], "stop"
            kept = [piece for piece in self.pieces if piece.offset < len(self.text)]
            self.pieces = kept

    def _give(self, final: bool) -> str:
        end = len(self.text) if final else len(self.text) - self._begun()
        text, self.given = self.text[self.given : end], max(self.given, end)
        return text

    def _begun(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self.stops), default=0)
        for count in range(min(longest - 1, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-count:]) for stop in self.stops):
                return count
        return 0
