"""The texts of the bundled models side by side: bits per character under the baseline, diversity, share of real words, seconds.

    python benchmarks/bundled.py                                # every diffusion model, its exact sampler, 16 texts
    python benchmarks/bundled.py --models shakespeare-mask runs/mine --temperature 0.6 0.7 0.8
    python benchmarks/bundled.py --models shakespeare-mask shakespeare-block --block-lengths 1 4 16 64 256     # the order of writing
    python benchmarks/bundled.py --models kjv-words --data kjv.txt --judge none     # another text, without a baseline of its own
    python benchmarks/bundled.py --quick                        # does it run?

Every text is cut to its first 200 characters, so that characters and subwords are judged alike. Forward passes and seconds are those of a
whole window, all texts in one batch. The last row is real text. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import dlm
from dlm.evaluation import generative
from dlm.text.tokenizer import Tokenizer
from dlm.train import data as reading

MODELS = tuple(f"shakespeare-{name}" for name in ("mask", "uniform", "semantic", "hybrid", "block", "words", "words-uniform"))
CHARACTERS = 200


def quality(judge: dlm.LanguageModel | None, tokenizer: Tokenizer, texts: Sequence[str], words: set[str]) -> dict[str, float]:
    """tokenizer: of characters, the judge's own where there is one."""
    samples_NT = torch.tensor([tokenizer.encode(text[:CHARACTERS]) for text in texts])
    bits = judge and generative.judge_bits(judge.noise, judge.predict, samples_NT)
    return ({"bits": bits.value, "bits_band95": bits.band95} if bits else {}) | {
        "entropy": generative.unigram_entropy(samples_NT),
        "distinct_4": generative.distinct(samples_NT, 4),
        "words": generative.known_words([text[:CHARACTERS] for text in texts], words),
    }


def measure(
    model: dlm.LanguageModel, temperature: float, block_length: int | None, args: argparse.Namespace
) -> tuple[dict[str, Any], list[str]]:
    """Cost of its texts, and the texts. block_length: None is the model's own."""
    sampler = args.sampler if model.config.noise["process"] == "masked" else "ancestral"
    chosen = {"block_length": block_length, "steps": args.steps}
    how: dict[str, Any] = {"sampler": sampler} | {name: value for name, value in chosen.items() if value is not None}
    begun = time.perf_counter()
    made = model.generate([""] * args.samples, length=model.window, seed=args.seed, temperature=temperature, **how)
    seconds = time.perf_counter() - begun
    texts = [one.text for one in made if len(one.text) >= CHARACTERS]
    cost = {"forward_passes": made[0].forwards, "seconds_a_text": seconds / args.samples}
    return {"model": model.name, "temperature": temperature, "block_length": block_length, "texts": len(texts)} | cost, texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="bundled names or directories")
    parser.add_argument("--data", default="shakespeare", help="the text that the models learned")
    parser.add_argument("--judge", default="shakespeare-ar", help="an autoregressive model of its characters, or none")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sampler", default="first-hitting", help="of masks; other noises take their ancestral sampler")
    parser.add_argument("--steps", type=int, help="of a window; default: the model's own; first-hitting takes one a token")
    parser.add_argument("--temperature", type=float, nargs="+", default=[1.0])
    parser.add_argument("--block-lengths", type=int, nargs="+", default=[None], help="of masked models; default: the model's own order")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.models, args.samples = ["shakespeare-words"], 2
    judge = None if args.judge == "none" else dlm.load(args.judge)
    train, val = reading.split(reading.read(args.data), 0.1)
    tokenizer, words, rows = judge.tokenizer if judge else Tokenizer.characters(train[0] + val[0]), generative.vocabulary(train[0]), []
    for name in args.models:
        model = dlm.load(name)
        for temperature, block_length in itertools.product(args.temperature, args.block_lengths):
            row, texts = measure(model, temperature, block_length, args)
            rows.append(row | quality(judge, tokenizer, texts, words))
            Console(stderr=True).print(rows[-1])
    real = [val[0][i : i + CHARACTERS] for i in range(0, len(val[0]) - CHARACTERS, len(val[0]) // args.samples)]
    rows.append({"model": "real text", "texts": len(real)} | quality(judge, tokenizer, real, words))
    table = Table("model", "T", "blocks of", "texts", "passes", "s a text", "bits/char", "entropy", "distinct-4", "known words", box=None)
    for row in rows:
        bits = f"{row['bits']:.2f} +- {row['bits_band95']:.2f}" if judge else ""
        cost = [f"{row['seconds_a_text']:.1f}" if "seconds_a_text" in row else "", bits]
        told = ["" if row.get(name) is None else str(row[name]) for name in ("temperature", "block_length", "texts", "forward_passes")]
        table.add_row(row["model"], *told, *cost, *(f"{row[name]:.3f}" for name in ("entropy", "distinct_4", "words")))
    Console(width=130).print(table)
    print(json.dumps({"benchmark": "bundled", "data": args.data, "rows": rows}))


if __name__ == "__main__":
    main()
