"""Learned orders and schedules against the fixed linear one: the bound after equal steps, over several seeds.

    OMP_NUM_THREADS=1 nice python benchmarks/orders.py                        # five kinds of noise, 3 seeds, 600 steps
    python benchmarks/orders.py --kinds masked "masked, time" "genmd4, held" "genmd4, held, fast time"             # controls
    python benchmarks/orders.py --steps 20000 --set layers=6 --set width=192 --set window=128
    python benchmarks/orders.py --seeds 1 --first-seed 2                      # one seed, so that several processes share the work
    python benchmarks/orders.py --quick                                       # does it run?

Every step reads the same number of windows: learned weights read half as many texts, each with two draws of noise. Bounds are of the
averaged weights on the same held-out windows, in bits a character. `held` keeps the weights at 1: ordered noise is then masked noise
on half as many texts, GenMD4's masked noise whose network reads the time. `bound`: the network learns from the bound and not from equal
weights; `fast time`: the weights that read the time learn at the rate of all others.

Of learned noise the gradient of the bound with respect to the log-weights is measured as well, at the end, on held-out windows: its
signal-to-noise ratio in a training step, and its slope, the bits that weights with a spread of 1 in their logarithms would gain if the
bound were linear. The direction is that of one half of the batches, the slope that of the other, so noise has a slope of 0.
Rows are kept in --rows, so that an interrupted call goes on. The result is appended to benchmarks/history.jsonl; the last line is one JSON
object.
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
from dlm.evaluation import likelihood
from dlm.evaluation.card import dumps
from dlm.evaluation.statistics import Mean
from dlm.noise import loss
from dlm.noise.learned import COPIES, LearnedNoise, training_loss
from dlm.train import processes, setup
from dlm.train.config import TrainConfig
from dlm.train.learner import Learner
from dlm.train.training import Training

HISTORY = Path(__file__).parent / "history.jsonl"
SIZE = ["layers=2", "heads=4", "width=64", "window=64", "batch=16", "context=0", "warmup=50", "ema=0.99", "log_every=1000000"]
TIME, HELD, BOUND = "time_conditioning=true", "noise_lr=0", "weights=bound"
KINDS = {
    "masked": [],
    "ordered, held": ["noise=ordered", HELD],
    "ordered": ["noise=ordered"],
    "genmd4, held": ["noise=genmd4", TIME, HELD],
    "genmd4": ["noise=genmd4", TIME],
}
FAST = ", fast time"
CONTROLS = {
    "masked, bound": [BOUND],
    "masked, time": [TIME],
    "masked, time, bound": [TIME, BOUND],
    f"masked, time{FAST}": [TIME],
    "genmd4, held, bound": ["noise=genmd4", TIME, HELD, BOUND],
    f"genmd4, held{FAST}": ["noise=genmd4", TIME, HELD],
}
PASSES = {False: 16, True: 64}  # a bound with a time in it is estimated with more error
BATCHES = 1024  # of the gradient of the log-weights


def slope(gradients_MN: Tensor) -> dict[str, float]:
    """Of gradients in bits a character of M batches: the signal-to-noise ratio of one batch, and the slope with its standard error."""
    error_N = gradients_MN.std(0) / math.sqrt(len(gradients_MN))
    signal = gradients_MN.mean(0).square().sum() - error_N.square().sum()
    halves, along = (gradients_MN[::2], gradients_MN[1::2]), []
    for half_MN, other_MN in (halves, halves[::-1]):
        direction_N = half_MN.mean(0) / half_MN.mean(0).norm().clamp(min=1e-12)
        along.append(Mean.of(other_MN @ direction_N * math.sqrt(gradients_MN.shape[1])))
    return {
        "signal_to_noise": float((signal.clamp(min=0) / gradients_MN.var(0).sum().clamp(min=1e-24)).sqrt()),
        "slope": sum(one.value for one in along) / 2,
        "slope_stderr": sum(one.stderr for one in along) / 2,  # the two are nearly one number
    }


def gradients(learner: Learner, windows_WT: Tensor, batches: int, seed: int) -> Tensor:
    """Of the log-weights, the network held, in bits a character (batches, N), on batches of the size and noise of training."""
    assert learner.noise_weights is not None
    live, found, rows = learner.noise_weights.log_weights, [], learner.config.batch // COPIES
    rng = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def predict(z_BT: Tensor, t_B: Tensor) -> Tensor:
        logits: Tensor = learner.network(z_BT, t_B).float()
        return logits

    for _ in range(batches):
        x_BT = windows_WT[torch.randint(len(windows_WT), (rows,), generator=rng)].repeat_interleave(COPIES, 0)
        u_B = loss.draw_levels(rows, rng).repeat_interleave(COPIES)
        nats_B = training_loss(learner.noise, predict, x_BT, torch.ones_like(x_BT, dtype=torch.bool), rng, u_B, equal=True)
        found.append(torch.autograd.grad(nats_B.mean() / x_BT.shape[1] / math.log(2), live)[0])
    return torch.stack(found).double()


def measure(settings: list[str], seed: int, passes: int, out: Path, *, fast_time: bool, batches: int) -> dict[str, Any]:
    """Train and evaluate: bits a character, the error of the estimate, and of learned noise its log-weights and their gradient."""
    config = TrainConfig(data="shakespeare").with_settings([*settings, f"seed={seed}"])
    accelerator = processes.accelerate(config.batch, bf16=config.bf16)
    task = Training(config, setup.resolve(config), accelerator, out, {})
    for group in task.learner.optimizer.param_groups if fast_time else ():
        if not group.get("muon"):
            group.pop("lr_scale", None)
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
            seed=seed,  # so that the band over the seeds has the error of the estimate in it
            reads_time=config.network.time_conditioning,
        )
        learned: dict[str, Any] = {}
        if isinstance(learner.noise, LearnedNoise):
            log_weights = [round(math.log(w), 4) for w in learner.noise.fixed()]
            learned = {"log_weights": log_weights} | slope(gradients(learner, windows_WT, batches, seed))
    return {
        "bits": found.bits_per_char,
        "stderr": found.stderr / math.log(2),
        "parameters": task.facts["parameters"],
        "seconds": round(spent, 1),
    } | learned


def measured(settings: list[str], seed: int, passes: int, **how: Any) -> dict[str, Any]:
    """`measure` with a run directory that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        return measure(settings, seed, passes, Path(folder), **how)


def told(row: dict[str, Any]) -> str:
    return f"{row['bits']:.4f} +- {row['stderr']:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS, *CONTROLS], default=list(KINDS))
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
            own = (KINDS | CONTROLS)[kind]
            passes, batches = (2, 4) if arguments.quick else (PASSES[TIME in own], BATCHES)
            settings = [*size, *own, *arguments.settings]
            make = partial(measured, settings, seed, passes, fast_time=kind.endswith(FAST), batches=batches)
            runs.setdefault(kind, []).append(rows.row(kind, settings, seed, passes, measure=make, told=told))
    table, result = Table("noise", "bits a character", "against the first", "slope", "CPU seconds"), []
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
        slopes = torch.tensor([row["slope"] for row in found if "slope" in row], dtype=torch.float64)
        told_slope = f"{slopes.mean():.3f}" if len(slopes) else ""
        table.add_row(kind, f"{mean.value:.4f} +- {mean.band95:.4f}", against, told_slope, f"{seconds:.0f}")
    Console().print(table)
    line = {"benchmark": "orders", "machine": platform.processor() or platform.machine(), "steps": steps, "rows": result}
    if not arguments.quick and seeds > 1:
        with HISTORY.open("a") as file:
            file.write(dumps(line) + "\n")
    print(dumps(line))


if __name__ == "__main__":
    main()
