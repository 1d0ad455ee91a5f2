"""Is it really lossless? Greedy text against the autoregressive baseline on 1,000 prompts, and a two-sample test of sampled text.

    python benchmarks/lossless.py --base smollm2-135m --methods "lookup:4;strided:4" --adapter smollm2-135m-introspective
    python benchmarks/lossless.py --base smollm2-135m --dtype bfloat16              # near-ties that round otherwise
    python benchmarks/lossless.py --prompts 0 --samples 1000 --adapter smollm2-135m-introspective

Greedy: every method continues the same prompts; where its text leaves the baseline's, the gap of the two likeliest logits there is shown.
Sampled: the first tokens of as many independent texts by the baseline and by each method, `ratio` coupling included, which keeps the
distribution and not the text; p is the share of relabelled samples that differ as much. The baseline at another temperature stands
beside them, to show that the test can fail. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import dlm
from dlm.cli.app import load
from dlm.cli.progress import showing
from dlm.evaluation import card
from dlm.sampling.autoregressive.speculative import SpeculativeDecoder
from dlm.sampling.draw import generators
from dlm.trajectory import Canvas
from dlm.workflows.inputs import Counter

TASKS = (
    "Tell me a short story about {}.",
    "Write the first lines of a tale in which {} is lost.",
    "What is {}?",
    "Why do people care about {}?",
    "How would you explain {} to a child?",
    "List five facts about {}.",
    "Write a poem of four lines about {}.",
    "Give me three questions to ask about {}.",
    "Summarise what is known about {} in two sentences.",
    "Write a letter to a friend about {}.",
    "Describe {} without naming it.",
    "What is the history of {}?",
    "Write a Python function that prints a line about {}.",
    "Name one advantage and one drawback of {}.",
    "Compare {} with its opposite.",
    "Write a dialogue between two people who disagree about {}.",
    "Plan a lesson of ten minutes on {}.",
    "What will {} look like in a hundred years?",
    "Give advice to somebody who is afraid of {}.",
    "Translate a sentence about {} into French.",
)
SUBJECTS = (
    *("the sea", "a lighthouse", "bread", "the moon", "a clock", "rain", "an old bridge", "chess", "a garden", "volcanoes"),
    *("the colour blue", "trains", "sleep", "bees", "a violin", "glass", "winter", "maps", "honesty", "a dragon", "salt"),
    *("the library", "paper", "a broken mirror", "friendship", "coffee", "gravity", "a small town", "kites", "the desert"),
    *("mathematics", "a king", "silence", "shadows", "computers", "rivers", "a tall tree", "memory", "markets", "the wind"),
    *("a spider", "cooking", "stars", "money", "a ship", "snow", "laughter", "an empty house", "photographs", "time"),
)


def prompts(count: int) -> list[str]:
    """The first of 1,000, tasks in turn."""
    every = [task.format(subject) for subject, task in product(SUBJECTS, TASKS)]
    if count > len(every):
        raise SystemExit(f"there are {len(every)} prompts, {count} were asked for")
    return every[:count]


def canvases(lm: dlm.LanguageModel, texts: Sequence[str], new: int, batch: int) -> Iterator[Canvas]:
    """Batches of prompts of like length, as messages of a user where the base has a chat template."""
    rows = [lm.prompt_ids(text) for text in texts]
    for part in torch.tensor([len(row) for row in rows]).argsort(stable=True).split(batch):
        yield Canvas.from_rows([[*rows[i], *[None] * new] for i in part.tolist()], fill=lm.tokenizer.mask_id)


def write(sampler: Any, canvas: Canvas, seed: int) -> tuple[Tensor, int]:
    *_, frame = sampler.steps(canvas, rng=generators(seed, len(canvas.tokens_BT)))
    return frame.tokens_BT, frame.forwards


def greedy(lm: dlm.LanguageModel, args: argparse.Namespace, words: Sequence[str]) -> list[dict[str, Any]]:
    samplers = {word: lm.sampler(sampler=word, temperature=0.0) for word in ("autoregressive", *words)}
    found: dict[str, dict[str, Any]] = {word: {"method": word, "texts": 0, "same": 0, "calls": 0, "gaps": []} for word in samplers}
    with showing(f"greedy, {args.prompts} prompts") as progress:
        count = Counter(progress, args.prompts)
        for canvas in canvases(lm, prompts(args.prompts), args.new, args.batch):
            plain_BL: Tensor | None = None
            for word, sampler in samplers.items():
                text_BL, calls = write(sampler, canvas, 0)
                plain_BL = text_BL if plain_BL is None else plain_BL
                row, same_B = found[word], (text_BL == plain_BL).all(-1)
                row["texts"] += len(same_B)
                row["same"] += int(same_B.sum())
                row["calls"] += calls
                row["gaps"] += [gap(lm, plain_BL[b], text_BL[b]) for b in (~same_B).nonzero().flatten().tolist()]
            count.add(len(canvas.tokens_BT))
    return list(found.values())


def gap(lm: dlm.LanguageModel, plain_L: Tensor, text_L: Tensor) -> float:
    """How far apart the logits of the two tokens are where the texts part, by a call on the text before."""
    first = int((plain_L != text_L).int().argmax())
    start = lm.config.start_token_id
    head = [] if start is None else [lm.tokenizer.mask_id if start < 0 else start]
    read = torch.tensor([head + plain_L[:first].tolist()])
    logits_V = lm.network(read)[0, -1].float()
    return float((logits_V[plain_L[first]] - logits_V[text_L[first]]).abs())


def first_tokens(lm: dlm.LanguageModel, sampler: Any, args: argparse.Namespace, seed: int, count: Counter) -> Tensor:
    """The first tokens of `samples` texts (N, K)."""
    row, parts = lm.prompt_ids(args.prompt), []
    for first in range(0, args.samples, args.batch):
        rows = min(args.batch, args.samples - first)
        canvas = Canvas.from_rows([[*row, *[None] * args.first]] * rows, fill=lm.tokenizer.mask_id)
        parts.append(write(sampler, canvas, seed + first)[0][:, len(row) :])
        count.add(rows)
    return torch.cat(parts)


def differs(a_NK: Tensor, b_NK: Tensor, rng: torch.Generator, rounds: int = 2000) -> float:
    """p of a permutation test on the counts of whole rows, by the chi-square distance of two samples of one size."""
    both_N = torch.unique(torch.cat([a_NK, b_NK]), dim=0, return_inverse=True)[1]
    whole = torch.bincount(both_N).double()

    def distance(chosen_N: Tensor) -> float:
        count = torch.bincount(both_N[chosen_N], minlength=len(whole)).double()
        return float(((2 * count - whole) ** 2 / whole).sum())

    seen = distance(torch.arange(len(a_NK)))
    as_far = sum(distance(torch.randperm(len(both_N), generator=rng)[: len(a_NK)]) >= seen - 1e-9 for _ in range(rounds))
    return (1 + as_far) / (1 + rounds)


def sampled(lm: dlm.LanguageModel, args: argparse.Namespace, words: Sequence[str]) -> list[dict[str, Any]]:
    samplers: dict[str, Any] = {word: lm.sampler(sampler=word) for word in words}
    chains = {word: one for word, one in samplers.items() if isinstance(one, SpeculativeDecoder) and one.tree is None}
    samplers |= {f"{word}, ratio": replace(one, coupling="ratio") for word, one in chains.items()}
    samplers = {"plain again": lm.sampler(sampler="autoregressive"), **samplers}
    samplers["plain at temperature 0.8"] = lm.sampler(sampler="autoregressive", temperature=0.8)
    rng, rows = torch.Generator().manual_seed(args.seed), []
    with showing(f"sampled, {args.samples} texts each") as progress:
        count = Counter(progress, args.samples * (1 + len(samplers)))
        plain_NK = first_tokens(lm, samplers["plain again"], args, args.seed, count)
        for i, (label, sampler) in enumerate(samplers.items(), 1):
            other_NK = first_tokens(lm, sampler, args, args.seed + i * args.samples, count)
            p = [differs(plain_NK[:, : k + 1], other_NK[:, : k + 1], rng) for k in range(args.first)]
            rows.append({"method": label, "samples": args.samples, "p": p})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--adapter")
    parser.add_argument("--methods", default="lookup:4;strided:4", help="samplers with semicolons between")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--new", type=int, default=32, help="tokens to write")
    parser.add_argument("--samples", type=int, default=0, help="texts of the two-sample test; 0: none")
    parser.add_argument("--first", type=int, default=3, help="tokens of each that it compares")
    parser.add_argument("--prompt", default="Tell me a short story about the sea.")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--deterministic", action="store_true", help="batch-invariant: forward passes of any length round alike")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few prompts of the bundled base: does it run?")
    args = parser.parse_args()
    if args.quick:
        args.base, args.methods, args.prompts, args.new, args.samples, args.batch = "shakespeare-ar", "lookup:3", 4, 12, 40, 20
        args.prompt = "ROMEO:"
    lm = load(args.base, "cpu", args.dtype, args.adapter, args.deterministic)
    words = [word for word in args.methods.split(";") if word]
    text_rows = greedy(lm, args, words) if args.prompts else []
    drawn_rows = sampled(lm, args, words) if args.samples else []
    table = Table("method", "texts", "equal", "calls", "largest gap where they part", box=None, title="greedy" if text_rows else None)
    for row in text_rows:
        table.add_row(row["method"], str(row["texts"]), str(row["same"]), str(row["calls"]), f"{max(row['gaps'], default=0):.1e}")
    tests = Table("method", *(f"p, first {k + 1}" for k in range(args.first)), box=None, title="drawn" if drawn_rows else None)
    for row in drawn_rows:
        tests.add_row(row["method"], *(f"{p:.3f}" for p in row["p"]))
    for rows, one in ((text_rows, table), (drawn_rows, tests)):
        if rows:
            Console(width=120).print(one)
    figures = {"greedy": text_rows, "sampled": drawn_rows}
    print(
        card.dumps(
            card.make(figures, device="cpu", dtype=args.dtype, seed=args.seed, settings=vars(args), data={"source": "prompts in this file"})
        )
    )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
