"""`dlm eval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dlm.cli.app import Device, FamilyOption, Json, Seed, Split, ValFraction, app, between, check_names, err, is_card, is_text, load, one_of
from dlm.cli.tables import console, table
from dlm.errors import InputError
from dlm.files import parse_json
from dlm.train.data_kinds import SOURCES

if TYPE_CHECKING:
    from rich.table import Table

    from dlm.language_model import LanguageModel
    from dlm.workflows.evaluate import Evaluation

ESTIMATORS = ("auto", "any-order", "counted", "two-clocks", "continuous", "score-entropy", "discrete")
TASKS = "Tasks of lm-evaluation-harness"  # panel of the help


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Bundled name, directory or hub id.")],
    data: Annotated[
        str | None,
        typer.Option(callback=is_text, help=f"Bundled data set (shakespeare), text file, folder of .txt files, hf:DATASET, {SOURCES}."),
    ] = None,
    split: Split = "val",
    val_fraction: ValFraction = 0.1,
    against: Annotated[str | None, typer.Option(help="A second model, measured on the same text.")] = None,
    estimator: Annotated[
        str,
        typer.Option(
            callback=one_of(*ESTIMATORS),
            help="any-order (masks) | counted (replacement noise) | two-clocks (classes) | continuous | score-entropy (SEDD) | discrete; ",
        ),
    ] = "auto",
    block_lengths: Annotated[str, typer.Option(help="Of block diffusion, with commas, a bound for each; default: the model's own.")] = "",
    window: Annotated[
        int | None,
        typer.Option(help="Of autoregressive models: cut the text into pieces of so many tokens, each read from its beginning."),
    ] = None,
    temperature: Annotated[float, typer.Option(callback=between(0), help="Divides the logits of masked and autoregressive models.")] = 1.0,
    passes: Annotated[int, typer.Option(callback=between(1), help="Monte-Carlo passes over the text.")] = 4,
    steps: Annotated[int, typer.Option(callback=between(1), help="Steps of the discrete estimator.")] = 256,
    max_windows: Annotated[
        int | None, typer.Option(callback=between(1), help="At most this many windows, spread evenly over the text.")
    ] = None,
    seed: Seed = 0,
    card: Annotated[
        Path | None,
        typer.Option(callback=is_card, show_default="runs/eval/MODEL-SPLIT.json or MODEL-tasks.json", help="File of the evaluation card."),
    ] = None,
    tasks: Annotated[str, typer.Option(help="Names with commas, as gsm8k,arc_easy; instead of --data.", rich_help_panel=TASKS)] = "",
    include_path: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Directory with YAML files of more tasks.", rich_help_panel=TASKS)
    ] = None,
    shots: Annotated[
        int | None, typer.Option(callback=between(0), help="Examples before a question; default: the task's own.", rich_help_panel=TASKS)
    ] = None,
    limit: Annotated[
        float | None, typer.Option(callback=between(0), help="Documents of each task; below 1: a share of them.", rich_help_panel=TASKS)
    ] = None,
    batch_size: Annotated[str, typer.Option(help="Rows of a forward pass, or auto.", rich_help_panel=TASKS)] = "auto",
    mc_samples: Annotated[
        int, typer.Option(callback=between(2), help="Mask patterns of a continuation, of diffusion models.", rich_help_panel=TASKS)
    ] = 128,
    model_args: Annotated[
        str, typer.Option(help="Options of decoding and of the likelihood: steps=64,likelihood_blocks=1.", rich_help_panel=TASKS)
    ] = "",
    chat_template: Annotated[bool, typer.Option("--chat-template", help="Ask as a user of a chat.", rich_help_panel=TASKS)] = False,
    resume: Annotated[
        Path | None, typer.Option(help="Keep answers in files that begin with this; the same command goes on.", rich_help_panel=TASKS)
    ] = None,
    as_json: Json = False,
    device: Device = "cpu",
    family: FamilyOption = "",
) -> None:
    """Measure nats per token, bits per character and per byte of a text, or run tasks of lm-evaluation-harness.

    A bound for diffusion models, exact for autoregressive ones.
    """
    if bool(tasks) == (data is not None):
        raise InputError("give --data, a text to measure, or --tasks, names of lm-evaluation-harness" + (", not both" if tasks else ""))
    lengths = _lengths(block_lengths)
    if card is not None and len(lengths) > 1:
        raise InputError("--card names one file, and each of --block-lengths gets a card: leave --card away")
    check_names([model, *([against] if against else [])])
    from dlm.cli.progress import showing
    from dlm.evaluation.card import dumps
    from dlm.workflows.evaluate import Evaluations
    from dlm.workflows.evaluate import evaluate as measure

    if data is None:
        from dlm.workflows.harness import require

        require()  # before the model is loaded
        settings = {"include_path": include_path, "shots": shots, "limit": limit, "batch_size": batch_size, "resume": resume}
        more = {"mc_samples": mc_samples, "chat": chat_template, "seed": seed} | _model_args(model_args)
        _run_tasks(load(model, device, family=family), tasks, card, as_json, settings | more)
        return

    def one(name: str, length: int | None, own: bool) -> Evaluation:
        lm = load(name, device, family=family if own else "")
        marks = (f"-blocks{length}" if length else "") + (f"-temperature{temperature:g}" if temperature != 1 else "")
        usual = Path("runs/eval") / f"{lm.name}-{split}{marks}.json"
        place = is_card(card if card and own else usual)
        with showing(f"measuring {lm.name}") as progress:
            return measure(
                lm,
                data,
                split=split,
                val_fraction=val_fraction,
                estimator=estimator,
                block_length=length,
                window=window,
                temperature=temperature,
                passes=passes,
                steps=steps,
                max_windows=max_windows,
                seed=seed,
                card=place,
                progress=progress,
            )

    own = [one(model, length, own=True) for length in lengths] or [one(model, None, own=True)]
    found = Evaluations(own, one(against, None, own=False) if against else None)
    rows = [*found.own, *([found.against] if found.against else [])]
    console(as_json).print(_table(rows))
    for row in rows:
        if row.parts is not None:
            told = " + ".join(f"{value:.4f} {name}" for name, value in row.parts.items())
            console(as_json).print(f"{row.model}: {told}, in nats per token", highlight=False)
        if row.nats_per_predicted_token is not None:
            first = f"{row.model} reads no start token: the first token of a window has no condition and counts as uniform"
            console(as_json).print(f"{first}; {row.nats_per_predicted_token:.4f} nats per token without those", highlight=False)
    _tell([row.card for row in rows if row.card is not None])
    if as_json:
        print(dumps(found.record()))


def _tell(cards: Sequence[Path]) -> None:
    """Where the evaluation cards are, which hold all that is needed to repeat the numbers."""
    err.print(f"wrote {' '.join(map(str, cards))}", highlight=False, soft_wrap=True)


def _model_args(words: str) -> dict[str, object]:
    """`name=value` with commas; a value is a number, true, false, or a text."""
    found: dict[str, object] = {}
    for word in filter(None, words.split(",")):
        name, sign, value = word.partition("=")
        if not sign or not name.isidentifier():
            raise InputError(f"--model-args {word}: give name=value with commas, as in steps=64,temperature=0.5")
        try:
            found[name] = parse_json(value, "--model-args")
        except InputError:
            found[name] = value
    return found


def _run_tasks(lm: LanguageModel, tasks: str, card: Path | None, as_json: bool, settings: Mapping[str, Any]) -> None:
    from dlm.evaluation.card import dumps
    from dlm.workflows.harness import evaluate_tasks

    card = card or Path("runs/eval") / f"{lm.name}-tasks.json"
    is_card(card)
    found = evaluate_tasks(lm, [task.strip() for task in tasks.split(",") if task.strip()], card=card, **settings)
    made = table("task", "documents", "metric", "value", "stderr")
    for task, row in found.figures.items():
        for metric, value in row.items():
            if "_stderr," not in metric:
                stderr = row.get(metric.replace(",", "_stderr,"))
                documents = str(found.samples.get(task, ""))
                made.add_row(task, documents, metric.removesuffix(",none"), f"{value:.4f}", "" if stderr is None else f"{stderr:.4f}")
    console(as_json).print(made)
    if not as_json and "loglikelihood_mc_stderr_mean" in found.likelihood:
        error = found.likelihood["loglikelihood_mc_stderr_mean"]
        print(f"log-likelihoods: {found.likelihood['likelihood_estimator']}, Monte-Carlo error {error:.4f} nats each in the mean")
    _tell([card])
    if as_json:
        print(dumps(found.record()))


def _lengths(words: str) -> list[int]:
    try:
        return [int(word) for word in words.split(",") if word]
    except ValueError:
        raise InputError(f"--block-lengths {words}: give whole numbers with commas, as in 1,4,16") from None


def _table(found: Sequence[Evaluation]) -> Table:
    unit = found[0].unit
    named = ["bits per char", "per byte"] if unit == "character" else [f"bits per {unit}"]
    made = table("model", "nats per token", *named, "stderr", "samples", "estimator")
    for one in found:
        sign = "<= " if one.is_bound else ""
        label = f"{one.model}, blocks of {one.block_length}" if one.block_length else one.model
        label += f", temperature {one.temperature:g}" if one.temperature != 1 else ""
        values = (one.nats_per_token, one.bits_per_char, one.bits_per_byte)[: 1 + len(named)]
        figures = [f"{sign}{value:.4f}" for value in values]
        made.add_row(label, *figures, f"{one.stderr:.4f}", str(one.samples), one.estimator)
    return made
