"""Progress of the use cases: a bar for their callbacks, and runs drawn as they go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dlm.cli.app import INTERRUPTED, err, fail, interrupts, stoppable

if TYPE_CHECKING:
    from dlm.language_model.generation import Stepping


@contextmanager
def showing(label: str) -> Iterator[Callable[[int, int], None]]:
    """A callback (done, total) that moves a bar on the error stream; in a pipe or a file nothing is drawn."""
    columns = TextColumn(label), BarColumn(), TimeRemainingColumn()
    with stoppable(), Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as bar:
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


def run_to_end(run: Stepping, save: Path | None, console: Console | None) -> None:
    """Every step of a run, drawn on this console if there is one, and kept in a file. After Ctrl-C the frames so far are saved."""
    with interrupts() as stopped, shown(run, console) as update:
        while not stopped() and run.step() is not None:
            update()
        ended = stopped()
    if save is not None and len(run.trajectory) > 1:
        run.trajectory.save(save)
        err.print(f"saved {save}; see it again with: dlm show {save}", highlight=False, soft_wrap=True)
    if ended:
        fail("stopped" + (f"; the {len(run.trajectory) - 1} steps so far are in {save}" if save is not None else ""), INTERRUPTED)
