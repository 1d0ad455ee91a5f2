"""`dlm show`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from dlm.cli.app import app, are_runs, between, err, is_file_name

if TYPE_CHECKING:
    from dlm.trajectory import Trajectory


@app.command()
def show(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUNS", callback=are_runs, help="Files that `dlm generate --save` wrote; several stand side by side."),
    ],
    html: Annotated[
        Path | None, typer.Option(callback=is_file_name, help="Write one self-contained page with a scrubber and a heat map.")
    ] = None,
    gif: Annotated[Path | None, typer.Option(callback=is_file_name, help="Write an animated GIF (viz extra).")] = None,
    seconds: Annotated[float, typer.Option(callback=between(0), help="How long the replay takes.")] = 6.0,
) -> None:
    """Replay saved runs, or turn them into a page or a GIF."""
    panes = load_runs(runs)
    if html is not None:
        from dlm.viz.html import write_html

        write_html(panes, html)
        err.print(f"wrote {html}", highlight=False)
    if gif is not None:
        from dlm.viz.gif import write_gif

        many = len(panes) > 1  # side by side they are narrower and smaller
        write_gif(panes, gif, columns=max(30, 108 // len(panes)) if many else 64, size=20 if many else 30)
        err.print(f"wrote {gif}", highlight=False)
    if html is None and gif is None:
        from dlm.viz.terminal import replay

        console = Console()
        if console.is_terminal:
            replay(panes, console, seconds=seconds)
        else:
            for label, run in panes:
                sys.stdout.write((f"--- {label}\n" if len(panes) > 1 else "") + run.text() + "\n")


def load_runs(paths: list[Path]) -> list[tuple[str, Trajectory]]:
    """(label, run) of every file. InputError where one is missing or damaged."""
    from dlm.evaluation.settling import label_of
    from dlm.workflows.inputs import saved_run

    return [(label_of(run), run) for run in map(saved_run, paths)]
