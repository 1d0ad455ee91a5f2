"""Text of token sequences: the bytes of each token, joined into characters. The one place where tokens become text that is drawn.

A character of several tokens is shown at the token that completes it, the others show nothing. Where a character is not whole, one
U+FFFD stands for its bytes, at the last of them. A mask stays a mask. All pieces of a text without masks, joined, are what
`Tokenizer.decode` gives for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

REPLACEMENT = "\ufffd"
MASK = "█"


class Part(NamedTuple):
    """What one token adds to a text, as bytes of UTF-8: `inner` after other tokens, `first` at the beginning, None for the same."""

    inner: bytes
    first: bytes | None = None


class Spelling:
    """The parts of tokens. parts: by token id; a token without one is drawn as U+FFFD. mask_id: of the mask, None for none."""

    def __init__(self, parts: Mapping[int, Part], mask_id: int | None = None) -> None:
        self.parts, self.mask_id = parts, mask_id
        self._known: dict[int, tuple[Part, str | None]] = {}

    @classmethod
    def of(cls, texts: Mapping[int, str], mask_id: int | None = None) -> Spelling:
        """From the text of each token, the same wherever it stands."""
        return cls({token: Part(_encoded(text)) for token, text in texts.items()}, mask_id)

    def part(self, token: int) -> Part:
        """The bytes of one token; those of U+FFFD for an unknown one, none for the mask."""
        return self._part(token)[0]

    def _part(self, token: int) -> tuple[Part, str | None]:
        """And its text where it is whole by itself, whatever stands beside it."""
        found = self._known.get(token)
        if found is None:
            try:
                part = Part(b"") if token == self.mask_id else self.parts[token]
            except KeyError:
                part = Part(REPLACEMENT.encode())
            found = self._known[token] = part, _whole(part.inner)
        return found

    def is_whole(self, token: int) -> bool:
        """Whether a token holds whole characters alone."""
        return _whole(self.part(token).inner) is not None

    def alone(self, token: int, mask: str = MASK) -> str:
        """The text of one token inside a text, an incomplete character as one U+FFFD."""
        if token == self.mask_id:
            return mask
        part, text = self._part(token)
        return _decoded(part.inner) if text is None else text

    def draw(self, tokens: Sequence[int], mask: str = MASK) -> list[str]:
        """The text shown at each of these tokens, which are a text from its beginning."""
        shown: list[str] = []
        run: list[tuple[int, Part]] = []  # tokens whose bytes may belong together, and where they stand
        begun = open_before = False

        def flush() -> None:
            if run:
                _join(shown, run, open_before)
                run.clear()

        for at, token in enumerate(tokens):
            shown.append("")
            if token == self.mask_id:
                flush()
                shown[at], begun, open_before = mask, True, True
                continue
            part, text = self._part(token)
            if not part.inner:
                continue
            if not begun and part.first is not None:
                part = Part(part.first)
                text = _whole(part.inner)
            begun = True
            if text is None:
                run.append((at, part))
            else:
                flush()
                shown[at], open_before = text, False
        flush()
        return shown

    def text(self, tokens: Sequence[int], mask: str = MASK) -> str:
        """The pieces of `draw`, joined."""
        return "".join(self.draw(tokens, mask))

    def record(self, tokens: Iterable[int]) -> dict[str, Any]:
        """The parts of these tokens as JSON. `pieces` is the text of each, alone in files of earlier versions."""
        pieces: dict[str, str] = {}
        data: dict[str, str] = {}
        first: dict[str, str] = {}
        for token in sorted(set(tokens)):
            if token == self.mask_id or (part := self._stored(token)) is None:
                continue
            pieces[str(token)] = self.alone(token)
            if _whole(part.inner) is None:
                data[str(token)] = part.inner.hex()
            if part.first is not None:
                first[str(token)] = part.first.hex()
        extra = {"bytes": data, "first": first}
        return {"pieces": pieces} | {name: value for name, value in extra.items() if value}

    def _stored(self, token: int) -> Part | None:
        try:
            return self.parts[token]
        except KeyError:
            return None

    @classmethod
    def from_record(cls, header: Mapping[str, Any], mask_id: int | None) -> Spelling:
        """What `record` gave. ValueError, TypeError or LookupError for something else."""
        data, first = header.get("bytes", {}), header.get("first", {})
        parts = {}
        for token, text in header["pieces"].items():
            if not isinstance(text, str):
                raise ValueError(f"the text of token {token} is no text")
            inner = bytes.fromhex(data[token]) if token in data else _encoded(text)
            parts[int(token)] = Part(inner, bytes.fromhex(first[token]) if token in first else None)
        return cls(parts, mask_id)

    def same(self, other: Spelling) -> bool:
        """Whether the tokens of this record are spelled alike in the other one."""
        return all(self.alone(token) == other.alone(token) for token in list(self.parts))


def _whole(data: bytes) -> str | None:
    """The text, None for bytes that are no characters by themselves."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _encoded(text: str) -> bytes:
    """Of a lone surrogate, which no text may hold, U+FFFD."""
    return re.sub("[\ud800-\udfff]", REPLACEMENT, text).encode()


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _join(shown: list[str], run: Sequence[tuple[int, Part]], open_before: bool) -> None:
    """Put the characters of neighbouring tokens where the last byte of each stands. open_before: a mask lies before them."""
    data = b"".join(part.inner for _, part in run)
    owner = [at for at, part in run for _ in part.inner]
    begin = 0
    if open_before:  # the rest of a character whose beginning is masked
        while begin < min(3, len(data)) and data[begin] & 0xC0 == 0x80:
            begin += 1
        if begin:
            shown[owner[begin - 1]] += REPLACEMENT
    while begin < len(data):
        try:
            good, bad = data[begin:].decode(), 0
        except UnicodeDecodeError as error:
            good, bad = data[begin : begin + error.start].decode(), error.end - error.start
        for char in good:
            begin += len(char.encode())
            shown[owner[begin - 1]] += char
        if bad:
            begin += bad
            shown[owner[begin - 1]] += REPLACEMENT
