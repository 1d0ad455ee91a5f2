"""`dlm eval`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dlm.cli.app import Device, Json, Seed, app, load
from dlm.cli.tables import console, table
from dlm.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from dlm.workflows.evaluate import Evaluation


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Bundled name, directory or hub id.")],
    data: Annotated[str, typer.Option(help="Bundled data set (shakespeare), text file, folder of .txt files, or hf:DATASET.")],
    split: Annotated[str, typer.Option(help="train | val | all.")] = "val",
    val_fraction: Annotated[float, typer.Option(help="Last part of the text that is `val`.")] = 0.1,
    against: Annotated[str | None, typer.Option(help="A second model, measured on the same text.")] = None,
    estimator: Annotated[
        str, typer.Option(help="any-order (masks) | counted (replacement noise) | continuous | discrete; auto: the first that applies.")
    ] = "auto",
    block_lengths: Annotated[str, typer.Option(help="Of block diffusion, with commas, a bound for each; default: the model's own.")] = "",
    window: Annotated[
        int | None,
        typer.Option(help="Of autoregressive models: cut the text into pieces of so many tokens, each read from its beginning."),
    ] = None,
    passes: Annotated[int, typer.Option(help="Monte-Carlo passes over the text.")] = 4,
    steps: Annotated[int, typer.Option(help="Steps of the discrete estimator.")] = 256,
    max_windows: Annotated[int | None, typer.Option(help="At most this many windows, spread evenly over the text.")] = None,
    seed: Seed = 0,
    card: Annotated[Path | None, typer.Option(help="File of the evaluation card; default: runs/eval/MODEL-SPLIT.json.")] = None,
    as_json: Json = False,
    device: Device = "cpu",
) -> None:
    """Measure nats per token and bits per character of a text.

    A bound for diffusion models, exact for autoregressive ones.
    """
    from dlm.cli.progress import showing
    from dlm.evaluation.card import dumps
    from dlm.workflows.evaluate import Evaluations
    from dlm.workflows.evaluate import evaluate as measure

    lengths = _lengths(block_lengths)
    if card is not None and len(lengths) > 1:
        raise InputError("--card names one file, and each of --block-lengths gets a card: leave --card away")

    def one(name: str, length: int | None, own: bool) -> Evaluation:
        lm = load(name, device)
        suffix = f"-blocks{length}" if length else ""
        with showing(f"measuring {lm.name}") as progress:
            return measure(
                lm,
                data,
                split=split,
                val_fraction=val_fraction,
                estimator=estimator,
                block_length=length,
                window=window,
                passes=passes,
                steps=steps,
                max_windows=max_windows,
                seed=seed,
                card=card if card and own else Path("runs/eval") / f"{lm.name}-{split}{suffix}.json",
                progress=progress,
            )

    own = [one(model, length, own=True) for length in lengths] or [one(model, None, own=True)]
    found = Evaluations(own, one(against, None, own=False) if against else None)
    console(as_json).print(_table([*found.own, *([found.against] if found.against else [])]))
    if as_json:
        print(dumps(found.record()))


def _lengths(words: str) -> list[int]:
    try:
        return [int(word) for word in words.split(",") if word]
    except ValueError:
        raise InputError(f"--block-lengths {words}: give whole numbers with commas, as in 1,4,16") from None


def _table(found: Sequence[Evaluation]) -> Table:
    made = table("model", "nats per token", "bits per char", "stderr", "kind")
    for one in found:
        sign = "<= " if one.is_bound else ""
        label = f"{one.model}, blocks of {one.block_length}" if one.block_length else one.model
        figures = f"{sign}{one.nats_per_token:.4f}", f"{sign}{one.bits_per_char:.4f}", f"{one.stderr:.4f}"
        made.add_row(label, *figures, one.estimator)
    return made
