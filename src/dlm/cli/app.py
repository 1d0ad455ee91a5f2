"""The application, the options that the verbs share, and how errors reach the user.

Conventions: the model is an argument, MODEL, of every verb; lists take commas; the settings of a sampler stand after colons. An old
spelling works for one version, with a warning that says the new one: `renamed` for options, `listed` for separators.
"""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import platform
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperCommand
from typer.models import CommandInfo

import dlm
from dlm import bundled, seeds
from dlm.errors import InputError, nearest
from dlm.files import check_target, check_there, read_text
from dlm.sampling import registry

if TYPE_CHECKING:
    from dlm.language_model import LanguageModel
    from dlm.language_model.protocols import Model
    from dlm.sampling.autoregressive.draft import Draft

app = typer.Typer(
    name="dlm",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
err = Console(stderr=True)


def between(low: float, high: float = math.inf) -> Callable[[float | None], float | None]:
    """A check of an option's value, for its `callback`: without torch, and before any work."""

    def check(value: float | None) -> float | None:
        if value is not None and not low <= value <= high:
            limits = f"be at least {low:g}" if high == math.inf else f"lie in {low:g} .. {high:,.15g}"
            raise typer.BadParameter(f"must {limits}, got {value}")
        return value

    return check


def _seed(value: int) -> int:
    try:
        return seeds.check(value)
    except InputError as error:
        raise typer.BadParameter(str(error)) from None


def one_of(*names: str) -> Callable[[str], str]:
    """A check as `between`, for a word out of a few."""

    def check(value: str) -> str:
        if value not in names:
            raise typer.BadParameter(f"must be {' or '.join(names)}, got {value!r}{nearest(value, names)}".removesuffix("?"))
        return value

    return check


def is_file_name(value: Path | None) -> Path | None:
    """A check as `between`, for a file to write: its directory is there, and it is none itself."""
    if value is not None:
        check_target(value)
    return value


def is_run_name(value: Path | None) -> Path | None:
    """A check as `between`, for a run to save."""
    if value is not None and value.suffix not in ("", ".traj"):
        raise InputError(f"--save writes a run, as in --save run.traj; dlm show run.traj --gif run.gif draws it (got {value})")
    return is_file_name(value)


def is_card(value: Path | None) -> Path | None:
    """A check as `between`, for a file whose directory is made where there is none."""
    if value is not None:
        check_target(value, makes=True)
    return value


def are_runs(value: list[Path]) -> list[Path]:
    """A check as `between`, for files that `dlm generate --save` wrote."""
    for path in value:
        check_there(path, f"make one with dlm generate --save {path}")
    return value


def is_adapter(value: Path | None) -> Path | None:
    """A check as `between`, for an adapter or heads: a directory, a bundled name, or `auto`."""
    if value is not None and not value.is_dir() and str(value) not in ("auto", *bundled.adapters()):
        names = ", ".join(bundled.adapters()) or "none"
        raise InputError(f"no adapter {str(value)!r}: give a directory that dlm convert made, auto, or a bundled one ({names})")
    return value


def is_plot(value: Path | None) -> Path | None:
    """A check as `between`, for a picture of curves."""
    if value is not None:
        from dlm.viz.plots import check

        check(value)
    return value


def is_text(value: str | None) -> str | None:
    """A check as `between`, for the text of `--data`: its files are there. A data set of the hub is looked for later."""
    from dlm.train import data_kinds

    if value is not None and not value.startswith("hf:") and not data_kinds.is_word(value):
        bundled.text_files(value)
    return value


def is_sampler(value: str | None) -> str | None:
    """A check as `between`, for a sampler with its settings. Which models it suits is told once the model is known."""
    if value is not None:
        registry.check(value.replace(",", ":"))  # a comma is an old spelling
    return value


Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.", rich_help_panel="Machine")]
Seed = Annotated[int, typer.Option(callback=_seed, help="The same seed on the same machine gives the same output; -2**63 .. 2**63 - 1.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="float32, bfloat16; int8 or int4: quantized weights of an autoregressive model, on a CPU.", rich_help_panel="Machine"
    ),
]
Deterministic = Annotated[
    bool,
    typer.Option("--deterministic", help="Batch-invariant: logits bitwise identical in every batch; slower.", rich_help_panel="Machine"),
]
Compile = Annotated[
    bool,
    typer.Option("--compile", help="torch.compile for forward passes of few positions; the first take seconds.", rich_help_panel="Machine"),
]
EVERY_CORE = "OMP_NUM_THREADS, or one for each core"
AllThreads = Annotated[
    int, typer.Option(callback=between(0), show_default=EVERY_CORE, help="Threads of the CPU.", rich_help_panel="Machine")
]
Threads = Annotated[
    int,
    typer.Option(
        callback=between(0),
        show_default=f"one for forward passes under 10 ms, else {EVERY_CORE}",
        help="Threads of the CPU.",
        rich_help_panel="Machine",
    ),
]
FamilyOption = Annotated[
    str,
    typer.Option(
        "--family",
        show_default="by its config",
        help="Read another project's checkpoint as of this family, where its config does not say: open-dcoder, diffullama, i-dlm ...",
        rich_help_panel="Machine",
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        show_default="official for another project's checkpoint",
        help="official: the reference sampler of such a checkpoint, with the settings of its model card.",
        rich_help_panel="Sampling",
    ),
]
BridgeOption = Annotated[
    str,
    typer.Option(
        "--bridge",
        show_default="none",
        help="`transformers`: read a DiffusionGemma with the class that transformers ships.",
        rich_help_panel="Machine",
    ),
]
Split = Annotated[str, typer.Option(callback=one_of("train", "val", "all"), help="train | val | all.")]
ValFraction = Annotated[float, typer.Option(callback=between(0, 1), help="Last part of the text that is `val`.")]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="With --bridge transformers: run the code that a checkpoint brings.", rich_help_panel="Machine"
    ),
]
DeviceMap = Annotated[
    str,
    typer.Option(
        "--device-map",
        show_default="none",
        help="`auto`: spread the model over GPUs, memory and disk, as it fits.",
        rich_help_panel="Machine",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="End with one JSON object.")]
SAMPLING, DRAFTING = "Sampling", "Speculative decoding (autoregressive models)"  # panels of the help
OWN = "the model's own, else all"  # the default of an option that generation_config.json may set
TopP = Annotated[
    float | None,
    typer.Option(
        callback=between(0, 1), show_default=OWN, help="Keep the likeliest tokens up to this probability.", rich_help_panel=SAMPLING
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(callback=between(0), show_default=OWN, help="Keep this many likeliest tokens; 0: all.", rich_help_panel=SAMPLING),
]
DraftOption = Annotated[
    str | None,
    typer.Option(
        "--draft",
        help="Drafter: adapter, ngram, heads, self:int8, self:int4 (quantized weights), or a draft model's directory or name.",
        rich_help_panel=DRAFTING,
    ),
]
DraftTokens = Annotated[
    str | None,
    typer.Option(show_default="auto", help="Draft tokens that a forward pass verifies; auto: as many as pay.", rich_help_panel=DRAFTING),
]
DraftTree = Annotated[
    int, typer.Option(callback=between(0), help="Nodes of a draft tree, of adapter and heads; 0: a chain.", rich_help_panel=DRAFTING)
]
Lossless = Annotated[
    bool, typer.Option("--lossless", help="The drafter that is fastest for this model; the text stays the same.", rich_help_panel=DRAFTING)
]
Adapter = Annotated[
    Path | None,
    typer.Option(
        callback=is_adapter, help="What `dlm convert` made for the model: directory, bundled name, auto.", rich_help_panel=DRAFTING
    ),
]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"dlm {dlm.__version__} (Python {platform.python_version()}, torch {metadata.version('torch')})")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_version)] = False,
) -> None:
    """Diffusion language models: train, sample, watch, measure.

    Begin with: dlm generate "ROMEO:" --watch
    """


def arrange(panels: Mapping[str, Sequence[str]]) -> None:
    """Give the help a panel for each group of verbs, in this order."""
    order = {verb: (place, panel) for place, (panel, verb) in enumerate((panel, verb) for panel, verbs in panels.items() for verb in verbs)}

    last = (len(order), "More")

    def verb(info: CommandInfo) -> str:
        return info.name or info.callback.__name__ if info.callback is not None else ""

    app.registered_commands.sort(key=lambda info: order.get(verb(info), last))
    for info in app.registered_commands:
        info.rich_help_panel = order.get(verb(info), last)[1]
    for group in app.registered_groups:
        group.rich_help_panel = order.get(str(group.name), last)[1]


def renamed(old: Mapping[str, str]) -> type[TyperCommand]:
    """A command class whose old spellings still work, each with a warning on the error stream that says the new one.

    old: from the old name of an option to its new one (`--max-new-tokens`), or to the argument that it has become (`MODEL`).
    InputError where that argument is given as well.
    """

    class Renamed(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            kept, moved = _respelt(ctx.command_path, args, old)
            ctx.default_map = {**(ctx.default_map or {}), **{metavar.lower(): value for metavar, value in moved.items()}}
            rest = super().parse_args(ctx, kept)
            for metavar in moved:
                if ctx.get_parameter_source(metavar.lower()).name != "DEFAULT_MAP":
                    raise InputError(f"{metavar} is given twice: write {ctx.command_path} {metavar}")
            return rest

    return Renamed


def _respelt(command: str, args: list[str], old: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """The words in the new spelling, and the values of options that became arguments by the metavar of these."""
    kept: list[str] = []
    moved: dict[str, str] = {}
    words = iter(args)
    for word in words:
        if word == "--":
            return [*kept, word, *words], moved
        name, equals, value = word.partition("=")
        new = old.get(name, "")
        if not new:
            kept.append(word)
        elif new.startswith("-"):
            warn_old(name, new)
            kept.append(f"{new}{equals}{value}")
        else:
            value = value if equals else next(words, "")
            warn_old(f"{name} {value}", f"{command} {value}")
            moved[new] = value
    return kept, moved


def warn_old(old: str, new: str) -> None:
    """One line on the error stream: this spelling works in this version and no longer in the next."""
    print(f"warning: {old} is an old spelling, which the next version drops: write {new}".replace("\n", " "), file=sys.stderr)


def listed(words: str, option: str) -> list[str]:
    """The parts of a list with commas. Old spellings with a warning: semicolons, a sampler's settings after a comma (`lookup:8,0.2`)."""
    parts = [part.strip() for part in re.split("[,;]", words)]
    kept: list[str] = []
    for part in filter(None, parts):
        if kept and ":" in kept[-1] and SETTING.fullmatch(part):
            kept[-1] += f":{part}"
        else:
            kept.append(part)
    if ";" in words or len(kept) < len([part for part in parts if part]):
        warn_old(f"{option} {words!r}", repr(",".join(kept)))
    return kept


def note(text: str) -> None:
    """Dim words beside the result, on standard error."""
    err.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def one_name(name: str | None, model: str | None) -> str | None:
    """The model, named behind the prompt or by --model. InputError for both."""
    if name is not None and model is not None:
        raise InputError(f"the model is given twice, {name} and --model {model}: leave one away")
    return name or model


def sampler_word(word: str | None) -> str | None:
    """A sampler with its settings after colons; after commas with a warning."""
    if word is None or "," not in word:
        return word
    new = word.replace(",", ":")
    warn_old(f"--sampler {word}", f"--sampler {new}")
    return new


def drafting(draft: str | None, tokens: str | None, tree: int) -> Draft | None:
    """The drafter that --draft, --draft-tokens and --draft-tree mean. InputError for numbers without a drafter."""
    from dlm.sampling.autoregressive.draft import Draft

    if draft is None:
        if tokens is not None or tree:
            raise InputError(f"{'--draft-tree' if tree else '--draft-tokens'} is for a drafter: add --draft ngram, or another one")
        return None
    if tokens not in (None, "auto") and not str(tokens).isdecimal():
        raise InputError(f"--draft-tokens is a whole number or auto, got {tokens!r}")
    return Draft.parse(draft, tokens=None if tokens in (None, "auto") else int(str(tokens)), tree=tree)


SETTING = re.compile(r"[0-9.]+(x[0-9]+)?|auto")  # of a sampler, after a colon


def load(
    name: str,
    device: str = "cpu",
    dtype: str = "float32",
    adapter: Path | list[Path] | None = None,
    deterministic: bool = False,
    compile: bool = False,
    family: str = "",
    bridge: str = "",
    trust_remote_code: bool = False,
    device_map: str = "",
) -> LanguageModel:
    """InputError for a model, device or dtype that is not there, or an adapter of another base."""
    check_names([name], dtype)
    from dlm.language_model import load
    from dlm.workflows.inputs import check_device

    check_device(device)
    how: dict[str, Any] = {"deterministic": deterministic, "compile": compile, "family": family, "bridge": bridge}
    how |= {"trust_remote_code": trust_remote_code, "device_map": device_map}
    lm = load(name, device=device, dtype=dtype, adapter=adapter, **how)
    if (dtype, device, lm.is_diffusion) == ("float32", "cpu", False):
        _hint_bits(name)
    return lm


FEW_BITS = 6.0  # of a weight on average, in a file whose weights would lose little as int4


def _hint_bits(name: str) -> None:
    """A line for a file of few bits a weight, which float32 makes large. SmolLM2-135M, Q4_1: 538 MB as float32, 265 MB as int4."""
    from dlm.formats import gguf
    from dlm.formats.find import here

    path = here(name)
    if path is not None and path.suffix == ".gguf" and (bits := gguf.bits(path)) < FEW_BITS:
        line = f"{path.name} spends {bits:.1f} bits on a weight, and float32 spends 32: --dtype int4 takes about half the memory"
        note(line)


def set_threads(asked: int, models: Iterable[Model], rows: int = 1) -> None:
    """As many as asked for; where that is 0, as a forward pass of `rows` texts of the largest of these models is worth."""
    from dlm.inference.threads import use_threads

    use_threads(asked, [(lm.network, rows * (lm.window if lm.is_diffusion else 1)) for lm in models])


def check_names(models: Iterable[str], dtype: str = "float32") -> None:
    """InputError for a model or dtype that is not there, before torch is loaded."""
    from dlm.formats.find import here
    from dlm.language_model.options import check_dtype

    check_dtype(dtype)
    for name in models:
        here(name)


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
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{path} is empty: give one prompt on each line")
    return lines


def given_text(words: str) -> str:
    """The words themselves, or for `-` all of standard input, without the line break at its end."""
    return sys.stdin.read().removesuffix("\n") if words == "-" else words


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Gives a function that tells whether Ctrl-C was pressed: work ends between two steps, none is kept by halves. A second one raises
    KeyboardInterrupt at once."""
    pressed = False

    def note(_number: int, _frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # as a shell's background jobs inherit it
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Ctrl-C in this work ends in the line that the work itself gives, if it gives one; elsewhere it ends in a plain one."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        fail(str(stopped) or "stopped", INTERRUPTED)


INTERRUPTED = 128 + 2
"""The exit code after Ctrl-C, as a shell reports SIGINT."""
READER_GONE = 128 + 13
"""The exit code where the program that reads the output has left, as a shell reports SIGPIPE."""


def main() -> None:
    """Run a command; an error that the user can mend ends in one line and exit code 2, Ctrl-C in 130, a closed pipe in 141."""
    _open_streams()
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        code = _run()
    except BrokenPipeError:
        code = READER_GONE
    except KeyboardInterrupt:  # before typer listens
        code = INTERRUPTED
    except SystemExit as end:
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        code = READER_GONE  # rich and typer end in 1
    finally:
        _close_streams()
    sys.exit(code)


def _open_streams() -> None:
    """Any bytes can be read, so that a text says by itself that it is not UTF-8; any text can be written, as escapes in the worst case."""
    for name, mode, errors in (("stdin", "r", "surrogateescape"), ("stdout", "w", "backslashreplace"), ("stderr", "w", "backslashreplace")):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _close_streams() -> None:
    """Nothing is left to write when the interpreter ends: it would complain of a reader that has left, and of a full disk again."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run() -> int:
    """The exit code. SystemExit for errors, after their line."""
    try:
        code = app(prog_name="dlm", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except (InputError, ModuleNotFoundError) as error:
        fail(str(error), 2)
    except typer.TyperException as error:
        fail(_usage(error), error.exit_code)
    except OSError as error:
        hint = ": no space left, free some and go on" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        fail(f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}{hint}", 2)
    if code == INTERRUPTED:
        fail("stopped", INTERRUPTED)
    return code if isinstance(code, int) else 0


def _usage(error: typer.TyperException) -> str:
    """An error of the command line itself in one line; empty where the help has been printed instead."""
    message = error.format_message()
    context = getattr(error, "ctx", None)
    end = " (" if message.endswith("?") else "; "
    hint = f"{end}see {context.command_path} --help{')' if end == ' (' else ''}" if context is not None else ""
    return f"{message[:1].lower()}{message[1:].rstrip('.')}{hint}" if message else ""


def fail(message: str, code: int) -> NoReturn:
    """End in one line on the error stream, or in none for an empty message."""
    if message:
        print(f"dlm: {message}".replace("\n", " "), file=sys.stderr)
    sys.exit(code)
