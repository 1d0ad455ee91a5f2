"""One row of a run as glyphs on lines: the text of each position, its look, and where lines break."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from rich.cells import get_character_cell_size

from dlm.trajectory import Canvas, Places, Trajectory
from dlm.viz.palette import BORDER, COLD, DRAFTED, GIVEN, MASK, REJECTED, SHADES, Look, level

TEXT = [[Look("text", heat, draft) for draft in (False, True)] for heat in range(COLD + 1)]

Pane = tuple[str, Trajectory]
"""A label and a run."""


class Glyph(NamedTuple):
    """A visible character with its combining marks, the position whose token it belongs to, and its width in cells."""

    position: int
    char: str
    width: int


class Figures(NamedTuple):
    """The progress of a run in one row.

    settled and free count positions that the sampler writes. under_way counts those of the window that a revising sampler is at, of
    which it has taken the share `done` of its time. model: of a schedule, the one that took the last step.
    accepted of the `drafted` tokens were accepted; drafted is None for a sampler without drafts.
    """

    settled: int
    free: int
    steps: int
    forwards: int
    seconds: float
    under_way: int = 0
    done: float = 0.0
    model: str = ""
    accepted: int = 0
    drafted: int | None = None

    @property
    def share(self) -> float:
        return (self.settled + self.done * self.under_way) / self.free if self.free else 1.0

    @property
    def per_second(self) -> float:
        return self.settled / self.seconds if self.seconds else 0.0

    @property
    def per_pass(self) -> float:
        return self.settled / self.forwards if self.forwards else 0.0

    @property
    def acceptance(self) -> float:
        """The share of the draft tokens that were accepted; 0 where there was none."""
        return self.accepted / self.drafted if self.drafted else 0.0


def figures(run: Trajectory, row: int) -> Figures:
    """Counted at the last frame."""
    free_T = run.free_BT[row]
    settled = int(((run.settled_BT[row] >= 0) & free_T).sum())
    free = int(free_T.sum())
    under_way = min(free - settled, run.meta.get("window", free)) if run.meta.get("revises") else 0
    model = run.models[-1] if run.meta.get("schedule") else ""
    verified = (int(run.accepted_B[row]), int(run.drafted_B[row])) if run.has_drafts else (0, None)
    return Figures(settled, free, len(run) - 1, run.forwards[-1], run.seconds[-1], under_way, 1 - run.t_SB[-1][row], model, *verified)


def pieces(run: Trajectory, row: int, mask: str = "█") -> list[str]:
    """The text of each position of a row at the last frame; padding is left out. A line breaks only where that is settled: text that
    is still being revised would jump about. A draft token stands in place of its mask."""
    valid_T = run.valid_BT[row]
    token_T, drafted = run.current_BT[row].clone(), at_row(run.drafts(len(run) - 1), row)
    token_T[list(drafted)] = torch.tensor(list(drafted.values()), dtype=torch.long)
    shown = zip(run.shown(row, token_T, mask), run.settled_BT[row][valid_T].tolist(), strict=True)
    return [piece if settled >= 0 else piece.replace("\n", "↵") for piece, settled in shown]


def looks(run: Trajectory, row: int, *, pace: float = 1.0, after: float = 0.0) -> list[Look]:
    """The look of each position of a row at the last frame; padding is left out.

    pace: seconds of the viewer to one of the run. after: seconds since the last frame, when the run is over.
    """
    valid_T = run.valid_BT[row]
    last, now = len(run) - 1, run.seconds[-1]
    heat = {}
    for k in range(last, 0, -1):
        heat[k] = level(math.inf if after else last - k, (now - run.seconds[k]) * pace + after)
        if heat[k] == COLD:
            break
    result, drafted, blends = [], at_row(run.drafts(last), row), run.likely(last, row)
    for position, token, changed, settled, free in zip(
        range(int(valid_T.sum())),  # padding lies on the right
        run.current_BT[row][valid_T].tolist(),
        run.changed_BT[row][valid_T].tolist(),
        run.settled_BT[row][valid_T].tolist(),
        run.free_BT[row][valid_T].tolist(),
        strict=True,
    ):
        if position in drafted:
            result.append(DRAFTED)
        elif position in blends:
            result.append(Look("text", draft=True, blend=_blend(run, blends[position])))
        elif token == run.mask_id:
            result.append(MASK)
        elif not free:
            result.append(GIVEN)
        elif changed:
            result.append(TEXT[heat.get(changed, COLD)][settled < 0])
        else:
            result.append(TEXT[COLD][settled < 0])
    return coloured(run, row, result)


HOT = 3
"""Levels at which a cell that has just changed glows before it takes its own colour."""


def coloured(run: Trajectory, row: int, looks: Sequence[Look]) -> list[Look]:
    """The same looks, of a grid of colours with that of each cell; an empty one stands for none."""
    if not is_coloured(run):
        return list(looks)
    colours = [*run.meta["grid"]["colours"], ""]  # of tokens, then of the mask
    tokens = run.current_BT[row][run.valid_BT[row]].tolist()
    cells = zip(looks, tokens, strict=True)
    return [
        look._replace(colour=colours[token], draft=False) if look.kind in ("text", "given") and look.level >= HOT else look
        for look, token in cells
    ]


def is_coloured(run: Trajectory) -> bool:
    """Whether this is a grid of colours, whose cells are squares side by side: two columns wide, with no space between them."""
    return "colours" in run.meta.get("grid", {})


def _blend(run: Trajectory, likely: Sequence[tuple[int, float]]) -> tuple[tuple[str, int], ...]:
    """The first visible character of each token that weighs something."""
    found = [(run.piece(token).replace("\n", "↵")[:1] or " ", round(weight * SHADES)) for token, weight in likely]
    return (found[0], *(one for one in found[1:] if one[1]))


def with_rejected(run: Trajectory, row: int, shown: Sequence[str], looks: Sequence[Look]) -> tuple[list[str], list[Look]]:
    """The same pieces and looks with the rejected draft tokens of the last frame, struck out in front of the token that replaced them,
    in a text; the cells of a grid stay where they are."""
    rejected = at_row(run.rejected(len(run) - 1), row)
    if not rejected or "grid" in run.meta:
        return list(shown), list(looks)
    at = min(rejected)
    token_T = run.current_BT[row].clone()
    token_T[list(rejected)] = torch.tensor(list(rejected.values()), dtype=torch.long)
    drawn = run.shown(row, token_T)
    struck = [drawn[position].replace("\n", "↵") for position in rejected]
    return [*shown[:at], *struck, *shown[at:]], [*looks[:at], *[REJECTED] * len(struck), *looks[at:]]


def slots(run: Trajectory, row: int, *, ascii_only: bool = False) -> list[int | str]:
    """The positions of a row in their order; of a grid, by its meta, also the space and the borders between them, as text."""
    positions = list(range(int(run.valid_BT[row].sum())))  # padding lies on the right
    if "grid" not in run.meta:
        return list(positions)
    columns, (height, width) = run.meta["grid"]["axes"][-1], run.meta["grid"]["tile"][-2:]
    down, across, cross = "|-+" if ascii_only else "│─┼"
    rule = f"{across}{cross}{across}".join([across * (2 * width - 1 + is_coloured(run))] * (columns // width)) + "\n"
    made: list[int | str] = []
    for position in positions:
        row_of, column = divmod(position, columns)
        if column % width == 0 < column:
            made.append(f" {down} ")
        elif column:
            made += [] if is_coloured(run) else [" "]
        elif position:
            made.append("\n" if row_of % height else f"\n{rule}")
        made.append(position)
    return made


def framed(
    run: Trajectory, row: int, shown: Sequence[str], looks: Sequence[Look], *, ascii_only: bool = False
) -> tuple[list[str], list[Look]]:
    """The same pieces and looks, of a grid with its borders among them."""
    if "grid" not in run.meta:
        return list(shown), list(looks)
    if is_coloured(run):
        shown = [piece * 2 if look.kind == "mask" else f"{piece} " for piece, look in zip(shown, looks, strict=True)]
    found = slots(run, row, ascii_only=ascii_only)
    pieces = [slot if isinstance(slot, str) else shown[slot] for slot in found]
    return pieces, [BORDER if isinstance(slot, str) else looks[slot] for slot in found]


def judged(row: int, looks: Sequence[Look], rejected: Places) -> list[Look]:
    """The same looks after the next forward pass has verified the draft tokens: rejected or just accepted."""
    wrong = at_row(rejected, row)
    return [look if look != DRAFTED else REJECTED if i in wrong else TEXT[0][False] for i, look in enumerate(looks)]


def at_row(places: Places, row: int) -> dict[int, int]:
    """Tokens by position."""
    rows, positions, tokens = places
    mine = rows == row
    return dict(zip(positions[mine].tolist(), tokens[mine].tolist(), strict=True))


def visible(char: str) -> str:
    """The character, or a picture of it when a terminal would act on it instead of showing it."""
    code = ord(char)
    if code < 32 and char != "\n":
        return chr(0x2400 + code)
    return "\ufffd" if code > 126 and unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") else char


@cache
def glyphs(piece: str) -> tuple[tuple[str, int], ...]:
    """(character, cells) of the visible part of one piece; a line break takes no cell, a combining mark that of the character before it."""
    shown: list[tuple[str, int]] = []
    for char in map(visible, piece.replace("\t", "    ")):
        cells = 0 if char == "\n" else get_character_cell_size(char)
        if not cells and char != "\n" and shown and shown[-1][0] != "\n":
            shown[-1] = unicodedata.normalize("NFC", shown[-1][0] + char), shown[-1][1]
        else:
            shown.append((char, cells))
    return tuple(shown)


def wrap(shown: Sequence[str], columns: int, *, words: bool = False) -> list[list[Glyph]]:
    """Lines of at most `columns` cells. A line break ends its line and stays its last glyph.

    words: break after a space where one is near, which is steady only when the text no longer changes; a space may then
    hang over the end of its line.
    """
    lines: list[list[Glyph]] = [[]]
    used, cut = 0, 0  # cells of the line; glyphs of the line up to the last space
    for position, piece in enumerate(shown):
        for char, cells in glyphs(piece):
            while used + cells > columns and lines[-1] and not (words and char == " "):
                rest = lines[-1][cut:] if words and cut else []
                lines[-1] = lines[-1][: len(lines[-1]) - len(rest)]
                lines.append(rest)
                used, cut = sum(g.width for g in rest), 0
            lines[-1].append(Glyph(position, char, cells))
            used += cells
            if char == " ":
                cut = len(lines[-1])
            elif char == "\n":
                lines.append([])
                used, cut = 0, 0
    return lines


def follow(top: int, warm: Sequence[int], height: int, total: int) -> int:
    """First line to show of `total` when `height` fit: stays at `top` unless the middle of the warm lines is out of view."""
    if warm:
        middle = sorted(warm)[len(warm) // 2]
        if not top + height // 8 <= middle < top + height - height // 8:
            top = middle - height // 2
    return max(0, min(top, total - height))


def empty(run: Trajectory) -> Trajectory:
    """The same run at frame 0, to be grown again."""
    canvas = Canvas(run.start_BT, run.free_BT, run.valid_BT)
    return Trajectory(run.start_BT, canvas, pieces=run.spelling, mask_id=run.mask_id, meta=run.meta)


def clock(panes: Sequence[Pane], *, seconds: float) -> list[list[float]]:
    """When each frame of each pane is shown, the longest run lasting `seconds`.

    One run goes step by step; several go as they went in time, or step by step if none has times.
    """
    times = [list(run.seconds) for _, run in panes]
    longest = max(t[-1] for t in times)
    if len(panes) == 1 or not longest:
        times = [[float(k) for k in range(len(t))] for t in times]
        longest = max(t[-1] for t in times)
    scale = seconds / longest if longest else 0.0
    return [[t * scale for t in column] for column in times]
