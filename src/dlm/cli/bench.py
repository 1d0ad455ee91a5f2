"""`dlm bench decode`: what proposes best for an autoregressive model, on this machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dlm.cli.app import Device, Json, Seed, app, bar, load, prompt_lines
from dlm.errors import InputError

bench = typer.Typer(no_args_is_help=True, help="Measure speed on this machine.")
app.add_typer(bench, name="bench")

PROMPTS = (
    "ROMEO:\nBut soft, what light through yonder window breaks? It is the east,",
    "First Citizen:\nWe are accounted poor citizens, the patricians good.",
    "The king shall live. The king shall live. The king shall",
    "What say you to the matter of the people, and to the matter of the people",
)


@bench.callback()
def _group() -> None:
    """Measure speed on this machine."""


@bench.command()
def decode(
    base: Annotated[str, typer.Option(help="An autoregressive model.")] = "shakespeare-ar",
    methods: Annotated[str, typer.Option(help="Samplers with semicolons between; the plain one is always first.")] = "lookup:4;strided:4",
    adapter: Annotated[Path | None, typer.Option(help="What `dlm convert` made for this base.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file, a prompt a line; default: four of Shakespeare's kind.")] = None,
    batch: Annotated[str, typer.Option(help="Rows at once, with commas.")] = "1,4",
    new: Annotated[int, typer.Option(help="Tokens to write.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 1.0,
    rounds: Annotated[int, typer.Option(help="The least of so many is kept.")] = 3,
    seed: Seed = 0,
    as_json: Json = False,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 | bfloat16.")] = "float32",
) -> None:
    """Tokens a second and a call, acceptance by position, and whether the text is the plain sampler's, for each method and batch."""
    from dlm.evaluate import decoding

    lm = load(base, device, dtype, adapter)
    if lm.is_diffusion:
        raise InputError(f"{base} is a diffusion model: its samplers are compared by dlm calibrate")
    if rounds < 1 or new < 2:
        raise InputError(f"--rounds counts from 1 and --new from 2, got {rounds} and {new}")
    sizes, texts = _sizes(batch), PROMPTS if prompts is None else prompt_lines(prompts)
    words = list(dict.fromkeys(["autoregressive", *(word for word in methods.split(";") if word)]))
    samplers = {word: lm.sampler(sampler=word, temperature=temperature) for word in words}
    found: list[Any] = []
    with bar(f"decoding with {lm.name}", len(words) * len(sizes) * rounds) as progress:
        for rows in sizes:
            canvas = lm.canvas([texts[i % len(texts)] for i in range(rows)], max_new_tokens=new).to(device)
            found += decoding.compare(samplers, canvas, seed=seed, rounds=rounds, progress=progress.forward)
    Console(stderr=as_json).print(_table(found, words, sizes))
    if as_json:
        facts = {"base": lm.name, "adapter": str(adapter or ""), "new": new, "temperature": temperature, "seed": seed, "dtype": dtype}
        print(json.dumps(facts | {"rows": [one.record() for one in found]}))


def _sizes(batch: str) -> list[int]:
    try:
        sizes = [int(word) for word in batch.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise InputError(f"--batch is one or more numbers of rows with commas between, as in 1,4,16; got {batch!r}")
    return sizes


def _table(found: Sequence[Any], words: Sequence[str], sizes: Sequence[int]) -> Any:
    from rich.table import Table

    caption = "acceptance: of the 1st, 2nd ... proposal of a call; speed against the plain sampler of the same batch, in one run"
    table = Table(box=None, header_style="bold", caption=caption, caption_justify="left")
    table.add_column("method")
    for head in ("same text", "tokens/forward", "acceptance", "first token", *(f"tok/s, {rows}" for rows in sizes)):
        table.add_column(head, justify="right", no_wrap=True)
    by = {(one.method, one.batch): one for one in found}
    for word in words:
        own = [by[word, rows] for rows in sizes]
        speeds = []
        for one, rows in zip(own, sizes, strict=True):
            plain, rate = by["autoregressive", rows], one.tokens / one.seconds
            speeds.append(f"{rate:.0f} ({rate / (plain.tokens / plain.seconds):.2f}x)")
        accepted = " ".join(f"{a:.2f}" for a in own[0].accepted)
        same = "yes" if all(one.same for one in own) else "no"
        table.add_row(word, same, f"{own[0].per_call:.2f}", accepted, f"{own[0].first * 1000:.0f} ms", *speeds)
    return table
