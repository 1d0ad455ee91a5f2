"""Native events: every token with its state, confidence and alternatives, at every step. Pure: from the engine's events to the wire's.

States: g given, n noise, d draft (may change again, or a draft token before its verification), f fresh (settled by this step),
c settled before, x a rejected draft token. A step of noise on vectors also tells `blends`: the likeliest tokens of each open position.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from dlm.errors import InputError
from dlm.language_model import LanguageModel
from dlm.serve.engine.job import Began, Change, Ended, Event, Failed, Stepped
from dlm.serve.engine.shelf import Plan
from dlm.serve.guard import problem
from dlm.serve.protocol import schema
from dlm.serve.protocol.reply import Row
from dlm.trajectory import Canvas


def canvas(lm: LanguageModel, request: schema.GenerateRequest) -> Canvas:
    """The canvas of a request. InputError for parts that do not go together, or tokens that the model has not."""
    if request.messages is not None:
        if request.canvas is not None or request.prompt or request.suffix or request.length:
            raise InputError("messages stand alone, with max_tokens: leave prompt, suffix, canvas and length away")
        said = [{"role": message.role, "content": schema.content(message)} for message in request.messages]
        return lm.chat_canvas(said, **({} if request.max_tokens is None else {"max_new_tokens": request.max_tokens}))
    if request.canvas is None:
        return lm.canvas(request.prompt or "", length=request.length, max_new_tokens=request.max_tokens, suffix=request.suffix or "")
    if request.prompt or request.suffix or request.length or request.max_tokens:
        raise InputError("a canvas stands alone: put prompt, holes and suffix into it")
    row: list[int | None] = []
    for part in request.canvas:
        if isinstance(part, str):
            row += lm.tokenizer.encode(part, "inside" if row else "start")
        else:
            row += [None] if part is None else lm.known([part])
    if None not in row:
        raise InputError("the canvas has no hole: write null for every token to fill")
    return Canvas.from_rows([row], fill=lm.tokenizer.mask_id)


class Narrator:
    """Tells one row. events: (name, data) of the native events that an event of the engine gives.

    A character of several tokens is shown at the one that completes it. A step therefore also tells tokens that stay, with the state that
    they have, where the text shown at them changes. The end of a text shows nothing. answers: the given part is a conversation, which
    shows nothing either, as do control tokens.
    """

    def __init__(self, ident: str, plan: Plan, row: Row, *, answers: bool = False) -> None:
        self.ident, self.plan, self.row, self.answers = ident, plan, row, answers
        self.mask_id, self.spelling = plan.model.tokenizer.mask_id, plan.model.tokenizer.spelling
        control = plan.model.tokenizer.control.values() if answers else ()
        self.silent = plan.model.stops | frozenset(control)
        self.drafts: dict[int, int] = {}
        self.told: list[list[Any]] = []  # the last entry of each position, as in `changed`

    def events(self, event: Event) -> Iterator[tuple[str, dict[str, Any]]]:
        self.row.take(event)
        if isinstance(event, Began):
            yield "begin", self._begin()
        elif isinstance(event, Stepped):
            yield from self._step(event)
        elif isinstance(event, Ended):
            yield from self._end()
        elif isinstance(event, Failed):
            yield "error", {"error": problem(event.status, event.message, event.code)}

    def _begin(self) -> dict[str, Any]:
        row, lm = self.row, self.plan.model
        texts = self._draw(row.tokens)
        states = "".join("n" if i in row.open else "g" for i in range(len(row.tokens)))
        self.told = [[i, token, texts[i], states[i], None, None] for i, token in enumerate(row.tokens)]
        return {
            "id": self.ident,
            "model": lm.name,
            "sampler": self.plan.word,
            "seed": self.plan.seed,
            "steps": self.plan.steps,
            "prompt_tokens": len(row.tokens) - len(row.open),
            "mask_id": self.mask_id,
            "tokens": [[token, text] for token, text in zip(row.tokens, texts, strict=True)],
            "states": states,
        } | ({"grid": lm.grid} if lm.grid else {})

    def _step(self, event: Stepped) -> Iterator[tuple[str, dict[str, Any]]]:
        facts = {"step": event.forwards, "forwards": event.forwards, "t": round(event.t, 6), "model": event.model}
        written = {change.position: change for change in event.changes}
        rejected = [i for i, token in self.drafts.items() if i not in written or written[i].token != token]
        if rejected:
            struck = self._draw(self._with(self.drafts))
            yield "step", facts | {"changed": [[i, self.drafts[i], struck[i], "x", None, None] for i in rejected]}
        changed, tokens = [self._changed(change) for change in event.changes], self.row.tokens
        changed += ([i, token, "", "d", None, None] for i, token in event.drafts.items())
        noise_again = (i for i in rejected if i not in written and i not in event.drafts)
        changed += ([i, tokens[i], "", "n", None, None] for i in noise_again)
        self.drafts = event.drafts
        texts = self._draw(self._with(event.drafts))
        for entry in changed:
            entry[2] = texts[entry[0]]
            self.told[entry[0]] = entry
        for i, entry in enumerate(self.told):
            if entry[2] != texts[i]:  # its neighbour has completed a character, or no longer does
                self.told[i] = [i, entry[1], texts[i], "c" if entry[3] == "f" else entry[3], *entry[4:]]
                changed.append(self.told[i])
        blends = [[i, [self._shared(*pair) for pair in likely]] for i, likely in event.blends.items()]
        yield "step", facts | {"changed": changed} | ({"blends": blends} if blends else {})

    def _draw(self, tokens: list[int]) -> list[str]:
        """The text shown at each token."""
        texts = self.spelling.draw(tokens, mask="")
        quiet = self.row.canvas.given_BT[0].tolist() if self.answers else [False] * len(tokens)
        return ["" if hidden or token in self.silent else text for text, token, hidden in zip(texts, tokens, quiet, strict=True)]

    def _with(self, drafts: dict[int, int]) -> list[int]:
        """The tokens of the row with these draft tokens."""
        return [drafts.get(i, token) for i, token in enumerate(self.row.tokens)]

    def _changed(self, change: Change) -> list[Any]:
        noise = change.token == self.mask_id
        state = "f" if change.settled else "n" if noise else "d"
        others = [self._shared(token, math.exp(logp)) for token, logp in change.alternatives]
        confidence = None if change.confidence is None else round(change.confidence, 5)
        return [change.position, change.token, "", state, confidence, others or None]

    def _shared(self, token: int, share: float) -> list[Any]:
        """[text of the token by itself, its share]"""
        return [self.spelling.alone(token, mask=""), round(share, 5)]

    def _end(self) -> Iterator[tuple[str, dict[str, Any]]]:
        row, lm = self.row, self.plan.model
        new = [row.tokens[i] for i in range(row.first, row.last)]
        ends = next((row.first + k for k, token in enumerate(new) if token in lm.stops), None) if lm.stops else None
        given = int(row.canvas.given_BT.sum())
        holes = row.canvas.free_BT[0].tolist()
        written = sum(hole and token != self.mask_id for hole, token in zip(holes, row.tokens, strict=True))
        usage = {"prompt_tokens": given, "completion_tokens": written, "total_tokens": given + written, "forwards": row.forwards}
        usage["tokens_per_forward"] = round(written / max(1, row.forwards), 4)
        text = lm.tokenizer.decode(row.tokens[row.first if self.answers else 0 : ends])
        if ends is not None:  # nothing stands there any more
            rest = [entry for entry in self.told[ends : row.last] if entry[3] != "g" and (entry[2] or entry[3] not in "fc")]
            changed = [[entry[0], row.tokens[ends], "", "c", None, None] for entry in rest]
            yield "step", {"step": row.forwards, "forwards": row.forwards, "t": 0.0, "model": lm.name, "changed": changed}
        reason = "length" if ends is None else "stop"
        yield "end", {"text": text, "finish_reason": reason, "usage": usage, "seconds": round(row.seconds, 4)}
