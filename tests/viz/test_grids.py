"""A run on a grid is drawn as one: borders between boxes, in the terminal, on the page and in a GIF."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console

from dlm.trajectory import Canvas, Frame, Trajectory
from dlm.viz import layout
from dlm.viz.gif import write_gif
from dlm.viz.html import write_html
from dlm.viz.terminal import LiveView

ANSWER = "1234341221434321"
DRAWN = ["1 2 │ 3 4", "3 4 │ 1 2", "────┼────", "2 1 │ 4 3", "4 3 │ 2 1"]


def solving(until: int = 12) -> Trajectory:
    """The first four cells are given, then one is written in each step; 5 is the mask."""
    x_BT = torch.tensor([[int(c) for c in ANSWER]])
    free_BT = torch.arange(16)[None] >= 4
    pieces, meta = {n: str(n) for n in range(5)}, {"grid": {"axes": [4, 4], "tile": [2, 2]}}
    canvas = Canvas(x_BT, free_BT, torch.ones_like(free_BT))
    made = Trajectory(torch.where(free_BT, 5, x_BT), canvas, pieces=pieces, mask_id=5, meta=meta)
    for k in range(1, until + 1):
        known_BT = torch.arange(16)[None] < 4 + k
        made.append(Frame(torch.where(known_BT, x_BT, 5), known_BT, torch.tensor([1 - k / 12]), "", k), seconds=k / 10)
    return made


def test_borders_stand_between_boxes() -> None:
    run = solving()
    shown, looks = layout.framed(run, 0, layout.pieces(run, 0), layout.looks(run, 0))
    assert "".join(shown).splitlines() == DRAWN
    assert [look.kind for look in looks][:4] == ["given", "border", "given", "border"]
    assert [slot for slot in layout.slots(run, 0) if isinstance(slot, int)] == list(range(16))
    shown, _ = layout.framed(run, 0, layout.pieces(run, 0), layout.looks(run, 0), ascii_only=True)
    assert "".join(shown).splitlines()[2] == "----+----"


def test_the_terminal_leaves_the_grid_behind() -> None:
    out = io.StringIO()
    with LiveView(solving(), Console(file=out, force_terminal=True, color_system=None, width=80)) as view:
        view.update(force=True)
    left = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line).rstrip() for line in out.getvalue().splitlines()]
    assert left[-6:-1] == DRAWN


def test_the_page_has_borders_at_which_nothing_happens(tmp_path: Path) -> None:
    write_html([("", solving())], tmp_path / "run.html")
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found is not None
    (pane,) = json.loads(found[1])
    now = list(pane["start"])
    for event in pane["events"]:
        for at, piece in zip(event[::2], event[1::2], strict=True):
            assert pane["cells"][at] >= 4
            now[at] = piece
    assert "".join(pane["pieces"][piece] for piece in now).splitlines() == DRAWN
    assert sum(pane["free"]) == 12
    assert [cell for cell in pane["cells"] if cell >= 0] == list(range(16))


def test_a_gif_has_a_line_for_each_row_and_border(tmp_path: Path) -> None:
    sizes = []
    for name, meta in (("grid", solving().meta), ("text", {})):
        run = solving()
        run.meta = meta
        write_gif([("", run)], tmp_path / f"{name}.gif", size=12)
        with Image.open(tmp_path / f"{name}.gif") as image:
            sizes.append(image.size)
    assert sizes[0][1] - sizes[1][1] == 4 * 18  # five lines for one, of 1.5 times the size of the font
    assert sizes[0][0] / (24 + 4) == sizes[1][0] / (36 + 4)  # no wider than its caption and the margins need
