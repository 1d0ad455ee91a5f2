"""How fast an autoregressive model decodes with each drafter: the same prompts and seeds for every method, in turns.

Shapes: B rows, L columns of the canvas, K draft tokens of a forward pass.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from dlm.bench.peers import Peer
from dlm.sampling.autoregressive.plain import AutoregressiveSampler
from dlm.sampling.autoregressive.speculative import SpeculativeDecoder
from dlm.sampling.draw import generators
from dlm.trajectory import Canvas

Method = AutoregressiveSampler | SpeculativeDecoder | Peer
MAX_DRAFT_TOKENS = 64  # of a forward pass that are counted one by one


@dataclass(frozen=True)
class Decoding:
    """One method on one batch, or on several of one size. tokens: written by all rows; calls: forward passes (0: not known of a peer);
    seconds of the whole, first: until every row had a token, the least of several rounds; accepted: the chance that the k-th draft token
    of a forward pass is accepted; same: whether its text is that of the autoregressive baseline of the same weights; memory: bytes of
    weights and KV cache."""

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
    def per_pass(self) -> float:
        """Tokens of a row that a forward pass commits."""
        return self.tokens / self.batch / self.calls if self.calls else math.nan

    @property
    def rate(self) -> float:
        """Tokens a second, of all rows."""
        return self.tokens / self.seconds

    def record(self) -> dict[str, object]:
        found = asdict(self) | {"tokens_per_forward": self.per_pass, "tokens_per_second": self.rate}
        return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in found.items()}


@dataclass(frozen=True)
class _Once:
    """One method on one canvas. rows: the ids that it wrote; drafted, accepted: how often the k-th draft token was."""

    rows: list[list[int]]
    calls: int
    seconds: float
    first: float
    drafted_K: Tensor
    accepted_K: Tensor


def compare(
    methods: Mapping[str, Method],
    canvases: Canvas | Sequence[Canvas],
    *,
    against: Mapping[str, str] | None = None,
    kind: str = "",
    seed: int = 0,
    rounds: int = 3,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Decoding]:
    """Every method writes the same canvases, all of one size, with the same seeds.

    against: the baseline of each method, by default the first. A peer that takes fewer rows at once is left out. Every method writes the
    first canvas once before the clock starts, so that no round pays for compilation and allocation. progress counts runs, `runs` in all.
    """
    canvases = [canvases] if isinstance(canvases, Canvas) else list(canvases)
    first = next(iter(methods))
    usable = {name: method for name, method in methods.items() if _takes(method, len(canvases[0].tokens_BT))}
    for method in usable.values():
        _once(method, canvases[0], seed)
        progress(1)
    best: dict[tuple[str, int], _Once] = {}
    for _ in range(rounds):  # in turns, so that a slow minute counts for none
        for number, canvas in enumerate(canvases):
            for name, method in usable.items():
                one = _once(method, canvas, seed)
                was = best.get((name, number), one)
                best[name, number] = replace(one, seconds=min(one.seconds, was.seconds), first=min(one.first, was.first))
                progress(1)
    each = {name: [best[name, number] for number in range(len(canvases))] for name in usable}
    batch = len(canvases[0].tokens_BT)
    return [_decoding(name, batch, each[name], each[(against or {}).get(name, first)], kind) for name in usable]


def runs(methods: int, canvases: int, rounds: int) -> int:
    """Runs of one comparison."""
    return methods * (1 + canvases * rounds)


def _takes(method: Method, rows: int) -> bool:
    return isinstance(method, AutoregressiveSampler | SpeculativeDecoder) or not method.rows or rows <= method.rows


def _decoding(name: str, batch: int, each: Sequence[_Once], baseline: Sequence[_Once], kind: str) -> Decoding:
    """The figures of all canvases together."""
    drafted_K = torch.stack([run.drafted_K for run in each]).sum(0)
    accepted_K = torch.stack([run.accepted_K for run in each]).sum(0)
    return Decoding(
        method=name,
        batch=batch,
        tokens=sum(len(row) for run in each for row in run.rows),
        calls=sum(run.calls for run in each),
        seconds=sum(run.seconds for run in each),
        first=sum(run.first for run in each) / len(each),
        accepted=[int(a) / int(d) for a, d in zip(accepted_K, drafted_K, strict=True) if d],
        same=[run.rows for run in each] == [run.rows for run in baseline],
        kind=kind,
    )


def _once(method: Method, canvas: Canvas, seed: int) -> _Once:
    rows, given_BL = len(canvas.tokens_BT), (~canvas.free_BT & canvas.valid_BT).cpu()
    drafted_K, accepted_K = torch.zeros(MAX_DRAFT_TOKENS, dtype=torch.long), torch.zeros(MAX_DRAFT_TOKENS, dtype=torch.long)
    k_K, first = torch.arange(MAX_DRAFT_TOKENS), math.nan
    clock = time.perf_counter()
    if isinstance(method, SpeculativeDecoder):
        for frame, tally in method.rounds(canvas, rng=generators(seed, rows)):
            first = time.perf_counter() - clock if frame.forwards == 1 else first
            reached_BK = tally.accepted_B[:, None].cpu() >= k_K  # the k-th is verified where all before it were accepted
            drafted_K += ((tally.drafted_B[:, None].cpu() > k_K) & reached_BK).sum(0)
            accepted_K += (tally.accepted_B[:, None].cpu() > k_K).sum(0)
    elif isinstance(method, AutoregressiveSampler):
        for frame in method.steps(canvas, rng=generators(seed, rows)):
            first = time.perf_counter() - clock if frame.forwards == 1 else first
    else:
        prompts = [method.start + ids[given].tolist() for ids, given in zip(canvas.tokens_BT.cpu(), given_BL, strict=True)]
        written, first = method.write(prompts, int(canvas.free_BT[0].sum()))
        return _Once(written, 0, time.perf_counter() - clock, first, drafted_K, accepted_K)
    seconds = time.perf_counter() - clock
    new_BL = frame.settled_BT.cpu() & canvas.valid_BT.cpu() & ~given_BL
    texts = [ids[new].tolist() for ids, new in zip(frame.tokens_BT.cpu(), new_BL, strict=True)]
    return _Once(texts, frame.forwards, seconds, first, drafted_K, accepted_K)
