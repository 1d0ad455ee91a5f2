"""How fast an autoregressive model decodes, by what proposes its tokens: the same prompts and seeds for every method, in turns.

Shapes: B rows, L columns of the canvas, K places of a proposal.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dlm.sampling.autoregressive import AutoregressiveSampler
from dlm.sampling.draw import generators
from dlm.sampling.strided import StridedSampler
from dlm.trajectory import Canvas

Method = AutoregressiveSampler | StridedSampler


@dataclass(frozen=True)
class Decoding:
    """One method on one batch. tokens: written by all rows; calls of the network; seconds of the whole and until every row had a token,
    the least of several rounds; accepted: the chance that the k-th proposal of a call is kept; same: whether its text is the plain one."""

    method: str
    batch: int
    tokens: int
    calls: int
    seconds: float
    first: float
    accepted: list[float]
    same: bool

    @property
    def per_call(self) -> float:
        """Tokens of a row that a call commits."""
        return self.tokens / self.batch / self.calls

    def record(self) -> dict[str, Any]:
        return asdict(self) | {"tokens_per_forward": self.per_call, "tokens_per_second": self.tokens / self.seconds}


def compare(
    methods: Mapping[str, Method], canvas: Canvas, *, seed: int = 0, rounds: int = 3, progress: Callable[[int], None] = lambda runs: None
) -> list[Decoding]:
    """Every method writes the same canvas with the same seeds; the first is the plain one that the others are held to."""
    found: dict[str, Decoding] = {}
    plain_BL: Tensor | None = None
    for _ in range(rounds):  # in turns, so that a slow minute counts for none
        for name, sampler in methods.items():
            one, text_BL = _once(name, sampler, canvas, seed, plain_BL)
            plain_BL = text_BL if plain_BL is None else plain_BL
            best = found.get(name, one)
            found[name] = Decoding(**(asdict(one) | {"seconds": min(one.seconds, best.seconds), "first": min(one.first, best.first)}))
            progress(1)
    return list(found.values())


def _once(name: str, sampler: Method, canvas: Canvas, seed: int, plain_BL: Tensor | None) -> tuple[Decoding, Tensor]:
    rows = len(canvas.tokens_BT)
    proposed_K, accepted_K = torch.zeros(64, dtype=torch.long), torch.zeros(64, dtype=torch.long)
    k_K, first = torch.arange(64), math.nan
    given = int((~canvas.free_BT & canvas.valid_BT).sum())
    clock = time.perf_counter()
    if isinstance(sampler, StridedSampler):
        for frame, tally in sampler.rounds(canvas, rng=generators(seed, rows)):
            first = time.perf_counter() - clock if frame.forwards == 1 else first
            reached_BK = tally.accepted_B[:, None].cpu() >= k_K  # the k-th is looked at where all before it were kept
            proposed_K += ((tally.proposed_B[:, None].cpu() > k_K) & reached_BK).sum(0)
            accepted_K += (tally.accepted_B[:, None].cpu() > k_K).sum(0)
    else:
        for frame in sampler.steps(canvas, rng=generators(seed, rows)):
            first = time.perf_counter() - clock if frame.forwards == 1 else first
    seconds = time.perf_counter() - clock
    text_BL = frame.tokens_BT.cpu()
    written = int((frame.settled_BT & canvas.valid_BT.to(frame.settled_BT.device)).sum()) - given
    accepted = [int(a) / int(p) for a, p in zip(accepted_K, proposed_K, strict=True) if p]
    same = plain_BL is None or torch.equal(text_BL, plain_BL)
    return Decoding(name, rows, written, frame.forwards, seconds, first, accepted, same), text_BL
