"""One self-contained page on which runs are replayed: no network, no build step."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Sequence
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

from dlm.files import write_text
from dlm.trajectory import Trajectory
from dlm.viz import palette
from dlm.viz.layout import Pane, at_row, is_coloured, slots


def write_html(panes: Sequence[Pane], path: str | Path, *, row: int = 0) -> None:
    """Write the page, to a temporary name first. One scrubber moves all panes, which stand side by side."""
    room = files("dlm.viz")
    template, css, script = (room.joinpath(name).read_text("utf-8") for name in ("replay.html", "shared/blend.css", "shared/blend.js"))
    data = json.dumps([_bordered(_record(label, run, row), slots(run, row)) for label, run in panes], separators=(",", ":"))
    for char in "<>&":  # inside a script element only these could end it; in JSON they have another spelling
        data = data.replace(char, f"\\u{ord(char):04x}")
    title = html.escape(" | ".join(label for label, _ in panes) or "run")
    parts = {"/*palette*/": palette.css() + "\n" + css, "/*blend*/": script.replace("export ", ""), "{{title}}": title, "{{data}}": data}
    page = re.sub("|".join(map(re.escape, parts)), lambda match: parts[match[0]], template)
    write_text(Path(path), page, errors="replace")


def _record(label: str, run: Trajectory, row: int) -> dict[str, Any]:
    """One pane as plain data.

    pieces: the texts that are shown, `mask` the index of the one that is noise, -1 for none; tokens: the token of each; start: an index
    into pieces for each position; free: 1 where the sampler writes; settled: the frame of the promise, -1 for none; events: for each frame
    after the first, position and piece by turns, of tokens that change and of those that stay while the text shown at them changes,
    because a neighbour completes a character; drafts: in the same way the draft tokens of each frame, empty for a run without drafts;
    likely: of each frame [position, piece, percent, piece, percent, ...] of its blends, empty for a run without;
    colours: of a grid of colours, that of each token, empty for one without;
    forwards and seconds: for each frame.
    """
    valid_T = run.valid_BT[row]
    index: dict[tuple[int, str], int] = {}

    def pieces(tokens: Sequence[int]) -> list[int]:
        return [index.setdefault(pair, len(index)) for pair in zip(tokens, run.spelling.draw(tokens), strict=True)]

    shown: list[list[int]] = []
    drafts: list[list[int]] = []
    for k, frame in enumerate(run.frames()):
        tokens, drafted = frame.tokens_BT[row][valid_T].tolist(), at_row(run.drafts(k), row)
        now = pieces([drafted.get(i, token) for i, token in enumerate(tokens)])
        drafts.append([number for i in drafted for number in (i, now[i])])
        mask = pieces([run.mask_id])[0] if drafted and run.mask_id is not None else 0
        shown.append([(mask if tokens[i] == run.mask_id else shown[-1][i]) if i in drafted else piece for i, piece in enumerate(now)])
    events = [[number for i, piece in enumerate(after) if piece != before[i] for number in (i, piece)] for before, after in pairwise(shown)]
    blends = [_blends(run, k, row, pieces) for k in range(len(run))] if run.has_blends else []
    return {
        "label": label,
        "pieces": [f"{text} " if is_coloured(run) else text for _, text in index],
        "tokens": [token for token, _ in index],
        "mask": next((number for (token, _), number in index.items() if token == run.mask_id), -1),
        "start": shown[0],
        "free": run.free_BT[row][valid_T].int().tolist(),
        "settled": run.settled_BT[row][valid_T].tolist(),
        "events": events,
        "drafts": drafts if run.has_drafts else [],
        "likely": blends,
        "forwards": run.forwards,
        "seconds": [round(s, 4) for s in run.seconds],
        "colours": run.meta.get("grid", {}).get("colours", []),
    }


def _blends(run: Trajectory, k: int, row: int, pieces: Callable[[Sequence[int]], list[int]]) -> list[list[int]]:
    """The likeliest tokens of each position of a frame, as pieces by themselves with their weights in percent."""
    found = []
    for position, likely in run.likely(k, row).items():
        flat = [number for token, weight in likely for number in (pieces([token])[0], round(100 * weight))]
        found.append([position, *flat])
    return found


def _bordered(pane: dict[str, Any], shown: Sequence[int | str]) -> dict[str, Any]:
    """The same pane with the borders of a grid as positions that nothing happens at. cells: the token of each position, -1 for a border."""
    place = [i for i, slot in enumerate(shown) if isinstance(slot, int)]
    border = {text: len(pane["pieces"]) + n for n, text in enumerate(dict.fromkeys(slot for slot in shown if isinstance(slot, str)))}

    def moved(flat: list[int]) -> list[int]:
        return [number for at, piece in zip(flat[::2], flat[1::2], strict=True) for number in (place[at], piece)]

    return pane | {
        "pieces": [*pane["pieces"], *border],
        "tokens": [*pane["tokens"], *[-1] * len(border)],
        "start": [border[slot] if isinstance(slot, str) else pane["start"][slot] for slot in shown],
        "free": [0 if isinstance(slot, str) else pane["free"][slot] for slot in shown],
        "settled": [0 if isinstance(slot, str) else pane["settled"][slot] for slot in shown],
        "events": [moved(flat) for flat in pane["events"]],
        "drafts": [moved(flat) for flat in pane["drafts"]],
        "likely": [[[place[one[0]], *one[1:]] for one in blends] for blends in pane["likely"]],
        "cells": [-1 if isinstance(slot, str) else slot for slot in shown],
    }
