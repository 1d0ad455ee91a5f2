"""Progress bars for the callbacks of the use cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dlm.cli.app import err


@contextmanager
def showing(label: str) -> Iterator[Callable[[int, int], None]]:
    """A callback (done, total) that moves a bar on the error stream; in a pipe or a file nothing is drawn."""
    columns = TextColumn(label), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
