"""`dlm settle`: how fast runs settle, in one table and one picture."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dlm.cli.app import Device, Json, app, console, err, load_judge
from dlm.cli.show import load_runs

if TYPE_CHECKING:
    from dlm.evaluation.settling import Settling


@app.command()
def settle(
    runs: Annotated[list[Path], typer.Argument(help="Files that `dlm generate --save` wrote; those of one model and sampler are pooled.")],
    judge: Annotated[
        str | None, typer.Option(help="An autoregressive model of the same vocabulary, to tell bits per token on the way.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the curves as .png, .svg or .pdf (viz extra).")] = None,
    as_json: Json = False,
    device: Device = "cpu",
) -> None:
    """Measure how text settles: when each token last changed, edits per token, distance to the final text, bits on the way."""
    from dlm.errors import InputError
    from dlm.evaluation.settling import settling

    if plot is not None:
        from dlm.viz.plots import check

        check(plot)  # before the work, not after it
    groups: dict[str, list[Any]] = {}
    for label, run in load_runs(runs):
        groups.setdefault(label, []).append(run)
    judging: dict[str, Any] = {}
    if judge is not None:
        import torch

        from dlm.evaluation.generative import judge_bits_each

        lm = load_judge(judge, device)
        pieces = lm.tokenizer.pieces()
        for run in (run for group in groups.values() for run in group):
            if any(pieces.get(token) != piece for token, piece in run.pieces.items()):
                raise InputError(f"{judge} has another vocabulary than a run of {run.meta.get('model', 'these files')}")

        def bits(x_BT: torch.Tensor) -> torch.Tensor:
            return judge_bits_each(lm.noise, lm.predict, x_BT.to(device))

        judging = {"judge": bits, "vocab_size": lm.tokenizer.vocab_size}
    found = [settling(group, label=label, **judging) for label, group in groups.items()]
    console(as_json).print(_table(found))
    if plot is not None:
        from dlm.viz.plots import settling_plot

        settling_plot([_curves(one) for one in found], plot)
        err.print(f"wrote {plot}", highlight=False)
    if as_json:
        print(json.dumps({"runs": [_record(one) for one in found]}))


def _table(found: list[Settling]) -> Any:
    from rich.table import Table

    caption = (
        "edits: changes per token; half, 90 %, last: the step by which so much has settled; first, middle: share that this step changed"
    )
    table = Table(box=None, header_style="bold", caption=caption, caption_justify="left")
    table.add_column("run")
    for head in ("edits", "half", "90 %", "last", "first", "middle", *(["bits/token"] if found[0].bits else [])):
        table.add_column(head, no_wrap=True)
    for one in found:
        changed = one.changed.mean_S
        cells = [f"{one.label}: {one.texts} texts, {one.steps} steps", f"{one.edits:.2f}", str(one.step_of(0.5)), str(one.step_of(0.9))]
        cells += [f"{one.last_step:.0f}", f"{changed[1]:.1%}", f"{changed[(one.steps + 1) // 2]:.1%}"]
        if one.bits is not None:
            cells.append(f"{one.bits.mean_S[-1]:.2f} +- {one.bits.band_S[-1]:.2f}")
        table.add_row(*cells)
    return table


def _curves(one: Settling) -> dict[str, Any]:
    named = {"settled": one.settled, "changed": one.changed, "error": one.error} | ({"bits": one.bits} if one.bits else {})
    return {"label": one.label} | {name: (curve.mean_S.tolist(), curve.band_S.tolist()) for name, curve in named.items()}


def _record(one: Settling) -> dict[str, Any]:
    def plain(values: list[float]) -> list[float | None]:
        return [None if math.isnan(value) else round(value, 5) for value in values]

    record: dict[str, Any] = {
        "label": one.label,
        "texts": one.texts,
        "steps": one.steps,
        "edits": one.edits,
        "edits_stderr": one.edits_stderr,
    }
    record |= {"half_settled": one.step_of(0.5), "settled_90": one.step_of(0.9), "last_step": one.last_step}
    curves = {name: pair for name, pair in _curves(one).items() if name != "label"}
    return record | {name: {"mean": plain(mean), "band95": plain(band)} for name, (mean, band) in curves.items()}
