"""`dlm calibrate`: measure the samplers of a model, for `--sampler auto`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dlm.cli.app import Device, Json, Seed, app, between, check_names, err, load
from dlm.cli.tables import console, table

if TYPE_CHECKING:
    from rich.table import Table

    from dlm.calibration.table import Calibration


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Bundled name, directory or hub id of a masked model.")],
    judge: Annotated[str, typer.Option(help="An autoregressive model; one of another vocabulary reads the text.")] = "shakespeare-ar",
    samples: Annotated[int, typer.Option("--samples", "-n", callback=between(2), help="Texts for each setting.")] = 8,
    length: Annotated[
        int,
        typer.Option(callback=between(0), show_default="a window, of other projects' models at most 128", help="Tokens of a text."),
    ] = 0,
    temperature: Annotated[float, typer.Option(callback=between(0), help="Of every setting.")] = 1.0,
    retime: Annotated[bool, typer.Option(help="Only measure the seconds of the table that is there again, in turns.")] = False,
    quick: Annotated[bool, typer.Option(help="Three settings only.")] = False,
    out: Annotated[Path | None, typer.Option(help="Directory of the table; default: beside the checkpoint.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
    device: Device = "cpu",
) -> None:
    """Measure every sampler of a model, for --sampler auto.

    Forward passes, seconds, bits under a judge and diversity, kept beside the checkpoint. After Ctrl-C the same command goes on.
    """
    check_names([model, judge])
    from dlm.calibration.table import FILE
    from dlm.cli.progress import showing
    from dlm.evaluation.card import dumps
    from dlm.formats.find import find
    from dlm.workflows.calibrate import calibrate as measure

    lm = load(model, device)
    place = out or find(model)
    with showing(f"measuring {lm.name}") as progress:
        found = measure(
            lm,
            judge,
            samples=samples,
            length=length,
            temperature=temperature,
            quick=quick,
            retime=retime,
            out=place,
            seed=seed,
            device=device,
            progress=progress,
        )
    console(as_json).print(_table(found))
    hint = f"dlm generate --model {model} --sampler auto --budget calls:32"
    err.print(f"wrote {place / FILE}; try: {hint}", highlight=False, soft_wrap=True)
    if as_json:
        print(dumps(found.record()))


def _table(found: Calibration) -> Table:
    front = found.front("calls") + found.front("seconds")
    caption = "* on the front of calls (forward passes) or seconds, among settings as varied as the exact ones (=)"
    made = table("setting", "calls", "seconds", "bits/token", "entropy", "distinct-4", "", caption=caption, numbers=True)
    for row in found.rows:
        words = [str(row.options["sampler"])] + [f"{key}={row.options[key]}" for key in row.options if key != "sampler"]
        figures = f"{row.calls:.0f}", f"{row.seconds:.2f}", f"{row.bits:.2f} +- {row.bits_stderr:.2f}", f"{row.entropy:.2f}"
        made.add_row(" ".join(words), *figures, f"{row.distinct_4:.2f}", "=" * row.exact + "*" * (row in front))
    return made
