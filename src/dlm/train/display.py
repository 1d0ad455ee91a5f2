"""A run as a terminal shows it: a bar with the latest figures, or a line every few seconds in a pipe or a file."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from dlm.train.loop import Progress

SECONDS_BETWEEN_LINES = 5.0  # in a pipe or a file


class Display:
    """A callback for `dlm.fit` and `dlm.convert`. unit: of the training loss, as in `nats per token`."""

    def __init__(self, console: Console | None = None, unit: str = "nats per token") -> None:
        self.console, self.unit = console or Console(stderr=True), unit
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        times = (TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
        self._bar = Bar(*columns, *times, console=self.console, disable=not self.console.is_terminal)
        self._tasks: dict[str, TaskID] = {}
        self._quiet_until = 0.0

    def __enter__(self) -> Display:
        return self  # the bar begins with the first news: of several processes, one alone has any

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def __call__(self, progress: Progress) -> None:
        if progress.text:
            self.console.print(progress.text, markup=False, highlight=False, soft_wrap=True)
        elif progress.logged and not self.console.is_terminal:
            self._line(progress)
        if progress.label not in self._tasks:
            self._bar.start()
            for shown in self._tasks.values():
                self._bar.update(shown, visible=False)
            self._tasks[progress.label] = self._bar.add_task(progress.label, note="")
        self._bar.update(self._tasks[progress.label], total=progress.total, completed=progress.done, note=self._note(progress))

    def _line(self, progress: Progress) -> None:
        if time.perf_counter() < self._quiet_until and progress.done < progress.total:
            return
        figures = f"{progress.nats:.4f} {self.unit}, {progress.tokens_per_second:,.0f} tokens/s, eta {progress.eta}"
        self.console.print(f"step {progress.done}/{progress.total}: {figures}", markup=False, highlight=False, soft_wrap=True)
        self._quiet_until = time.perf_counter() + SECONDS_BETWEEN_LINES

    def _note(self, progress: Progress) -> str:
        """A dash for a figure before the first line of the log."""
        if not progress.measured:
            return ""
        nats = "-" if progress.nats is None else f"{progress.nats:.3f}"
        rate = "-" if progress.tokens_per_second is None else f"{progress.tokens_per_second:,.0f}"
        return f"{nats} nats, {rate} tokens/s"
