"""`dlm curse`: the bits lost when several tokens are drawn in one step, from one curve and measured for each sampler."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dlm.cli.app import Device, Json, Seed, Split, ValFraction, app, between, err, is_plot, is_sampler, is_text, listed, load
from dlm.cli.tables import console, table
from dlm.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from dlm.workflows.curse import CurseReport

LEGEND = (
    "Bits per character lost. equal: random positions in equal steps, by the entropies of the model; best: in the best steps; "
    "text: as equal, by the cross-entropy, which the bound on this text loses. The samplers are measured, with 95 %."
)


@app.command()
def curse(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A masked diffusion model: bundled name, directory or hub id.")],
    data: Annotated[
        str | None,
        typer.Option(
            callback=is_text,
            show_default="the training text of the model",
            help="Bundled data set, text file, folder of .txt files, or hf:DATASET.",
        ),
    ] = None,
    split: Split = "val",
    val_fraction: ValFraction = 0.1,
    sampler: Annotated[str, typer.Option(help="Samplers to measure, with commas: ancestral, topk, confidence:0.9 ...")] = "ancestral,topk",
    tokens_per_step: Annotated[
        str | None, typer.Option(help="Numbers of tokens a step, with commas; default: those of 1,4,16,64 that the window holds.")
    ] = None,
    max_windows: Annotated[int, typer.Option(callback=between(1), help="At most this many windows, spread evenly over the text.")] = 8,
    plot: Annotated[Path | None, typer.Option(callback=is_plot, help="Write the curves as .png, .svg or .pdf (viz extra).")] = None,
    seed: Seed = 0,
    as_json: Json = False,
    device: Device = "cpu",
) -> None:
    """Measure the curse of parallel decoding.

    The bits per character lost when several tokens are drawn at once.
    """
    words, sizes = listed(sampler, "--sampler"), _sizes(tokens_per_step)
    for word in words:
        is_sampler(word)
    from dlm.cli.progress import showing
    from dlm.evaluation.card import dumps
    from dlm.workflows.curse import curse as measure

    lm = load(model, device)
    with showing(f"drawing with {lm.name}") as progress:
        found = measure(
            lm,
            data,
            split=split,
            val_fraction=val_fraction,
            samplers=words,
            tokens_per_step=sizes,
            max_windows=max_windows,
            seed=seed,
            progress=progress,
        )
    out = console(as_json)
    out.print(_table(found))
    sizes_of = ", ".join(map(str, found.best_steps))
    out.print(f"best sizes of {len(found.best_steps)} steps: {sizes_of}", highlight=False, soft_wrap=True)
    if plot is not None:
        from dlm.viz.plots import curse_plot

        curse_plot([row.record() for row in found.rows], found.levels(), found.window, plot)
        err.print(f"wrote {plot}", highlight=False)
    if as_json:
        print(dumps(found.record()))


def _sizes(words: str | None) -> list[int] | None:
    try:
        return None if words is None else [int(word) for word in words.split(",")]
    except ValueError:
        raise InputError(f"tokens per step are whole numbers with commas between, not {words!r}") from None


def _table(found: CurseReport) -> Table:
    facts = f"{found.windows} windows of {found.window} tokens, {found.characters_per_token:.2f} characters each"
    caption = f"{LEGEND} {facts}; the text costs <= {found.bound.value:.3f}."
    words = list(dict.fromkeys(word for row in found.rows for word in row.measured))
    made = table("tokens/step", "steps", "equal", "best", "text", *words, caption=caption, numbers=True)
    for row in found.rows:
        cells = [f"{mean.value:.4f}" for mean in (row.equal, row.best, row.text)]
        cells += [f"{mean.value:.4f} +- {mean.band95:.4f}" if (mean := row.measured.get(word)) else "" for word in words]
        made.add_row(str(row.tokens_per_step), str(row.steps), *cells)
    return made
