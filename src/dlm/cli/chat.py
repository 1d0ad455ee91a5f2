"""`dlm chat`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from dlm.cli.app import (
    Adapter,
    BridgeOption,
    Compile,
    Device,
    DeviceMap,
    DraftOption,
    DraftTokens,
    DraftTree,
    Dtype,
    FamilyOption,
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
    interrupts,
    load,
    note,
    renamed,
    set_threads,
)
from dlm.errors import InputError

if TYPE_CHECKING:
    from dlm.language_model import LanguageModel
    from dlm.language_model.options import DecodingOptions
    from dlm.trajectory import Canvas


@app.command(cls=renamed(dict.fromkeys(("--base", "--model", "-m"), "MODEL")))
def chat(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model with a chat template: pulled name, directory, GGUF file, hub id.")
    ] = "smollm2-135m",
    system: Annotated[str | None, typer.Option(show_default="that of its template", help="The system prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(callback=between(1), help="Tokens of an answer at most.")] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(callback=between(0), show_default="that of the base, else 0", help="0 takes the likeliest token."),
    ] = None,
    preset: Preset = None,
    top_p: TopP = None,
    top_k: TopK = None,
    draft: DraftOption = None,
    draft_tokens: DraftTokens = None,
    draft_tree: DraftTree = 0,
    lossless: Lossless = False,
    adapter: Adapter = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    compile: Compile = False,
    family: FamilyOption = "",
    bridge: BridgeOption = "",
    trust_remote_code: TrustOption = False,
    device_map: DeviceMap = "",
    threads: Threads = 0,
) -> None:
    """Talk to a model, line by line; /help lists the commands.

    Ctrl-C stops an answer, and ends the chat where none is being written; so does Ctrl-D.
    """
    drafter = drafting(draft, draft_tokens, draft_tree)
    if lossless and drafter is not None:
        raise InputError("--lossless chooses the drafter: leave --draft away")
    from dlm.language_model.options import DecodingOptions

    lm = load(model, device, dtype, adapter, False, compile, family, bridge, trust_remote_code, device_map)
    set_threads(threads, [lm])
    if lossless:
        lm.prepare_lossless()
    sampler = "lossless" if lossless else None
    given = DecodingOptions(temperature=temperature, top_p=top_p, top_k=top_k, sampler=sampler, preset=preset, draft=drafter)
    options = lm.for_chat(given)
    lm.build(lm.resolve(options))  # an error of the options is told before the first question
    messages = [{"role": "system", "content": system}] if system else []
    lm.prompting.conversation([*messages, {"role": "user", "content": ""}])  # so are template and system prompt
    if sys.stdin.isatty():
        note(f"{lm.name}, {max_new_tokens} tokens an answer at most. {BANNER}")
    try:
        _talk(lm, messages, options, max_new_tokens, seed)
    except KeyboardInterrupt:
        print()


COMMANDS = {"/help": "list the commands", "/clear": "begin a new conversation", "/quit": "end"}
BANNER = "/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends."


def _talk(lm: LanguageModel, messages: list[dict[str, str]], options: DecodingOptions, max_new_tokens: int, seed: int) -> None:
    """Questions and answers until the input ends. messages: what is said before the first question."""
    beginning = list(messages)
    while (line := _ask()) is not None and line.strip() != "/quit":
        match line.strip():
            case "":
                continue
            case "/help":
                note("\n".join(f"{name:8} {about}" for name, about in COMMANDS.items()) + f"\n{BANNER}")
                continue
            case "/clear":
                messages = list(beginning)
                note("a new conversation")
                continue
        messages.append({"role": "user", "content": line})
        try:
            canvas = lm.chat_canvas(messages, max_new_tokens=max_new_tokens)
        except InputError as error:
            note(f"{error}{' with /clear' if len(messages) > len(beginning) + 1 else ''}")
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": _answer(lm, canvas, options, seed)})


def _ask() -> str | None:
    """The next line, None at the end; a prompt only where somebody sits."""
    if sys.stdin.isatty():
        print("> ", end="", flush=True)
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def _answer(lm: LanguageModel, canvas: Canvas, options: DecodingOptions, seed: int) -> str:
    """Print the answer as it comes, from left to right and up to its end or to Ctrl-C, and return it."""
    text = shown = ""
    first = int(canvas.free_BT[0].int().argmax())
    run = lm.run(canvas, options, seed=seed)
    with interrupts() as stopped:
        while not stopped() and (frame := run.step()) is not None:
            settled_T = frame.settled_BT[0, first:].cpu()
            ids = frame.tokens_BT[0, first:].cpu()[settled_T.cummin(0).values].tolist()
            text = lm.tokenizer.decode(ids[: next((n for n, i in enumerate(ids) if i in lm.stops), len(ids))])
            if not text.endswith("\ufffd"):  # half a character: its other bytes are still to come
                print(text[len(shown) :], end="", flush=True)
                shown = text
        print(text[len(shown) :])  # parts of a character whose rest did not come
        if stopped():
            note("stopped; what stands there is kept as the answer")
    return text
