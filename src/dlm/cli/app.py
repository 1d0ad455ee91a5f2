"""The application, what the verbs share, and how errors reach the user."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from dlm import bundled
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
Dtype = Annotated[str, typer.Option(help="float32 | bfloat16 | int8 | int4 (weights of an autoregressive model, on a CPU).")]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="Logits that no batch and no number of positions changes, to the bit; slower.")
]
Compile = Annotated[bool, typer.Option("--compile", help="Faster calls of few positions; the first ones take seconds each.")]
Json = Annotated[bool, typer.Option("--json", help="End with one JSON object.")]


WIDE = 160  # columns of a table that goes into a pipe or a file


def console(as_json: bool = False) -> Console:
    """For tables: on the error stream beside JSON; where that is no terminal, wide enough that no column is lost."""
    made = Console(stderr=as_json)
    return made if made.is_terminal else Console(stderr=as_json, width=WIDE)


def load(
    name: str,
    device: str = "cpu",
    dtype: str = "float32",
    adapter: Path | list[Path] | None = None,
    deterministic: bool = False,
    compile: bool = False,
) -> Any:
    """A LanguageModel. InputError for a device or dtype that is not there, or an adapter of another base."""
    import torch

    from dlm.language_model import load

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"no device {device!r} here ({str(error).splitlines()[0]}): use --device cpu") from None
    return load(name, device=device, dtype=dtype, adapter=adapter, deterministic=deterministic, compile=compile)


def load_judge(name: str, device: str = "cpu") -> Any:
    """A LanguageModel with an exact likelihood. InputError for a diffusion model."""
    lm = load(name, device)
    if lm.is_diffusion:
        raise InputError(f"{name} is a diffusion model: a judge must be autoregressive, to have an exact likelihood")
    return lm


def judging(name: str, lm: Any, given: int = 0) -> Any:
    """Texts of `lm` (N, T) -> what each is worth under a judge: by token where the vocabulary is the same, else through text.

    given: tokens at the beginning that are not counted. InputError for a diffusion model, or one that cannot read the texts.
    """
    from dlm.evaluation import generative, judge
    from dlm.formats import native

    device = str(lm.network.device)
    try:
        ours = name in bundled.models() or native.is_ours(native.find(name))
    except InputError:
        ours = True  # the message of `load_judge` is better
    twin = load_judge(name, device) if ours else None
    if twin is None or twin.tokenizer.fingerprint() != lm.tokenizer.fingerprint():
        if given:
            raise InputError(f"{name} has a vocabulary of its own: it judges whole texts, not what comes after {given} tokens")
        bits = judge.of_transformers(name, device) if twin is None else judge.of_model(twin)
        return judge.figures(bits, lm.tokenizer.decode)
    if twin.window < lm.window:
        raise InputError(f"{name} reads windows of {twin.window}, {lm.name} writes {lm.window}: a judge needs windows at least as long")
    return generative.figures(twin.noise, twin.predict, given=given)


def named_models(words: str) -> str | dict[str, str]:
    """`NAME` for model L, or `M=NAME,L=NAME`. InputError for anything else."""
    if "=" not in words:
        return words
    pairs = [word.strip().partition("=") for word in words.split(",")]
    if any(not (len(key) == 1 and key.isupper() and name) for key, _, name in pairs) or len({key for key, _, _ in pairs}) < len(pairs):
        raise InputError(f"--light takes a model, or several by capital letters as in M=NAME,L=NAME; got {words!r}")
    return {key: name for key, _, name in pairs}


def prompt_lines(path: Path) -> list[str]:
    """The lines that hold something. InputError where there are none."""
    if not path.is_file():
        raise InputError(f"no prompts at {path}: give a text file with one on each line")
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start})") from None
    if not lines:
        raise InputError(f"{path} is empty: give one prompt on each line")
    return lines


def bar(label: str, total: int) -> Any:
    """A progress bar on the error stream with a method `forward(amount)`; nothing where that is no terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    class Bar(Progress):
        def forward(self, amount: int = 1) -> None:
            self.advance(self.task_ids[0], amount)

    made = Bar(TextColumn(label), BarColumn(), TimeRemainingColumn(), console=err, disable=not err.is_terminal, transient=True)
    made.add_task("", total=total)
    return made


def main() -> None:
    """Run a command; what the user can mend ends in one line and exit code 2, Ctrl-C in 130."""
    try:
        app()
    except (InputError, ModuleNotFoundError) as error:
        fail(str(error), 2)
    except OSError as error:
        hint = ": no space left, free some and go on" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        fail(f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}{hint}", 2)


def fail(message: str, code: int) -> NoReturn:
    """End in one line on the error stream."""
    print(f"dlm: {message}".replace("\n", " "), file=sys.stderr)
    sys.exit(code)
