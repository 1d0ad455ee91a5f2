"""The bytes that each token of a `tokenizers.Tokenizer` adds to a text, and the tokenizer of a text that goes on after other tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import tokenizers
from tokenizers import pre_tokenizers

from dlm.spelling import REPLACEMENT, Part

Place = Literal["start", "inside", "control"]
"""Where a text stands: at the beginning; after other text, so that it gets no space of its own; after a control token, where a tokenizer
may put a space or not."""


def byte_alphabet() -> dict[str, int]:
    """The byte that each letter of byte-level BPE stands for (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


class Parts(dict[int, Part]):
    """By token id, worked out when it is asked for. Ids without a token have no text."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        super().__init__()
        self.inner = inner
        kinds = [step["type"] for step in _steps(json.loads(_shell(inner)).get("decoder"))]
        self.alphabet = byte_alphabet() if kinds == ["ByteLevel"] else {}
        self.fallback = "ByteFallback" in kinds
        self.before, self.before_text = self._anchor()

    def _anchor(self) -> tuple[int, str]:
        """A token whose text shows what the next one adds to it, and that text."""
        for token in sorted(self.inner.get_vocab(with_added_tokens=True).values()):
            text = self._decode([token])
            if text.strip() and REPLACEMENT not in text and self._byte(token) is None:
                return token, text
        return -1, ""

    def _decode(self, ids: list[int]) -> str:
        text: str = self.inner.decode(ids, skip_special_tokens=False)
        return text

    def _byte(self, token: int) -> int | None:
        """Of a token of byte fallback."""
        name = self.inner.id_to_token(token) if self.fallback else None
        if name is None or len(name.encode()) != 6 or not name.startswith("<0x") or not name.endswith(">"):
            return None
        try:
            return int(name[3:5], 16)
        except ValueError:
            return None

    def __missing__(self, token: int) -> Part:
        part = self[token] = self._part(token)
        return part

    def _part(self, token: int) -> Part:
        name = self.inner.id_to_token(token)
        if name is None:
            return Part(b"")
        if self.alphabet:
            spelt = [self.alphabet.get(char) for char in name]
            return Part(name.encode() if None in spelt else bytes(byte for byte in spelt if byte is not None))
        byte = self._byte(token)
        first = self._decode([token])
        if byte is not None:
            inner = bytes([byte])
            return Part(inner, None if first in (REPLACEMENT, inner.decode("utf-8", "replace")) else first.encode())
        whole = self._decode([self.before, token]) if self.before >= 0 else first
        text = whole.removeprefix(self.before_text)
        return Part(text.encode(), None if first == text else first.encode())


def _shell(inner: tokenizers.Tokenizer) -> str:
    """The decoder of a tokenizer as JSON, without its vocabulary, which may be large."""
    bare = tokenizers.Tokenizer(tokenizers.models.BPE())
    if inner.decoder is not None:
        bare.decoder = inner.decoder
    text: str = bare.to_str()
    return text


def _steps(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The parts of a sequence of normalizers, pre-tokenizers or decoders, one after another; of one alone, itself."""
    if part is None:
        return
    if part.get("type") == "Sequence":
        for name in ("normalizers", "pretokenizers", "decoders"):
            for one in part.get(name, []):
                yield from _steps(one)
    else:
        yield part


def placed(inner: tokenizers.Tokenizer, place: Place) -> tokenizers.Tokenizer:
    """The tokenizer of a text at this place: `inner` itself where it is the same."""
    if place == "start":
        return inner
    bare = tokenizers.Tokenizer(tokenizers.models.BPE())
    if inner.normalizer is not None:
        bare.normalizer = inner.normalizer
    if inner.pre_tokenizer is not None:
        bare.pre_tokenizer = inner.pre_tokenizer
    data = json.loads(bare.to_str())
    if not _without_space(data, place):
        return inner
    whole = json.loads(inner.to_str()) | {name: data[name] for name in ("normalizer", "pre_tokenizer")}
    other = tokenizers.Tokenizer.from_str(json.dumps(whole))
    other.encode_special_tokens = True
    return other


def _without_space(data: dict[str, Any], place: Place) -> bool:
    """Take away what puts a space before a text at this place; whether there was such a thing."""
    changed = False
    for step in _steps(data["pre_tokenizer"]):
        if step["type"] == "Metaspace" and step.get("prepend_scheme", "always") in (
            ("first",) if place == "control" else ("first", "always")
        ):
            step["prepend_scheme"] = "never"
            step.pop("add_prefix_space", None)
            changed = True
        if step["type"] == "ByteLevel" and step.get("add_prefix_space") and place == "inside":
            step["add_prefix_space"] = False
            changed = True
    if place == "inside":
        for step in _steps(data["normalizer"]):
            if step["type"] == "Prepend":
                step["prepend"] = ""
                changed = True
    return changed


def alphabet_of(text: str) -> set[str]:
    """The letters of byte-level BPE that spell a text."""
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return set(letters[0][0]) if letters else set()
