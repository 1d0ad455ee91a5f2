"""The noise processes side by side: samplers, quality against steps, and the cost of stopping early.

    python benchmarks/noise.py samplers     # every sampler of every process at 32 steps, over temperatures
    python benchmarks/noise.py steps        # 4 to 256 steps for each process and two samplers, over temperatures; --plot front.png
    python benchmarks/noise.py stopping     # --until-settled against the full run with the same seeds

Bits per character under an autoregressive judge always stand beside unigram entropy, distinct-4 and the share of words that occur in
the training text, since dull text pleases a judge. Rows are kept in --rows, so that an interrupted call goes on. The last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import dlm
from dlm.evaluation import card, generative
from dlm.train import data as reading
from dlm.train import recipes

SISTERS = ("mask", "uniform", "semantic", "hybrid")
MASKED = ("ancestral", "topk", "confidence:0.7", "predictor-corrector:1", "predictor-corrector:4")
REPLACING = ("ancestral", "predictor-corrector:1", "refine", "entropy-bound:30", "worst:2", "worst:4")
TEMPERATURES = (0.4, 0.6, 0.8, 1.0)
RUNNERS: dict[str, tuple[tuple[str, tuple[float, ...]], ...]] = {  # sampler, temperatures; chosen from `samplers`
    "mask": (("ancestral", (0.7, 1.0)), ("topk", (0.7,))),
    "uniform": (("ancestral", (0.7,)), ("worst:4", (0.7, 1.0))),
    **dict.fromkeys(("semantic", "hybrid"), (("worst:4", (0.7,)),)),
}
STEPS = (4, 8, 16, 32, 64, 128, 256)


class Bench:
    """Models, the judge, and the rows measured so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.models: dict[str, dlm.LanguageModel] = {}
        self.twin = dlm.load("shakespeare-ar", device=args.device)
        config = recipes.shakespeare_mask()
        train, val = reading.split(reading.read(config.data), config.val_fraction)
        self.words = generative.vocabulary(train[0])
        real_WT = reading.Stream.encode(val, self.twin.tokenizer, self.twin.window).windows(args.samples)
        self.real = self.quality(real_WT)
        self.rows: dict[str, dict[str, Any]] = {}
        if args.rows.is_file():
            for line in args.rows.read_text().splitlines():
                record = json.loads(line)
                self.rows[record["key"]] = record

    def quality(self, samples_NT: Tensor) -> dict[str, Any]:
        bits = generative.judge_bits(self.twin.noise, self.twin.predict, samples_NT.to(self.args.device))
        return {
            "bits": bits.value,
            "bits_stderr": bits.stderr,
            "entropy": generative.unigram_entropy(samples_NT),
            "distinct_4": generative.distinct(samples_NT, 4),
            "words": generative.known_words([self.twin.tokenizer.decode(row) for row in samples_NT.tolist()], self.words),
        }

    def generate(self, sister: str, seed: int, rows: int, **options: Any) -> list[dlm.Generation]:
        if sister not in self.models:
            self.models[sister] = dlm.load(f"shakespeare-{sister}", device=self.args.device)
        model = self.models[sister]
        made: list[dlm.Generation] = model.generate([""] * rows, length=model.window, seed=seed, **options)
        return made

    def row(self, sister: str, **options: Any) -> dict[str, Any]:
        """One setting, measured unless it is among the rows already."""
        key = json.dumps([sister, options, self.args.samples])
        if key not in self.rows:
            parts, calls = [], 0
            for begin in range(0, self.args.samples, self.args.batch):
                made = self.generate(sister, begin, min(self.args.batch, self.args.samples - begin), **options)
                parts.append(made[0].trajectory.current_BT)
                calls = max(calls, made[0].forwards)
            row = {"key": key, "noise": sister, **options, "calls": calls} | self.quality(torch.cat(parts))
            self.keep(key, row)
        return self.rows[key]

    def keep(self, key: str, row: dict[str, Any]) -> None:
        self.rows[key] = row
        self.args.rows.parent.mkdir(parents=True, exist_ok=True)
        with self.args.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        Console(stderr=True).print(key, highlight=False, markup=False)


def cells(row: dict[str, Any]) -> list[str]:
    return [f"{row['bits']:.2f} +- {row['bits_stderr']:.2f}", *(f"{row[name]:.2f}" for name in ("entropy", "distinct_4", "words"))]


HEADS = ("bits/char", "entropy", "distinct-4", "known words")


def samplers(bench: Bench) -> list[dict[str, Any]]:
    table = Table("noise", "sampler", "temperature", *HEADS, box=None)
    rows = []
    for sister in bench.args.sisters:
        for sampler in MASKED if sister == "mask" else REPLACING:
            for temperature in TEMPERATURES:
                row = bench.row(sister, sampler=sampler, steps=bench.args.steps[0], temperature=temperature)
                rows.append(row)
                table.add_row(sister, sampler, str(temperature), *cells(row))
    table.add_row("real text", "", "", *cells(bench.real))
    Console().print(table)
    return rows


def steps(bench: Bench) -> list[dict[str, Any]]:
    table = Table("noise", "sampler", "temperature", "steps", "calls", *HEADS, box=None)
    rows = []
    for sister in bench.args.sisters:
        for sampler, temperatures in RUNNERS[sister]:
            for temperature in temperatures:
                for count in bench.args.steps:
                    row = bench.row(sister, sampler=sampler, steps=count, temperature=temperature)
                    rows.append(row)
                    table.add_row(sister, sampler, str(temperature), str(count), str(row["calls"]), *cells(row))
    table.add_row("real text", "", "", "", "", *cells(bench.real))
    Console().print(table)
    if bench.args.plot is not None:
        from dlm.viz.plots import points_plot

        series: dict[str, list[tuple[float, float, str]]] = {}
        for row in rows:
            label = f"{row['noise']}, {row['sampler']}, temperature {row['temperature']}"
            series.setdefault(label, []).append((row["distinct_4"], row["bits"], str(row["steps"])))
        series["real text"] = [(bench.real["distinct_4"], bench.real["bits"], "")]
        points_plot(series, "distinct-4", "bits per character under the judge", bench.args.plot)
    return rows


def stopping(bench: Bench) -> list[dict[str, Any]]:
    table = Table(
        "noise", "sampler", "quiet steps", "steps saved", "characters changed", "expected", "bits, full", "bits, stopped", box=None
    )
    rows = []
    for sister in (s for s in bench.args.sisters if s != "mask"):
        for sampler, temperature in (("refine", 0.8), ("worst:4", 0.0)):
            options = {"sampler": sampler, "steps": bench.args.steps[0], "temperature": temperature}
            full = bench.generate(sister, 0, bench.args.samples, **options)
            for quiet in (1, 4):
                early = bench.generate(sister, 0, bench.args.samples, until_settled=quiet, **options)
                both = [made[0].trajectory.current_BT for made in (full, early)]
                changed = (both[0] != both[1]).double().sum(-1).mean().item()
                whole, part = (bench.quality(x_NT) for x_NT in both)
                mean = {name: sum(getattr(g, name) for g in early) / len(early) for name in ("steps_saved", "expected_edits")}
                row = {"noise": sister, **options, "quiet": quiet, "changed": changed} | mean
                rows.append(row | {"bits_full": whole["bits"], "bits_stopped": part["bits"]})
                saved = f"{mean['steps_saved']:.1f} of {options['steps']}"
                figures = (f"{changed:.1f}", f"{mean['expected_edits']:.1f}", f"{whole['bits']:.3f}", f"{part['bits']:.3f}")
                table.add_row(sister, sampler, str(quiet), saved, *figures)
    Console().print(table)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["samplers", "steps", "stopping"])
    parser.add_argument("--sisters", nargs="+", default=list(SISTERS), help="shakespeare-NAME")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, nargs="+", default=None)
    parser.add_argument("--rows", type=Path, default=Path("runs/noise.jsonl"))
    parser.add_argument("--plot", type=Path, default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="two samples, few steps: does it run?")
    args = parser.parse_args()
    args.steps = args.steps or {"samplers": [32], "steps": list(STEPS), "stopping": [64]}[args.part]
    if args.quick:
        args.samples, args.steps, args.rows = 2, [4], args.rows.with_name("quick.jsonl")
    bench = Bench(args)
    rows = {"samplers": samplers, "steps": steps, "stopping": stopping}[args.part](bench)
    settings = {"part": args.part, "samples": args.samples, "steps": args.steps}
    figures = {"rows": rows, "real_text": bench.real}
    print(card.dumps(card.make(figures, device=args.device, dtype="float32", seed=0, settings=settings, data={})))


if __name__ == "__main__":
    main()
