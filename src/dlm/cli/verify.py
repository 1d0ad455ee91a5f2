"""`dlm verify`: whether a checkpoint of another project writes here what its own code writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dlm.cli.app import Device, FamilyOption, app, load


@app.command()
def verify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint: a directory, a hub id or a bundled name.")],
    cases: Annotated[
        Path,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="JSON: `cases` with name, settings, prompt_ids and output_ids of the reference; or safetensors: its logits and losses.",
        ),
    ],
    device: Device = "cpu",
    family: FamilyOption = "",
) -> None:
    """Compare the ids of the reference sampler, or logits and losses, with those that the reference gave. Exit code 1 where some differ."""
    from dlm.cli.progress import showing
    from dlm.workflows.verify import verify as run

    with showing("verifying cases") as progress:
        found = run(load(model, device, family=family), cases, progress=progress)
    for case in found.cases:
        print(case.line)
    print(json.dumps(found.record()))
    if found.differ:
        raise typer.Exit(1)
