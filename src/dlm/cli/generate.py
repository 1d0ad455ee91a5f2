"""`dlm generate`: write text, watch it, compare several models or samplers."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dlm import bundled
from dlm.cli.app import Deterministic, Device, Dtype, Json, Seed, app, err, fail, load, named_models
from dlm.errors import InputError
from dlm.sampling import registry


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to begin with.")] = "",
    model: Annotated[
        str, typer.Option("--model", "--heavy", "--base", "-m", help="Bundled name, directory or hub id.")
    ] = "shakespeare-mask",
    compare: Annotated[
        str | None, typer.Option(help="Several at once, side by side: mask,uniform,semantic or MODEL@SAMPLER, with commas.")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of the whole text; default: one window.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens to add, instead of --length.")] = None,
    suffix: Annotated[str, typer.Option(help="Text to end with.")] = "",
    template: Annotated[str | None, typer.Option(help="Text with holes: every _ is one token to fill, \\_ an underscore.")] = None,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Texts to write, with the seeds SEED, SEED + 1 ...")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps for each window.")] = None,
    sampler: Annotated[str | None, typer.Option(help=registry.help_text())] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token.")] = None,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep this many likeliest tokens; 0: all.")] = 0,
    greedy_tail: Annotated[int, typer.Option(help="Last steps that take the likeliest token everywhere (replacement noise).")] = 0,
    until_settled: Annotated[int, typer.Option(help="Stop once no token has changed for this many steps; 0: never.")] = 0,
    block_length: Annotated[int | None, typer.Option(help="Fill each window in blocks of this length, from left to right.")] = None,
    cache: Annotated[
        str | None,
        typer.Option(help="prefix | dual | delayed[:8] | drift[:0.1]: what to keep between calls; none: not even what is exact."),
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of a window that a long text carries into the next.")] = None,
    guidance: Annotated[float, typer.Option(help="Above 1 the prompt counts for more than its due; 1: for what it is.")] = 1.0,
    allow: Annotated[str | None, typer.Option(help="The only characters that may be written.")] = None,
    pattern: Annotated[str | None, typer.Option(help="A regular expression that the whole text must match (constraints extra).")] = None,
    budget: Annotated[str | None, typer.Option(help="Of --sampler auto: calls:32 | seconds:2 | bits:0.1 (allowed loss).")] = None,
    schedule: Annotated[str | None, typer.Option(help="Which model takes which step: 'L0.5 H0.5' | sandwich:0.25 | auto.")] = None,
    light: Annotated[str | None, typer.Option(help="The smaller model L of a schedule; several: M=NAME,L=NAME.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="What `dlm convert` made for an autoregressive base, for --lossless.")] = None,
    lossless: Annotated[
        bool,
        typer.Option(
            "--lossless",
            help="The text of plain decoding in fewer calls: with --adapter, else a rounded copy drafts (on a GPU: a bundled one).",
        ),
    ] = False,
    seed: Seed = 0,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="See the text settle.")] = False,
    save: Annotated[Path | None, typer.Option(help="Write the run as a .traj file for `dlm show` and `dlm settle`.")] = None,
    as_json: Json = False,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    deterministic: Deterministic = False,
) -> None:
    """Write text: continue a prompt, fill holes, or lead to a suffix."""
    from dlm.language_model.generation import Run

    layout: dict[str, Any] = {"length": length, "max_new_tokens": max_new_tokens, "suffix": suffix, "template": template}
    options: dict[str, Any] = {"steps": steps, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    options |= {"greedy_tail": greedy_tail, "until_settled": until_settled, "block_length": block_length}
    options |= {"context": context, "guidance": guidance, "allow": allow, "pattern": pattern, "budget": budget}
    options |= {"schedule": schedule, "light": None if light is None else named_models(light)}
    options |= {"cache": True if cache is None else cache if cache != "none" else False}
    if samples < 1 or (samples > 1 and template is not None):
        raise InputError("--samples counts texts from 1, and a template makes one")
    if lossless and (sampler is not None or compare is not None):
        raise InputError("--lossless chooses the sampler: leave --sampler and --compare away")
    sampler = "lossless" if lossless else sampler
    runs: dict[str, Run] = {}
    for label, name, word in _entries(compare, model, sampler):
        lm = load(name, device, dtype, adapter, deterministic)
        canvas = lm.canvas(prompt if samples == 1 else [prompt] * samples, **layout)
        own = options if lm.is_diffusion or compare is None else {k: options[k] for k in ("temperature", "top_p", "top_k")}
        own = own | {"sampler": word, "budget": budget if compare is None or word == "auto" else None}
        runs[label or lm.name] = Run(lm, canvas, seed, own)
    paths = _paths(save, list(runs))
    console = Console(stderr=as_json)
    watching = watch and console.is_terminal
    try:
        with _watch(runs, console) if watching else _quiet(runs) as update:
            going = list(runs.values())
            while going := [run for run in going if run.step() is not None]:
                update()
    except KeyboardInterrupt:
        kept = [(run.trajectory, path) for run, path in zip(runs.values(), paths, strict=False) if len(run.trajectory) > 1]
        for trajectory, path in kept:
            trajectory.save(path)
        told = " and ".join(f"the {len(trajectory) - 1} steps so far are in {path}" for trajectory, path in kept)
        fail(f"stopped; {told}" if kept else "stopped", 130)
    for run, path in zip(runs.values(), paths, strict=False):
        run.trajectory.save(path)
    if paths:
        files = " ".join(map(str, paths))
        err.print(f"saved {files}; see it again with: dlm show {files}", highlight=False, soft_wrap=True)
    _report(runs, watching, as_json)


def _entries(compare: str | None, model: str, sampler: str | None) -> list[tuple[str, str, str | None]]:
    """(label, model, sampler) of every run. `mask` means the bundled sister of `model` of that name."""
    if compare is None:
        return [("", model, sampler)]
    entries = []
    for label in (part.strip() for part in compare.split(",") if part.strip()):
        name, at, word = label.partition("@")
        sister = f"{model.rsplit('-', 1)[0]}-{name}"
        entries.append((label, sister if name not in bundled.models() and sister in bundled.models() else name, word if at else sampler))
    if len({label for label, _, _ in entries}) < max(2, len(entries)):
        raise InputError(f"--compare {compare}: name two or more different runs, as in mask,uniform or uniform@refine,uniform@worst")
    return entries


def _paths(save: Path | None, labels: list[str]) -> list[Path]:
    if save is None:
        return []
    if len(labels) == 1:
        return [save]
    return [save.with_stem(f"{save.stem}-{re.sub('[^A-Za-z0-9.]+', '-', label).strip('-.')}") for label in labels]


def _report(runs: dict[str, Any], watched: bool, as_json: bool) -> None:
    results = {label: run.results() for label, run in runs.items()}
    for label, rows in results.items():
        head = f"--- {label}" if len(results) > 1 else "---"
        for row in rows if not (as_json or (watched and len(rows) == 1)) else ():
            sys.stdout.write((f"{head}, seed {row.seed}\n" if len(rows) > 1 else f"{head}\n" if len(results) > 1 else "") + row.text + "\n")
        for row in rows:
            if row.steps_saved is not None:
                err.print(
                    f"{label}, seed {row.seed}: settled early, {row.steps_saved} steps saved; of {row.tokens} tokens the model "
                    f"expects {row.expected_edits:.1f} to have changed in them",
                    highlight=False,
                )
            if row.proposed is not None and not (watched and len(rows) == 1):
                share = f"{row.accepted / row.proposed:.0%} of " if row.proposed else ""
                rate = f"{row.tokens} tokens in {row.forwards} calls, {row.tokens_per_forward:.1f} a call"
                facts = f"{label}, {row.sampler}, seed {row.seed}: {rate}; {share}{row.proposed} proposals accepted"
                err.print(facts, highlight=False, soft_wrap=True)
    if as_json:
        records = [row.record() for rows in results.values() for row in rows]
        print(json.dumps(records[0] if len(records) == 1 else {"runs": records}))


@contextlib.contextmanager
def _quiet(runs: dict[str, Any]) -> Any:
    """A bar on the error stream; nothing when that is no terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from dlm.viz.layout import figures

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as progress:
        task = progress.add_task("generating", total=None)

        def update() -> None:
            rows = [figures(run.trajectory, row) for run in runs.values() for row in range(len(run.trajectory.free_BT))]
            total, done = sum(row.free for row in rows), sum(row.free * row.share for row in rows)
            calls = sum(run.trajectory.forwards[-1] for run in runs.values())
            progress.update(task, total=total, completed=done, description=f"{total} tokens, {calls} network calls")

        yield update


@contextlib.contextmanager
def _watch(runs: dict[str, Any], console: Console) -> Any:
    """The live view, one pane a run."""
    from dlm.viz.terminal import LiveView

    with LiveView([(label, run.trajectory) for label, run in runs.items()], console) as view:
        yield view.update
        view.update(force=True)
