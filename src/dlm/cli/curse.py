"""`dlm curse`: what drawing several tokens a step costs, from one curve and measured for each sampler."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dlm.cli.app import Device, Json, Seed, app, bar, console, err, load
from dlm.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_SIZES = (1, 4, 16, 64)
LEGEND = (
    "Bits per character lost. equal: random positions in equal steps, by the entropies of the model; best: in the best steps; "
    "text: as equal, by the cross-entropy, which the bound on this text loses. The samplers are measured, with 95 %."
)


@app.command()
def curse(
    model: Annotated[str, typer.Argument(help="A masked diffusion model: bundled name, directory or hub id.")],
    data: Annotated[
        str | None, typer.Option(help="Text file, folder of .txt files, or hf:DATASET; default: what the model learned.")
    ] = None,
    split: Annotated[str, typer.Option(help="train | val | all.")] = "val",
    val_fraction: Annotated[float, typer.Option(help="Last part of the text that is `val`.")] = 0.1,
    sampler: Annotated[str, typer.Option(help="Samplers to measure, with commas: ancestral, topk, confidence:0.9 ...")] = "ancestral,topk",
    tokens_per_step: Annotated[
        str | None, typer.Option(help="Numbers of tokens a step, with commas; default: those of 1,4,16,64 that the window holds.")
    ] = None,
    max_windows: Annotated[int, typer.Option(help="At most this many windows, spread evenly over the text.")] = 8,
    plot: Annotated[Path | None, typer.Option(help="Write the curves as .png, .svg or .pdf (viz extra).")] = None,
    seed: Seed = 0,
    as_json: Json = False,
    device: Device = "cpu",
) -> None:
    """Measure the curse of parallel decoding: the bits per character lost when several tokens are drawn at once."""
    from dlm.evaluation import order_cost, parallel_decoding
    from dlm.noise.masked import MaskedNoise
    from dlm.sampling import registry
    from dlm.sampling.draw import Draw
    from dlm.train import data as reading

    if plot is not None:
        from dlm.viz.plots import check

        check(plot)  # before the work, not after it
    lm = load(model, device)
    if not (lm.is_diffusion and isinstance(lm.noise, MaskedNoise)):
        raise InputError(f"{model} is no masked diffusion model: the price of parallel decoding is counted in masks")
    if lm.is_causal:
        raise InputError(f"{model} is a model of block diffusion: random tokens that are known are not what it sees")
    sizes = _sizes(tokens_per_step, lm.window)
    rules = {word: registry.make(word, Draw(), lm.noise) for word in sampler.split(",")}
    for rule in rules.values():
        parallel_decoding.check(rule)
    source = lm.config.training.get("data", "") if data is None else data
    stream = reading.Stream.encode(reading.select(reading.read(source), split, val_fraction), lm.tokenizer, lm.window)
    windows_WT = stream.windows(max_windows).to(device)
    if len(windows_WT) < 2:
        raise InputError(f"the spread over windows is the error: give 2 windows of {lm.window} tokens at least, here are {len(windows_WT)}")
    characters = sum(len(lm.tokenizer.decode(row)) for row in windows_WT.tolist()) / windows_WT.numel()
    with bar(f"the curve of {lm.name}", order_cost.curve_rows(*windows_WT.shape)) as progress:
        curve = order_cost.entropy_curve(lm.noise, lm.predict, windows_WT, seed=seed, progress=progress.forward)
    batch, found = 4 if device == "cpu" else 64, {}
    with bar(f"drawing with {lm.name}", len(rules) * len(sizes) * len(windows_WT)) as progress:
        for word, rule in rules.items():
            for size in sizes:
                each = parallel_decoding.curse(
                    lm.noise, lm.predict, windows_WT, rule, size, seed=seed, batch=batch, progress=progress.forward
                )
                found[word, size] = each.bits_per_char(characters).record()
    bits = 1 / (characters * math.log(2))
    entropy_WT, text_WT = curve.every(curve.entropy_WK) * bits, curve.every(curve.text_WK) * bits
    rows: list[dict[str, Any]] = []
    powers = {2**k for k in range(sizes[-1].bit_length())}  # the curve prices these at no cost
    for size in sorted(powers | set(sizes)):
        steps = -(-lm.window // size)
        equal = order_cost.equal_steps(lm.window, steps)
        prices = (order_cost.price(entropy_WT, equal), order_cost.best_price(entropy_WT, steps), order_cost.price(text_WT, equal))
        priced = {name: _mean(price_W / lm.window) for name, price_W in zip(("equal", "best", "text"), prices, strict=True)}
        rows.append(
            {"tokens_per_step": size, "steps": steps} | priced | {"measured": {word: found[word, size] for word in rules if size in sizes}}
        )
    plan = order_cost.best_steps(order_cost.smooth(entropy_WT.mean(0)), -(-lm.window // sizes[-1]))
    bound = _mean(text_WT.mean(-1))
    out = console(as_json)
    facts = f"{len(windows_WT)} windows of {lm.window} tokens, {characters:.2f} characters each; the text costs <= {bound['mean']:.3f}."
    out.print(_table(rows, list(rules), f"{LEGEND} {facts}"))
    out.print(f"best sizes of {len(plan)} steps: {', '.join(map(str, plan))}", highlight=False, soft_wrap=True)
    levels = {"known": curve.known_K.tolist(), "entropy": _means(curve.entropy_WK * bits), "text": _means(curve.text_WK * bits)}
    if plot is not None:
        from dlm.viz.plots import curse_plot

        curse_plot(rows, levels, lm.window, plot)
        err.print(f"wrote {plot}", highlight=False)
    if as_json:
        record = {"model": lm.name, "data": source, "split": split, "windows": len(windows_WT), "window": lm.window, "seed": seed}
        record |= {"characters_per_token": characters, "bound": bound, "rows": rows, "best_steps": plan, "curve": levels}
        print(json.dumps(record))


def _sizes(text: str | None, window: int) -> list[int]:
    """Ascending, each once."""
    if text is None:
        return [size for size in DEFAULT_SIZES if size <= window]
    try:
        sizes = sorted({int(word) for word in text.split(",")})
    except ValueError:
        raise InputError(f"tokens per step are whole numbers with commas between, not {text!r}") from None
    if not 1 <= sizes[0] <= sizes[-1] <= window:
        raise InputError(f"tokens per step lie in 1 .. {window}, the window of this model; got {text}")
    return sizes


def _mean(values_W: Tensor) -> dict[str, float]:
    from dlm.evaluation.statistics import Mean

    return Mean.of(values_W).record()


def _means(values_WK: Tensor) -> dict[str, list[float]]:
    pairs = [_mean(values_W) for values_W in values_WK.T]
    return {name: [pair[name] for pair in pairs] for name in ("mean", "band95")}


def _table(rows: Sequence[dict[str, Any]], words: Sequence[str], caption: str) -> Any:
    from rich.table import Table

    table = Table(box=None, header_style="bold", caption=caption, caption_justify="left")
    for head in ("tokens/step", "steps", "equal", "best", "text", *words):
        table.add_column(head, no_wrap=True, justify="right")
    for row in rows:
        cells = [f"{row[name]['mean']:.4f}" for name in ("equal", "best", "text")]
        cells += [f"{pair['mean']:.4f} +- {pair['band95']:.4f}" if (pair := row["measured"].get(word)) else "" for word in words]
        table.add_row(str(row["tokens_per_step"]), str(row["steps"]), *cells)
    return table
