"""`dlm settle`: how fast runs settle, in one table and one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dlm.cli.app import Device, Json, app, are_runs, check_names, err, is_plot
from dlm.cli.tables import console, table

if TYPE_CHECKING:
    from rich.table import Table

    from dlm.evaluation.settling import Settling


@app.command()
def settle(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUNS", callback=are_runs, help="Files that `dlm generate --save` wrote; those of one model and sampler are pooled."
        ),
    ],
    judge: Annotated[
        str | None, typer.Option(help="An autoregressive model of the same vocabulary, for bits per token on the way.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(callback=is_plot, help="Write the curves as .png, .svg or .pdf (viz extra).")] = None,
    as_json: Json = False,
    device: Device = "cpu",
) -> None:
    """Measure how the text of saved runs settles.

    When each token last changed, edits per token, distance to the final text, bits on the way.
    """
    check_names([judge] if judge else [])
    from dlm.cli.progress import showing
    from dlm.evaluation.card import dumps
    from dlm.workflows.settle import settle as measure

    with showing("measuring runs") as progress:
        found = measure(runs, judge, device=device, progress=progress)
    console(as_json).print(_table(found.runs))
    if plot is not None:
        from dlm.viz.plots import settling_plot

        curves = ({name: (one.mean_S.tolist(), one.band_S.tolist()) for name, one in run.curves().items()} for run in found.runs)
        settling_plot([{"label": run.label} | lines for run, lines in zip(found.runs, curves, strict=True)], plot)
        err.print(f"wrote {plot}", highlight=False)
    if as_json:
        print(dumps(found.record()))


def _table(found: Sequence[Settling]) -> Table:
    caption = (
        "edits: changes per token; half, 90 %, last: the step by which so much has settled; first, middle: share that this step changed"
    )
    heads = ("run", "edits", "half", "90 %", "last", "first", "middle", *(["bits/token"] if found[0].bits else []))
    made = table(*heads, caption=caption, numbers=True)
    for one in found:
        changed = one.changed.mean_S
        cells = [f"{one.label}: {one.texts} texts, {one.steps} steps", f"{one.edits:.2f}", str(one.step_of(0.5)), str(one.step_of(0.9))]
        cells += [f"{one.last_step:.0f}", f"{changed[1]:.1%}", f"{changed[(one.steps + 1) // 2]:.1%}"]
        if one.bits is not None:
            error = f" +- {one.bits.band_S[-1]:.2f}" if one.texts > 1 else ""
            cells.append(f"{one.bits.mean_S[-1]:.2f}{error}")
        made.add_row(*cells)
    return made
