"""OpenAI's protocol: completions and chat, whole or in chunks. Pure: from requests to canvases, from events of the engine to objects.

Chunks hold settled text alone, to be appended; with `diffusing` each holds the whole text as it stands and replaces the last.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dlm.errors import InputError
from dlm.language_model import LanguageModel
from dlm.serve.engine.job import Began, Change, Event, Stepped
from dlm.serve.engine.shelf import Plan
from dlm.serve.protocol import logprobs, schema
from dlm.serve.protocol.logprobs import Entry
from dlm.serve.protocol.reply import Row
from dlm.serve.protocol.writer import Piece, Writer
from dlm.trajectory import Canvas

_ERROR: dict[str, Any] = {
    "description": "An error as OpenAI's clients expect it.",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message", "type", "param", "code"],
                        "properties": {
                            "message": {"type": "string"},
                            "type": {"type": "string"},
                            "param": {"type": ["string", "null"]},
                            "code": {"type": ["string", "null"]},
                        },
                    }
                },
            }
        }
    },
}
ERRORS: dict[int | str, dict[str, Any]] = {status: _ERROR for status in (400, 401, 404, 408, 413, 422, 429, 500, 503, 504)}


@dataclass
class Answer:
    """One request under way. rows: of each choice; prompts: their beginnings as text; records: of `Job`.

    scored: the tokens of each prompt whose log-probabilities were asked for; scores: the changes that give them, by position.
    """

    plan: Plan
    asked: schema.CompletionRequest | schema.ChatRequest
    canvases: list[Canvas]
    prompts: list[str]
    rows: list[Row]
    records: int | None
    ident: str = ""
    scored: list[tuple[int, ...]] = field(default_factory=list)
    scores: dict[int, dict[int, Change]] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def make(cls, plan: Plan, asked: schema.CompletionRequest | schema.ChatRequest) -> Answer:
        """InputError for a prompt that cannot be continued as asked."""
        lm, n = plan.model, asked.n or 1
        if isinstance(asked, schema.ChatRequest):
            if plan.decoding.answer is not None and asked.logprobs and not lm.is_diffusion:
                raise InputError("an answer of a given form has no logprobs: leave logprobs or response_format away")
            made = [_conversation(lm, asked)]
            records = (asked.top_logprobs or 0) if asked.logprobs else None
            ident = "chatcmpl-"
        else:
            made = [_text(lm, asked, prompt) for prompt in _prompts(asked)]
            records, ident = asked.logprobs, "cmpl-"
        canvases = [canvas for canvas, _ in made for _ in range(n)]
        if len(canvases) > schema.MAX_CHOICES:
            raise InputError(f"{len(canvases)} choices were asked for, {schema.MAX_CHOICES} is the limit of a request")
        stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
        rows = [Row(canvas, Writer(lm.tokenizer, _before(canvas), lm.stops, stops)) for canvas in canvases]
        prompts = [prompt for _, prompt in made for _ in range(n)]
        answer = cls(plan, asked, canvases, prompts, rows, records, ident + secrets.token_hex(12))
        if answer._echo and records is not None:
            _check_scoring(lm, asked, canvases)
            answer.scored = [tuple(_before(canvas)) for canvas, _ in made]
            answer.prompts = ["".join(answer._drawn(index // n)) for index in range(len(canvases))]
        return answer

    # --- chunks ------------------------------------------------------------------------------------------------------

    def take(self, index: int, event: Event) -> Iterator[dict[str, Any]]:
        """The chunks that an event of this row, or of the scoring of a prompt, gives."""
        if (prompt := self._score_of(index)) is not None:
            if isinstance(event, Stepped):
                self.scores[prompt] = {change.position: change for change in event.changes}
            return
        row, chat = self.rows[index], isinstance(self.asked, schema.ChatRequest)
        if row.done:
            return
        text = row.take(event)
        if row.writer.finished:
            row.done = True
        if isinstance(event, Began):
            echo = self.prompts[index] if self._echo else ""
            if chat:
                yield self._chunk(index, {"role": "assistant", "content": ""})
            elif echo and not self.asked.diffusing:
                yield self._chunk(index, echo)
        elif self.asked.diffusing:
            if not row.done:
                yield self._chunk(index, self._standing(index))
        elif text:
            yield self._chunk(index, text, self._logprobs(row, self._fresh(row, text)))
        if row.done:
            final = self._standing(index) if self.asked.diffusing else ""
            yield self._chunk(index, final if not chat or final else {}, reason=row.finish_reason)

    def early(self, index: int) -> bool:
        """Whether the row's text ended before the engine was done with it."""
        return self._score_of(index) is None and bool(self.rows[index].writer.finished) and self.rows[index].seconds == 0

    def is_done(self, index: int) -> bool:
        """Whether the text of the row has ended; the scoring of a prompt ends by itself."""
        return self._score_of(index) is None and self.rows[index].done

    def last(self) -> Iterator[dict[str, Any]]:
        """The chunk after the last choice, if one was asked for."""
        if self.asked.stream_options is not None and self.asked.stream_options.include_usage:
            yield self._head() | {"choices": [], "usage": self._usage()}

    def _chunk(self, index: int, text: str | dict[str, str], logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": reason}
        if isinstance(self.asked, schema.ChatRequest):
            choice["delta"] = {"content": text} if isinstance(text, str) else text
        else:
            choice["text"] = text
        head = self._head()
        if self.asked.stream_options is not None and self.asked.stream_options.include_usage:
            head["usage"] = None
        return head | {"choices": [choice]}

    def _standing(self, index: int) -> str:
        """The text of a row as it is now, with noise as a block."""
        row, spelling = self.rows[index], self.plan.model.tokenizer.spelling
        if row.done:
            return self._echoed(index) + row.writer.text
        return self._echoed(index) + "".join(spelling.draw(row.tokens[: row.last])[row.first :])

    def _fresh(self, row: Row, text: str) -> list[Piece]:
        """The pieces of the text that was given last."""
        end = row.writer.given
        begin = end - len(text)
        return [piece for piece in row.writer.pieces if begin <= piece.offset < end]

    # --- the whole ---------------------------------------------------------------------------------------------------

    def whole(self) -> dict[str, Any]:
        """The answer once every row has ended."""
        choices = []
        for index, row in enumerate(self.rows):
            logprobs = self._logprobs(row, row.writer.pieces, len(self._echoed(index)), self._given(index))
            choice: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": row.finish_reason}
            if isinstance(self.asked, schema.ChatRequest):
                choice["message"] = {"role": "assistant", "content": row.writer.text, "refusal": None}
            else:
                choice["text"] = self._echoed(index) + row.writer.text
            choices.append(choice)
        return self._head() | {"choices": choices, "usage": self._usage()}

    @property
    def _echo(self) -> bool:
        return isinstance(self.asked, schema.CompletionRequest) and bool(self.asked.echo)

    def _echoed(self, index: int) -> str:
        return self.prompts[index] if self._echo else ""

    def _head(self) -> dict[str, Any]:
        kind = "text_completion"
        if isinstance(self.asked, schema.ChatRequest):
            kind = "chat.completion.chunk" if self.asked.stream else "chat.completion"
        plan = self.plan
        facts = {"sampler": plan.word, "seed": plan.seed, "steps": plan.steps}
        return {"id": self.ident, "object": kind, "created": self.created, "model": plan.model.name, "dlm": facts}

    def _usage(self) -> dict[str, Any]:
        """Tokens of the final texts alone, and the forward passes."""
        n = self.asked.n or 1
        prompt = sum(int(row.canvas.given_BT.sum()) for row in self.rows[::n])
        new, forwards = sum(len(row.writer.pieces) for row in self.rows), sum(row.forwards for row in self.rows)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "forwards": forwards,
            "tokens_per_forward": round(new / max(1, forwards), 4),
        }

    def _logprobs(self, row: Row, pieces: Sequence[Piece], begin: int = 0, given: Sequence[Entry] = ()) -> dict[str, Any] | None:
        """Log-probabilities of tokens at the forward pass that wrote them, before temperature; given: those of the prompt."""
        if self.records is None:
            return None
        spelling, at = self.plan.model.tokenizer.spelling, {id(piece): k for k, piece in enumerate(row.writer.pieces)}
        changes = (row.written.get(row.first + at[id(piece)]) for piece in pieces)
        new = [Entry(piece.token, piece.text, begin + piece.offset, change) for piece, change in zip(pieces, changes, strict=True)]
        if isinstance(self.asked, schema.ChatRequest):
            return logprobs.of_chat(spelling, new)
        return logprobs.of_completion(spelling, [*given, *new], self.records)

    # --- the prompt --------------------------------------------------------------------------------------------------

    @property
    def written(self) -> list[Canvas]:
        """The canvases that have a hole: the jobs of the rows, in their order, before those of `scored`."""
        return [canvas for canvas in self.canvases if bool(canvas.free_BT.any())]

    def _score_of(self, index: int) -> int | None:
        """The prompt that a job scores; None for the job of a row."""
        number = index - len(self.written)
        return number if number >= 0 else None

    def _given(self, index: int) -> list[Entry]:
        """The tokens of a row's prompt, where they were scored."""
        if not self.scored:
            return []
        prompt, found, offset = index // (self.asked.n or 1), list[Entry](), 0
        for at, (token, text) in enumerate(zip(self.scored[prompt], self._drawn(prompt), strict=True)):
            found.append(Entry(token, text, offset, self.scores[prompt].get(at)))
            offset += len(text)
        return found

    def _drawn(self, prompt: int) -> list[str]:
        return self.plan.model.tokenizer.spelling.draw(self.scored[prompt], mask="")


def texts(asked: schema.CompletionRequest | schema.ChatRequest) -> Iterator[str]:
    """All texts of a request that are to be encoded."""
    if isinstance(asked, schema.ChatRequest):
        for message in asked.messages:
            yield schema.content(message)
    else:
        yield asked.suffix or ""
        yield from (prompt for prompt in _prompts(asked) if isinstance(prompt, str))


def _prompts(asked: schema.CompletionRequest) -> list[str | list[int]]:
    prompt: Any = "" if asked.prompt is None else asked.prompt
    alone = isinstance(prompt, str) or isinstance(prompt[0], int)
    return [prompt] if alone else list(prompt)


def _before(canvas: Canvas) -> list[int]:
    """The tokens before the first hole."""
    free = canvas.free_BT[0].tolist()
    tokens: list[int] = canvas.tokens_BT[0, : free.index(True) if True in free else len(free)].tolist()
    return tokens


def _check_scoring(lm: LanguageModel, asked: schema.CompletionRequest | schema.ChatRequest, canvases: Sequence[Canvas]) -> None:
    """InputError where a prompt has no log-probabilities."""
    if lm.is_diffusion:
        raise InputError(f"{lm.name} is a diffusion model, which has a bound for a text and no logprobs of its tokens: leave echo away")
    if asked.stream:
        raise InputError("the logprobs of a prompt come with the whole answer: leave stream away, or echo")
    longest = max(len(_before(canvas)) for canvas in canvases)
    if not 0 < longest <= lm.window:
        raise InputError(f"the prompt has {longest} tokens: for its logprobs give 1 .. {lm.window}, the window of {lm.name}")


def _text(lm: LanguageModel, asked: schema.CompletionRequest, prompt: str | list[int]) -> tuple[Canvas, str]:
    """(the canvas, the prompt as text)."""
    if asked.max_tokens == 0:
        if not asked.echo or asked.suffix or asked.stream:
            raise InputError("max_tokens 0 writes nothing: it goes with echo, without suffix and stream")
        ids = lm.tokenizer.encode(prompt) if isinstance(prompt, str) else lm.known(prompt)
        if not ids:
            raise InputError("there is no prompt to echo")
        return Canvas.from_rows([ids], fill=lm.tokenizer.mask_id), prompt if isinstance(prompt, str) else lm.tokenizer.decode(prompt)
    canvas = lm.canvas([prompt], max_new_tokens=asked.max_tokens, suffix=asked.suffix or "")
    return canvas, prompt if isinstance(prompt, str) else lm.tokenizer.decode(prompt)


def _conversation(lm: LanguageModel, asked: schema.ChatRequest) -> tuple[Canvas, str]:
    messages = [{"role": message.role, "content": schema.content(message)} for message in asked.messages]
    max_new_tokens = asked.max_completion_tokens or asked.max_tokens
    return lm.chat_canvas(messages, **({} if max_new_tokens is None else {"max_new_tokens": max_new_tokens})), ""
