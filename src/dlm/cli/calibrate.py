"""`dlm calibrate`: measure the samplers of a model, for `--sampler auto`."""

from __future__ import annotations

import itertools
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dlm.cli.app import Device, Json, Seed, app, bar, console, err, load, load_judge
from dlm.errors import InputError

if TYPE_CHECKING:
    from dlm.calibration.table import Calibration


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="Bundled name or directory of a masked model.")],
    judge: Annotated[str, typer.Option(help="An autoregressive model of the same vocabulary.")] = "shakespeare-ar",
    samples: Annotated[int, typer.Option("--samples", "-n", help="Texts for each setting, a window long.")] = 8,
    temperature: Annotated[float, typer.Option(help="Of every setting.")] = 1.0,
    retime: Annotated[bool, typer.Option(help="Only measure the seconds of the table that is there again, in turns.")] = False,
    quick: Annotated[bool, typer.Option(help="Three settings only.")] = False,
    out: Annotated[Path | None, typer.Option(help="Directory of the table; default: beside the checkpoint.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
    device: Device = "cpu",
) -> None:
    """Measure calls, seconds, bits under a judge and diversity of every sampler, and keep the table beside the checkpoint."""
    from dlm.calibration import measure
    from dlm.calibration.table import Calibration
    from dlm.evaluation.card import device_name
    from dlm.formats.native import find
    from dlm.noise.masked import MaskedNoise

    if samples < 2:
        raise InputError(f"--samples must be at least 2, to have an error, got {samples}")
    lm, twin = load(model, device), load_judge(judge, device)
    if not lm.is_diffusion or not isinstance(lm.noise, MaskedNoise):
        raise InputError(f"{model} is no masked diffusion model: there is nothing to calibrate")
    if twin.tokenizer.fingerprint() != lm.tokenizer.fingerprint():
        raise InputError(f"{judge} has another vocabulary than {model}")
    if twin.window < lm.window:
        raise InputError(f"{judge} reads windows of {twin.window}, {model} writes {lm.window}: a judge needs windows at least as long")
    place = out or find(model)
    if not (place.is_dir() and os.access(place, os.W_OK)):  # before the work, not after it
        raise InputError(f"{place} is no directory that can be written: --out names another")

    def pace(options: dict[str, Any], calls: int) -> float:
        frames = lm.stream([""] * samples, length=lm.window, seed=seed, temperature=temperature, **options)
        clock = time.perf_counter()
        done = sum(1 for _ in itertools.islice(frames, calls))
        return (time.perf_counter() - clock) / done / samples

    if retime:
        found = lm.calibration()
        progress = bar(f"timing {lm.name}", measure.ROUNDS * len(found.rows))
        with progress:
            rows = measure.retime(pace, found.rows, progress=progress.forward)
        _finish(Calibration(rows, found.made | {"device": device_name(device)}), place, model, as_json)
        return
    settings = measure.candidates(window=lm.window, causal=lm.is_causal, quick=quick)
    rows, progress = [], bar(f"measuring {lm.name}", len(settings))
    with progress:
        for row in measure.measure(measure.writing(lm, samples, temperature), measure.judged(twin), settings, seed=seed):
            rows.append(row)
            progress.forward()
    made = {"model": lm.name, "judge": twin.name, "texts": samples, "length": lm.window, "temperature": temperature}
    _finish(Calibration(rows, made | {"seed": seed, "device": device_name(device)}), place, model, as_json)


def _finish(found: Calibration, place: Path, model: str, as_json: bool) -> None:
    console(as_json).print(_table(found))
    path = found.save(place)
    err.print(f"wrote {path}; try: dlm generate --model {model} --sampler auto --budget calls:32", highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps({"made": found.made, "rows": [asdict(row) for row in found.rows]}))


def _table(found: Calibration) -> Any:
    from rich.table import Table

    front = found.front("calls") + found.front("seconds")
    caption = "* on the front of calls or seconds, among settings as varied as the exact ones (=)"
    table = Table(box=None, header_style="bold", caption=caption, caption_justify="left")
    table.add_column("setting")
    for head in ("calls", "seconds", "bits/token", "entropy", "distinct-4", ""):
        table.add_column(head, no_wrap=True)
    for row in found.rows:
        words = [str(row.options["sampler"])] + [f"{key}={row.options[key]}" for key in row.options if key != "sampler"]
        figures = f"{row.calls:.0f}", f"{row.seconds:.2f}", f"{row.bits:.2f} +- {row.bits_stderr:.2f}", f"{row.entropy:.2f}"
        table.add_row(" ".join(words), *figures, f"{row.distinct_4:.2f}", "=" * row.exact + "*" * (row in front))
    return table
