"""`dlm show`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from dlm.cli.app import Json, app, are_runs, between, err, is_file_name, is_plot
from dlm.cli.tables import console, table
from dlm.errors import InputError

if TYPE_CHECKING:
    from dlm.trajectory import Trajectory

SHOWN_PLACES = 12  # of a learned order, at either end


def are_shown(value: list[Path]) -> list[Path]:
    """A check as `between`, for saved runs, or the directory of one model."""
    return value if len(value) == 1 and value[0].is_dir() else are_runs(value)


@app.command()
def show(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUNS",
            callback=are_shown,
            help="Files that `dlm generate --save` wrote, several side by side; or one model that learned an order.",
        ),
    ],
    html: Annotated[
        Path | None, typer.Option(callback=is_file_name, help="Write one self-contained page with a scrubber and a heat map.")
    ] = None,
    gif: Annotated[Path | None, typer.Option(callback=is_file_name, help="Write an animated GIF (viz extra).")] = None,
    seconds: Annotated[float, typer.Option(callback=between(0), help="How long the replay takes.")] = 6.0,
    plot: Annotated[
        Path | None, typer.Option(callback=is_plot, help="Of a model: draw its learned weights as .png, .svg or .pdf (viz extra).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Replay saved runs, or turn them into a page or a GIF; or show which positions or tokens a model writes first."""
    if len(runs) == 1 and runs[0].is_dir():
        if html is not None or gif is not None:
            raise InputError(f"{runs[0]} is a model, not a saved run: --html and --gif replay runs of dlm generate --save")
        return show_order(runs[0], plot, as_json=as_json)
    if plot is not None or as_json:
        raise InputError("--plot and --json show the learned order of one model: give its directory")
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


def show_order(model: Path, plot: Path | None, *, as_json: bool) -> None:
    """The learned weights of a model as a table, a picture or JSON."""
    from dlm.evaluation.card import dumps
    from dlm.workflows.order import learned_order

    found = learned_order(str(model))
    made = table(f"{found.what}, first to last", "weight", "half masked at t", numbers=True)
    places, many = found.first, len(found.places) > 2 * SHOWN_PLACES
    for one in (*places[:SHOWN_PLACES], *places[-SHOWN_PLACES:]) if many else places:
        made.add_row(one.label if found.what == "position" else escape(repr(one.label)), f"{one.weight:.3f}", f"{one.half:.3f}")
    console(as_json).print(made)
    if plot is not None:
        from dlm.viz.plots import weights_plot

        shown = found.places if found.what == "position" else found.first
        weights_plot({one.label if found.what == "position" else repr(one.label)[1:-1]: one.weight for one in shown}, found.what, plot)
        err.print(f"wrote {plot}", highlight=False)
    if as_json:
        print(dumps(dict(found.record())))


def load_runs(paths: list[Path]) -> list[tuple[str, Trajectory]]:
    """(label, run) of every file. InputError where one is missing or damaged."""
    from dlm.evaluation.settling import label_of
    from dlm.workflows.inputs import saved_run

    return [(label_of(run), run) for run in map(saved_run, paths)]
