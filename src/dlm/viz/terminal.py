"""Text settling in the terminal, live or replayed; one run, or a few side by side."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from types import TracebackType

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.segment import Segment, Segments
from rich.style import Style

from dlm.trajectory import Frame, Trajectory
from dlm.viz import layout
from dlm.viz.layout import Pane
from dlm.viz.palette import ACCENT, COLD, QUIET, terminal

GAP_CELLS, MIN_PANE_CELLS = 3, 24  # between panes; a pane is not squeezed further, the last panes are left out instead
TWO_LINES_BELOW_CELLS = 64  # where the figures take two lines
MIN_SECONDS_BETWEEN_DRAWINGS = 1 / 30


class Panes:
    """A renderable: the last frame of each run, side by side, no higher or wider than the console."""

    def __init__(self, panes: Sequence[Pane], *, row: int = 0, total_steps: int | None = None, pace: float = 1.0) -> None:
        self.panes = [("".join(map(layout.visible, label.replace("\n", " "))), run) for label, run in panes]
        self.row, self.total_steps, self.pace = row, total_steps, pace
        self._tops = [0] * len(self.panes)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns, ascii_only = options.max_width, options.ascii_only
        count = max(1, min(len(self.panes), (columns + GAP_CELLS) // (MIN_PANE_CELLS + GAP_CELLS)))
        width = (columns - GAP_CELLS * (count - 1)) // count
        color = not console.no_color and console.color_system is not None
        left = len(self.panes) - count
        more = f", {left} more below at the end" if left else ""
        blocks = [self._block(i, width, console.size.height - 1, color, ascii_only, more * (i == count - 1)) for i in range(count)]
        height = max(len(block) for block in blocks)
        for y in range(height):
            for i, block in enumerate(blocks):
                line = block[y] if y < len(block) else []
                if i < count - 1:
                    line = [*Segment.adjust_line_length(line, width), Segment(" " * GAP_CELLS)]
                yield from line
            if y < height - 1:
                yield Segment.line()

    def _block(self, i: int, width: int, height: int, color: bool, ascii_only: bool, more: str = "") -> list[list[Segment]]:
        """more: beside the label, of the panes that are left out."""
        label, run = self.panes[i]
        head = [_clip([Segment(label, Style(bold=True)), Segment(more, QUIET)], width)] if len(self.panes) > 1 else []
        numbers = layout.figures(run, self.row)
        shown = layout.pieces(run, self.row, _mask(ascii_only))
        looks = layout.looks(run, self.row, pace=self.pace, after=1.0 if numbers.settled == numbers.free else 0.0)
        shown, looks = layout.with_rejected(run, self.row, shown, looks)
        shown, looks = layout.framed(run, self.row, shown, looks, ascii_only=ascii_only)
        lines = layout.wrap(shown, width)
        room = max(1, height - len(head) - (2 if width < TWO_LINES_BELOW_CELLS else 1))
        warm = [y for y, line in enumerate(lines) for g in line if looks[g.position].level < COLD]
        top = self._tops[i] = layout.follow(self._tops[i], warm, room, len(lines))
        where = f"[{top + 1}-{top + room}/{len(lines)}]" if len(lines) > room else ""
        foot = _progress(numbers, width, self.total_steps, ascii_only, where)
        body = []
        for line in lines[top : top + room]:
            styled = groupby((g for g in line if g.char != "\n"), key=lambda g: looks[g.position])
            body.append([Segment("".join(g.char for g in group), terminal(look, color)) for look, group in styled])
        return [*head, *body, *foot]


class LiveView:
    """Shows a run while it grows: call `update` after each `append`.

    On exit the text stays in the scrollback as it is, with one line of figures below. Where the console is no terminal
    nothing is drawn. Several runs, as (label, trajectory) pairs, stand side by side.
    """

    def __init__(
        self,
        trajectory: Trajectory | Sequence[Pane],
        console: Console,
        *,
        row: int = 0,
        label: str = "",
        total_steps: int | None = None,
        pace: float = 1.0,
    ) -> None:
        panes = [(label, trajectory)] if isinstance(trajectory, Trajectory) else list(trajectory)
        self.view = Panes(panes, row=row, total_steps=total_steps, pace=pace)
        self.console = console
        self._live = Live(self.view, console=console, auto_refresh=False, transient=True, vertical_overflow="crop")
        self._next = 0.0

    def __enter__(self) -> LiveView:
        if self.console.is_terminal:
            self._live.start(refresh=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self.console.is_terminal:
            return
        self._live.stop()
        for i, (label, run) in enumerate(self.view.panes):
            self._leave(label, run, blank=i > 0, stopped=kind is not None)

    def update(self, force: bool = False) -> None:
        """Draw, unless the last drawing was a moment ago. The next drawing shows the frames that were skipped."""
        now = time.perf_counter()
        if not self.console.is_terminal or (now < self._next and not force):
            return
        self._live.refresh()
        done = time.perf_counter()
        self._next = done + max(MIN_SECONDS_BETWEEN_DRAWINGS, 3 * (done - now))  # a long text leaves most of the time to the model

    def _leave(self, label: str, run: Trajectory, *, blank: bool, stopped: bool) -> None:
        color = not self.console.no_color and self.console.color_system is not None
        numbers = layout.figures(run, self.view.row)
        shown = layout.pieces(run, self.view.row, _mask(self.console.options.ascii_only))
        looks = layout.looks(run, self.view.row, after=1.0)
        shown, looks = layout.framed(run, self.view.row, shown, looks, ascii_only=self.console.options.ascii_only)
        segments = [Segment("\n" * blank), Segment(f"{label}\n", Style(bold=True))] if len(self.view.panes) > 1 else []
        for look, group in groupby(range(len(shown)), key=lambda position: looks[position]):
            text = "".join(c if c == "\t" else layout.visible(c) for position in group for c in shown[position])
            segments.append(Segment(text, terminal(look, color)))
        if not "".join(shown).endswith("\n"):
            segments.append(Segment("\n"))
        name = f"{label}: " if label and len(self.view.panes) == 1 else ""
        facts = f"{name}{'stopped after ' if stopped else ''}{numbers.steps} steps, {numbers.forwards} passes"
        facts += f", {numbers.settled} tokens in {numbers.seconds:.2f} s"
        rates = [f", {numbers.per_second:.0f} tok/s", f", {numbers.per_pass:.1f} tok/pass"]
        if numbers.drafted is not None:
            rates = [rates[1], f", {numbers.acceptance:.0%} of {numbers.drafted} draft tokens accepted", rates[0]]
        for fact in rates:
            facts += fact if len(facts + fact) <= self.console.width else ""
        segments.append(Segment(f"{facts}\n", QUIET))
        # soft_wrap leaves the wrapping to the terminal, so that a long line is copied as one line
        self.console.print(Segments(segments), soft_wrap=True)


def replay(panes: Sequence[Pane], console: Console, *, row: int = 0, seconds: float | None = 6.0) -> None:
    """Show saved runs again; the longest takes `seconds`, or as long as it took when that is None."""
    if not console.is_terminal:
        return
    longest = max(run.seconds[-1] for _, run in panes)
    times = layout.clock(panes, seconds=seconds) if seconds is not None else [run.seconds for _, run in panes]
    pace = (seconds / longest if longest else 1.0) if seconds is not None else 1.0
    grown = [(label, layout.empty(run)) for label, run in panes]
    total = len(panes[0][1]) - 1 if len(panes) == 1 else None
    queue = heapq.merge(*(_due(i, run, times[i]) for i, (_, run) in enumerate(panes)), key=lambda item: item[0])
    with LiveView(grown, console, row=row, total_steps=total, pace=pace) as view:
        begin = time.perf_counter()
        for due, i, frame, at in queue:
            wait = begin + due - time.perf_counter()
            if wait > 0:
                view.update(force=wait > MIN_SECONDS_BETWEEN_DRAWINGS)
                time.sleep(max(0.0, begin + due - time.perf_counter()))
            grown[i][1].append(frame, seconds=at)
        view.update(force=True)


def _due(i: int, run: Trajectory, times: Sequence[float]) -> Iterator[tuple[float, int, Frame, float]]:
    for k, frame in enumerate(run.frames()):
        if k:
            yield times[k], i, frame, run.seconds[k]


def _mask(ascii_only: bool) -> str:
    return "#" if ascii_only else "░"


def _progress(numbers: layout.Figures, width: int, total: int | None, ascii_only: bool, where: str) -> list[list[Segment]]:
    """One line, or two where it is narrow; facts that do not fit are left out."""
    step = f"step {numbers.steps}" + (f"/{total}" if total else "")
    size = 16 if width >= 100 else 8
    full = int(numbers.share * size)
    solid, faint = ("=", "-") if ascii_only else ("━", "─")
    word = "" if where else " done" if numbers.under_way else " settled"  # a tall text needs the room
    bar = [Segment(solid * full, ACCENT), Segment(faint * (size - full), QUIET), Segment(f" {numbers.share:4.0%}{word}", QUIET)]
    lines = [[Segment(f"{step}  ", QUIET), *bar]]
    if width < TWO_LINES_BELOW_CELLS:
        lines.append([])
    rates = (f"{numbers.per_second:.0f} tok/s", f"{numbers.per_pass:.1f} tok/pass") if numbers.settled or not numbers.under_way else ()
    turn = (f"model {numbers.model}",) if numbers.model else ()
    facts = (*turn, f"{numbers.forwards} passes", *rates)  # text that is still revised has no rate yet
    if numbers.drafted is not None:
        facts = (*turn, *rates[1:], f"{numbers.forwards} passes", f"{numbers.acceptance:.0%} accepted", where, *rates[:1])
        where = ""
    for fact in (*facts, where):
        gap = "  " if lines[-1] else ""
        if fact and Segment.get_line_length(lines[-1]) + len(gap + fact) <= width:
            lines[-1].append(Segment(gap + fact, QUIET))
    return [_clip(line, width) for line in lines]


def _clip(line: list[Segment], width: int) -> list[Segment]:
    return Segment.adjust_line_length(line, width, pad=False)
