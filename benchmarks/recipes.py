"""The bound after equal CPU seconds of training, for changes of the recipe one on top of another, over several seeds.

    python benchmarks/recipes.py                             # the ladder: 3 seeds, 40 CPU seconds each
    python benchmarks/recipes.py --seconds 220 --set width=192 --set layers=6
    python benchmarks/recipes.py --rungs "adamw: optimizer=adamw" "muon: optimizer=muon"    # changes of your own, each alone
    python benchmarks/recipes.py --steps 300 --rungs "float32:" "bfloat16: bf16=true"       # equal steps in place of equal seconds
    python benchmarks/recipes.py --quick                     # does it run?

A run of so many seconds first times a few steps and then takes as many as fit, so that its learning rate decays to the end. Times are
CPU seconds of the process, which other work on the machine changes little. Bounds are of the averaged weights on the same validation
windows, in nats a character for any tokenizer. The result is appended to benchmarks/history.jsonl; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dlm.evaluation.statistics import Mean
from dlm.train import data as reading
from dlm.train import processes, setup
from dlm.train.config import TrainConfig
from dlm.train.training import Training

HISTORY = Path(__file__).parent / "history.jsonl"
PLAIN = ["optimizer=adamw", "conv=0", "weights=bound"]
LADDER = {  # each with all before it
    "AdamW, bound": [],
    "+ short convolution": ["conv=5"],
    "+ Muon": ["optimizer=muon"],
    "+ equal weights": ["weights=equal"],
    "+ BPE of 1,024": ["tokenizer=bpe:1024", "window=54", "batch=38"],
}
SIZE = ["layers=4", "heads=4", "width=128", "window=128", "batch=16", "context=0", "warmup=50", "ema=0.99", "log_every=1000000"]
WARM = 3


def train(config: TrainConfig, seconds: float, steps: int, out: Path) -> tuple[Training, int, float]:
    """A run of so many CPU seconds, or of so many steps: (it, its steps, the seconds that it took)."""
    accelerator = processes.accelerate(config.batch, bf16=config.bf16)
    made = setup.resolve(config)
    if not steps:
        trial = Training(config, made, accelerator, out, {})
        for step in range(2 * WARM):
            if step == WARM:
                begun = time.process_time()
            trial.update(step)
        steps = max(config.warmup + 1, round(seconds / ((time.process_time() - begun) / WARM)))
    run = Training(replace(config, steps=steps), made, accelerator, out, {})
    begun = time.process_time()
    for step in range(steps):
        run.update(step)
    return run, steps, time.process_time() - begun


def measure(settings: list[str], seed: int, seconds: float, steps: int, out: Path) -> dict[str, Any]:
    config = TrainConfig(data="shakespeare").with_settings([*settings, f"seed={seed}"])
    task, steps, spent = train(config, seconds, steps, out)
    found = task.validate(steps).figures
    text = "".join(reading.select(reading.read(config.data), "val", config.val_fraction))
    per_token = len(text) / len(task.setup.tokenizer.encode(text))
    return {"nats": found["val_nats"] / per_token, "steps": steps, "seconds": round(spent, 1), "stderr": found["val_stderr"] / per_token}


def rungs(words: list[str] | None) -> dict[str, list[str]]:
    """By name, the settings of each run."""
    if words:
        return {name.strip(): settings.split() for name, _, settings in (word.partition(":") for word in words)}
    found, before = {}, PLAIN
    for name, change in LADDER.items():
        found[name] = before = [*before, *change]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40.0, help="CPU seconds of a run")
    parser.add_argument("--steps", type=int, default=0, help="of every run, in place of the seconds")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rungs", nargs="+", metavar="'NAME: KEY=VALUE ...'", help="runs in place of the ladder")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="for every run")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    seconds, seeds, steps = (0.1, 2, 0) if arguments.quick else (arguments.seconds, arguments.seeds, arguments.steps)
    quick = ["eval_windows=4", "eval_passes=1", "warmup=1"] if arguments.quick else ["eval_windows=400", "eval_passes=2"]
    table = Table("recipe", "nats a character", "steps", "CPU seconds")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in rungs(arguments.rungs).items():
            runs = [measure([*SIZE, *quick, *settings, *arguments.settings], seed, seconds, steps, Path(folder)) for seed in range(seeds)]
            nats = [run["nats"] for run in runs]
            found = Mean.of(torch.tensor(nats, dtype=torch.float64))
            mean, error = found.value, found.band95
            rows.append({"recipe": name, "nats_per_character": mean, "band95": error, "runs": runs})
            table.add_row(name, f"{mean:.4f} +- {error:.4f}", str(runs[0]["steps"]), f"{sum(run['seconds'] for run in runs) / seeds:.0f}")
            print(f"{name}: {mean:.4f} +- {error:.4f}", flush=True)
    Console().print(table)
    result = {
        "benchmark": "recipes",
        "machine": platform.processor() or platform.machine(),
        "seconds": 0 if steps else seconds,
        "steps": steps,
        "rows": rows,
    }
    if not arguments.quick:
        with HISTORY.open("a") as file:
            file.write(json.dumps(result) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
