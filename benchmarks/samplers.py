"""Every sampler of the bundled models: quality against forward passes and against seconds; the automatic choice against the usual defaults.

    python benchmarks/samplers.py                              # tables that `dlm calibrate` left, and a fresh measurement of the choices
    python benchmarks/samplers.py --calibrate --samples 16     # the tables again first
    python benchmarks/samplers.py --plot docs/samplers.png

A table is one measurement of every setting; choosing its best row favours luck. The choice of `--sampler auto` for each budget
is therefore measured again here, with other seeds, beside the usual defaults and the autoregressive baseline.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import dlm
from dlm.calibration import measure
from dlm.calibration.table import Calibration, Options, Row
from dlm.cli.progress import showing
from dlm.evaluation import card
from dlm.evaluation.statistics import Mean
from dlm.formats import native
from dlm.workflows.calibrate import judging, writing
from dlm.workflows.inputs import judge_figures

BUDGETS = ("calls:16", "calls:32", "calls:64", "calls:256", "seconds:1", "bits:0.1")
USUAL: dict[str, dict[str, Any]] = {
    "ancestral, a step a token": {"sampler": "ancestral", "steps": 256},
    "ancestral, 64 steps": {"sampler": "ancestral", "steps": 64},
    "topk, 64 steps": {"sampler": "topk", "steps": 64},
    "confidence 0.9": {"sampler": "confidence:0.9", "steps": 256},
}


TWIN: dict[str, dict[str, Any]] = {
    "autoregressive, cache": {"sampler": "autoregressive"},
    "autoregressive, no cache": {"sampler": "autoregressive", "cache": False},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["shakespeare-mask"])
    parser.add_argument("--twin", default="shakespeare-ar")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--calibrate", action="store_true", help="measure the tables first")
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--seed", type=int, default=1000, help="of the fresh measurement; the tables have 0")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="two budgets, two texts: does it run?")
    args = parser.parse_args()
    usual, of_twin = USUAL, TWIN
    if args.quick:
        args.samples, args.budgets = 2, args.budgets[:2]
        of_twin = {"autoregressive, cache": TWIN["autoregressive, cache"]}
        usual = {"topk, 16 steps": {"sampler": "topk", "steps": 16}}
    console, twin, rows = Console(stderr=True), dlm.load(args.twin, device=args.device), []
    table = Table("model", "setting", "chosen", "calls", "seconds", "bits/char", "entropy", "distinct-4", box=None)
    tables: dict[str, Calibration] = {}
    runs: list[tuple[Any, str, dict[str, Any]]] = []
    for name in args.models:
        if args.calibrate:
            with showing(f"measuring {name}") as progress:
                dlm.calibrate(name, twin, samples=args.samples, out=native.find(name), device=args.device, progress=progress)
        model = dlm.load(name, device=args.device)
        tables[name] = model.calibration()
        chosen = {f"auto, {budget}": tables[name].choose(budget).options for budget in args.budgets}
        runs += [(model, label, options) for label, options in (chosen | usual).items()]
    runs += [(twin, label, options) for label, options in of_twin.items()]
    for model, label, options in runs:
        console.print(f"{model.name}: {label}", highlight=False)
        row = _measured(model, twin, options, args)
        rows.append({"model": model.name, "setting": label} | asdict(row))
        words = " ".join(str(value) for value in options.values()) if label.startswith("auto,") else ""
        figures = f"{row.calls:.0f}", f"{row.seconds:.2f}", f"{row.bits:.2f} +- {row.bits_stderr:.2f}", f"{row.entropy:.2f}"
        table.add_row(model.name, label, words, *figures, f"{row.distinct_4:.2f}")
    Console().print(table)
    if args.plot is not None:
        from dlm.viz.plots import fronts_plot

        fronts_plot({name: _points(found) for name, found in tables.items()}, args.plot)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    figures_of = {"rows": rows, "tables": {name: [asdict(row) for row in found.rows] for name, found in tables.items()}}
    print(card.dumps(card.make(figures_of, device=args.device, dtype="float32", seed=args.seed, settings=settings, data={})))


def _measured(model: dlm.LanguageModel, twin: dlm.LanguageModel, options: Options, args: argparse.Namespace) -> Row:
    generate, judge = writing(model, args.samples, model.window, temperature=1.0), judging(judge_figures(twin, model))
    return measure.measure(generate, judge, options, seed=args.seed)


def _points(found: Calibration) -> list[dict[str, Any]]:
    best = found.front("calls") + found.front("seconds")
    return [_point(row, row in best, int(found.made["texts"])) | {"fair": row in found.fair()} for row in found.rows]


def _point(row: Row, on_front: bool, texts: int) -> dict[str, Any]:
    name, colon, setting = str(row.options["sampler"]).partition(":")
    cache = str(row.options.get("cache", ""))
    note = cache or (setting if colon and "steps" not in row.options else str(row.options.get("steps", "")))
    return {"group": name + (" + cache" if cache else ""), "note": note, "calls": row.calls, "seconds": row.seconds, "bits": row.bits} | {
        "band95": Mean(row.bits, row.bits_stderr, texts).band95,
        "front": on_front,
    }


if __name__ == "__main__":
    main()
