"""Caches for bidirectional models: the time each saves, and how far its text drifts from the uncached run.

    python benchmarks/caches.py                       # shakespeare-mask, and the models of 1,024 and 4,096 characters if they are there
    python benchmarks/caches.py --device cuda --characters 65536

The wider models are trained on top of shakespeare-mask (see --train). Every policy decodes the same canvases by `topk` with the same
random numbers, so that the cache alone makes tokens differ. Policies take turns. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import dlm
from dlm.evaluation import card, generative
from dlm.language_model.options import TextKeywords
from dlm.train import recipes
from dlm.train.log import finished

POLICIES = ("uncached", "prefix", "dual", "delayed:8", "drift:0.2")
WIDE: dict[int, dict[str, Any]] = {1024: {"batch": 4, "steps": 60}, 4096: {"batch": 1, "steps": 30}}


def wider(window: int, out: Path) -> None:
    """shakespeare-mask, trained a little more on windows of another length."""
    base = recipes.shakespeare_mask()
    config = replace(base, network=base.network.with_(window=window), init="shakespeare-mask", lr=5e-4, warmup=10, **WIDE[window])
    config = replace(config, eval_every=config.steps, eval_windows=4, save_every=20, compile=True)
    if not finished(out, config.steps):
        dlm.fit(config, out, resume=(out / "training.safetensors").is_file())


@dataclass
class Timings:
    """Of each cache policy: seconds a text in every repeat, and the texts (samples, window)."""

    seconds: dict[str, list[float]]
    texts: dict[str, torch.Tensor]


def measure(model: dlm.LanguageModel, window: int, samples: int, args: argparse.Namespace, console: Console) -> Timings:
    """Every policy writes the same texts in turn."""
    timings = Timings({policy: [] for policy in POLICIES}, {})
    options: TextKeywords = {"length": window, "block_length": window // args.blocks, "sampler": "topk", "temperature": 1.0}
    model.generate("", **(options | {"steps": args.blocks}))  # the first run allocates what later ones use
    for repeat in range(args.repeats):
        for policy in POLICIES:
            console.print(f"window {window}, {policy}, repeat {repeat + 1}", highlight=False)
            clock = time.perf_counter()
            cache = True if policy == "uncached" else policy
            made = model.generate([""] * samples, seed=0, **(options | {"steps": args.blocks * args.calls, "cache": cache}))
            timings.seconds[policy].append((time.perf_counter() - clock) / samples)
            timings.texts[policy] = made[0].trajectory.current_BT
    return timings


def compared(timings: Timings, policy: str, window: int, twin: dlm.LanguageModel, device: str) -> dict[str, Any]:
    """A policy against none: its speed, its text, and the bits of that text under the twin."""
    base, median = (statistics.median(timings.seconds[name]) for name in ("uncached", policy))
    text_BT = timings.texts[policy]
    bits = generative.judge_bits(twin.noise, twin.predict, text_BT.view(-1, 256).to(device))
    differ = (text_BT != timings.texts["uncached"]).double().mean().item()
    row = {"window": window, "cache": policy, "seconds_per_text": median, "speed_up": base / median, "differ": differ}
    return row | {"bits": bits.value, "bits_stderr": bits.stderr, "distinct_4": generative.distinct(text_BT, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--runs", type=Path, default=Path("runs/caches"), help="where the wider models are")
    parser.add_argument("--train", action="store_true", help="train those that are missing")
    parser.add_argument("--twin", default="shakespeare-ar")
    parser.add_argument("--characters", type=int, default=4096, help="of all texts of a window together")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=8, help="of a window")
    parser.add_argument("--calls", type=int, default=8, help="forward passes for a block")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="one window, one text, few steps: does it run?")
    args = parser.parse_args()
    if args.quick:
        args.windows, args.characters, args.calls = [256], 512, 2
    console, twin = Console(stderr=True), dlm.load(args.twin, device=args.device)
    table = Table("window", "cache", "seconds", "speed-up", "tokens that differ", "bits/char under judge", "distinct-4", box=None)
    rows: list[dict[str, Any]] = []
    for window in args.windows:
        path = args.runs / str(window)
        if window != 256 and args.train:
            wider(window, path)
        if window != 256 and not (path / "config.json").is_file():
            console.print(f"no model of {window} characters in {path}: --train makes it", highlight=False)
            continue
        model = dlm.load("shakespeare-mask" if window == 256 else str(path), device=args.device)
        timings = measure(model, window, max(1, args.characters // window), args, console)
        for policy in POLICIES:
            rows.append(row := compared(timings, policy, window, twin, args.device))
            figures = f"{row['seconds_per_text']:.2f}", f"{row['speed_up']:.2f}", f"{row['differ']:.1%}"
            table.add_row(str(window), policy, *figures, f"{row['bits']:.2f} +- {row['bits_stderr']:.2f}", f"{row['distinct_4']:.2f}")
    Console().print(table)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    print(card.dumps(card.make({"rows": rows}, device=args.device, dtype="float32", seed=0, settings=settings, data={})))


if __name__ == "__main__":
    main()
