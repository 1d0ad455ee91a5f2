"""A compressed vocabulary against plain masks: words become classes and classes become masks, at equal steps, over several seeds.

    OMP_NUM_THREADS=1 nice python benchmarks/classes.py          # masks, learned and random classes; 3 seeds, 450 steps
    python benchmarks/classes.py --kinds masks "learned classes" --steps 4000
    python benchmarks/classes.py --quick                         # does it run?

Classes: k-means of the output embedding of a bundled model of the same 1,024 subwords (it has read the training text for longer than
these runs); the control has classes of the same sizes with random members. Bounds are of the averaged weights on the same held-out
windows, in bits a character, at several checkpoints of one run. Lost: bits a character that a text loses when it is written in so many
forward passes, in random order and equal parts, two stages with their best split; `bits` has that loss in it. Rows are kept in --rows, so
that an interrupted call goes on. The result is appended to benchmarks/history.jsonl; the last line is one JSON object.
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
from torch import Tensor

from dlm.bench.rows import Rows
from dlm.evaluation import likelihood, order_cost, two_stages
from dlm.evaluation.card import dumps
from dlm.evaluation.statistics import Mean
from dlm.noise.classes import ClassNoise
from dlm.noise.loss import Predict
from dlm.noise.masked import MaskedNoise
from dlm.protocols import NoiseProcess
from dlm.train import processes, setup
from dlm.train.config import TrainConfig
from dlm.train.training import Training

HISTORY = Path(__file__).parent / "history.jsonl"
SIZE = ["layers=2", "heads=4", "width=64", "window=64", "batch=16", "context=0", "warmup=50", "ema=0.99", "log_every=1000000"]
SIZE += ["tokenizer=bpe:1024"]
SOURCE = "shakespeare-words:64"
KINDS = {
    "masks": [],
    "learned classes": ["noise=classes", f"clusters={SOURCE}"],
    "random classes": ["noise=classes", f"clusters=shuffled:{SOURCE}"],
    "learned, lead 8": ["noise=classes:8", f"clusters={SOURCE}"],
}
CALLS = (4, 8, 16, 32, 64)
"""Forward passes in which a window of 64 tokens is written."""
CHECKPOINTS = 3


def bound(noise: NoiseProcess, predict: Predict, windows_WT: Tensor, characters: int, passes: int) -> dict[str, Any]:
    """Bits a character, with the two parts where there are some."""
    found = likelihood.evaluate(noise, predict, windows_WT, characters=characters, passes=passes)
    bits = found.tokens / characters / math.log(2)  # of a nat per token
    parts = {name: nats * bits for name, nats in (found.parts or {}).items()}
    return {"bits": found.bits_per_char, "stderr": found.stderr * bits, "parts": parts}


def parallel(noise: NoiseProcess, predict: Predict, windows_WT: Tensor, bits: float, levels: int) -> dict[str, Any]:
    """Bits a character by forward passes: what is lost, and the bound with it; of two stages also of each. bits: of a nat of a window."""
    length, found = windows_WT.shape[1], {}
    if isinstance(noise, ClassNoise):
        stages = two_stages.stages(noise, predict, windows_WT, levels=levels)
        costs = [cost_WT.sum(-1).mean().item() * bits for cost_WT in stages.costs("text")]
        for calls in CALLS:
            of_class, of_word, first = stages.lost(calls)
            lost = [float(part.mean()) * bits for part in (of_class, of_word)]
            found[calls] = {"lost": sum(lost), "bits": sum(lost) + sum(costs), "class": lost[0], "word": lost[1], "class_calls": first}
        return {"bits": sum(costs), "class": costs[0], "word": costs[1], "calls": found}
    assert isinstance(noise, MaskedNoise)
    curve = order_cost.entropy_curve(noise, predict, windows_WT, levels=levels)
    cost_WT = curve.every(curve.text_WK)
    total = cost_WT.sum(-1).mean().item() * bits
    for calls in CALLS:
        lost_W = order_cost.price(cost_WT, order_cost.equal_steps(length, calls))
        found[calls] = {"lost": float(lost_W.mean()) * bits, "bits": float(lost_W.mean()) * bits + total}
    return {"bits": total, "calls": found}


def measure(settings: list[str], seed: int, passes: int, levels: int, out: Path) -> dict[str, Any]:
    """Train; the bound at every checkpoint and the loss of parallel decoding at the end."""
    config = TrainConfig(data="shakespeare").with_settings([*settings, f"seed={seed}"])
    task = Training(config, setup.resolve(config), processes.accelerate(config.batch, bf16=config.bf16), out, {})
    learner, windows_WT = task.learner, task.setup.validation_WT
    characters = len(task.setup.tokenizer.decode(windows_WT.flatten().tolist()))
    at = {config.steps * (k + 1) // CHECKPOINTS: k for k in range(CHECKPOINTS)}
    curve, spent = [], 0.0

    def predict(z_BT: Tensor, t_B: Tensor) -> Tensor:
        logits: Tensor = learner.network(z_BT, t_B).float()
        return logits

    for step in range(config.steps):
        begun = time.process_time()
        task.update(step)
        spent += time.process_time() - begun
        if step + 1 in at:
            learner.network.eval()
            with learner.averaged():
                curve.append({"step": step + 1} | bound(task.setup.noise, predict, windows_WT, characters, passes))
                if step + 1 == config.steps:
                    bits = len(windows_WT) / characters / math.log(2)
                    some_WT = windows_WT[:: max(1, len(windows_WT) // 16)]
                    decoding = parallel(task.setup.noise, predict, some_WT, bits, levels)
            learner.network.train()
    return {"checkpoints": curve, "parallel": decoding, "parameters": task.facts["parameters"], "seconds": round(spent, 1)}


def measured(settings: list[str], seed: int, passes: int, levels: int) -> dict[str, Any]:
    """`measure` with a run directory that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        return measure(settings, seed, passes, levels, Path(folder))


def told(row: dict[str, Any]) -> str:
    return ", ".join(f"{one['bits']:.4f}" for one in row["checkpoints"]) + f" bits, {row['seconds']} s"


def mean(values: list[float]) -> dict[str, float]:
    """With half of the 95 % band over seeds."""
    found = Mean.of(torch.tensor(values, dtype=torch.float64))
    return {"value": found.value, "band95": found.band95}


def summary(found: list[dict[str, Any]], first: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds; differences are of runs of the same seed."""
    checkpoints = []
    for k, one in enumerate(found[0]["checkpoints"]):
        bits = [row["checkpoints"][k]["bits"] for row in found]
        less = [row["checkpoints"][k]["bits"] - other["checkpoints"][k]["bits"] for row, other in zip(found, first, strict=True)]
        parts = {name: mean([row["checkpoints"][k]["parts"][name] for row in found]) for name in one["parts"]}
        checkpoints.append({"step": one["step"], "bits": mean(bits), "difference": mean(less), "parts": parts})
    calls = {
        count: {name: mean([row["parallel"]["calls"][count][name] for row in found]) for name in figures}
        for count, figures in found[0]["parallel"]["calls"].items()
    }
    return {"checkpoints": checkpoints, "two_stages": mean([row["parallel"]["bits"] for row in found]), "calls": calls}


def tables(result: dict[str, dict[str, Any]]) -> list[Table]:
    """The bound at the checkpoints with its parts, and decoding by forward passes."""

    def shown(one: dict[str, float]) -> str:
        return f"{one['value']:.4f} +- {one['band95']:.4f}"

    learning = Table("kind", "steps", "bits a character", "against the first", "class", "word given class")
    decoding = Table("kind", "forward passes", "bits lost", "bits", "lost in classes", "in words", "passes for classes")
    for kind, found in result.items():
        for one in found["checkpoints"]:
            parts = [shown(part) for part in one["parts"].values()] or ["", ""]
            learning.add_row(kind, str(one["step"]), shown(one["bits"]), shown(one["difference"]), *parts)
        for count, one in found["calls"].items():
            more = [f"{one[name]['value']:.4f}" if name in one else "" for name in ("class", "word")]
            first = f"{one['class_calls']['value']:.1f}" if "class_calls" in one else ""
            decoding.add_row(kind, str(count), shown(one["lost"]), shown(one["bits"]), *more, first)
    return [learning, decoding]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="for every run")
    parser.add_argument("--rows", type=Path, default=Path("runs/classes.jsonl"))
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    steps, seeds, passes, levels = (3, 1, 2, 3) if arguments.quick else (arguments.steps, arguments.seeds, 6, 9)
    rows = Rows(arguments.rows.with_name("quick-classes.jsonl") if arguments.quick else arguments.rows)
    size = [*SIZE, f"steps={steps}", f"eval_windows={4 if arguments.quick else 100}"] + (["warmup=1"] if arguments.quick else [])
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in range(arguments.first_seed, arguments.first_seed + seeds):
        for kind in arguments.kinds:
            settings = [*size, *KINDS[kind], *arguments.settings]
            make = partial(measured, settings, seed, passes, levels)
            runs.setdefault(kind, []).append(rows.row(kind, settings, seed, passes, levels, measure=make, told=told))
    result = {kind: summary(found, runs[arguments.kinds[0]]) for kind, found in runs.items()}
    for table in tables(result):
        Console(width=150).print(table)
    seconds = {kind: sum(row["seconds"] for row in found) / len(found) for kind, found in runs.items()}
    line = {"benchmark": "classes", "machine": platform.processor() or platform.machine(), "steps": steps, "seeds": seeds}
    line |= {"settings": arguments.settings, "seconds": seconds, "rows": result}
    if not arguments.quick and seeds > 1:
        with HISTORY.open("a") as file:
            file.write(dumps(line) + "\n")
    print(dumps(line))


if __name__ == "__main__":
    main()
