"""A run as an animated GIF.

Every colour is placed in one palette beforehand and characters are stamped as palette indices, so frames need no
quantisation, share their colours exactly and compress well.
"""

from __future__ import annotations

import math
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dlm.files import replacing
from dlm.trajectory import Places, Trajectory
from dlm.viz import layout
from dlm.viz.layout import Pane
from dlm.viz.palette import BORDER, COLD, DARK, DRAFTED, LEVEL_SECONDS, REJECTED, RGB, SHADES, Look, Theme, paint, rgb

if TYPE_CHECKING:
    from PIL import Image

MIN_RUN_SECONDS, MAX_STEP_SECONDS = 4.0, 0.25  # a run of few steps is slowed to last the first, but no step longer than the second
EDGE_SHADES = 6  # between two colours

Cell = tuple[str, int, Look]
"""A character, its width in cells and its look."""


def write_gif(
    panes: Sequence[Pane],
    path: str | Path,
    *,
    row: int = 0,
    fps: int = 20,
    columns: int = 64,
    rows: int = 24,
    hold: float = 1.5,
    max_frames: int = 200,
    size: int = 30,
    theme: Theme = DARK,
) -> None:
    """Write a looping GIF, to a temporary name first.

    One picture for each step, one of the verification of its draft tokens where a run has them, plus the cooling at the end,
    `max_frames` in all: longer runs skip steps. One pane goes step by step, several share the clock. columns, rows: cells of a pane at
    most (it scrolls if the text is longer; a grid is always whole); hold: seconds the end stands still; size: font size in pixels.
    ModuleNotFoundError without the viz extra.
    """
    if find_spec("PIL") is None or find_spec("matplotlib") is None:
        raise ModuleNotFoundError("a GIF needs the viz extra: pip install 'dlm[viz]'")
    import matplotlib

    if not panes or min(fps, columns, rows, size) < 1:
        raise ValueError("a GIF needs a pane, and fps, columns, rows and size of at least 1")
    cooling = math.ceil(COLD * LEVEL_SECONDS * fps)
    shown = max(2, min(max(2 * len(run) - 1 if run.has_drafts else len(run) for _, run in panes), max_frames - cooling))
    delay = max(1 / fps, min(MAX_STEP_SECONDS, MIN_RUN_SECONDS / shown))
    durations = [max(delay, 0.4)] + [delay] * (shown - 1) + [1 / fps] * (cooling - 1) + [1 / fps + hold]
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    stage = _Stage(panes, row, columns, rows, _Stamps(fonts, size, theme), delay)
    images: Iterator[Image.Image] = stage.images(shown, cooling, 1 / fps)
    with replacing(Path(path)) as partial:
        next(images).save(
            partial,
            format="GIF",
            save_all=True,
            append_images=images,
            duration=[round(100 * d) * 10 for d in durations],
            loop=0,
            optimize=True,
            disposal=1,
        )


def _framed(run: Trajectory, row: int, looks: Sequence[Look] | None = None) -> tuple[list[str], list[Look]]:
    """The pieces of the last frame and their looks, with the borders of a grid."""
    return layout.framed(run, row, layout.pieces(run, row), layout.looks(run, row) if looks is None else looks)


class _Stamps:
    """Characters and captions as images of palette indices."""

    def __init__(self, fonts: Path, size: int, theme: Theme) -> None:
        from PIL import ImageFont

        self.theme = theme
        self.regular = ImageFont.truetype(fonts / "DejaVuSansMono.ttf", size)
        self.slanted = ImageFont.truetype(fonts / "DejaVuSansMono-Oblique.ttf", size)
        self.small = ImageFont.truetype(fonts / "DejaVuSansMono.ttf", max(8, round(size * 0.72)))
        self.width, self.height = round(self.regular.getlength("M")), round(size * 1.5)
        ascent, descent = self.regular.getmetrics()
        self.baseline = (self.height - ascent - descent) // 2 + ascent
        self.colors: list[RGB] = []
        self._cells: dict[Cell, Image.Image] = {}
        self.page = self.index(rgb(theme.page))

    def index(self, color: RGB) -> int:
        if color not in self.colors:
            self.colors.append(color)
        return self.colors.index(color)

    def ramp(self, low: RGB, high: RGB) -> list[int]:
        """256 indices from one colour to the other in EDGE_SHADES + 1 shades."""
        shades = []
        for i in range(EDGE_SHADES + 1):
            red, green, blue = (round(a + (b - a) * i / EDGE_SHADES) for a, b in zip(low, high, strict=True))
            shades.append(self.index((red, green, blue)))
        return [shades[round(coverage / 255 * EDGE_SHADES)] for coverage in range(256)]

    def cell(self, cell: Cell) -> Image.Image:
        """One character on its ground; a mask is a filled block, so that no font need have one."""
        if cell not in self._cells:
            self._cells[cell] = self._draw(*cell)
        return self._cells[cell]

    def _draw(self, char: str, cells: int, look: Look) -> Image.Image:
        from PIL import Image, ImageChops, ImageDraw

        ink, ground = paint(look, self.theme)
        page = rgb(self.theme.page)
        box = (self.width * cells, self.height)
        image = Image.new("L", box, self.page)
        if look.colour:  # a square of a drawing, with a thin line around it
            image.paste(self.index(rgb(self.theme.line)), (0, 0, *box))
            image.paste(self.index(ground), (1, 1, box[0] - 1, box[1] - 1))
        elif ground != page:
            fine = 4
            block = Image.new("L", (box[0] * fine, box[1] * fine), 0)
            top, edge = round(0.08 * box[1] * fine), 0.06 * self.width * fine
            corners = (edge, top, block.width - 1 - edge, block.height - 1 - top)
            ImageDraw.Draw(block).rounded_rectangle(corners, radius=0.2 * self.width * fine, fill=255)
            image = block.resize(box, Image.Resampling.BOX).point(self.ramp(page, ground))
        if look.kind != "mask" and not look.colour and (look.blend or not char.isspace()):
            glyph = Image.new("L", box, 0)
            font = self.slanted if look.draft else self.regular
            for one, shade in reversed(look.blend or ((char, SHADES),)):  # the likeliest last, on top
                layer = Image.new("L", box, 0)
                at = (box[0] - font.getlength(one)) // 2, self.baseline
                ImageDraw.Draw(layer).text(at, one, fill=round(255 * shade / SHADES), font=font, anchor="ls")
                glyph = ImageChops.lighter(glyph, layer)
            touched = glyph.point([int(c > 255 / EDGE_SHADES / 2) * 255 for c in range(256)])
            image.paste(glyph.point(self.ramp(ground, ink)), mask=touched)
        if look.kind == "rejected":
            middle, thick = round(0.52 * self.height), max(2, self.height // 15)
            image.paste(self.index(ink), (0, middle, box[0], middle + thick))
        return image

    def caption(self, text: str, width: int, color: str) -> Image.Image:
        from PIL import Image, ImageDraw

        image = Image.new("L", (width, self.height), 0)
        ImageDraw.Draw(image).text((0, self.baseline), text, fill=255, font=self.small, anchor="ls")
        return image.point(self.ramp(rgb(self.theme.page), rgb(color)))

    def palette(self) -> list[int]:
        if len(self.colors) > 256:
            raise ValueError(f"{len(self.colors)} colours do not fit a GIF")
        return [channel for color in self.colors for channel in color]


class _Stage:
    """The panes, grown frame by frame, and the picture they are drawn on."""

    def __init__(self, panes: Sequence[Pane], row: int, columns: int, rows: int, stamps: _Stamps, delay: float) -> None:
        self.panes, self.row, self.stamps, self.delay = list(panes), row, stamps, delay
        self.lines = [layout.wrap(_framed(run, row)[0], columns, words=True) for _, run in panes]
        for lines in self.lines:
            if len(lines) > 1 and not lines[-1]:
                lines.pop()
        self.rows = max(
            len(lines) if "grid" in run.meta else min(rows, len(lines)) for (_, run), lines in zip(panes, self.lines, strict=True)
        )
        captions = [24 if "grid" in run.meta else 36 for _, run in panes]  # room for them: a grid's is short
        widths = [[sum(max(1, g.width) for g in line) for line in lines] for lines in self.lines]
        self.columns = [min(columns, max([caption, *column])) for caption, column in zip(captions, widths, strict=True)]
        self.head = int(any(label for label, _ in panes))
        width, height = stamps.width, stamps.height
        self.margin = 2 * width
        self.lefts = [self.margin + width * (sum(self.columns[:i]) + 4 * i) for i in range(len(panes))]
        self.top = height + round(1.25 * height * self.head)
        self.foot = self.top + height * self.rows + height // 2
        self.box = (self.lefts[-1] + width * self.columns[-1] + self.margin, self.foot + round(2.1 * height))
        self.tops = [0] * len(panes)
        self.drawn: list[dict[tuple[int, int], Cell]] = [{} for _ in panes]

    def images(self, shown: int, cooling: int, tick: float) -> Iterator[Image.Image]:
        """`shown` pictures of the run, then `cooling` of the end, `tick` seconds apart."""
        from PIL import Image

        canvas = Image.new("L", self.box, self.stamps.page)
        for i, (label, _) in enumerate(self.panes):
            heading = self.stamps.caption(label, self.stamps.width * self.columns[i], self.stamps.theme.quiet)
            canvas.paste(heading, (self.lefts[i], self.stamps.height * 3 // 4))
        self._reserve()
        seconds = self.delay * (shown - 1)
        times = layout.clock(self.panes, seconds=seconds)
        grown = [layout.empty(run) for _, run in self.panes]
        frames = [run.frames() for _, run in self.panes]
        for stream in frames:
            next(stream)
        for j in range(shown + cooling):
            now = seconds * min(j, shown - 1) / (shown - 1)
            after = tick * max(0, j - shown + 1)
            for i, run in enumerate(grown):
                while len(run) < bisect_right(times[i], now + 1e-6):
                    run.append(next(frames[i]), seconds=now)
                # times are of the picture here: a pane that ends early cools while the others go on
                over = now - run.seconds[-1] if len(run) == len(times[i]) else 0.0
                k = len(run)
                judged = k < len(times[i]) and 2 * now >= times[i][k - 1] + times[i][k] - 1e-6
                self._pane(canvas, i, run, over + after, self.panes[i][1].rejected(k) if judged else None)
            image = canvas.copy()
            image.putpalette(self.stamps.palette())
            yield image

    def _reserve(self) -> None:
        """Put every colour into the palette before the first picture is written."""
        looks = [
            Look("mask"),
            Look("given"),
            BORDER,
            DRAFTED,
            REJECTED,
            Look("text"),
            Look("text", draft=True),
            *(Look("text", k) for k in range(COLD)),
        ]
        colours = [colour for _, run in self.panes for colour in run.meta.get("grid", {}).get("colours", ()) if colour]
        for look in [*looks, *(Look("text", colour=colour) for colour in dict.fromkeys(colours))]:
            self.stamps.cell(("M", 1, look))
        self.stamps.caption("", 1, self.stamps.theme.quiet)
        self.stamps.index(rgb(self.stamps.theme.accent))
        self.stamps.index(rgb(self.stamps.theme.line))

    def _pane(self, canvas: Image.Image, i: int, run: Trajectory, after: float, rejected: Places | None) -> None:
        """rejected: those of the draft tokens shown, None before their verification."""
        width, height = self.stamps.width, self.stamps.height
        left = self.lefts[i]
        looks = layout.looks(run, self.row, after=after)
        cells = self._cells(i, run, *_framed(run, self.row, looks if rejected is None else layout.judged(self.row, looks, rejected)))
        for (x, y), (_, span, _) in self.drawn[i].items():
            if (x, y) not in cells or cells[x, y][1] != span:
                corner = (left + x * width, self.top + y * height)
                canvas.paste(self.stamps.page, (*corner, corner[0] + span * width, corner[1] + height))
        for (x, y), cell in cells.items():
            if self.drawn[i].get((x, y)) != cell:
                canvas.paste(self.stamps.cell(cell), (left + x * width, self.top + y * height))
        self.drawn[i] = cells
        numbers, whole = layout.figures(run, self.row), self.panes[i][1]
        room = width * self.columns[i]
        thick = max(2, height // 15)
        full = round(room * numbers.share)
        for start, end, color in ((0, full, self.stamps.theme.accent), (full, room, self.stamps.theme.line)):
            canvas.paste(self.stamps.index(rgb(color)), (left + start, self.foot, left + end, self.foot + thick))
        facts = f"step {numbers.steps}/{len(whole) - 1}   {numbers.forwards} passes"
        if numbers.drafted is not None:  # a step is a forward pass
            facts = f"pass {numbers.forwards}/{whole.forwards[-1]}   {numbers.per_pass:.1f} tok/pass   {numbers.acceptance:.0%} accepted"
        facts += f"   {whole.seconds[numbers.steps]:.1f} s" if len(self.panes) > 1 and whole.seconds[-1] else ""
        canvas.paste(self.stamps.caption(facts, room, self.stamps.theme.quiet), (left, self.foot + height // 3))

    def _cells(self, i: int, run: Trajectory, pieces: Sequence[str], looks: Sequence[Look]) -> dict[tuple[int, int], Cell]:
        """The character at each (column, line) of the pane. The end is known, so characters stand at their final places."""
        lines = self.lines[i]
        warm = [y for y, line in enumerate(lines) for g in line if looks[g.position].level < COLD]
        top = self.tops[i] = layout.follow(self.tops[i], warm, self.rows, len(lines))
        chars = [[char for char, _ in layout.glyphs(piece)] for piece in pieces]
        used = [0] * len(pieces)  # glyphs of the position's present piece that are placed
        cells: dict[tuple[int, int], Cell] = {}
        squares = layout.is_coloured(run)
        for y, line in enumerate(lines):
            x, before = 0, (-1, -1)
            for glyph in line:
                position, width = glyph.position, max(glyph.width, glyph.char == "\n")
                n = used[position]
                used[position] += 1
                look = looks[position]
                if squares and look.kind != "border":
                    if n == 0 and top <= y < top + self.rows:
                        cells[x, y - top] = (chars[position][0], 2, look)
                    x += width
                    continue
                char = " " if look.kind == "mask" else chars[position][n] if n < len(chars[position]) else " "
                char = ("" if glyph.char == "\n" else "\u21b5") if char == "\n" else char
                if top <= y < top + self.rows and char and width and x + width <= self.columns[i]:
                    cells[x, y - top] = (char, width, look)
                    before = x, y - top
                elif before in cells and not width and char.strip():  # a combining mark in a token of its own
                    marked, span, own = cells[before]
                    cells[before] = (unicodedata.normalize("NFC", marked + char), span, own)
                x += width
        return cells
