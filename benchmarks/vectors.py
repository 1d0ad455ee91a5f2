"""Noise on vectors against noise on tokens: the bound after equal steps of one network, over several seeds.

    OMP_NUM_THREADS=1 nice python benchmarks/vectors.py                          # four kinds of noise, 3 seeds, 300 steps
    python benchmarks/vectors.py --steps 3000 --set layers=4 --set width=128
    python benchmarks/vectors.py --quick                                         # does it run?

Every kind has the same network, the same texts in the same order and as many forward passes; `uniform, mixtures` reads mixtures of tokens
in the first half of them. Bounds are of the averaged weights on the same held-out windows, in nats a character. Rows are kept in --rows,
so that an interrupted call goes on. The result is appended to benchmarks/history.jsonl; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
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
from dlm.noise.gaussian import GaussianNoise
from dlm.train import processes, setup
from dlm.train.config import TrainConfig
from dlm.train.training import Training

HISTORY = Path(__file__).parent / "history.jsonl"
SIZE = ["layers=2", "heads=4", "width=64", "window=64", "batch=16", "context=0", "warmup=50", "ema=0.99", "log_every=1000000"]
KINDS = {
    "masked": ["noise=masked"],
    "uniform": ["noise=uniform"],
    "uniform, mixtures": ["noise=uniform", "mixtures=0.1"],
    "gaussian": ["noise=gaussian"],
}
PASSES = {"masked": 4, "uniform": 8, "uniform, mixtures": 8, "gaussian": 32}  # by the variance of each estimator


def measure(settings: list[str], seed: int, passes: int) -> dict[str, Any]:
    """Train and evaluate: nats a character, the error of the estimate and, of vectors, its parts."""
    config = TrainConfig(data="shakespeare").with_settings([*settings, f"seed={seed}"])
    accelerator = processes.accelerate(config.batch, bf16=config.bf16)
    with tempfile.TemporaryDirectory() as folder:
        task = Training(config, setup.resolve(config), accelerator, Path(folder), {})
        begun = time.process_time()
        for step in range(config.steps):
            task.update(step)
        spent, network, noise = time.process_time() - begun, task.learner.network, task.learner.noise
        network.eval()
        windows_WT = task.setup.validation_WT
        with task.learner.averaged():
            found = likelihood.evaluate(
                noise,
                noise.reading(network) if isinstance(noise, GaussianNoise) else lambda z_BT, t_B: network(z_BT, t_B).float(),
                windows_WT,
                characters=windows_WT.numel(),
                passes=passes,
            )
    return {
        "nats": found.nats_per_token,
        "stderr": found.stderr,
        "parts": found.parts,
        "parameters": task.facts["parameters"],
        "seconds": round(spent, 1),
    }


def told(row: dict[str, Any]) -> str:
    return f"{row['nats']:.4f} +- {row['stderr']:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="for every run")
    parser.add_argument("--rows", type=Path, default=Path("runs/vectors.jsonl"))
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    steps, seeds, windows = (2, 1, 4) if arguments.quick else (arguments.steps, arguments.seeds, 150)
    size = [*SIZE, f"steps={steps}", f"eval_windows={windows}", *(["warmup=1"] if arguments.quick else []), *arguments.settings]
    kept = Rows(arguments.rows.with_name("quick-vectors.jsonl") if arguments.quick else arguments.rows)
    passes = dict.fromkeys(KINDS, 2) if arguments.quick else PASSES
    rows: dict[str, list[dict[str, Any]]] = {}
    for seed in range(seeds):
        for kind in arguments.kinds:
            settings, count = [*size, *KINDS[kind]], passes[kind]
            make = partial(measure, settings, seed, count)
            rows.setdefault(kind, []).append(kept.row(kind, settings, seed, count, measure=make, told=told))
    table, result = Table("noise", "nats a character", "against the first", "CPU seconds"), []
    for kind, found in rows.items():
        nats, first = (torch.tensor([row["nats"] for row in some], dtype=torch.float64) for some in (found, rows[arguments.kinds[0]]))
        mean, difference = Mean.of(nats), Mean.of(nats - first)
        figures = {"nats": mean.value, "band95": mean.band95, "difference": difference.value, "difference_band95": difference.band95}
        runs = [{name: value for name, value in row.items() if name != "key"} for row in found]
        result.append({"noise": kind} | figures | {"runs": runs})
        against = f"{difference.value:+.4f} +- {difference.band95:.4f}"
        seconds = sum(row["seconds"] for row in found) / len(found)
        table.add_row(kind, f"{mean.value:.4f} +- {mean.band95:.4f}", against, f"{seconds:.0f}")
    Console().print(table)
    line = {"benchmark": "vectors", "machine": platform.processor() or platform.machine(), "steps": steps, "rows": result}
    if not arguments.quick and seeds > 1:
        with HISTORY.open("a") as file:
            file.write(dumps(line) + "\n")
    print(dumps(line))


if __name__ == "__main__":
    main()
