"""Rows to convert a base with: windows of a text, or texts that the base wrote itself (self-distillation, which needs no data set).

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

from dlm.adapters import lora
from dlm.errors import InputError
from dlm.files import check_stamp, stamp, write_text
from dlm.formats.native import ModelConfig
from dlm.models.transformer import Transformer
from dlm.text.chat import ChatTemplate
from dlm.text.tokenizer import Tokenizer
from dlm.train import data as reading
from dlm.trajectory import Canvas, Frame

FILE = "texts.jsonl"
FORMAT = 1
ASKED = 1 << 31  # added to the seed of what users say, so that no answer is drawn with the same numbers (32 bits of a seed count)
Batch = tuple[Tensor, Tensor]  # x_BT int64 and free_BT, False where a token is only read: start, prompt, padding


class Writer(Protocol):
    """An autoregressive `LanguageModel`: what is needed of it to write texts."""

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
    """draw(batch, rng) gives rows to learn from; `held` are rows that it never gives."""

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

    The fingerprint is of the base and the settings, which the texts follow from: a run may go on with more of them, and what is then
    held back was never learned.
    """
    try:
        head, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        texts = [([int(i) for i in line["ids"]], int(line["given"])) for line in lines]
        made_by = str(head["made_by"])[:16]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is missing or damaged ({error}): let the base write again into another --out") from None
    if len(texts) < 2:
        raise InputError(f"{path} holds {len(texts)} texts, two are needed: one to learn from, one to measure on")
    count = max(1, min(held, round(len(texts) * val_fraction)))  # more would be measured by nobody

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
    tell: Callable[[int], None] = lambda texts: None,
) -> None:
    """The base writes `count` texts of at most `length` positions; temperatures: one for each batch of them, in turns.

    prompts: taken in turns, as messages of a user where the base has a chat template. Without, such a base writes what users say as
    well, at temperature 1, and what texts begin with is read, not learned; others begin at their start token.
    A file that came of the same base and settings is gone on with: a run that was stopped, or fewer texts. tell: gets the number of
    texts after each batch, which is then on disk.
    InputError for a base without start token or room.
    """
    mask_id = lm.tokenizer.mask_id
    heads = [lm.prompt_ids(prompt) for prompt in prompts] or [[]]
    turn = _turn(lm) if lm.chat.source and not prompts else None
    room = length - (lm.config.start_token_id is not None)
    if lm.config.start_token_id is None and not prompts and turn is None:
        raise InputError(f"{lm.name} reads no start token: give --prompts FILE for its texts to begin with")
    if (longest := max(map(len, heads)) if turn is None else len(turn[0] + turn[1]) + 4) > room - 2:
        raise InputError(f"a prompt has {longest} tokens, a text {room}: shorter prompts or a greater --length")
    about = {"base": lora.fingerprint(lm.network), "length": length, "seed": seed, "heads": heads, "turn": turn}
    about |= {"temperatures": list(temperatures), "batch": batch}
    made_by = {"made_by": hashlib.sha256(json.dumps(about).encode()).hexdigest(), "base": lm.name, "seed": seed}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if not lines or not _made_by(lines[0], made_by, path):
        lines = [json.dumps(stamp(FORMAT) | made_by)]
    tell(min(len(lines) - 1, count))
    path.parent.mkdir(parents=True, exist_ok=True)
    while (first := len(lines) - 1) < count:
        turns = first // batch
        chosen = [heads[i % len(heads)] for i in range(first, min((turns + 1) * batch, count))]
        if turn is not None:
            chosen = _asked(lm, turn, len(chosen), room, seed + first + ASKED)
        canvas = Canvas.from_rows([[*ids, *[None] * (room - len(ids))] for ids in chosen], fill=mask_id)
        *_, frame = lm.stream(canvas=canvas, seed=seed + first, temperature=temperatures[turns % len(temperatures)])
        for ids, row in zip(chosen, frame.tokens_BT.tolist(), strict=True):
            row = row[: row.index(mask_id)] if mask_id in row else row  # it has ended its text
            lines.append(json.dumps({"given": len(ids), "text": lm.tokenizer.decode(row), "ids": row}))
        write_text(path, "\n".join(lines) + "\n")
        tell(len(lines) - 1)


def _made_by(head: str, made_by: dict[str, object], path: Path) -> bool:
    """Whether the first line of a file says that it came of the same base and settings."""
    try:
        found = json.loads(head)
    except ValueError:
        return False
    check_stamp(found, FORMAT, path)
    return {key: found.get(key) for key in made_by} == made_by


def _turn(lm: Writer) -> tuple[list[int], list[int]]:
    """What stands before and after the words of a user: what two conversations have in common."""
    a, b = (lm.prompt_ids(word) for word in ("a", "b"))
    before = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    after = next(i for i, (x, y) in enumerate(zip(reversed(a), reversed(b), strict=False)) if x != y)
    return a[:before], a[len(a) - after :]


def _asked(lm: Writer, turn: tuple[list[int], list[int]], count: int, room: int, seed: int) -> list[list[int]]:
    """Conversations up to where the base is to speak; what the user says is its own, a third of the room at most."""
    before, after = turn
    most = (room - len(before) - len(after)) // 3
    canvas = Canvas.from_rows([[*before, *[None] * most]] * count, fill=lm.tokenizer.mask_id)
    *_, frame = lm.stream(canvas=canvas, seed=seed, temperature=1.0)
    ends = lm.stops | {lm.tokenizer.mask_id}
    said = (itertools.takewhile(lambda i: i not in ends, row[len(before) :]) for row in frame.tokens_BT.tolist())
    return [[*before, *words, *after] for words in said]
