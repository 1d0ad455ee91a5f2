"""The texts of the bundled models side by side: bits per character under the baseline, diversity, share of real words, seconds.

    python benchmarks/bundled.py                                # every diffusion model, its exact sampler, 16 texts
    python benchmarks/bundled.py --models shakespeare-mask runs/mine --temperature 0.7
    python benchmarks/bundled.py --quick                        # does it run?

Every text is cut to its first 200 characters, so that characters and subwords are judged alike. Forward passes and seconds are those of a
whole window, all texts in one batch. The last row is real text. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import dlm
from dlm.evaluation import generative
from dlm.train import data as reading

MODELS = tuple(f"shakespeare-{name}" for name in ("mask", "uniform", "semantic", "hybrid", "block", "words", "words-uniform"))
CHARACTERS = 200


def quality(judge: dlm.LanguageModel, texts: Sequence[str], words: set[str]) -> dict[str, float]:
    samples_NT = torch.tensor([judge.tokenizer.encode(text[:CHARACTERS]) for text in texts])
    bits = generative.judge_bits(judge.noise, judge.predict, samples_NT)
    return {
        "bits": bits.value,
        "bits_band95": bits.band95,
        "entropy": generative.unigram_entropy(samples_NT),
        "distinct_4": generative.distinct(samples_NT, 4),
        "words": generative.known_words([text[:CHARACTERS] for text in texts], words),
    }


def measure(name: str, judge: dlm.LanguageModel, words: set[str], args: argparse.Namespace) -> dict[str, Any]:
    model = dlm.load(name)
    sampler = args.sampler if model.config.noise["process"] == "masked" else "ancestral"
    begun = time.perf_counter()
    made = model.generate([""] * args.samples, length=model.window, seed=args.seed, temperature=args.temperature, sampler=sampler)
    seconds = time.perf_counter() - begun
    texts = [one.text for one in made if len(one.text) >= CHARACTERS]
    row = {"model": Path(name).name, "texts": len(texts), "forward_passes": made[0].forwards, "seconds_a_text": seconds / args.samples}
    return row | quality(judge, texts, words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="bundled names or directories")
    parser.add_argument("--judge", default="shakespeare-ar")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sampler", default="first-hitting", help="of masks; other noises take their ancestral sampler")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.models, args.samples = ["shakespeare-words"], 2
    judge = dlm.load(args.judge)
    train, val = reading.split(reading.read("shakespeare"), 0.1)
    words, rows = generative.vocabulary(train[0]), []
    for name in args.models:
        rows.append(measure(name, judge, words, args))
        Console(stderr=True).print(rows[-1])
    real = [val[0][i : i + CHARACTERS] for i in range(0, len(val[0]) - CHARACTERS, len(val[0]) // args.samples)]
    rows.append({"model": "real text", "texts": len(real)} | quality(judge, real, words))
    table = Table("model", "texts", "passes", "s a text", "bits/char", "entropy", "distinct-4", "known words", box=None)
    for row in rows:
        cells = [f"{row['bits']:.2f} +- {row['bits_band95']:.2f}", *(f"{row[name]:.2f}" for name in ("entropy", "distinct_4", "words"))]
        cost = [str(row.get("forward_passes", "")), f"{row['seconds_a_text']:.1f}" if "seconds_a_text" in row else ""]
        table.add_row(row["model"], str(row["texts"]), *cost, *cells)
    Console(width=130).print(table)
    print(json.dumps({"benchmark": "bundled", "temperature": args.temperature, "rows": rows}))


if __name__ == "__main__":
    main()
