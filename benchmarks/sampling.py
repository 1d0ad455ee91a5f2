"""Tokens per second, network calls and quality of every sampler at equal model, the autoregressive twin beside them.

    python benchmarks/sampling.py                      # bundled checkpoints, 16 windows each
    python benchmarks/sampling.py --device cuda --samples 256 --batch 64

Samplers take turns within each repeat, so that a slow minute of the machine falls on all of them. Quality is bits per
character under the autoregressive twin beside the entropy of the text. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict

import torch
from rich.console import Console
from rich.table import Table

import dlm
from dlm.evaluate import card, generative

SETTINGS: list[tuple[str, dict[str, object]]] = [
    *[(f"ancestral, {n} steps", {"sampler": "ancestral", "steps": n}) for n in (16, 32, 64, 128, 256)],
    *[(f"topk, {n} steps", {"sampler": "topk", "steps": n}) for n in (16, 64, 256)],
    *[(f"confidence {x}", {"sampler": f"confidence:{x}"}) for x in (0.7, 0.9)],
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="shakespeare-mask")
    parser.add_argument("--twin", default="shakespeare-ar")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="one repeat of two samples: does it run?")
    args = parser.parse_args()
    if args.quick:
        args.samples, args.batch, args.repeats = 2, 2, 1
    model, twin = (dlm.load(name, device=args.device) for name in (args.model, args.twin))
    runs = [(label, model, options) for label, options in SETTINGS]
    runs += [("autoregressive twin, cache", twin, {}), ("autoregressive twin, no cache", twin, {"cache": False})]
    tokens = {label: [] for label, _, _ in runs}
    seconds: dict[str, list[float]] = {label: [] for label, _, _ in runs}
    forwards = dict.fromkeys(tokens, 0)
    console = Console(stderr=True)
    for repeat in range(args.repeats):
        for label, lm, options in runs:
            console.print(f"repeat {repeat + 1} of {args.repeats}: {label}", highlight=False)
            for begin in range(0, args.samples, args.batch):
                prompts = [""] * min(args.batch, args.samples - begin)
                clock = time.perf_counter()
                results = lm.generate(prompts, length=lm.window, seed=1000 * repeat + begin, **options)
                seconds[label].append((time.perf_counter() - clock) / len(prompts))
                tokens[label].append(results[0].trajectory.current_BT)
                forwards[label] += results[0].forwards
    table = Table("sampler", "calls per text", "tokens/s", "x twin", "bits/char under twin", "entropy", "distinct-4", box=None)
    rows = []
    base = statistics.median(seconds["autoregressive twin, cache"])
    for label, _, _ in runs:
        samples_NT = torch.cat(tokens[label])
        bits = generative.judge_bits(twin.noise, twin.predict, samples_NT.to(args.device))
        calls = forwards[label] / len(seconds[label])
        median = statistics.median(seconds[label])
        row = {
            "sampler": label,
            "calls_per_text": calls,
            "tokens_per_second": model.window / median,
            "spread": [model.window / max(seconds[label]), model.window / min(seconds[label])],
            "ratio_to_twin": base / median,
            "judge_bits_per_char": asdict(bits),
            "unigram_entropy_bits": generative.unigram_entropy(samples_NT),
            "distinct_4": generative.distinct(samples_NT, 4),
        }
        rows.append(row)
        quality = f"{bits.value:.3f} +- {bits.stderr:.3f}", f"{row['unigram_entropy_bits']:.3f}", f"{row['distinct_4']:.3f}"
        table.add_row(label, f"{calls:.1f}", f"{row['tokens_per_second']:,.0f}", f"{row['ratio_to_twin']:.2f}", *quality)
    Console().print(table)
    settings = {"model": args.model, "twin": args.twin, "samples": args.samples, "batch": args.batch, "repeats": args.repeats}
    print(json.dumps(card.make({"rows": rows}, device=args.device, dtype="float32", seed=0, settings=settings, data={})))


if __name__ == "__main__":
    main()
