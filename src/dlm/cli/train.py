"""`dlm train`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from dlm.cli.app import AllThreads, Json, app, err, is_text, set_threads, stoppable
from dlm.errors import InputError
from dlm.train import data_kinds

NOISES = "masked | uniform | semantic[:lead] | hybrid[:share] | gidd[:share] | ordered | genmd4 | gaussian | classes[:lead]"


@app.command()
def train(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="A recipe's name (dlm list), or none with --data.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            callback=is_text, help=f"shakespeare (bundled), a text file, a folder of .txt files, hf:DATASET, {data_kinds.SOURCES}."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; default: runs/RECIPE.")] = None,
    noise: Annotated[str | None, typer.Option(help=f"{NOISES}; same as --set noise=.")] = None,
    noise_schedule: Annotated[str | None, typer.Option(help="linear | cosine | polynomial:2 ...; same as --set noise_schedule=.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, any number of times; a key that is unknown lists all.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last save in --out.")] = False,
    threads: AllThreads = 0,
    as_json: Json = False,
) -> None:
    """Train a recipe, or the default model on your own text.

    Ctrl-C saves and stops; --resume goes on.
    """
    from dataclasses import replace

    from dlm.train import recipes

    if recipe is None and data is None:
        raise InputError(f"give a recipe ({', '.join(recipes.RECIPES)}) or --data FILE")
    found = recipes.find(recipe) if recipe else recipes.of_data(str(data))  # an unknown one is told before the rest is imported
    from dlm.grids import kinds
    from dlm.train.config import TrainConfig
    from dlm.train.display import Display
    from dlm.workflows.fit import fit, sample

    set_threads(threads, [])
    config = found or TrainConfig()
    if data is not None:
        config = replace(config, data=data)
    words = {"noise": noise, "noise_schedule": noise_schedule}
    config = config.with_settings([f"{key}={word}" for key, word in words.items() if word is not None] + (settings or []))
    out = out or Path("runs") / (recipe or Path(data or "").stem.replace(":", "-") or "model")
    with stoppable(), Display(err) as display:
        result = fit(config, out, resume=resume, preview=sample, progress=display)
    if int(os.environ.get("RANK", "0")) == 0:
        arc = config.data.partition(":")[0] in data_kinds.KINDS["arc"].words
        verb = f"solve {config.data}" if arc else "solve PUZZLE" if kinds.find(config.data) is not None else "generate"
        err.print(f"done; try: dlm {verb} --model {out}{'' if arc else ' --watch'}", highlight=False)
        if as_json:
            print(json.dumps(result.record()))
