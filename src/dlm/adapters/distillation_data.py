"""Rows to convert a base with: windows of a text, or texts that the base wrote itself (self-distillation needs no data set).

Shapes: B rows, T positions, the start token included where the base reads one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dlm import seeds
from dlm.adapters import lora
from dlm.errors import InputError
from dlm.files import check_stamp, parse_json, stamp, write_text
from dlm.formats.native import ModelConfig
from dlm.models.transformer import Transformer
from dlm.text.chat import ChatTemplate
from dlm.text.tokenizer import Tokenizer
from dlm.train import data as reading
from dlm.trajectory import Canvas, Frame

FILE = "texts.jsonl"
FORMAT = 1
QUESTION_SEED = 1 << 31  # added to the seed of a user's words, so that no answer is drawn with the same numbers (32 bits of a seed count)
Batch = tuple[Tensor, Tensor]  # x_BT int64 and free_BT, False where a token is only read: start, prompt, padding


class Writer(Protocol):
    """An autoregressive `LanguageModel`: the parts needed to write texts."""

    @property
    def name(self) -> str: ...
    @property
    def network(self) -> Transformer: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def chat(self) -> ChatTemplate: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def stops(self) -> frozenset[int]:
        """Tokens that end a text or a turn."""

    def prompt_ids(self, text: str) -> list[int]:
        """Tokens of a prompt, as a user's message where there is a chat template."""

    def stream(self, *, canvas: Canvas, seed: int, temperature: float) -> Iterator[Frame]:
        """Fill the canvas; row i draws with seed + i."""


@dataclass(frozen=True)
class Rows:
    """draw(batch, rng) gives training rows; `held` are rows that it never gives. tokens: of the training rows."""

    draw: Callable[[int, torch.Generator], Batch]
    held: Batch
    tokens: int
    fingerprint: str


def from_text(source: str, tokenizer: Tokenizer, start: int | None, length: int, *, val_fraction: float = 0.1, held: int = 64) -> Rows:
    """Windows at random places of what `dlm.train.data.read` reads; the last part of it is held back. InputError for too little text."""
    parts = zip(("training", "held-out"), reading.split(reading.read(source), val_fraction), strict=True)
    window = length - (start is not None)
    streams = [reading.Stream.encode(part, tokenizer, window, name=f"{name} part") for name, part in parts]

    def begun(x_BT: Tensor) -> Batch:
        if start is not None:
            x_BT = torch.cat([torch.full_like(x_BT[:, :1], start), x_BT], 1)
        free_BT = torch.ones_like(x_BT, dtype=torch.bool)
        free_BT[:, 0] = False
        return x_BT, free_BT

    return Rows(
        lambda batch, rng: begun(streams[0].draw(batch, rng)),
        begun(streams[1].windows(held)),
        len(streams[0].tokens_N),
        streams[0].fingerprint(),
    )


def from_base(path: Path, start: int | None, length: int, *, val_fraction: float = 0.1, held: int = 64) -> Rows:
    """Texts of a file that `write` wrote, cut to `length`; the last ones are held back. InputError where it is missing or damaged.

    The fingerprint is of the base and the settings, which the texts follow from: a run may go on with more of them, and the texts that
    are then held back were never trained on.
    """
    try:
        head, *lines = [parse_json(line, path) for line in path.read_text(encoding="utf-8").splitlines()]
        texts = [([int(i) for i in line["ids"]], int(line["given"])) for line in lines]
        made_by = str(head["made_by"])[:16]
        check_stamp(head, FORMAT, path)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is missing or damaged ({error}): let the base write again into another --out") from None
    if len(texts) < 2:
        raise InputError(f"{path} holds {len(texts)} texts, two are needed: one to learn from, one to measure on")
    count = max(1, min(held, round(len(texts) * val_fraction)))  # no more are measured

    def rows(chosen: Sequence[tuple[list[int], int]]) -> Batch:
        x_BT, free_BT = torch.zeros(len(chosen), length, dtype=torch.long), torch.zeros(len(chosen), length, dtype=torch.bool)
        for b, (ids, given) in enumerate(chosen):
            row = ([] if start is None else [start]) + ids
            given += start is not None
            x_BT[b, : len(row)] = torch.tensor(row[:length])
            free_BT[b, max(given, 1) : len(row)] = True
        return x_BT, free_BT

    return Rows(
        lambda batch, rng: rows([texts[i] for i in torch.randint(len(texts) - count, (batch,), generator=rng).tolist()]),
        rows(texts[-count:][:held]),
        sum(len(ids) - given for ids, given in texts[:-count]),
        made_by,
    )


@dataclass(frozen=True)
class _Plan:
    """Texts that a base is to write: `room` tokens each, behind the prompts in turns, or behind questions of its own.

    frame: tokens before and after a user's words, where the base also writes those.
    """

    lm: Writer
    length: int
    prompts: list[list[int]]
    frame: tuple[list[int], list[int]] | None
    temperatures: list[float]
    seed: int
    batch: int

    @property
    def room(self) -> int:
        return self.length - (self.lm.config.start_token_id is not None)

    def check(self) -> None:
        """InputError for a base without start token or room."""
        if self.lm.config.start_token_id is None and self.prompts == [[]] and self.frame is None:
            raise InputError(f"{self.lm.name} reads no start token: give --prompts FILE for its texts to begin with")
        longest = max(map(len, self.prompts)) if self.frame is None else len(self.frame[0] + self.frame[1]) + 4
        if longest > self.room - 2:
            raise InputError(f"a prompt has {longest} tokens, a text {self.room}: shorter prompts or a greater --length")

    def head(self) -> dict[str, object]:
        """The first line of the file, with a digest of all that the texts follow from."""
        about = {"base": lora.fingerprint(self.lm.network), "length": self.length, "seed": self.seed, "heads": self.prompts}
        about |= {"turn": self.frame, "temperatures": self.temperatures, "batch": self.batch}
        return {"made_by": hashlib.sha256(json.dumps(about).encode()).hexdigest(), "base": self.lm.name, "seed": self.seed}

    def write(self, first: int, count: int) -> list[str]:
        """The lines of texts `first` and after, to the end of their batch or to text `count`. Text i draws with seed + i."""
        mask_id, turn = self.lm.tokenizer.mask_id, first // self.batch
        chosen = [self.prompts[i % len(self.prompts)] for i in range(first, min((turn + 1) * self.batch, count))]
        if self.frame is not None:
            chosen = _questions(self.lm, self.frame, len(chosen), self.room, seeds.after(self.seed, first + QUESTION_SEED))
        canvas = Canvas.from_rows([[*ids, *[None] * (self.room - len(ids))] for ids in chosen], fill=mask_id)
        temperature = self.temperatures[turn % len(self.temperatures)]
        *_, frame = self.lm.stream(canvas=canvas, seed=seeds.after(self.seed, first), temperature=temperature)
        lines = []
        for ids, row in zip(chosen, frame.tokens_BT.tolist(), strict=True):
            row = row[: row.index(mask_id)] if mask_id in row else row  # it has ended its text
            lines.append(json.dumps({"given": len(ids), "text": self.lm.tokenizer.decode(row), "ids": row}))
        return lines


def write(
    lm: Writer,
    path: Path,
    count: int,
    length: int,
    *,
    prompts: Sequence[str] = (),
    temperatures: Sequence[float] = (1.0,),
    seed: int = 0,
    batch: int = 64,
    tell: Callable[[int], None] = lambda _: None,
) -> None:
    """The base writes `count` texts of at most `length` positions; temperatures: one for each batch of them, in turns.

    prompts: taken in turns, as messages of a user where the base has a chat template. Without prompts, such a base writes the user's
    words as well, at temperature 1, which a training then reads and does not predict; any other base begins at its start token.
    A file that came of the same base and settings is gone on with. tell: gets the number of texts after each batch, which is then on
    disk. InputError for a base without start token or room.
    """
    frame = _turn(lm) if lm.chat.source and not prompts else None
    plan = _Plan(lm, length, [lm.prompt_ids(prompt) for prompt in prompts] or [[]], frame, list(temperatures), seed, batch)
    plan.check()
    head = plan.head()
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if not lines or not _begins_with(lines[0], head, path):
        lines = [json.dumps(stamp(FORMAT) | head)]
    tell(min(len(lines) - 1, count))
    path.parent.mkdir(parents=True, exist_ok=True)
    while (first := len(lines) - 1) < count:
        lines += plan.write(first, count)
        write_text(path, "\n".join(lines) + "\n")
        tell(len(lines) - 1)


def _begins_with(line: str, head: dict[str, object], path: Path) -> bool:
    """Whether the first line of a file, of this format or the one before, says that it came of the same base and settings."""
    try:
        found = parse_json(line, path)
    except InputError:
        return False
    if not isinstance(found, dict):
        return False
    check_stamp(found, FORMAT, path)
    return {key: found.get(key) for key in head} == head


def _turn(lm: Writer) -> tuple[list[int], list[int]]:
    """Tokens before and after the words of a user: those that two conversations have in common."""
    a, b = (lm.prompt_ids(word) for word in ("a", "b"))
    before = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    after = next(i for i, (x, y) in enumerate(zip(reversed(a), reversed(b), strict=False)) if x != y)
    return a[:before], a[len(a) - after :]


def _questions(lm: Writer, turn: tuple[list[int], list[int]], count: int, room: int, seed: int) -> list[list[int]]:
    """Conversations up to where the base is to answer; it writes the user's words itself, a third of the room at most."""
    before, after = turn
    most = (room - len(before) - len(after)) // 3
    canvas = Canvas.from_rows([[*before, *[None] * most]] * count, fill=lm.tokenizer.mask_id)
    *_, frame = lm.stream(canvas=canvas, seed=seed, temperature=1.0)
    ends = lm.stops | {lm.tokenizer.mask_id}
    said = (itertools.takewhile(lambda i: i not in ends, row[len(before) :]) for row in frame.tokens_BT.tolist())
    return [[*before, *words, *after] for words in said]
