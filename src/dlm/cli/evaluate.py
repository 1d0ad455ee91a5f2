"""`dlm eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dlm.cli.app import Device, Json, Seed, app, bar, console, load

LOGITS = 1 << 27  # numbers that one call of a large vocabulary may give


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Bundled name, directory or hub id.")],
    data: Annotated[str, typer.Option(help="Text file, folder of .txt files, or hf:DATASET.")],
    split: Annotated[str, typer.Option(help="train | val | all.")] = "val",
    val_fraction: Annotated[float, typer.Option(help="Last part of the text that is `val`.")] = 0.1,
    against: Annotated[str | None, typer.Option(help="A second model, measured on the same text.")] = None,
    estimator: Annotated[
        str, typer.Option(help="any-order (masks) | counted (replacement noise) | continuous | discrete; auto: the first that applies.")
    ] = "auto",
    block_lengths: Annotated[str, typer.Option(help="Of block diffusion, with commas, a bound for each; default: the model's own.")] = "",
    window: Annotated[
        int | None,
        typer.Option(help="Of autoregressive models: cut the text into pieces of so many tokens, each read from its beginning."),
    ] = None,
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

    from dlm.errors import InputError
    from dlm.evaluation import card as cards
    from dlm.evaluation import likelihood
    from dlm.train import data as reading

    documents = reading.select(reading.read(data), split, val_fraction)
    table = Table("model", "nats per token", "bits per char", "stderr", "kind", box=None, header_style="bold")
    records = []
    try:
        lengths = [int(n) for n in block_lengths.split(",") if n]
    except ValueError:
        raise InputError(f"--block-lengths {block_lengths}: give whole numbers with commas, as in 1,4,16") from None
    if card is not None and len(lengths) > 1:
        raise InputError("--card names one file, and each of --block-lengths gets a card: leave --card away")
    entries = [(model, length) for length in lengths or [0]] + ([(against, 0)] if against else [])
    for name, length in entries:
        lm = load(name, device)
        if length and not lm.is_causal:
            raise InputError(f"{name} is no model of block diffusion: leave --block-lengths away")
        length = length or (lm.config.network.block_length if lm.is_causal else 0)
        if window is not None and (lm.is_diffusion or not 2 <= window <= lm.window):
            why = "is a diffusion model, whose window is part of it" if lm.is_diffusion else f"reads 2 to {lm.window} tokens"
            raise InputError(f"--window {window}: {name} {why}")
        stream = reading.Stream.encode(documents, lm.tokenizer, window or lm.window)
        windows_WT = stream.windows(max_windows)
        characters = sum(len(lm.tokenizer.decode(row)) for row in windows_WT.tolist())
        if lm.is_diffusion and estimator not in likelihood.ESTIMATORS:
            raise InputError(f"unknown estimator {estimator!r}; known: {', '.join(likelihood.ESTIMATORS)}")
        kind = estimator if lm.is_diffusion else "autoregressive"
        progress = bar(f"measuring {lm.name}", len(windows_WT) * (passes if lm.is_diffusion else 1))
        with progress:
            result = likelihood.evaluate(
                lm.noise,
                lm.predict,
                windows_WT.to(device),
                characters=characters,
                estimator=kind,
                passes=passes,
                steps=steps,
                seed=seed,
                beside=lm.predict_beside if length else None,
                block_length=length,
                reads_time=lm.config.network.time_conditioning,
                progress=progress.forward,
                batch=max(1, min(32, LOGITS // (stream.window * lm.config.network.vocab_size))),
            )
        record = result.record() | {"model": lm.name} | ({"block_length": length} if length else {})
        sign = "<= " if result.is_bound else ""
        table.add_row(
            f"{lm.name}, blocks of {length}" if length else lm.name,
            f"{sign}{result.nats_per_token:.4f}",
            f"{sign}{result.bits_per_char:.4f}",
            f"{result.stderr:.4f}",
            result.estimator,
        )
        suffix = f"-blocks{length}" if lengths and name == model else ""
        place = card if card and name == model else Path("runs/eval") / f"{lm.name}-{split}{suffix}.json"
        facts = {"source": data, "split": split, "fingerprint": stream.fingerprint(), "windows": len(windows_WT)}
        chosen = {
            "estimator": result.estimator,
            "passes": result.samples,
            "steps": steps if kind == "discrete" else None,
            "window": stream.window,
            "block_length": length or None,
        }
        cards.write(cards.make(record, device=device, dtype="float32", seed=seed, settings=chosen, data=facts), place)
        record["card"] = str(place)
        records.append(record)
    console(as_json).print(table)
    if as_json:
        rest: dict[str, object] = {"against": records.pop()} if against else {}
        print(cards.dumps((records[0] if len(records) == 1 else {"block_lengths": records}) | rest))
