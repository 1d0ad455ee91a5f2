"""`dlm schedule`: which model takes which denoising step; the cost of a schedule, its loss, and the best one by search."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dlm.cli.app import (
    Device,
    Json,
    Seed,
    Split,
    app,
    between,
    check_names,
    err,
    is_file_name,
    is_plot,
    is_sampler,
    is_text,
    listed,
    named_models,
    one_of,
    warn_old,
)
from dlm.cli.tables import console, table
from dlm.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from dlm.evaluation.statistics import Curve
    from dlm.workflows.schedule import CostReport, SearchReport, SensitivityReport, TrialRow

schedules = typer.Typer(no_args_is_help=True, help="Which model takes which denoising step.")
app.add_typer(schedules, name="schedule")

SCHEDULE = re.compile(r"[A-Z][\d.]*([ ,]+[A-Z][\d.]+)*|[a-z]+:[\d.:]+")
Heavy = Annotated[str, typer.Argument(metavar="HEAVY", help="The model H: bundled name, directory or hub id.")]
Light = Annotated[str, typer.Argument(metavar="LIGHT", help="The smaller model L; several: M=NAME,L=NAME.")]
Data = Annotated[
    str | None,
    typer.Option(
        callback=is_text,
        show_default="the training text of H",
        help="Bundled data set, text file, folder of .txt files, or hf:DATASET.",
    ),
]
Judge = Annotated[str, typer.Option(help="An autoregressive model; any causal one of transformers reads the text.")]
Steps = Annotated[int | None, typer.Option(callback=between(1), show_default="one for each token", help="Denoising steps of a window.")]
Sampler = Annotated[str, typer.Option(callback=is_sampler, help="A sampler that masks have, as in `dlm generate`.")]
Segments = Annotated[int, typer.Option(callback=between(1), help="Equal parts of the steps.")]
Samples = Annotated[int, typer.Option("--samples", "-n", callback=between(2), help="Texts for each schedule, the same seeds for all.")]
Windows = Annotated[int, typer.Option(callback=between(1), help="Windows of the text that the KL is measured on.")]


@schedules.command()
def cost(
    heavy: Heavy,
    light: Annotated[str, typer.Argument(metavar="LIGHT", show_default=False, help="The smaller model L; several: M=NAME,L=NAME.")] = "",
    schedule: Annotated[
        str, typer.Argument(metavar="SCHEDULE", show_default=False, help="'L125 H750 L125', 'L0.125 H0.75 L0.125', sandwich:0.25 ...")
    ] = "",
    steps: Steps = None,
    as_json: Json = False,
) -> None:
    """FLOPs of a schedule by three conventions: blocks alone, with the output head, and of the forward passes that happen."""
    if SCHEDULE.fullmatch(heavy) and not Path(heavy).exists():  # it stood first once, and the models had defaults
        schedule, heavy, light = heavy, light or "shakespeare-mask", schedule or "shakespeare-mask-2"
        warn_old("SCHEDULE before the models", f"dlm schedule cost {heavy} {light} '{schedule}'")
    if not schedule:
        raise InputError("missing argument 'SCHEDULE': write dlm schedule cost HEAVY LIGHT 'L0.5 H0.5'")
    lights = _here(heavy, light)
    from dlm.evaluation.card import dumps
    from dlm.workflows import schedule as workflow

    found = workflow.cost(heavy, lights, schedule, steps=steps)
    console(as_json).print(_cost_table(found))
    if as_json:
        print(dumps(found.record()))


def _here(heavy: str, light: str, *others: str) -> str | dict[str, str]:
    """The light models, by key where there are several. InputError for a model that is not there, before torch is loaded."""
    lights = named_models(light)
    check_names([heavy, *([lights] if isinstance(lights, str) else lights.values()), *others])
    return lights


@schedules.command()
def sensitivity(
    heavy: Heavy,
    light: Light,
    data: Data = None,
    split: Split = "val",
    max_windows: Annotated[int, typer.Option(callback=between(1), help="At most this many windows, spread evenly over the text.")] = 64,
    segments: Segments = 16,
    sampler: Sampler = "ancestral",
    steps: Steps = None,
    samples: Annotated[
        int, typer.Option("--samples", "-n", callback=between(1), help="Texts that H writes, for the states of its own runs.")
    ] = 16,
    swap: Annotated[
        int, typer.Option(callback=between(0), help="Also let L take one of so many parts of the steps, write and judge; 0: no.")
    ] = 0,
    judge: Judge = "shakespeare-ar",
    plot: Annotated[Path | None, typer.Option(callback=is_plot, help="Write the curves as .png, .svg or .pdf (viz extra).")] = None,
    seed: Seed = 0,
    as_json: Json = False,
    device: Device = "cpu",
) -> None:
    """Measure how much each step needs H: loss gap and KL on noised text and on H's own runs, with 95 % bands."""
    lights = _here(heavy, light)
    from dlm.cli.progress import showing
    from dlm.evaluation.card import dumps
    from dlm.workflows import schedule as workflow

    with showing("loss and KL of every segment") as progress:
        found = workflow.sensitivity(
            heavy,
            lights,
            data=data,
            split=split,
            max_windows=max_windows,
            segments=segments,
            sampler=sampler,
            steps=steps,
            samples=samples,
            swap=swap,
            judge=judge,
            seed=seed,
            device=device,
            progress=progress,
        )
    out = console(as_json)
    for key in found.lights:
        out.print(_sensitivity_table(found, key))
    if plot is not None:
        from dlm.viz.plots import panels_plot

        panels_plot(_panels(found), plot, doubling=False)
        err.print(f"wrote {plot}", highlight=False)
    if as_json:
        print(dumps(found.record()))


@schedules.command()
def search(
    heavy: Heavy,
    light: Light,
    how: Annotated[
        str,
        typer.Option(
            "--search",
            callback=one_of("kl", "joint", "exhaustive", "halving"),
            help="kl (by theory) | joint (and fewer steps) | exhaustive | halving (of many, again and again).",
        ),
    ] = "kl",
    saved: Annotated[float, typer.Option(callback=between(0, 1), help="Share of H's block FLOPs to save at least.")] = 0.35,
    segments: Segments = 8,
    steps: Annotated[int, typer.Option(callback=between(1), help="Denoising steps of a window.")] = 64,
    sampler: Sampler = "ancestral",
    samples: Samples = 16,
    count: Annotated[int, typer.Option(callback=between(1), help="Schedules that halving begins with.")] = 24,
    judge: Judge = "shakespeare-ar",
    data: Data = None,
    max_windows: Windows = 32,
    ledger: Annotated[
        Path | None, typer.Option(callback=is_file_name, help="File of trials: a search that stopped goes on where it was.")
    ] = None,
    save: Annotated[bool, typer.Option(help="Keep the best beside H, for `dlm generate --schedule auto`.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
    device: Device = "cpu",
) -> None:
    """Find the best schedule that saves so much; every one is written and judged with the same seeds, beside H alone and L alone."""
    lights = _here(heavy, light)
    from dlm.cli.progress import showing
    from dlm.evaluation.card import dumps
    from dlm.workflows import schedule as workflow

    with showing("writing and judging") as progress:
        found = workflow.search(
            heavy,
            lights,
            way=how,
            saved=saved,
            segments=segments,
            steps=steps,
            sampler=sampler,
            samples=samples,
            count=count,
            judge=judge,
            data=data,
            max_windows=max_windows,
            ledger=ledger,
            save=save,
            seed=seed,
            device=device,
            progress=progress,
        )
    if how == "joint":
        err.print(f"{found.taken} steps of {steps}, {found.best}: {found.nats:.2f} nats a text lost by theory", highlight=False)
    console(as_json).print(_trials_table(found.rows, found))
    if found.shortfall is not None:
        err.print(
            f"{found.winner} saved {found.shortfall:.1%}, not {saved:.1%}: its light steps came after the text was done", highlight=False
        )
    if found.file is not None:
        err.print(f"wrote {found.file}; try: dlm generate --model {heavy} --schedule auto", highlight=False, soft_wrap=True)
    if as_json:
        print(dumps(found.record()))


@schedules.command()
def compare(
    heavy: Heavy,
    light: Light,
    words: Annotated[str, typer.Argument(metavar="SCHEDULES", help="With commas between; SCHEDULE@STEPS in another number of steps.")],
    steps: Annotated[int, typer.Option(callback=between(1), help="Denoising steps of a window.")] = 256,
    sampler: Sampler = "ancestral",
    samples: Samples = 16,
    judge: Judge = "shakespeare-ar",
    data: Data = None,
    segments: Segments = 16,
    max_windows: Windows = 32,
    ledger: Annotated[Path | None, typer.Option(callback=is_file_name, help="File of trials: those in it are not measured again.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
    device: Device = "cpu",
) -> None:
    """Measure these schedules beside H alone: 'L0.5 H0.5,sandwich:0.25,H@100'."""
    lights = _here(heavy, light)
    from dlm.cli.progress import showing
    from dlm.evaluation.card import dumps
    from dlm.workflows import schedule as workflow

    with showing("writing and judging") as progress:
        found = workflow.compare(
            heavy,
            lights,
            listed(words, "SCHEDULES"),
            steps=steps,
            sampler=sampler,
            samples=samples,
            judge=judge,
            data=data,
            segments=segments,
            max_windows=max_windows,
            ledger=ledger,
            seed=seed,
            device=device,
            progress=progress,
        )
    console(as_json).print(_trials_table(found.rows))
    if as_json:
        print(dumps(found.record()))


def _cost_table(found: CostReport) -> Table:
    caption = f"{found.schedule}, one text of {found.window} tokens; saved against H alone, in the same sampler"
    made = table("counted", "GFLOPs", "saved", caption=caption, numbers=True)
    cost = found.cost
    made.add_row("blocks, every step", f"{cost.blocks / 1e9:,.2f}", f"{cost.saved_blocks:.1%}")
    made.add_row("and the head", f"{cost.with_head / 1e9:,.2f}", f"{cost.saved_with_head:.1%}")
    made.add_row(f"forward passes that happen ({cost.calls:.0f})", f"{cost.executed / 1e9:,.2f}", f"{cost.saved_executed:.1%}")
    return made


Line = list[tuple[float, float, float]]


def _line(mean: Sequence[float], band: Sequence[float]) -> Line:
    """Points x, y, half-width of the interval."""
    return [((j + 0.5) / len(mean), m, b) for j, (m, b) in enumerate(zip(mean, band, strict=True))]


def _lines(curves: Mapping[str, Curve]) -> dict[str, Line]:
    return {key: _line(curve.mean_S.tolist(), curve.band_S.tolist()) for key, curve in curves.items()}


def _panels(found: SensitivityReport) -> list[tuple[str, str, dict[str, Line]]]:
    x, text = "share of the steps done", found.text.curves()
    panels = [("loss on noised text, nats per token", x, _lines(text["loss"])), ("KL(H || model), noised text", x, _lines(text["kl"]))]
    panels.append(("KL(H || model), states that H comes by", x, _lines(found.runs.curves()["kl"])))
    swaps = {key: _line([one.value for one in each], [one.band95 for one in each]) for key, each in found.swap.items()}
    return [*panels, ("bits per token added by one segment", x, swaps)] if swaps else panels


def _sensitivity_table(found: SensitivityReport, key: str) -> Table:
    caption = "Nats per token, by share of the steps done; +- 95 %. KL(H || L) on noised text and on the states that H comes by."
    heads = ("steps done", "loss of H", f"loss of {key}", "gap", "KL, text", "KL, runs")
    made = table(*heads, title=f"{found.heavy} against {found.light}: {key}", caption=caption, numbers=True)
    text, runs = found.text.curves(), found.runs.curves()
    curves = (text["loss"]["H"], text["loss"][key], text["gap"][key], text["kl"][key], runs["kl"][key])
    for j in range(found.segments):
        cells = [f"{curve.mean_S[j]:.4f}" + (f" +- {curve.band_S[j]:.4f}" if i > 1 else "") for i, curve in enumerate(curves)]
        made.add_row(_part(j, found.segments), *cells)
    swaps = found.swap.get(key, ())
    for j, mean in enumerate(swaps):
        made.add_row(_part(j, len(swaps)), f"only here {key}:", f"{mean.value:+.4f} +- {mean.band95:.4f}", "bits/token")
    return made


def _part(j: int, parts: int) -> str:
    return f"{j / parts:.0%} - {(j + 1) / parts:.0%}"


def _trials_table(rows: Sequence[TrialRow], found: SearchReport | None = None) -> Table:
    caption = "saved: block FLOPs of the forward passes that happened; bits per token under the judge, against H with 95 %, paired; * front"
    heads = ("schedule", "texts", "saved", "path KL", "bits", "against H", "entropy", "s/text", "")
    made = table(*heads, caption=caption, width=24, numbers=True)
    made.columns[0].no_wrap, made.columns[0].overflow = False, "fold"  # a schedule may be long
    for row in sorted(rows, key=lambda row: (-row.texts, row.figures["bits"].value)):
        change = row.differences["bits"]
        cells = f"{row.saved:.1%}", f"{row.path_kl:.2f}", f"{row.figures['bits'].value:.3f}", f"{change.value:+.4f} +- {change.band95:.4f}"
        wins = found is not None and row.label == found.winner and found.shortfall is None  # one that saves less is not the best
        mark = "" if found is None else "best" * wins + "*" * (row.label in found.front)
        made.add_row(row.label, str(row.texts), *cells, f"{row.figures['entropy'].value:.3f}", f"{row.seconds:.2f}", mark)
    return made
