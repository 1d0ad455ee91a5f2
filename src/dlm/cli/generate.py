"""`dlm generate`: write text, watch it, compare several models or samplers."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from dlm import bundled
from dlm.cli.app import (
    INTERRUPTED,
    SAMPLING,
    Adapter,
    BridgeOption,
    Compile,
    Deterministic,
    Device,
    DeviceMap,
    DraftOption,
    DraftTokens,
    DraftTree,
    Dtype,
    FamilyOption,
    Json,
    Lossless,
    Preset,
    Seed,
    Threads,
    TopK,
    TopP,
    TrustOption,
    app,
    between,
    drafting,
    err,
    fail,
    given_text,
    interrupts,
    is_run_name,
    is_sampler,
    load,
    named_models,
    note,
    one_name,
    renamed,
    sampler_word,
    set_threads,
)
from dlm.errors import InputError
from dlm.language_model.options import MAX_TOKENS
from dlm.sampling import registry

if TYPE_CHECKING:
    from dlm.language_model import LanguageModel
    from dlm.language_model.generation import Generation, Run
    from dlm.language_model.options import DecodingOptions, LayoutKeywords

DEFAULT = "shakespeare-words"
MAX_SAMPLES = 10_000  # texts of one run, which share every forward pass
TEXT, CONSTRAINTS, SEVERAL, OUTPUT = "Text", "Constraints and guidance", "Several models", "Output"


@dataclass(frozen=True)
class Entry:
    """One run of a comparison: its label, its model, and its sampler where one is named."""

    label: str
    model: str
    sampler: str | None


@app.command(cls=renamed({"--heavy": "--model", "--base": "--model"}))
def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to begin with; - reads it from standard input.")] = "",
    name: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", show_default=DEFAULT, help="Bundled or pulled name, directory, GGUF file, hub id (dlm list)."),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="The same, for where no prompt stands before it.")] = None,
    length: Annotated[
        int | None,
        typer.Option(callback=between(1, MAX_TOKENS), show_default="one window", help="Tokens of the whole text.", rich_help_panel=TEXT),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(callback=between(1, MAX_TOKENS), help="Tokens to add, instead of --length.", rich_help_panel=TEXT)
    ] = None,
    suffix: Annotated[str, typer.Option(help="Text to end with.", rich_help_panel=TEXT)] = "",
    template: Annotated[
        str | None,
        typer.Option(help="Text with holes: every _ is one token to fill, \\_ an underscore.", rich_help_panel=TEXT),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            "--samples",
            "-n",
            callback=between(1, MAX_SAMPLES),
            help="Texts, with the seeds SEED, SEED + 1 ...",
            rich_help_panel=TEXT,
        ),
    ] = 1,
    seed: Seed = 0,
    steps: Annotated[
        int | None,
        typer.Option(
            callback=between(1),
            show_default="the model's own, else one for each token",
            help="Denoising steps of each window.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            callback=is_sampler, show_default="the model's own, else ancestral", help=registry.help_text(), rich_help_panel=SAMPLING
        ),
    ] = None,
    preset: Preset = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            callback=between(0), show_default="the model's own, else 1", help="0 takes the likeliest token.", rich_help_panel=SAMPLING
        ),
    ] = None,
    top_p: TopP = None,
    top_k: TopK = None,
    block_length: Annotated[
        int | None,
        typer.Option(callback=between(1), help="Fill each window in blocks of this length, from left to right.", rich_help_panel=SAMPLING),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            show_default="an exact KV cache where the model has one",
            help="Approximate KV cache of a bidirectional model: prefix, dual, delayed:8, drift:0.1; none: not even an exact one.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            show_default="the model's own", help="Tokens of a window that a long text carries into the next.", rich_help_panel=SAMPLING
        ),
    ] = None,
    greedy_tail: Annotated[
        int,
        typer.Option(
            callback=between(0), help="Last steps that take the likeliest token everywhere (replacement noise).", rich_help_panel=SAMPLING
        ),
    ] = 0,
    until_settled: Annotated[
        int,
        typer.Option(callback=between(0), help="Stop once no token has changed for this many steps; 0: never.", rich_help_panel=SAMPLING),
    ] = 0,
    early_stop: Annotated[
        bool,
        typer.Option(
            "--early-stop",
            help="Read and write nothing after an end-of-text token, from when it is written (checkpoints of other projects).",
            rich_help_panel=SAMPLING,
        ),
    ] = False,
    budget: Annotated[
        str | None,
        typer.Option(help="Of --sampler auto: calls:32, seconds:2 or bits:0.1 (bits per token lost).", rich_help_panel=SAMPLING),
    ] = None,
    draft: DraftOption = None,
    draft_tokens: DraftTokens = None,
    draft_tree: DraftTree = 0,
    lossless: Lossless = False,
    adapter: Adapter = None,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale; 1: none.", rich_help_panel=CONSTRAINTS)] = 1.0,
    allow: Annotated[str | None, typer.Option(help="The only characters that may be written.", rich_help_panel=CONSTRAINTS)] = None,
    pattern: Annotated[
        str | None,
        typer.Option(help="A regular expression that the whole text must match (constraints extra).", rich_help_panel=CONSTRAINTS),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(help="Runs side by side, with commas: mask,uniform,semantic or MODEL@SAMPLER,MODEL@SAMPLER.", rich_help_panel=SEVERAL),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(help="Which model takes which step: 'L0.5 H0.5', sandwich:0.25 or auto.", rich_help_panel=SEVERAL),
    ] = None,
    light: Annotated[
        str | None, typer.Option(help="The smaller model L of a schedule; several: M=NAME,L=NAME.", rich_help_panel=SEVERAL)
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="See the text settle.", rich_help_panel=OUTPUT)] = False,
    save: Annotated[
        Path | None,
        typer.Option(callback=is_run_name, help="Write the run as a .traj file for dlm show and dlm settle.", rich_help_panel=OUTPUT),
    ] = None,
    as_json: Json = False,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    deterministic: Deterministic = False,
    compile: Compile = False,
    family: FamilyOption = "",
    bridge: BridgeOption = "",
    trust_remote_code: TrustOption = False,
    device_map: DeviceMap = "",
    threads: Threads = 0,
) -> None:
    """Write text: continue a prompt, fill holes, or lead to a suffix.

    The prompt stands first and the model second, so that a sentence alone is enough; --model names one without a prompt.
    """
    from dlm.language_model.options import DecodingOptions

    drafter = drafting(draft, draft_tokens, draft_tree)
    named = one_name(name, model)
    _check(sampler, compare, lossless, drafter is not None)
    if samples > 1 and template is not None:
        raise InputError("--samples counts texts, and a template makes one: leave one of them away")
    word, prompt = "lossless" if lossless else sampler_word(sampler), given_text(prompt)
    options = DecodingOptions(
        preset=preset,
        draft=drafter,
        steps=steps,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        greedy_tail=greedy_tail,
        until_settled=until_settled,
        early_stop=early_stop,
        block_length=block_length,
        cache=True if cache is None else cache if cache != "none" else False,
        context=context,
        guidance=guidance,
        allow=allow,
        pattern=pattern,
        budget=budget,
        schedule=schedule,
        light=None if light is None else named_models(light),
    )
    layout: LayoutKeywords = {"length": length, "max_new_tokens": max_new_tokens, "suffix": suffix, "template": template}
    entries = _entries(compare, named or DEFAULT, word)
    _hint(prompt, named)

    loaded: list[tuple[LanguageModel, str]] = []

    def opened(wanted: str) -> LanguageModel:
        lm = load(wanted, device, dtype, adapter, deterministic, compile, family, bridge, trust_remote_code, device_map)
        loaded.append((lm, wanted))
        return lm

    runs = _runs(entries, opened, [prompt] * samples if samples > 1 else prompt, layout, options, seed)
    paths = _paths(save, list(runs))
    for lm, wanted in loaded:
        _hint_chat(lm, wanted, prompt)
    set_threads(threads, [run.model for run in runs.values()], rows=samples)
    console = Console(stderr=as_json)
    watching = watch and console.is_terminal
    _write(runs, paths, _watch(runs, console) if watching else _quiet(runs))
    _report(runs, watching, as_json)  # before the files, so that a full disk loses no text
    _save(runs, paths)


def _check(sampler: str | None, compare: str | None, lossless: bool, drafts: bool) -> None:
    """InputError for options that do not go together, before anything is loaded."""
    for chooses, option in ((lossless, "--lossless"), (drafts, "--draft")):
        if chooses and (sampler is not None or compare is not None):
            raise InputError(f"{option} chooses the sampler: leave --sampler and --compare away")
    if lossless and drafts:
        raise InputError("--lossless chooses the drafter: leave --draft away")


def _hint(prompt: str, model: str | None) -> None:
    """A line for those who put the model where the prompt stands."""
    if model is None and prompt in bundled.models():
        note(f"{prompt} is the prompt here; to write with that model: dlm generate --model {prompt}")


def _hint_chat(lm: LanguageModel, name: str, prompt: str) -> None:
    """A line for those who ask a chat model as if it answered here; none for a prompt with control tokens, which knows better."""
    if prompt and lm.chat.source and "<|" not in prompt:
        note(f"{lm.name} has a chat template, which generate leaves away: the text is continued. To ask the model: dlm chat {name}")


def _entries(compare: str | None, model: str, sampler: str | None) -> list[Entry]:
    """Every run. `mask` means the bundled sister of `model` of that name."""
    if compare is None:
        return [Entry("", model, sampler)]
    known = bundled.models()
    entries = []
    for label in (part.strip() for part in compare.split(",") if part.strip()):
        name, at, word = label.partition("@")
        sister = f"{model.rsplit('-', 1)[0]}-{name}"
        entries.append(Entry(label, sister if name not in known and sister in known else name, word if at else sampler))
    if len({entry.label for entry in entries}) < max(2, len(entries)):
        raise InputError(f"--compare {compare}: name two or more different runs, as in mask,uniform or uniform@refine,uniform@worst")
    return entries


def _runs(
    entries: Sequence[Entry],
    opened: Callable[[str], LanguageModel],
    prompt: str | list[str],
    layout: LayoutKeywords,
    options: DecodingOptions,
    seed: int,
) -> dict[str, Run]:
    """By label. In a comparison an autoregressive model takes the options that it knows."""
    from dlm.language_model.options import DecodingOptions

    runs = {}
    for entry in entries:
        lm = opened(entry.model)
        own = options
        if len(entries) == 1 and not lm.is_diffusion and options.steps is not None:
            raise InputError(f"{lm.name} is autoregressive and writes one token a forward pass, from left to right: leave --steps away")
        if len(entries) > 1 and not lm.is_diffusion:
            own = DecodingOptions(temperature=options.temperature, top_p=options.top_p, top_k=options.top_k, budget=options.budget)
        if len(entries) > 1 and entry.sampler != "auto":
            own = replace(own, budget=None)
        if entry.sampler == "lossless":
            lm.prepare_lossless()
        runs[entry.label or lm.name] = lm.run(lm.canvas(prompt, **layout), replace(own, sampler=entry.sampler), seed=seed)
    return runs


def _paths(save: Path | None, labels: list[str]) -> list[Path]:
    """A file for each run, beside one another."""
    if save is None:
        return []
    if len(labels) == 1:
        return [save]
    return [save.with_stem(f"{save.stem}-{re.sub('[^A-Za-z0-9.]+', '-', label).strip('-.')}") for label in labels]


def _write(runs: dict[str, Run], paths: Sequence[Path], view: contextlib.AbstractContextManager[Callable[[], None]]) -> None:
    """Take turns until all are done. After Ctrl-C the frames so far are saved."""
    try:
        with interrupts() as stopped, view as update:
            going = list(runs.values())
            while not stopped() and (going := [run for run in going if run.step() is not None]):
                update()
            if stopped():
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        _stopped(runs, paths)


def _save(runs: dict[str, Run], paths: Sequence[Path]) -> None:
    for run, path in zip(runs.values(), paths, strict=False):
        run.trajectory.save(path)
    if paths:
        files = " ".join(map(str, paths))
        err.print(f"saved {files}; see it again with: dlm show {files}", highlight=False, soft_wrap=True)


def _stopped(runs: dict[str, Run], paths: Sequence[Path]) -> NoReturn:
    kept = [(run.trajectory, path) for run, path in zip(runs.values(), paths, strict=False) if len(run.trajectory) > 1]
    for trajectory, path in kept:
        trajectory.save(path)
    told = " and ".join(f"the {len(trajectory) - 1} steps so far are in {path}" for trajectory, path in kept)
    fail(f"stopped; {told}" if kept else "stopped", INTERRUPTED)


def _report(runs: dict[str, Run], watched: bool, as_json: bool) -> None:
    """The texts, a dim line of figures for each, and the record. The live view of a single text has shown both."""
    results = {label: run.results() for label, run in runs.items()}
    for label, rows in results.items():
        shown = watched and len(rows) == 1
        for row in rows:
            if not as_json and not shown:
                head = f"--- {label}, seed {row.seed}\n" if len(rows) > 1 else f"--- {label}\n"
                sys.stdout.write((head if len(rows) > 1 or len(results) > 1 else "") + row.text + "\n")
        sys.stdout.flush()
        told = [row for row in rows if not shown or row.steps_saved is not None]
        for facts, alike in itertools.groupby(told, _figures):
            first, *others = alike
            seeds = f"seeds {first.seed} to {others[-1].seed}, each" if others else f"seed {first.seed}"
            note(f"{label}, {first.sampler}, {seeds}: {facts}")
    if as_json:
        records = [row.record() for rows in results.values() for row in rows]
        print(json.dumps(records[0] if len(records) == 1 else {"runs": records}))


def _figures(row: Generation) -> str:
    """In a few words: tokens, forward passes, seconds, and accepted draft tokens or saved steps."""
    passes = f"{row.forwards} forward pass{'es' * (row.forwards != 1)}"
    facts = f"{row.tokens} tokens in {passes}, {row.tokens_per_forward:.1f} a pass, {row.seconds:.1f} s"
    if row.proposed is not None:
        share = f"{row.accepted / row.proposed:.0%} of " if row.proposed and row.accepted is not None else ""
        facts += f"; {share}{row.proposed} draft tokens accepted"
    if row.steps_saved is not None:
        facts += f"; settled early, {row.steps_saved} steps saved; of {row.tokens} tokens the model expects {row.expected_edits:.1f} "
        facts += "to have changed in them"
    return facts


@contextlib.contextmanager
def _quiet(runs: dict[str, Run]) -> Iterator[Callable[[], None]]:
    """A bar on the error stream; nothing when that is no terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from dlm.viz.layout import figures

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as progress:
        task = progress.add_task("generating", total=None)

        def update() -> None:
            rows = [figures(run.trajectory, row) for run in runs.values() for row in range(len(run.trajectory.free_BT))]
            total, done = sum(row.free for row in rows), sum(row.free * row.share for row in rows)
            passes = sum(run.trajectory.forwards[-1] for run in runs.values())
            progress.update(task, total=total, completed=done, description=f"{total} tokens, {passes} forward passes")

        yield update


@contextlib.contextmanager
def _watch(runs: dict[str, Run], console: Console) -> Iterator[Callable[[], None]]:
    """The live view, one pane a run."""
    from dlm.viz.terminal import LiveView

    with LiveView([(label, run.trajectory) for label, run in runs.items()], console) as view:
        yield view.update
        view.update(force=True)
