"""Progress of the use cases: a bar for their callbacks, and runs drawn as they go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dlm.cli.app import err

if TYPE_CHECKING:
    from dlm.language_model.generation import Stepping


@contextmanager
def showing(label: str) -> Iterator[Callable[[int, int], None]]:
    """A callback (done, total) that moves a bar on the error stream; in a pipe or a file nothing is drawn."""
    columns = TextColumn(label), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def shown(run: Stepping, console: Console | None) -> Iterator[Callable[[], None]]:
    """A callback that draws a run on this console as it is now, or nothing without one."""
    if console is None:
        yield lambda: None
        return
    from dlm.viz.terminal import LiveView

    with LiveView(run.trajectory, console) as view:
        yield view.update
        view.update(force=True)
