"""How fast an autoregressive model decodes, by what proposes its tokens: the same prompts and seeds for every method, in turns.

Shapes: B rows, L columns of the canvas, K places of a proposal.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dlm.bench.peers import Peer
from dlm.sampling.autoregressive.plain import AutoregressiveSampler
from dlm.sampling.autoregressive.speculative import SpeculativeDecoder
from dlm.sampling.draw import generators
from dlm.trajectory import Canvas

Method = AutoregressiveSampler | SpeculativeDecoder | Peer


@dataclass(frozen=True)
class Decoding:
    """One method on one batch, or on several of one size. tokens: written by all rows; calls of the network (0: not known of a peer);
    seconds of the whole and until every row had a token, the least of several rounds; accepted: the chance that the k-th proposal of a
    call is kept; same: whether its text is that of the plain sampler that it is held to; memory: bytes of weights and cache."""

    method: str
    batch: int
    tokens: int
    calls: int
    seconds: float
    first: float
    accepted: list[float]
    same: bool
    kind: str = ""
    memory: int = 0

    @property
    def per_call(self) -> float:
        """Tokens of a row that a call commits."""
        return self.tokens / self.batch / self.calls if self.calls else math.nan

    def record(self) -> dict[str, Any]:
        found = asdict(self) | {"tokens_per_forward": self.per_call, "tokens_per_second": self.tokens / self.seconds}
        return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in found.items()}


@dataclass(frozen=True)
class _Once:
    """One method on one canvas. rows: the ids that it wrote; proposed, accepted: how often the k-th was."""

    rows: list[list[int]]
    calls: int
    seconds: float
    first: float
    proposed_K: Tensor
    accepted_K: Tensor


def compare(
    methods: Mapping[str, Method],
    canvases: Canvas | Sequence[Canvas],
    *,
    against: Mapping[str, str] | None = None,
    kind: str = "",
    seed: int = 0,
    rounds: int = 3,
    progress: Callable[[int], None] = lambda runs: None,
) -> list[Decoding]:
    """Every method writes the same canvases, all of one size, with the same seeds.

    against: the method that each is held to, by default the first. A peer that takes fewer rows at once is left out.
    """
    canvases = [canvases] if isinstance(canvases, Canvas) else list(canvases)
    batch, first = len(canvases[0].tokens_BT), next(iter(methods))
    usable = {name: method for name, method in methods.items() if not getattr(method, "rows", 0) or batch <= method.rows}  # type: ignore[union-attr]
    best: dict[tuple[str, int], _Once] = {}
    for _ in range(rounds):  # in turns, so that a slow minute counts for none
        for number, canvas in enumerate(canvases):
            for name, method in usable.items():
                one = _once(method, canvas, seed)
                was = best.get((name, number), one)
                best[name, number] = replace(one, seconds=min(one.seconds, was.seconds), first=min(one.first, was.first))
                progress(1)
    found = []
    for name in usable:
        runs = [best[name, number] for number in range(len(canvases))]
        plain = [best[(against or {}).get(name, first), number] for number in range(len(canvases))]
        proposed_K, accepted_K = sum(run.proposed_K for run in runs), sum(run.accepted_K for run in runs)
        accepted = [int(a) / int(p) for a, p in zip(accepted_K, proposed_K, strict=True) if p]  # type: ignore[arg-type]
        found.append(
            Decoding(
                name,
                batch,
                sum(len(row) for run in runs for row in run.rows),
                sum(run.calls for run in runs),
                sum(run.seconds for run in runs),
                sum(run.first for run in runs) / len(runs),
                accepted,
                [run.rows for run in runs] == [run.rows for run in plain],
                kind,
            )
        )
    return found


def _once(method: Method, canvas: Canvas, seed: int) -> _Once:
    rows, given_BL = len(canvas.tokens_BT), (~canvas.free_BT & canvas.valid_BT).cpu()
    proposed_K, accepted_K = torch.zeros(64, dtype=torch.long), torch.zeros(64, dtype=torch.long)
    k_K, first = torch.arange(64), math.nan
    clock = time.perf_counter()
    if isinstance(method, SpeculativeDecoder):
        for frame, tally in method.rounds(canvas, rng=generators(seed, rows)):
            first = time.perf_counter() - clock if frame.forwards == 1 else first
            reached_BK = tally.accepted_B[:, None].cpu() >= k_K  # the k-th is looked at where all before it were kept
            proposed_K += ((tally.drafted_B[:, None].cpu() > k_K) & reached_BK).sum(0)
            accepted_K += (tally.accepted_B[:, None].cpu() > k_K).sum(0)
    elif isinstance(method, AutoregressiveSampler):
        for frame in method.steps(canvas, rng=generators(seed, rows)):
            first = time.perf_counter() - clock if frame.forwards == 1 else first
    else:
        prompts = [method.start + ids[given].tolist() for ids, given in zip(canvas.tokens_BT.cpu(), given_BL, strict=True)]
        written, first = method.write(prompts, int(canvas.free_BT[0].sum()))
        return _Once(written, 0, time.perf_counter() - clock, first, proposed_K, accepted_K)
    seconds = time.perf_counter() - clock
    new_BL = frame.settled_BT.cpu() & canvas.valid_BT.cpu() & ~given_BL
    texts = [ids[new].tolist() for ids, new in zip(frame.tokens_BT.cpu(), new_BL, strict=True)]
    return _Once(texts, frame.forwards, seconds, first, proposed_K, accepted_K)
