"""Log-probabilities on the wire: by token, with its own bytes, so that tokens which look alike stay apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dlm.serve.engine.job import Change
from dlm.spelling import Spelling

UNKNOWN = -9999.0
"""In chat, for a token whose forward pass gave no distribution."""


@dataclass(frozen=True)
class Entry:
    """A token of the answer: the text that it shows, where that begins, and the change that wrote it, None where nothing is known."""

    token: int
    text: str
    offset: int
    change: Change | None

    @property
    def logp(self) -> float | None:
        """In nats, before temperature."""
        return None if self.change is None else self.change.logp

    @property
    def alternatives(self) -> Sequence[tuple[int, float]]:
        """(token, log p), best first."""
        return () if self.change is None else self.change.alternatives


def label(spelling: Spelling, token: int) -> str:
    """The text of a token; a part of a character as `bytes:\\xe5\\xa4`, a token without text by its number."""
    data = spelling.part(token).inner
    if not data:
        return f"token_id:{token}"
    return spelling.alone(token) if spelling.is_whole(token) else "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def of_completion(spelling: Spelling, entries: Sequence[Entry], count: int) -> dict[str, Any]:
    """As `logprobs` of a completion: of each token, and of the `count` likeliest at its place, the token itself instead of the last."""
    return {
        "tokens": [entry.text for entry in entries],
        "token_logprobs": [entry.logp for entry in entries],
        "top_logprobs": [_top(spelling, entry) for entry in entries] if count else None,
        "text_offset": [entry.offset for entry in entries],
    }


def _top(spelling: Spelling, entry: Entry) -> dict[str, float] | None:
    if entry.logp is None:
        return None
    found: dict[str, float] = {}
    best = dict(entry.alternatives)
    if entry.token not in best:  # beside a single one
        best = dict([*entry.alternatives[: max(1, len(best) - 1)], (entry.token, entry.logp)])
    for token, logp in best.items():
        name = label(spelling, token)
        found[f"token_id:{token}" if name in found else name] = logp
    return found


def of_chat(spelling: Spelling, entries: Sequence[Entry]) -> dict[str, Any]:
    """As `logprobs` of a choice of a chat."""

    def one(token: int, text: str, logp: float | None) -> dict[str, Any]:
        return {"token": text, "logprob": UNKNOWN if logp is None else logp, "bytes": list(spelling.part(token).inner)}

    content = []
    for entry in entries:
        best = [one(token, label(spelling, token), logp) for token, logp in entry.alternatives]
        content.append(one(entry.token, entry.text, entry.logp) | {"top_logprobs": best})
    return {"content": content, "refusal": None}
