"""`dlm chat`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dlm.cli.app import Compile, Device, Dtype, Seed, app, err, load, renamed
from dlm.errors import InputError


@app.command(cls=renamed(dict.fromkeys(("--base", "--model", "-m"), "MODEL")))
def chat(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model with a chat template: pulled name, directory, GGUF file, hub id.")
    ] = "smollm2-135m",
    system: Annotated[str | None, typer.Option(help="What the model is told first; default: what its template says.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep this many likeliest tokens; 0: all.")] = 0,
    lossless: Annotated[bool, typer.Option("--lossless", help="The same answers in fewer calls, as of dlm generate.")] = False,
    adapter: Annotated[Path | None, typer.Option(help="What `dlm convert` made for this base, for --lossless.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    compile: Compile = False,
) -> None:
    """Talk to a model, line by line. Ctrl-D or Ctrl-C ends it."""
    if max_new_tokens < 1:
        raise InputError(f"--max-new-tokens counts from 1, got {max_new_tokens}")
    lm = load(model, device, dtype, adapter, compile=compile)
    options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "sampler": "lossless" if lossless else None}
    if lossless:
        lm.prepare_lossless()
    lm.sampler(**options)  # what the model cannot do is told at once
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    lm.chat_prompt([*messages, {"role": "user", "content": ""}])  # a model without template is told at once
    try:
        while (line := _ask()) is not None:
            if not line.strip():
                continue
            messages.append({"role": "user", "content": line})
            try:
                canvas = lm.chat_canvas(messages, max_new_tokens=max_new_tokens)
            except InputError as error:
                err.print(str(error), markup=False, highlight=False)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": _answer(lm, canvas, seed, **options)})
    except KeyboardInterrupt:
        print()


def _ask() -> str | None:
    """The next line, None at the end; a prompt only where somebody sits."""
    if sys.stdin.isatty():
        print("> ", end="", flush=True)
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def _answer(lm: Any, canvas: Any, seed: int, **options: Any) -> str:
    """Print the answer as it comes, return it."""
    shown, row = "", canvas.free_BT[0]
    for frame in lm.stream(canvas=canvas, seed=seed, **options):
        ids = frame.tokens_BT[0].cpu()[row & frame.settled_BT[0].cpu()].tolist()
        text = lm.tokenizer.decode([i for i in ids if i not in lm.stops])
        if not text.endswith("\ufffd"):  # half a character: its other bytes are still to come
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()
    return shown
