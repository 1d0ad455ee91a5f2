"""`dlm bench decode`: the fastest way to write an autoregressive model's text on this machine, other engines beside our own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dlm.cli.app import (
    Compile,
    Deterministic,
    Device,
    Json,
    Seed,
    app,
    between,
    check_names,
    is_adapter,
    is_sampler,
    listed,
    prompt_lines,
    renamed,
)
from dlm.cli.tables import console, table
from dlm.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from dlm.bench.decoding import Decoding

bench = typer.Typer(no_args_is_help=True, help="Measure speed on this machine.")
app.add_typer(bench, name="bench")

BASELINE = "autoregressive"
SHORT = {"ar": BASELINE, "draft": "draft:int4:24", "ngram": "lookup:4", "mtp": "heads:4", "isd": "strided:4"}  # the names in papers
WHOLE, SHOWN = 4, 2  # draft tokens whose acceptance the table tells one by one, and the first ones where there are more


@bench.callback()
def _group() -> None:
    """Measure speed on this machine."""


@bench.command(cls=renamed({"--base": "MODEL", "--model": "MODEL", "-m": "MODEL", "--new": "--max-new-tokens"}))
def decode(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="An autoregressive model.")] = "shakespeare-ar",
    methods: Annotated[
        str, typer.Option(help="Samplers, with commas, or ar, draft, ngram, mtp, isd; the autoregressive baseline comes first.")
    ] = "lookup:4,strided:4",
    peers: Annotated[str, typer.Option(help="Other engines, with commas: transformers, llama.cpp. They need --temperature 0.")] = "",
    adapter: Annotated[Path | None, typer.Option(callback=is_adapter, help="Directory of `dlm convert` for this base.")] = None,
    heads: Annotated[
        Path | None, typer.Option(callback=is_adapter, help="Directory of `dlm convert --heads` for it, for the method heads:4.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file, a prompt a line; default: four of Shakespeare's kind.")] = None,
    kind: Annotated[str, typer.Option(help="Bundled prompts instead, with commas: story, question, summary, code.")] = "",
    batch: Annotated[str, typer.Option(help="Rows at once, with commas.")] = "1,4",
    max_new_tokens: Annotated[int, typer.Option(callback=between(2), help="Tokens to add.")] = 128,
    temperature: Annotated[float, typer.Option(callback=between(0), help="0 takes the likeliest token.")] = 1.0,
    top_k: Annotated[int, typer.Option(callback=between(0), help="Keep this many likeliest tokens; 0: all.")] = 0,
    rounds: Annotated[int, typer.Option(callback=between(1), help="The least time of so many is kept, after a warm-up.")] = 3,
    threads: Annotated[int, typer.Option(callback=between(0), help="Of the CPU, for all engines; 0: as many as torch takes.")] = 0,
    seed: Seed = 0,
    as_json: Json = False,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 | bfloat16 | int8 | int4; several with commas are compared.")] = "float32",
    deterministic: Deterministic = False,
    compile: Compile = False,
) -> None:
    """Compare samplers of an autoregressive model on this machine.

    Tokens a second and a forward pass, acceptance, memory, and whether the text is the baseline's, for each method and batch.
    """
    if kind and prompts is not None:
        raise InputError("--kind and --prompts both name the prompts: give one")
    sizes, asked = _sizes(batch), listed(methods, "--methods")
    words = list(dict.fromkeys(SHORT.get(word, word) for word in asked))
    lines = None if prompts is None else prompt_lines(prompts)
    for word in words:
        is_sampler(word)
    for word in dtype.split(","):
        check_names([model], word)
    import torch

    from dlm.cli.progress import showing
    from dlm.evaluation.card import dumps
    from dlm.workflows.bench import bundled_adapter
    from dlm.workflows.bench import decode as measure

    if threads:
        torch.set_num_threads(threads)
    if adapter is None and heads is None and {"isd", "mtp"} & set(asked):
        adapter = bundled_adapter(model)
    with showing(f"decoding with {model}") as progress:
        found = measure(
            model,
            methods=words,
            engines=[word for word in peers.split(",") if word],
            adapter=adapter,
            heads=heads,
            prompts=lines,
            kinds=[word for word in kind.split(",") if word],
            batches=sizes,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            rounds=rounds,
            seed=seed,
            device=device,
            dtypes=dtype.split(","),
            deterministic=deterministic,
            compile=compile,
            progress=progress,
        )
    out = console(as_json)
    for name in dict.fromkeys(row.kind for row in found.rows):
        out.print(_table([row for row in found.rows if row.kind == name], sizes))
    if as_json:
        print(dumps(found.record()))


def _sizes(batch: str) -> list[int]:
    try:
        sizes = [int(word) for word in batch.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise InputError(f"--batch is one or more numbers of rows with commas between, as in 1,4,16; got {batch!r}")
    return sizes


def _table(found: Sequence[Decoding], sizes: Sequence[int]) -> Table:
    """Of one kind of prompt: a row for each method, a column of speeds for each batch."""
    caption = (
        "acceptance: of the 1st, 2nd ... and of the last draft token of a forward pass (their number); memory: weights and KV cache\n"
        "of the first batch; same text: as the baseline of that dtype; speed against the first baseline of the same batch, in one run"
    )
    kind = found[0].kind
    speeds = [f"tok/s, {rows}" for rows in sizes]
    heads = [f"method, {kind}" if kind else "method", "same text", "tokens/forward", "acceptance", "first token", "memory", *speeds]
    made = table(*heads, caption=caption, width=max(len(one.method) for one in found), numbers=True)
    made.columns[heads.index("acceptance")].no_wrap = False  # it gives way, not the speeds
    by = {(one.method, one.batch): one for one in found}
    for method in dict.fromkeys(one.method for one in found):
        own = [by[method, rows] for rows in sizes if (method, rows) in by]
        speeds = [_speed(by[method, rows], by[BASELINE, rows]) if (method, rows) in by else "-" for rows in sizes]
        same = "yes" if all(one.same for one in own) else "no"
        per_pass = f"{own[0].per_pass:.2f}" if own[0].calls else "-"
        seconds, memory = f"{own[0].first * 1000:.0f} ms", f"{own[0].memory / 1e6:.0f} MB"
        made.add_row(method, same, per_pass, _acceptance(own[0].accepted), seconds, memory, *speeds)
    return made


def _speed(one: Decoding, baseline: Decoding) -> str:
    return f"{one.rate:.1f} ({one.rate / baseline.rate:.2f}x)"


def _acceptance(accepted: Sequence[float]) -> str:
    """Of the first draft tokens and the last: two dozen figures leave no room for the speed."""
    figures = [f"{share:.2f}" for share in accepted]
    return " ".join(figures if len(figures) <= WHOLE else [*figures[:SHOWN], "..", figures[-1], f"({len(figures)})"])
