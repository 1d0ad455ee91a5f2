"""Model schedules against honest baselines, in the form of 2604.02340's table: FLOPs saved by each convention, quality, time.

    python benchmarks/model_schedules.py --ledger runs/schedules.jsonl             # shakespeare-mask against shakespeare-mask-2
    python benchmarks/model_schedules.py --sampler topk --steps 64 --samples 32    # does the rule survive an order by confidence?
    python benchmarks/model_schedules.py --prompted 64 --samples 64                # continuations of real text

Every row writes the same seeds in the same sampler; differences are paired. No row pays for steps in which nothing changes, nor for
an output head at a position that is not unmasked: what a schedule saves comes on top of that. `H, n steps` is the heavy model with as
many steps as the FLOPs of the schedule beside it buy. A ledger keeps what is measured. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import dlm
from dlm.cli.app import named_models
from dlm.cli.progress import showing
from dlm.evaluation import card, generative
from dlm.model_scheduling import search
from dlm.model_scheduling.cost import cost, expected_calls
from dlm.model_scheduling.outcome import Outcome
from dlm.model_scheduling.plan import ModelSchedule
from dlm.workflows.inputs import Counter, Text, silent
from dlm.workflows.model_pair import ModelPair, Trials

PAPER = "L0.125 H0.75 L0.125"
SHAPES = ("prefix", "sandwich", "suffix", "middle", "alternate", "random")


class Bench:
    """Trials of one pair of models, by number of steps, all with the same seeds."""

    def __init__(self, args: argparse.Namespace, *, temperature: float = 1.0) -> None:
        self.args = args
        self.pair = ModelPair.of(args.heavy, named_models(args.light), args.device)
        self.lm, self.prices = self.pair.lm, self.pair.prices
        twin = dlm.load(args.judge, device=args.device) if args.mauve else None
        self.twin = twin if twin is not None and twin.tokenizer.fingerprint() == self.lm.tokenizer.fingerprint() else None
        text = Text.read(self.lm, args.data or None, max_windows=max(args.samples, args.windows))
        self.source, self.windows_WT = text.source, text.windows_WT
        prompts = [row[: args.prompted].tolist() for row in self.windows_WT]
        self.trials = Trials(self.pair, args.judge, sampler=args.sampler, temperature=temperature, prompts=prompts, ledger=args.ledger)

    def __call__(self, word: str, steps: int | None = None) -> Outcome:
        return self.trials(steps or self.args.steps)(word, self.args.seed, self.args.seed + self.args.samples)

    def kl(self) -> dict[str, list[float]]:
        """KL of every segment, on noised text."""
        windows_WT = self.windows_WT[: self.args.windows]
        with showing("KL of every segment") as progress:
            return self.pair.kl(windows_WT, self.args.segments, 0, Counter(progress, len(windows_WT) * self.args.segments))

    @cached_property
    def price(self) -> Callable[[int], float]:
        """Nats a text that a number of steps loses by drawing tokens at once, by the heavy model's entropies."""
        return self.pair.price(self.windows_WT[: self.args.windows], Counter(silent, 0))

    def mauve(self, outcome: Outcome) -> float | None:
        """Against as many windows of text, by the hidden states of the judge; None where the judge has another vocabulary."""
        if self.twin is None or not outcome.tokens:
            return None
        sets = torch.tensor(outcome.tokens), self.windows_WT[: outcome.texts]
        features = (generative.hidden_features(self.twin.network, x.to(self.args.device), self.twin.tokenizer.mask_id) for x in sets)
        return generative.mauve(*features)


def fewer_steps(steps: int, free: int, saved: float) -> int:
    """As many as leave this share of the calls of `steps` steps."""
    calls = (1 - saved) * sum(expected_calls(steps, free))
    return min(range(1, steps + 1), key=lambda n: abs(sum(expected_calls(n, free)) - calls))


def rows_of(bench: Bench, kl: dict[str, list[float]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """(label, schedule, steps) measured, the heavy model alone first."""
    blocks = bench.pair.blocks
    free = bench.lm.window - args.prompted
    planned = str(search.by_kl(kl, blocks, args.saved))
    share = min(1.0, args.saved / (1 - blocks["L"] / blocks["H"]))
    plan: list[tuple[str, str, int]] = [("H alone", "H", args.steps), ("L alone", "L", args.steps), ("paper's sandwich", PAPER, args.steps)]
    plan += [(f"H, {n} steps", "H", n) for n in (fewer_steps(args.steps, free, 0.25 * (1 - blocks["L"] / blocks["H"])),)]
    plan += [("by KL", planned, args.steps)]
    plan += [(name, f"{name}:{share:.4f}", args.steps) for name in args.shapes.split(",") if name]
    plan += [(f"H, {n} steps", "H", n) for n in (fewer_steps(args.steps, free, args.saved), fewer_steps(args.steps, free, 2 * args.saved))]
    counts = search.step_counts(args.steps, 24)
    prices, calls = ({n: f(n) for n in counts} for f in (bench.price, lambda n: sum(expected_calls(n, free))))
    for saved in (args.saved, 2 * args.saved):
        steps, schedule, _ = search.jointly(kl, blocks, prices, calls, free, saved)
        plan.append((f"jointly, {saved:.0%}", str(schedule), steps))
    plan += [(f"{word}", word, args.steps) for word in args.more.split(";") if word]
    rows, reference = [], None
    with showing("schedules") as progress:
        for done, (label, word, steps) in enumerate(plan, 1):
            outcome = bench(word, steps)
            reference = reference or outcome
            rows.append(row_of(label, word, steps, outcome, reference, bench, kl))
            progress(done, len(plan))
    return rows


def row_of(
    label: str, word: str, steps: int, outcome: Outcome, reference: Outcome, bench: Bench, kl: dict[str, list[float]]
) -> dict[str, Any]:
    """Figures, and their paired differences to H alone."""
    own = {name: outcome.mean(name).record() for name in outcome.figures}
    paired = {f"d_{name}": outcome.against(reference, name).record() for name in outcome.figures}
    row = {"label": label, "schedule": word, "steps": steps, "saved_executed": 1 - total(outcome) / total(reference)}
    schedule = ModelSchedule.parse(word)
    counted = cost(schedule, bench.prices, steps, bench.lm.window - bench.args.prompted)
    whole = cost(ModelSchedule.parse("H"), bench.prices, bench.args.steps, bench.lm.window - bench.args.prompted)
    row |= {"saved_blocks": 1 - counted.blocks / whole.blocks, "saved_with_head": 1 - counted.with_head / whole.with_head}
    if not bench.args.prompted:  # the curves are those of texts that begin with nothing
        row |= {"path_kl": search.path_kl(schedule, kl, bench.lm.window), "price": bench.price(steps)}
    row |= {"mauve": bench.mauve(outcome)}
    return row | own | paired | {"seconds": outcome.seconds / outcome.texts, "calls": outcome.calls, "texts": outcome.texts}


def total(outcome: Outcome) -> float:
    return (outcome.blocks + outcome.head) / outcome.texts


def matched(args: argparse.Namespace, words: list[str]) -> list[dict[str, Any]]:
    """Bits and entropy over temperatures, and bits of each schedule at the entropy that H has at temperature 1."""
    points: dict[str, list[tuple[float, float, float]]] = {word: [] for word in words}
    for temperature in args.temperatures:
        bench = Bench(args, temperature=temperature)
        for word in words:
            found = bench(word)
            points[word].append((temperature, found.mean("entropy").value, found.mean("bits").value))
    middle = min(range(len(args.temperatures)), key=lambda i: abs(args.temperatures[i] - 1))
    level = points[words[0]][middle][1]
    return [{"schedule": word, "points": line, "bits_at_matched_entropy": at(level, line)} for word, line in points.items()]


def at(level: float, line: list[tuple[float, float, float]]) -> float:
    """Bits where the entropy is `level`, on straight lines between temperatures; nan outside."""
    for (_, e0, b0), (_, e1, b1) in pairwise(line):
        if min(e0, e1) <= level <= max(e0, e1) and e0 != e1:
            return b0 + (b1 - b0) * (level - e0) / (e1 - e0)
    return math.nan


def show(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    table = Table(
        "",
        "steps",
        "blocks",
        "+ head",
        "executed",
        "path KL + price",
        "bits",
        "against H",
        "perplexity",
        "entropy",
        "distinct-4",
        "MAUVE",
        "s",
        box=None,
    )
    for row in rows:
        saved = [f"{row[name]:.1%}" for name in ("saved_blocks", "saved_with_head", "saved_executed")]
        change = f"{row['d_bits']['mean']:+.3f} +- {row['d_bits']['band95']:.3f}"
        entropy = f"{row['entropy']['mean']:.3f} ({row['d_entropy']['mean']:+.3f} +- {row['d_entropy']['band95']:.3f})"
        worse = 2 ** row["d_bits"]["mean"] - 1
        path = f"{row['path_kl']:.1f} + {row['price']:.2f}" if "path_kl" in row else ""
        cells = (
            f"{row['bits']['mean']:.3f}",
            change,
            f"{worse:+.1%}",
            entropy,
            f"{row['distinct_4']['mean']:.3f}",
            "" if row["mauve"] is None else f"{row['mauve']:.2f}",
            f"{row['seconds']:.2f}",
        )
        table.add_row(row["label"], str(row["steps"]), *saved, path, *cells)
    Console(width=180).print(table)
    Console(width=180).print(
        f"saved: FLOPs against H alone in {args.steps} steps: of blocks in every step, with the head, of the calls that happened.\n"
        f"bits per token under {args.judge}, {args.samples} texts, +- 95 % of the paired difference; perplexity: of a token, against H.\n"
        "path KL, and what drawing tokens at once loses: nats a text"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heavy", default="shakespeare-mask")
    parser.add_argument("--light", default="shakespeare-mask-2", help="L, or several as M=NAME,L=NAME")
    parser.add_argument("--judge", default="shakespeare-ar")
    parser.add_argument("--data", default="")
    parser.add_argument("--sampler", default="ancestral")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--saved", type=float, default=0.35, help="share of H's block FLOPs that the schedules save")
    parser.add_argument("--segments", type=int, default=16)
    parser.add_argument("--windows", type=int, default=64, help="of text, to measure the KL on")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--more", default="", help="further schedules with semicolons between")
    parser.add_argument("--prompted", type=int, default=0, help="tokens of real text that every text begins with")
    parser.add_argument("--mauve", action="store_true", help="also MAUVE against real text (eval extra)")
    parser.add_argument("--temperatures", type=float, nargs="*", default=[], help="also compare at matched entropy")
    parser.add_argument("--ledger", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="two short rows: does it run?")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.samples, args.windows, args.segments, args.shapes = 4, 2, 4, 4, "prefix"
    bench = Bench(args)
    kl = bench.kl()
    rows = rows_of(bench, kl, args)
    show(rows, args)
    sweep = matched(args, ["H", next(row["schedule"] for row in rows if row["label"] == "by KL")]) if args.temperatures else []
    for one in sweep:
        Console(width=180).print(f"{one['schedule']}: {one['bits_at_matched_entropy']:.3f} bits at the entropy of H at temperature 1")
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    figures = {"kl": kl, "rows": rows, "matched": sweep}
    data = {"source": bench.source, "split": "val"}
    print(card.dumps(card.make(figures, device=args.device, dtype="float32", seed=args.seed, settings=settings, data=data)))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
