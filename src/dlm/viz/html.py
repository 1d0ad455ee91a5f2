"""One self-contained page on which runs are replayed: no network, no build step."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from dlm.files import write_text
from dlm.trajectory import Places, Trajectory
from dlm.viz import palette
from dlm.viz.layout import Pane, at_row


def write_html(panes: Sequence[Pane], path: str | Path, *, row: int = 0) -> None:
    """Write the page, to a temporary name first. One scrubber moves all panes, which stand side by side."""
    template = files("dlm.viz").joinpath("replay.html").read_text(encoding="utf-8")
    data = json.dumps([_record(label, run, row) for label, run in panes], separators=(",", ":"))
    for char in "<>&":  # inside a script element only these could end it; in JSON they have another spelling
        data = data.replace(char, f"\\u{ord(char):04x}")
    title = html.escape(" | ".join(label for label, _ in panes) or "run")
    parts = {"/*palette*/": palette.css(), "{{title}}": title, "{{data}}": data}
    page = re.sub("|".join(map(re.escape, parts)), lambda match: parts[match[0]], template)
    write_text(Path(path), page, errors="replace")


def _record(label: str, run: Trajectory, row: int) -> dict[str, Any]:
    """One pane as plain data.

    pieces: the texts of tokens, `mask` the index of the one that is noise, -1 for none; start: an index into pieces for each
    position; free: 1 where the sampler writes; settled: the frame of the promise, -1 for none; events: for each frame after the
    first, position and piece by turns; drafts: in the same way the draft tokens of each frame, empty for a run without drafts;
    forwards and seconds: for each frame.
    """
    positions = run.valid_BT[row].nonzero().squeeze(-1).tolist()
    place = {position: i for i, position in enumerate(positions)}
    tokens = [run.start_BT[row].tolist()[position] for position in positions]
    index: dict[int, int] = {}
    for token in tokens:
        index.setdefault(token, len(index))

    def flat(places: Places) -> list[int]:
        mine = [(place[at], token) for at, token in at_row(places, row).items() if at in place]
        return [number for at, token in mine for number in (at, index.setdefault(token, len(index)))]

    events = [flat(run.changes(k)) for k in range(1, len(run))]
    drafts = [flat(run.drafts(k)) for k in range(len(run))] if run.has_drafts else []
    return {
        "label": label,
        "pieces": [run.piece(token) for token in index],
        "mask": index.get(run.mask_id, -1) if run.mask_id is not None else -1,
        "start": [index[token] for token in tokens],
        "free": [int(run.free_BT[row, position]) for position in positions],
        "settled": run.settled_BT[row][run.valid_BT[row]].tolist(),
        "events": events,
        "drafts": drafts,
        "forwards": run.forwards,
        "seconds": [round(s, 4) for s in run.seconds],
    }
