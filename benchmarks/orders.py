"""Learned orders and schedules against the fixed linear one: the bound after equal steps, over several seeds.

    OMP_NUM_THREADS=1 nice python benchmarks/orders.py                        # five kinds of noise, 3 seeds, 600 steps
    python benchmarks/orders.py --steps 20000 --set layers=6 --set width=192 --set window=128
    python benchmarks/orders.py --seeds 1 --first-seed 2                      # one seed, so that several processes share the work
    python benchmarks/orders.py --quick                                       # does it run?

Every step reads the same number of windows: learned weights read half as many texts, each with two draws of noise. Bounds are of the
averaged weights on the same held-out windows, in bits a character. `held` keeps the weights at 1: ordered noise is then masked noise
on half as many texts, GenMD4's masked noise whose network reads the time. Rows are kept in --rows, so that an interrupted call
goes on. The result is appended to benchmarks/history.jsonl; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import math
import platform
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dlm.bench.rows import Rows
from dlm.evaluation import likelihood
from dlm.evaluation.card import dumps
from dlm.evaluation.statistics import Mean
from dlm.noise.learned import LearnedNoise
from dlm.train import processes, setup
from dlm.train.config import TrainConfig
from dlm.train.training import Training

HISTORY = Path(__file__).parent / "history.jsonl"
SIZE = ["layers=2", "heads=4", "width=64", "window=64", "batch=16", "context=0", "warmup=50", "ema=0.99", "log_every=1000000"]
KINDS = {
    "masked": [],
    "ordered, held": ["noise=ordered", "noise_lr=0"],
    "ordered": ["noise=ordered"],
    "genmd4, held": ["noise=genmd4", "time_conditioning=true", "noise_lr=0"],
    "genmd4": ["noise=genmd4", "time_conditioning=true"],
}
PASSES = dict.fromkeys(("masked", "ordered, held", "ordered"), 8)
MANY_PASSES = 32  # a bound with a time in it is estimated with more error


def measure(settings: list[str], seed: int, passes: int, out: Path) -> dict[str, Any]:
    """Train and evaluate: bits a character, the error of the estimate, and the learned log-weights."""
    config = TrainConfig(data="shakespeare").with_settings([*settings, f"seed={seed}"])
    accelerator = processes.accelerate(config.batch, bf16=config.bf16)
    task = Training(config, setup.resolve(config), accelerator, out, {})
    begun = time.process_time()
    for step in range(config.steps):
        task.update(step)
    spent, learner = time.process_time() - begun, task.learner
    learner.network.eval()
    windows_WT = task.setup.validation_WT
    with learner.averaged():
        found = likelihood.evaluate(
            learner.noise,
            lambda z_BT, t_B: learner.network(z_BT, t_B).float(),
            windows_WT,
            characters=windows_WT.numel(),
            passes=passes,
            reads_time=config.network.time_conditioning,
        )
        weights = learner.noise.fixed() if isinstance(learner.noise, LearnedNoise) else ()
    return {
        "bits": found.bits_per_char,
        "stderr": found.stderr / math.log(2),
        "parameters": task.facts["parameters"],
        "log_weights": [round(math.log(w), 4) for w in weights],
        "seconds": round(spent, 1),
    }


def measured(settings: list[str], seed: int, passes: int) -> dict[str, Any]:
    """`measure` with a run directory that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        return measure(settings, seed, passes, Path(folder))


def told(row: dict[str, Any]) -> str:
    return f"{row['bits']:.4f} +- {row['stderr']:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="for every run")
    parser.add_argument("--rows", type=Path, default=Path("runs/orders.jsonl"))
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    steps, seeds = (2, 1) if arguments.quick else (arguments.steps, arguments.seeds)
    rows = Rows(arguments.rows.with_name("quick-orders.jsonl") if arguments.quick else arguments.rows)
    size = [*SIZE, f"steps={steps}", "warmup=1", "eval_windows=4"] if arguments.quick else [*SIZE, f"steps={steps}", "eval_windows=200"]
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in range(arguments.first_seed, arguments.first_seed + seeds):
        for kind in arguments.kinds:
            passes = 2 if arguments.quick else PASSES.get(kind, MANY_PASSES)
            settings = [*size, *KINDS[kind], *arguments.settings]
            make = partial(measured, settings, seed, passes)
            runs.setdefault(kind, []).append(rows.row(kind, settings, seed, passes, measure=make, told=told))
    table, result = Table("noise", "bits a character", "against the first", "CPU seconds"), []
    for kind, found in runs.items():
        bits = torch.tensor([row["bits"] for row in found], dtype=torch.float64)
        gain = bits - torch.tensor([row["bits"] for row in runs[arguments.kinds[0]]], dtype=torch.float64)
        mean, difference = Mean.of(bits), Mean.of(gain)
        result.append(
            {
                "noise": kind,
                "bits": mean.value,
                "band95": mean.band95,
                "difference": difference.value,
                "difference_band95": difference.band95,
            }
            | {"runs": [{name: value for name, value in row.items() if name not in ("key", "log_weights")} for row in found]}
        )
        seconds = sum(row["seconds"] for row in found) / len(found)
        against = f"{difference.value:+.4f} +- {difference.band95:.4f}"
        table.add_row(kind, f"{mean.value:.4f} +- {mean.band95:.4f}", against, f"{seconds:.0f}")
    Console().print(table)
    line = {"benchmark": "orders", "machine": platform.processor() or platform.machine(), "steps": steps, "rows": result}
    if not arguments.quick and seeds > 1:
        with HISTORY.open("a") as file:
            file.write(dumps(line) + "\n")
    print(dumps(line))


if __name__ == "__main__":
    main()
