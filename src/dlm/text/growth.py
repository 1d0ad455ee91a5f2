"""How much longer a tokenizer may make a text: one whose normalizer multiplies it is refused before it is built."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dlm.errors import InputError

MOST = 64
"""Bytes that a step of a tokenizer may make of one byte, besides what Unicode's own normal forms do."""
MAX_MAPPED = 256
"""Bytes of the longest text in a SentencePiece map of characters; that of nmt_nfkc has 33."""
MAX_PREPENDED = 1024
"""Bytes that a step may put before a text."""
FIXED = {"ByteLevel": 2.0, "Metaspace": 3.0, "Lowercase": 2.0, "BertNormalizer": 3.0}
STAGES = ("normalizer", "pre_tokenizer", "decoder")
INNER = ("normalizers", "pretokenizers", "decoders")


def check(data: Any, where: Path) -> None:
    """data: a tokenizer.json. InputError where its steps may make a byte MOST times as long.

    The normalizer comes before the pre-tokenizer on the same text, so that their factors multiply; the decoder has its own.
    """
    if not isinstance(data, Mapping):
        raise InputError(f"{where} is not a tokenizer.json (it holds a {type(data).__name__})")
    try:
        factors = {name: math.prod(_factor(step, where) for step in _steps(data.get(name))) for name in STAGES}
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{where} is not a tokenizer.json ({error})") from None
    worst = max(factors["normalizer"] * factors["pre_tokenizer"], factors["decoder"])
    if worst > MOST:
        raise InputError(f"{where} has a tokenizer that may make a text {worst:.3g} times as long, more than {MOST}: dlm does not run it")


def _steps(step: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of a stage, sequences taken apart."""
    pending = [step]
    while pending:
        step = pending.pop()
        inner = [name for name in INNER if step is not None and name in step]
        if inner:
            pending += step[inner[0]]
        elif step is not None:
            yield step


def _factor(step: Mapping[str, Any], where: Path) -> float:
    kind = step["type"]
    if kind == "Replace":
        pattern, content = step["pattern"], len(step["content"].encode())
        known = len(pattern["String"].encode()) if "String" in pattern else 0
        return max(1.0, content / known) if known else 1.0 + content  # a regular expression may match nothing, everywhere
    if kind == "Prepend" and len(step["prepend"].encode()) > MAX_PREPENDED:
        raise InputError(f"{where} has a tokenizer that puts more than {MAX_PREPENDED} bytes before a text: dlm does not run it")
    if kind == "Precompiled":  # the length of a trie, the trie, and the texts, each with a zero at its end
        blob = base64.b64decode(step["precompiled_charsmap"] or "")
        texts = blob[4 + int.from_bytes(blob[:4], "little") :]
        if (longest := max(map(len, texts.split(b"\0")))) > MAX_MAPPED:
            raise InputError(f"{where} has a tokenizer that makes {longest} bytes of a character: dlm does not run it")
    return FIXED.get(kind, 1.0)
