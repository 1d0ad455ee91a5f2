"""A run that the page has watched as a file to keep: a self-contained HTML replay, a GIF, or the events as JSON.

A trace is the record of a stream of native events: `{"label"?, "begin": {...}, "steps": [{...}, ...], "end"?: {...}}`.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.sampling.autoregressive import draft as drafts
from dlm.trajectory import COLOUR, Canvas, Frame, Likely, Trajectory
from dlm.viz.layout import Pane

FORMAT = "dlm-trace-1"
MAX_TRACES, MAX_POSITIONS, MAX_STEPS = 4, 16_384, 16_384
MAX_CHANGES, MAX_CELLS, MAX_CHARACTERS, MAX_BLENDED = 2_000_000, 50_000_000, 256, 8
"""Bounds of an export: changes in all, positions times steps, characters of one token, tokens at one place."""

GIVEN, NOISE, DRAFT, REJECTED, SETTLED = "g", "n", "d", "x", "fc"
STATES = frozenset("gndfcx")


@dataclass(frozen=True)
class ExportFile:
    """A finished file: the name to offer, its media type, its bytes."""

    name: str
    media_type: str
    content: bytes


def export(body: object) -> ExportFile:
    """The file that the body of `POST /v1/dlm/export` asks for: `{"format": "html" | "gif" | "json", "trace": {...}}`.

    Several `traces` stand side by side. InputError for a body that is malformed or too large; ModuleNotFoundError where a GIF
    lacks the viz extra.
    """
    if not isinstance(body, dict):
        raise InputError('an export is an object: {"format": "html", "trace": {...}}')
    kinds = {"html": _html, "gif": _gif, "json": _json}
    kind = body.get("format")
    if not isinstance(kind, str) or kind not in kinds:
        raise InputError(f"format must be one of {', '.join(kinds)}")
    traces = body["traces"] if "traces" in body else [body.get("trace")]
    if not isinstance(traces, list) or not 1 <= len(traces) <= MAX_TRACES:
        raise InputError(f"traces must be a list of 1 to {MAX_TRACES} traces")
    return kinds[kind](traces, [pane(trace) for trace in traces])


def pane(trace: object) -> Pane:
    """Label and run of one trace. InputError says which part of it is wrong."""
    if not isinstance(trace, dict) or not isinstance(trace.get("begin"), dict) or not isinstance(trace.get("steps"), list):
        raise InputError("a trace needs begin, the first event of its stream, and steps, the list of the others")
    begin, steps = trace["begin"], trace["steps"]
    tokens, states = begin.get("tokens"), begin.get("states")
    if not isinstance(tokens, list) or not isinstance(states, str) or len(tokens) != len(states) or not tokens:
        raise InputError("begin needs tokens, a list of [id, text], and states, one letter for each of them")
    if len(tokens) > MAX_POSITIONS or len(steps) > MAX_STEPS or len(tokens) * len(steps) > MAX_CELLS:
        raise InputError(f"too long to export: {len(tokens)} tokens in {len(steps)} steps")
    if set(states) - STATES:
        raise InputError(f"unknown state {min(set(states) - STATES)!r}; the states are {', '.join(sorted(STATES))}")
    label = trace.get("label", "")
    if not isinstance(label, str) or len(label) > MAX_CHARACTERS:
        raise InputError(f"a label is a text of at most {MAX_CHARACTERS} characters")
    return label, _run(begin, tokens, states, steps)


@dataclass(frozen=True)
class _Piece:
    """A text that is shown: its number, and the token that showed it first."""

    number: int
    token: int


class _Pieces:
    """A number for every text that is shown: a token may show another text where its neighbours complete a character."""

    def __init__(self, mask: object) -> None:
        self.mask = mask
        self.known: dict[str, _Piece] = {}  # by their text, in the order of their numbers

    def number(self, token: object, text: object, state: object) -> int:
        """0 is the mask."""
        if not isinstance(token, int) or isinstance(token, bool) or not isinstance(text, str) or len(text) > MAX_CHARACTERS:
            raise InputError(f"a token is a whole number and a text of at most {MAX_CHARACTERS} characters, got {str([token, text])[:60]}")
        if token == self.mask and state == NOISE:
            return 0
        return self.known.setdefault(text, _Piece(len(self.known) + 1, token)).number

    @property
    def texts(self) -> dict[int, str]:
        return {piece.number: text for text, piece in self.known.items()}

    def coloured(self, colours: list[str]) -> list[str]:
        """The colour of each number, "" for none, from those of tokens."""
        return ["", *(colours[piece.token] if 0 <= piece.token < len(colours) else "" for piece in self.known.values())]


@dataclass(frozen=True)
class _Move:
    """One step: the texts that it wrote and its draft tokens, by position, as numbers of `_Pieces`. likely: of its blends."""

    forwards: int
    seconds: float
    model: str
    written: dict[int, int]
    drafts: dict[int, int]
    likely: Likely | None


def _run(begin: dict[str, Any], tokens: list[Any], states: str, steps: list[Any]) -> Trajectory:
    pieces, start = _Pieces(begin.get("mask_id")), []
    for entry, state in zip(tokens, states, strict=True):
        if not isinstance(entry, list) or len(entry) != 2:
            raise InputError(f"begin.tokens holds pairs [id, text], got {str(entry)[:60]}")
        start.append(pieces.number(entry[0], entry[1], state))
    word = begin.get("sampler")
    drafting = isinstance(word, str) and drafts.is_short(word.partition(":")[0])
    moves, promise_T = _moves(steps, states, pieces, drafting)
    token_BT, free_BT = torch.tensor([start]), torch.tensor([[state != GIVEN for state in states]])
    canvas = Canvas(token_BT.clone(), free_BT, torch.ones_like(free_BT))
    meta = {"grid": _grid(begin["grid"], len(states), pieces)} if begin.get("grid") is not None else {}
    run = Trajectory(token_BT, canvas, pieces=pieces.texts, mask_id=0, meta=meta)
    forwards, seconds = 1, 0.0
    for k, move in enumerate(moves, 1):
        token_BT = _put(token_BT, move.written)
        draft_BT = _put(torch.full_like(token_BT, -1), move.drafts) if drafting else None
        settled_BT = ((promise_T >= 0) & (promise_T <= k))[None]
        forwards, seconds = max(forwards, move.forwards), max(seconds, move.seconds)  # a replay only goes forward
        t_B = torch.tensor([1 - k / len(moves)])
        run.append(Frame(token_BT, settled_BT, t_B, move.model, forwards, draft_BT=draft_BT, likely=move.likely), seconds=seconds)
    return run


def _grid(grid: object, cells: int, pieces: _Pieces) -> dict[str, list[int] | list[str]]:
    """Shape, bordered tile and colours of a grid. InputError for a shape of another number of cells, a tile that does not fill it, or a
    colour that is none."""
    axes, tile = (_sides(grid.get(name)) if isinstance(grid, dict) else [] for name in ("axes", "tile"))
    fills = len(axes) == len(tile) > 0 and not any(size % side for size, side in zip(axes, tile, strict=True))
    if not fills or math.prod(axes) != cells:
        raise InputError(f"begin.grid needs axes, whose product is the {cells} tokens, and a tile that fills them, got {str(grid)[:60]}")
    drawn: dict[str, list[int] | list[str]] = {"axes": axes, "tile": tile}
    colours = grid.get("colours", []) if isinstance(grid, dict) else []
    if not isinstance(colours, list) or not all(isinstance(one, str) and COLOUR.fullmatch(one) for one in colours):
        raise InputError("begin.grid.colours is a list of #rrggbb, or nothing for a token without a colour")
    return drawn | ({"colours": pieces.coloured(colours)} if colours else {})


def _sides(sides: object) -> list[int]:
    """A list of whole numbers above 0 as it is, anything else as no side."""
    return sides if isinstance(sides, list) and all(type(side) is int and side > 0 for side in sides) else []


def _moves(steps: list[Any], states: str, pieces: _Pieces, drafting: bool) -> tuple[list[_Move], Tensor]:
    """The steps, and the one from which on each position no longer changes, -1 for none: int64 (T). drafting: drafts are draft tokens."""
    moves: list[_Move] = []
    left, promise = MAX_CHANGES, [0 if state == GIVEN else -1 for state in states]
    for k, step in enumerate(steps, 1):
        changed = step.get("changed") if isinstance(step, dict) else None
        if not isinstance(changed, list):
            raise InputError(f"step {k} has no list named changed")
        blends = step.get("blends", [])
        left -= len(changed) + (len(blends) if isinstance(blends, list) else 0)
        if left < 0:
            raise InputError(f"too long to export: more than {MAX_CHANGES} changes")
        likely = _likely(blends, k, len(states), pieces)
        move = _Move(_forwards(step, k), _seconds(step, k), str(step.get("model") or "")[:MAX_CHARACTERS], {}, {}, likely)
        for entry in changed:
            position, number, state = _change(entry, k, len(states), pieces)
            if (states[position] == GIVEN) != (state == GIVEN):
                raise InputError(f"step {k} changes position {position}, which is {'' if states[position] == GIVEN else 'not '}given")
            if state == GIVEN:  # its neighbour completes a character
                move.written[position] = number
                continue
            if drafting and state == DRAFT:
                move.drafts[position] = number
            elif not (drafting and state == REJECTED):  # the text never held that, and the run knows it by itself
                move.written[position] = number
                promise[position] = (promise[position] if promise[position] >= 0 else len(moves) + 1) if state in SETTLED else -1
        if not (drafting and changed and all(change[3] == REJECTED for change in changed)):
            moves.append(move)
    return moves, torch.tensor(promise)


def _put(x_BT: Tensor, values: dict[int, int]) -> Tensor:
    """A copy of the one row with these values by position."""
    x_BT = x_BT.clone()
    x_BT[0, torch.tensor(list(values), dtype=torch.long)] = torch.tensor(list(values.values()), dtype=torch.long)
    return x_BT


def _change(entry: object, k: int, length: int, pieces: _Pieces) -> tuple[int, int, str]:
    """(position, number of the text, state) of [position, id, text, state, ...]."""
    if not isinstance(entry, list) or len(entry) < 4:
        raise InputError(f"step {k}: a change is [position, id, text, state, confidence, alternatives], got {str(entry)[:60]}")
    position, token, text, state = entry[:4]
    _check_position(position, k, length)
    if not isinstance(state, str) or state not in STATES:
        raise InputError(f"step {k}: unknown state {str(state)[:20]!r}")
    return position, pieces.number(token, text, state), state


def _likely(blends: object, k: int, length: int, pieces: _Pieces) -> Likely | None:
    """The likeliest tokens of a step of [position, [[text, share], ...]], None where there are none."""
    if not isinstance(blends, list) or not all(isinstance(one, list) and len(one) == 2 and isinstance(one[1], list) for one in blends):
        raise InputError(f"step {k}: blends are a list of [position, [[text, share], ...]]")
    if not blends:
        return None
    counts = {len(pairs) for _, pairs in blends}
    if len(counts) > 1 or not 1 <= min(counts) <= MAX_BLENDED:
        raise InputError(f"step {k}: every blend of a step has as many tokens, 1 to {MAX_BLENDED}")
    for position, pairs in blends:
        _check_position(position, k, length)
        for pair in pairs:
            if not isinstance(pair, list) or len(pair) != 2 or not _is_share(pair[1]):
                raise InputError(f"step {k}: a blend holds pairs of a text and its share from 0 to 1, got {str(pair)[:60]}")
    token_EC = torch.tensor([[pieces.number(0, text, DRAFT) for text, _ in pairs] for _, pairs in blends])
    weight_EC = torch.tensor([[share for _, share in pairs] for _, pairs in blends], dtype=torch.float64)
    position_E = torch.tensor([position for position, _ in blends])
    return Likely(torch.zeros_like(position_E), position_E, token_EC, weight_EC)


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _check_position(position: object, k: int, length: int) -> None:
    if not isinstance(position, int) or isinstance(position, bool) or not 0 <= position < length:
        raise InputError(f"step {k}: there is no position {str(position)[:20]}; the text has {length} tokens")


def _forwards(step: dict[str, Any], k: int) -> int:
    value = step.get("forwards", k)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 10**9:
        raise InputError(f"step {k}: forwards counts forward passes, got {str(value)[:20]}")
    return value


def _seconds(step: dict[str, Any], k: int) -> float:
    value = step.get("seconds", 0.0)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or not 0 <= value <= 10**9:
        raise InputError(f"step {k}: seconds must be a number from 0, got {str(value)[:20]}")
    return float(value)


def _html(_traces: Sequence[object], panes: Sequence[Pane]) -> ExportFile:
    from dlm.viz.html import write_html

    return ExportFile("run.html", "text/html; charset=utf-8", _written(lambda path: write_html(panes, path), "run.html"))


def _gif(_traces: Sequence[object], panes: Sequence[Pane]) -> ExportFile:
    from dlm.viz.gif import write_gif

    columns = 64 if len(panes) == 1 else 44
    write = lambda path: write_gif(panes, path, columns=columns, size=22)  # noqa: E731
    return ExportFile("run.gif", "image/gif", _written(write, "run.gif"))


def _json(traces: Sequence[object], _panes: Sequence[Pane]) -> ExportFile:
    try:
        text = json.dumps({"format": FORMAT, "traces": list(traces)}, separators=(",", ":"), allow_nan=False)
    except ValueError:
        raise InputError("a trace holds a number that JSON has not, such as NaN") from None
    return ExportFile("run.json", "application/json", text.encode())


def _written(write: Callable[[Path], None], name: str) -> bytes:
    """The bytes that a writer of files writes."""
    with tempfile.TemporaryDirectory(prefix="dlm-") as directory:
        path = Path(directory) / name
        write(path)
        return path.read_bytes()
