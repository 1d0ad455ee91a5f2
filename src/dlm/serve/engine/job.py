"""One row that a client waits for, and the events that tell its progress.

Shapes: L positions of the row, C changed positions, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dlm import seeds
from dlm.errors import InputError
from dlm.protocols import Sampler
from dlm.sampling.batching import WrittenDistribution
from dlm.trajectory import Canvas, Frame

CHUNK_POSITIONS = 256  # whose distributions are normalised at once
FAULT = "the server failed on this request; its log says more"


@dataclass(frozen=True)
class Change:
    """A position that was written, taken back or settled. logp: log p(token) at that time; alternatives: (token, log p), best first."""

    position: int
    token: int
    settled: bool
    logp: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()

    @property
    def confidence(self) -> float | None:
        """p(token) at that time."""
        return None if self.logp is None else math.exp(self.logp)


@dataclass(frozen=True)
class Began:
    """The row has its place in a batch. tokens: the state before the first forward pass."""

    tokens: list[int]


@dataclass(frozen=True)
class Stepped:
    """A forward pass that the row took part in. drafts: tokens by position, which the next pass verifies; forwards: passes so far.
    blends: (token, weight) of the likeliest tokens by position, from a sampler that makes all of them clearer together."""

    forwards: int
    t: float
    model: str
    changes: list[Change]
    drafts: dict[int, int]
    blends: dict[int, list[tuple[int, float]]]


@dataclass(frozen=True)
class Ended:
    """The text is complete. seconds: since it was submitted."""

    seconds: float


@dataclass(frozen=True)
class Failed:
    """The row failed, with this HTTP status."""

    status: int
    message: str
    code: str


Event = Began | Stepped | Ended | Failed


@dataclass(eq=False)
class Job:
    """One row. lane: rows with the same key share forward passes; make: the sampler of that lane.

    deliver: takes the events, called from the engine's thread; records: alternatives to record, None for no confidence either.
    deadline: of `time.monotonic`. cost: the rows without draft tokens whose forward pass takes as long.
    writes: whether it writes a text; else it scores one, by a sampler of its own.
    """

    lane: Hashable
    make: Callable[[], Sampler]
    canvas: Canvas
    seed: int
    mask_id: int
    deliver: Callable[[Event], None]
    records: int | None = None
    deadline: float = float("inf")
    cost: int = 1
    writes: bool = True
    cancelled: bool = False
    enough: bool = False  # its text has ended before its row
    forwards: int = 0
    submitted: float = field(default_factory=time.monotonic)
    first: float | None = None

    @property
    def length(self) -> int:
        return self.canvas.tokens_BT.shape[1]

    def generator(self) -> torch.Generator:
        return seeds.generator(self.seed)

    def tell(self, event: Event) -> None:
        """Deliver; a listener that is gone cancels the row."""
        try:
            self.deliver(event)
        except RuntimeError:  # its loop is closed
            self.cancelled = True

    def begin(self, frame: Frame, row: int) -> None:
        """The state before the first forward pass."""
        self.tokens_L, self.settled_L = frame.tokens_BT[row, : self.length], frame.settled_BT[row, : self.length]
        self.tell(Began(self.tokens_L.tolist()))

    def step(self, frame: Frame, row: int, distribution: WrittenDistribution | None) -> None:
        """Tell the changes of a forward pass."""
        tokens_L, settled_L = frame.tokens_BT[row, : self.length], frame.settled_BT[row, : self.length]
        at_C = ((tokens_L != self.tokens_L) | (settled_L & ~self.settled_L)).nonzero().squeeze(-1)
        self.tokens_L, self.settled_L = tokens_L, settled_L
        token_C, done_C = tokens_L[at_C], settled_L[at_C]
        recorded: list[tuple[Any, ...]] = [(None, ())] * len(at_C)
        if self.records is not None and distribution is not None and len(at_C):
            recorded = self._confidences(distribution, row, at_C, token_C)
        columns = zip(at_C.tolist(), token_C.tolist(), done_C.tolist(), recorded, strict=True)
        changes = [Change(i, token, done, *record) for i, token, done, record in columns]
        drafts: dict[int, int] = {}
        if frame.draft_BT is not None and self.records is not None:
            own_L = frame.draft_BT[row, : self.length]
            drafts = {i: int(own_L[i]) for i in (own_L >= 0).nonzero().squeeze(-1).tolist()}
        blends = {} if frame.likely is None or self.records is None else frame.likely.at_row(row)
        self.forwards += 1
        if self.first is None and bool(done_C.any()):
            self.first = time.monotonic()
        self.tell(Stepped(self.forwards, float(frame.t_B[row]), frame.model, changes, drafts, blends))

    def _confidences(self, distribution: WrittenDistribution, row: int, at_C: Tensor, token_C: Tensor) -> list[tuple[Any, ...]]:
        """(logp, alternatives) of each changed position, (None, ()) where the forward pass wrote nothing."""
        found: list[tuple[Any, ...]] = []
        for begin in range(0, len(at_C), CHUNK_POSITIONS):
            score_CV, known_C = distribution.at(row, at_C[begin : begin + CHUNK_POSITIONS])
            chosen_C = token_C[begin : begin + CHUNK_POSITIONS]
            score_CV = score_CV.double().cpu()
            score_CV[:, self.mask_id] = -torch.inf
            logp_CV = score_CV.log_softmax(-1)
            best = logp_CV.topk(min(self.records or 0, logp_CV.shape[1] - 1), -1)
            inside = (known_C.cpu() & (chosen_C != self.mask_id)).tolist()
            own = logp_CV.gather(1, chosen_C[:, None]).squeeze(1).tolist()
            others = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            rows = zip(inside, own, others, strict=True)
            found += [(logp, tuple(zip(*pair, strict=True))) if known else (None, ()) for known, logp, pair in rows]
        return found

    def end(self) -> None:
        self.tell(Ended(time.monotonic() - self.submitted))

    def fail(self, error: Exception) -> None:
        """Tell the request its own mistake, or that the fault is the server's."""
        if isinstance(error, InputError):
            self.tell(Failed(400, str(error), "invalid_request"))
        else:
            self.tell(Failed(500, FAULT, "internal_error"))
