"""The command line. Verbs import what they need when they run, so that `dlm --help` is quick."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from dlm.errors import InputError

app = typer.Typer(
    name="dlm",
    help="Diffusion language models: train, sample, watch, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
err = Console(stderr=True)

Model = Annotated[str, typer.Option("--model", "-m", help="Bundled name, directory or hub id.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]
Seed = Annotated[int, typer.Option(help="Same seed, same machine, same output.")]
Json = Annotated[bool, typer.Option("--json", help="End with one JSON object.")]


def _load(name: str, device: str = "cpu", dtype: str = "float32") -> Any:
    import torch

    from dlm.language_model import load

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in kinds:
        raise InputError(f"unknown dtype {dtype!r}; known: {', '.join(kinds)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"no device {device!r} here ({str(error).splitlines()[0]}): use --device cpu") from None
    return load(name, device=device, dtype=kinds[dtype])


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to begin with.")] = "",
    model: Model = "shakespeare-mask",
    length: Annotated[int | None, typer.Option(help="Tokens of the whole text; default: one window.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens to add, instead of --length.")] = None,
    suffix: Annotated[str, typer.Option(help="Text to end with.")] = "",
    template: Annotated[str | None, typer.Option(help="Text with holes: every _ is one token to fill, \\_ an underscore.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps for each window.")] = None,
    sampler: Annotated[str | None, typer.Option(help="ancestral | topk | confidence.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token.")] = None,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep this many likeliest tokens; 0: all.")] = 0,
    threshold: Annotated[float, typer.Option(help="For --sampler confidence.")] = 0.9,
    seed: Seed = 0,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="See the text settle.")] = False,
    save: Annotated[Path | None, typer.Option(help="Write the run as a .traj file for `dlm show`.")] = None,
    as_json: Json = False,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 | bfloat16.")] = "float32",
) -> None:
    """Write text: continue a prompt, fill holes, or lead to a suffix."""
    lm = _load(model, device, dtype)
    options: dict[str, Any] = {"length": length, "max_new_tokens": max_new_tokens, "suffix": suffix, "template": template}
    options |= {"steps": steps, "sampler": sampler, "temperature": temperature, "top_p": top_p, "top_k": top_k, "threshold": threshold}
    console = Console(stderr=as_json)
    watching = watch and console.is_terminal
    view = _Watch(lm.name, console) if watching else _Quiet()
    try:
        with view:
            result = lm.generate(prompt, seed=seed, callback=view, **options)
    except KeyboardInterrupt:
        if save is not None and view.trajectory is not None:
            view.trajectory.save(save)
            _fail(f"stopped; the {len(view.trajectory) - 1} steps so far are in {save}", 130)
        _fail("stopped", 130)
    if save is not None:
        result.trajectory.save(save)
        err.print(f"saved {save}; see it again with: dlm show {save}", highlight=False)
    if as_json:
        print(json.dumps(result.record()))
    elif not watching:
        sys.stdout.write(result.text + "\n")


class _Quiet:
    """A bar on the error stream; nothing when that is no terminal. Called after every step; keeps the trajectory."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.trajectory: Any = None
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=err, disable=not err.is_terminal, transient=True)
        self.task = self.bar.add_task("generating", total=None)

    def __enter__(self) -> None:
        self.bar.start()

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def __call__(self, trajectory: Any, frame: Any) -> None:
        self.trajectory = trajectory
        total = int(trajectory.free_BT.sum())
        done = int((frame.settled_BT.cpu() & trajectory.free_BT).sum())
        self.bar.update(self.task, total=total, completed=done, description=f"{done} of {total} tokens, {frame.forwards} network calls")


class _Watch:
    """The live view, opened at the first step."""

    def __init__(self, label: str, console: Console) -> None:
        self.label, self.console = label, console
        self.trajectory: Any = None
        self.live = contextlib.ExitStack()
        self.view: Any = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        self.live.__exit__(*error)

    def __call__(self, trajectory: Any, frame: Any) -> None:
        if self.view is None:
            from dlm.viz.terminal import LiveView

            self.trajectory = trajectory
            self.view = self.live.enter_context(LiveView(trajectory, self.console, label=self.label))
        self.view.update()


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="A .traj file that `dlm generate --save` wrote.")],
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page with a scrubber.")] = None,
    gif: Annotated[Path | None, typer.Option(help="Write an animated GIF (viz extra).")] = None,
    seconds: Annotated[float, typer.Option(help="How long the replay takes.")] = 6.0,
) -> None:
    """Replay a saved run in the terminal, or turn it into a page or a GIF."""
    from dlm.trajectory import Trajectory

    if not run.is_file():
        raise InputError(f"no file {run}: make one with dlm generate --save {run}")
    trajectory = Trajectory.load(run)
    panes = [(", ".join(str(trajectory.meta[k]) for k in ("model", "sampler") if k in trajectory.meta), trajectory)]
    if html is not None:
        from dlm.viz.html import write_html

        write_html(panes, html)
        err.print(f"wrote {html}", highlight=False)
    if gif is not None:
        from dlm.viz.gif import write_gif

        write_gif(panes, gif)
        err.print(f"wrote {gif}", highlight=False)
    if html is None and gif is None:
        from dlm.viz.terminal import replay

        console = Console()
        if console.is_terminal:
            replay(panes, console, seconds=seconds)
        else:
            sys.stdout.write(trajectory.text() + "\n")


@app.command()
def train(
    recipe: Annotated[str | None, typer.Argument(help="A recipe's name (dlm list), or none with --data.")] = None,
    data: Annotated[str | None, typer.Option(help="Text file, folder of .txt files, or hf:DATASET.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; default: runs/RECIPE.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value, any number of times.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last save in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Train a recipe, or the default model on your own text. Ctrl-C saves and stops; --resume goes on."""
    from dataclasses import replace

    from dlm import recipes
    from dlm.train.loop import TrainConfig
    from dlm.train.loop import train as run

    if recipe is None and data is None:
        raise InputError(f"give a recipe ({', '.join(recipes.RECIPES)}) or --data FILE")
    config: TrainConfig = recipes.find(recipe) if recipe else TrainConfig()
    if data is not None:
        config = replace(config, data=data)
    config = config.with_settings(settings or [])
    out = out or Path("runs") / (recipe or Path(data or "").stem or "model")
    try:
        figures = run(config, out, resume=resume, preview=_preview, console=err)
    except KeyboardInterrupt as stopped:
        _fail(str(stopped) or "stopped", 130)
    if int(os.environ.get("RANK", "0")) == 0:
        err.print(f"done; try: dlm generate --model {out} --watch", highlight=False)
        if as_json:
            print(json.dumps(figures | {"model": str(out)}))


def _preview(network: Any, config: Any, tokenizer: Any) -> str:
    """One line of text from the model in training, so that one sees it learn."""
    from dlm.language_model import LanguageModel

    network.eval()
    text: str = LanguageModel(network, config, tokenizer).generate(max_new_tokens=64, steps=32).text
    return "  " + text.replace("\n", "\u21b5")


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Bundled name, directory or hub id.")],
    data: Annotated[str, typer.Option(help="Text file, folder of .txt files, or hf:DATASET.")],
    split: Annotated[str, typer.Option(help="train | val | all.")] = "val",
    val_fraction: Annotated[float, typer.Option(help="Last part of the text that is `val`.")] = 0.1,
    against: Annotated[str | None, typer.Option(help="A second model, measured on the same text.")] = None,
    estimator: Annotated[str, typer.Option(help="any-order | continuous | discrete.")] = "any-order",
    passes: Annotated[int, typer.Option(help="Monte-Carlo passes over the text.")] = 4,
    steps: Annotated[int, typer.Option(help="Steps of the discrete estimator.")] = 256,
    max_windows: Annotated[int | None, typer.Option(help="At most this many windows, spread evenly over the text.")] = None,
    seed: Seed = 0,
    card: Annotated[Path | None, typer.Option(help="Where the evaluation card goes; default: runs/eval/MODEL-SPLIT.json.")] = None,
    as_json: Json = False,
    device: Device = "cpu",
) -> None:
    """Nats per token and bits per character of a text: a bound for diffusion, exact for autoregressive models."""
    from rich.table import Table

    from dlm.evaluate import card as cards
    from dlm.evaluate import likelihood
    from dlm.train import data as reading

    documents = reading.select(reading.read(data), split, val_fraction)
    table = Table("model", "nats per token", "bits per char", "stderr", "kind", box=None, header_style="bold")
    records = []
    for name in [model] + ([against] if against else []):
        lm = _load(name, device)
        stream = reading.Stream.encode(documents, lm.tokenizer, lm.window)
        windows_WT = stream.windows(max_windows)
        characters = sum(len(lm.tokenizer.decode(row)) for row in windows_WT.tolist())
        kind = estimator if lm.is_diffusion else "autoregressive"
        bar = _bar(f"measuring {lm.name}", len(windows_WT) * (passes if lm.is_diffusion else 1))
        with bar:
            result = likelihood.evaluate(
                lm.noise,
                lm.predict,
                windows_WT.to(device),
                characters=characters,
                estimator=kind,
                passes=passes,
                steps=steps,
                seed=seed,
                progress=bar.forward,
            )
        record = result.record() | {"model": lm.name}
        sign = "<= " if result.is_bound else ""
        table.add_row(lm.name, f"{sign}{result.nats_per_token:.4f}", f"{sign}{result.bits_per_char:.4f}", f"{result.stderr:.4f}", kind)
        place = card if card and name == model else Path("runs/eval") / f"{lm.name}-{split}.json"
        facts = {"source": data, "split": split, "fingerprint": stream.fingerprint(), "windows": len(windows_WT)}
        chosen = {"estimator": kind, "passes": result.samples, "steps": steps if kind == "discrete" else None, "window": lm.window}
        cards.write(cards.make(record, device=device, dtype="float32", seed=seed, settings=chosen, data=facts), place)
        record["card"] = str(place)
        records.append(record)
    Console(stderr=as_json).print(table)
    if as_json:
        print(json.dumps(records[0] | ({"against": records[1]} if against else {})))


def _bar(label: str, total: int) -> Any:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    class Bar(Progress):
        def forward(self, amount: int) -> None:
            self.advance(self.task_ids[0], amount)

    bar = Bar(TextColumn(label), BarColumn(), TimeRemainingColumn(), console=err, disable=not err.is_terminal, transient=True)
    bar.add_task("", total=total)
    return bar


@app.command(name="list")
def list_() -> None:
    """Checkpoints that come with dlm, and recipes that train more."""
    from dlm import recipes
    from dlm.models import checkpoint

    for name, path in checkpoint.bundled().items():
        config = checkpoint.load_config(path)
        size = config.training.get("parameters", 0)
        print(f"model   {name:24} {config.objective}, {size:,} parameters, window {config.network.window}, context {config.context}")
    for name, make in recipes.RECIPES.items():
        config_ = make()
        print(f"recipe  {name:24} {config_.objective}, {config_.steps} steps of {config_.batch} windows on {Path(config_.data).name}")


def main() -> None:
    """Run a command; what the user can mend ends in one line and exit code 2, Ctrl-C in 130."""
    try:
        app()
    except (InputError, ModuleNotFoundError) as error:
        _fail(str(error), 2)
    except OSError as error:
        hint = ": no space left, free some and go on" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        _fail(f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}{hint}", 2)


def _fail(message: str, code: int) -> NoReturn:
    print(f"dlm: {message}".replace("\n", " "), file=sys.stderr)
    sys.exit(code)
