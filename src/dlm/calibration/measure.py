"""Cost and quality of every sampler of a model, measured side by side: the table behind `--sampler auto`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from dlm.calibration.table import Options, Row
from dlm.evaluation import generative
from dlm.evaluation.statistics import Mean
from dlm.sampling import windows

Generate = Callable[[Options, int], tuple[Tensor, float, float]]
"""(options of a sampler, seed) -> (texts (N, T), forward passes for all, seconds for all)."""
Judge = Callable[[Tensor], Mean]
"""Texts (N, T) -> bits per token."""
ROUNDS = 2  # of timing
EXACT = ("first-hitting", "speculative")


def candidates(*, window: int, causal: bool, quick: bool = False) -> list[Options]:
    """Settings worth a look for a masked model; the exact one first. causal: a model of block diffusion."""
    few, half = [max(1, window // n) for n in (16, 8, 4)], max(1, window // 2)
    block = windows.longest_block(window, few[2])
    found: list[Options] = [{"sampler": "first-hitting"}]
    if quick:
        return [*found, *({"sampler": "topk", "steps": n} for n in few[:2])]
    found += [{"sampler": "ancestral", "steps": n} for n in (*few, half, window)]
    for word in ("topk", "margin", "entropy"):
        found += [{"sampler": word, "steps": n} for n in few]
    adaptive = ("confidence:0.5", "confidence:0.9", "factor:1", "factor:4", "klass:0.6", "entropy-bound:8", "entropy-bound:32")
    found += [{"sampler": word, "steps": half} for word in adaptive] + [{"sampler": "confidence:0.9", "steps": window}]
    for word in ("predictor-corrector:1", "remdm-cap:0.04", "remdm-rescale:0.1", "remdm-conf:0.5", "remdm-loop:0.04"):
        found += [{"sampler": word, "steps": n} for n in few[1:]]
    if causal:
        return found
    found += [{"sampler": word, "steps": n} for word in ("revoke:0.6", "planner:1") for n in few[1:]]
    found += [{"sampler": f"speculative:{setting}"} for setting in ("2", "4", "8", "16", "8,0.5")]
    for cache in ("prefix", "dual", "delayed:8", "drift:0.2"):
        found += [{"sampler": "ancestral", "steps": n, "cache": cache, "block_length": block} for n in (few[2], half)]
    return found


def is_exact(options: Options) -> bool:
    """Whether the sampler has the distribution of one token a call."""
    name, _, setting = str(options["sampler"]).partition(":")
    return name in EXACT and "," not in setting and not options.get("cache")


def measure(generate: Generate, judge: Judge, options: list[Options], *, seed: int = 0) -> Iterator[Row]:
    """A row for each setting, as it comes; all with the same seeds."""
    for setting in options:
        samples_NT, calls, seconds = generate(setting, seed)
        bits = judge(samples_NT)
        yield Row(
            options=setting,
            calls=calls,
            seconds=seconds / len(samples_NT),
            bits=bits.value,
            bits_stderr=bits.stderr,
            entropy=generative.unigram_entropy(samples_NT),
            distinct_4=generative.distinct(samples_NT, 4),
            exact=is_exact(setting),
        )


Pace = Callable[[Options, int], float]
"""(options of a sampler, forward passes) -> seconds of one for each text, over the first so many."""


def retime(
    pace: Pace, rows: Sequence[Row], *, rounds: int = ROUNDS, calls: int = 3, progress: Callable[[int], None] = lambda rows: None
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
