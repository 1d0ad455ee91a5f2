"""Cost and quality of every sampler of a model, measured side by side: the table behind `--sampler auto`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from dlm.calibration.table import Options, Row
from dlm.evaluation import generative
from dlm.evaluation.statistics import Mean
from dlm.sampling import registry, windows

Generate = Callable[[Options, int], tuple[Tensor, float, float]]
"""(options of a sampler, seed) -> (texts (N, T), forward passes for all, seconds for all)."""
Judge = Callable[[Tensor], Mean]
"""Texts (N, T) -> bits per token."""
ROUNDS = 2  # of timing
CACHES = ("prefix", "dual", "delayed:8", "drift:0.2")  # approximate ones that are measured


def candidates(*, window: int, causal: bool, blocks: Sequence[int] = (), quick: bool = False) -> list[Options]:
    """Settings of a masked model to measure, the exact one first: those that the registry names for each sampler, orders and caches.

    causal: a model of block diffusion, whose cache is exact. blocks: lengths in which the exact sampler also writes, from left to right.
    """
    settings = registry.trials(window, causal=causal, quick=quick)
    found: list[Options] = [{"sampler": word} | ({} if steps is None else {"steps": steps}) for word, steps in settings]
    if not quick:
        found += [{"sampler": "first-hitting", "block_length": length} for length in blocks]
    if causal or quick:
        return found
    quarter, half = max(1, window // 4), max(1, window // 2)
    block = windows.longest_block(window, quarter)
    for cache in CACHES:
        found += [{"sampler": "ancestral", "steps": n, "cache": cache, "block_length": block} for n in (quarter, half)]
    return found


def is_exact(options: Options) -> bool:
    """Whether these options, of a masked model or an autoregressive one, have the distribution of one token a forward pass.

    That of their own order of positions: blocks have another than a whole window. A text is longer than one token.
    """
    if options["sampler"] == "autoregressive":
        return True
    return registry.is_exact(options["sampler"], "masked", steps=options.get("steps"), cache=options.get("cache", True))


def measure(generate: Generate, judge: Judge, options: Options, *, seed: int = 0) -> Row:
    """The row of a setting."""
    samples_NT, calls, seconds = generate(options, seed)
    bits = judge(samples_NT)
    return Row(
        options=options,
        calls=calls,
        seconds=seconds / len(samples_NT),
        bits=bits.value,
        bits_stderr=bits.stderr,
        entropy=generative.unigram_entropy(samples_NT),
        distinct_4=generative.distinct(samples_NT, 4),
        exact=is_exact(options),
    )


Pace = Callable[[Options, int], float]
"""(options of a sampler, forward passes) -> seconds of one for each text, over the first so many."""


def retime(
    pace: Pace, rows: Sequence[Row], *, rounds: int = ROUNDS, calls: int = 3, progress: Callable[[int], None] = lambda _: None
) -> list[Row]:
    """The same rows with seconds measured again: the least of several rounds in turns, so that a slow minute counts for none.

    A cache is followed for longer, since its first call reads everything.
    """
    least = [math.inf] * len(rows)
    for _ in range(rounds):
        for i, row in enumerate(rows):
            least[i] = min(least[i], pace(row.options, 4 * calls if "cache" in row.options else calls))
            progress(1)
    return [replace(row, seconds=seconds * row.calls) for row, seconds in zip(rows, least, strict=True)]
