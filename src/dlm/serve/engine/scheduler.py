"""Continuous batching: one thread runs the models, rows join and leave between forward passes, lanes take turns."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dlm.errors import InputError
from dlm.protocols import Sampler
from dlm.serve.engine.job import Failed, Job
from dlm.serve.engine.lane import Lane, failed

log = logging.getLogger("dlm.serve")
MAX_READY_SAMPLERS = 64


class QueueFullError(Exception):
    """Too many wait. seconds: after which to try again."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"the server is busy: try again in {seconds} s")
        self.seconds = seconds


class ClosingError(Exception):
    """The server finishes what runs and takes nothing new."""


@dataclass
class Counts:
    """Totals since the start, written by the engine's thread alone."""

    calls: int = 0  # forward passes, each for all rows of a run
    rows: int = 0  # rows in these forward passes
    tokens: int = 0  # of texts that were finished
    finished: int = 0
    failed: int = 0
    cancelled: int = 0


class Engine:
    """Runs jobs. max_batch: rows that run at once; max_queue: rows that may wait; threads: of torch, 0 leaves them as they are.

    A row whose forward pass costs as much as several (`Job.cost`) runs beside max_batch others, and so many of them that their costs
    add up to max_batch, or one. Between forward passes it is the turn of the lane whose rows have had the least time each.

    observe: called from the engine's thread with (seconds to the first settled token, or None; seconds in all) of rows that finish.
    """

    def __init__(self, *, max_batch: int = 64, max_queue: int = 256, threads: int = 0, device: str = "cpu") -> None:
        if max_batch < 1 or max_queue < 0 or threads < 0:
            raise InputError("--max-batch counts from 1, --max-queue and --threads from 0")
        self.max_batch, self.max_queue, self.threads, self.device = max_batch, max_queue, threads, device
        self.counts = Counts()
        self.observe: Callable[[float | None, float], None] = lambda _first, _whole: None
        self._inbox: queue.SimpleQueue[list[Job] | None] = queue.SimpleQueue()
        self._waiting: deque[Job] = deque()
        self._lanes: dict[Hashable, Lane] = {}
        self._samplers: OrderedDict[Hashable, Sampler] = OrderedDict()
        self._lock, self._pending, self._closing = threading.Lock(), 0, False
        self._seconds = 1.0  # moving average of the time that a row takes
        self._thread = threading.Thread(target=self._work, name="dlm-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, grace: float = 30.0) -> None:
        """Take nothing new, finish what runs for so many seconds, then end the rest."""
        self._closing = True
        self._inbox.put(None)
        self._thread.join(grace)
        if self._thread.is_alive():
            self._grace_over = True
            self._inbox.put(None)
            self._thread.join(10)

    _grace_over = False

    @property
    def alive(self) -> bool:
        """Whether it works and takes requests."""
        return self._thread.is_alive() and not self._closing

    @property
    def running(self) -> int:
        """Rows in a batch."""
        return sum(len(lane) for lane in list(self._lanes.values()))

    @property
    def waiting(self) -> int:
        """Rows that wait for a place."""
        return max(0, self._pending - self.running)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take these rows, all or none. QueueFullError, or ClosingError."""
        if self._closing:
            raise ClosingError("the server is shutting down")
        with self._lock:
            if self._pending + len(jobs) > self.max_batch + self.max_queue:
                raise QueueFullError(max(1, round(self._seconds * self._pending / self.max_batch)))
            self._pending += len(jobs)
        self._inbox.put(list(jobs))

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Free their rows before the next forward pass."""
        for job in jobs:
            job.cancelled = True
        self._inbox.put(None)

    def _work(self) -> None:
        if self.threads:
            torch.set_num_threads(self.threads)
        while True:
            self._receive()
            if self._grace_over:
                self._end_all()
            if self._closing and not self._lanes and not self._waiting and self._inbox.empty():
                return
            try:
                self._turn()
            except Exception:  # a fault of the engine itself, not of one request: no other request may hang
                log.exception("the engine failed; all that ran is given up")
                self._end_all()

    def _receive(self) -> None:
        """Take the submitted jobs; wait for some where the engine is idle."""
        idle = not self._lanes and not self._waiting and not self._closing
        while idle or not self._inbox.empty():
            jobs = self._inbox.get()
            self._waiting.extend(jobs or ())
            idle = False

    def _turn(self) -> None:
        """One forward pass of the lane whose turn it is, after abandoned rows have left and waiting ones have joined."""
        now = time.monotonic()
        for lane in self._lanes.values():
            gone = [job for job in lane.jobs if self._is_over(job, now)]
            if gone:
                lane.drop(gone)
                self._finished(len(gone))
        self._leave_empty()
        self._admit(now)
        self._leave_empty()
        if not self._lanes:
            return
        lane = min(self._lanes.values(), key=lambda lane: lane.clock)
        before, forwards, rows, began = len(lane), lane.forwards, lane.rows, time.monotonic()
        done = lane.step()
        lane.clock += (time.monotonic() - began) / before
        self.counts.calls += lane.forwards - forwards
        self.counts.rows += lane.rows - rows
        for job in done:
            self._count(job)
        self.counts.failed += before - len(lane) - len(done)
        self._finished(before - len(lane))
        self._leave_empty()

    def _leave_empty(self) -> None:
        """Drop the lanes without rows: all have ended, or those that a new lane was made for could not begin."""
        self._lanes = {key: lane for key, lane in self._lanes.items() if len(lane)}

    def _admit(self, now: float) -> None:
        arrivals: dict[Hashable, list[Job]] = {}
        costs = [job.cost for lane in self._lanes.values() for job in lane.jobs]
        room = self.max_batch - sum(cost == 1 for cost in costs)
        spent = sum(cost for cost in costs if cost > 1)
        kept: deque[Job] = deque()
        while self._waiting:
            job = self._waiting.popleft()
            if self._is_over(job, now):
                self._finished(1)
            elif job.cost == 1 and room > 0:
                arrivals.setdefault(job.lane, []).append(job)
                room -= 1
            elif job.cost > 1 and (not spent or spent + job.cost <= self.max_batch):
                arrivals.setdefault(job.lane, []).append(job)
                spent += job.cost
            else:
                kept.append(job)
        self._waiting = kept
        for key, jobs in arrivals.items():
            try:
                if key not in self._lanes:
                    made = Lane(self._sampler(key, jobs[0]), self.device)
                    made.clock = min((lane.clock for lane in self._lanes.values()), default=0.0)
                    self._lanes[key] = made
            except Exception as error:
                for job in jobs:
                    failed(job, error)
                self.counts.failed += len(jobs)
                self._finished(len(jobs))
                continue
            before = len(self._lanes[key])
            self._lanes[key].admit(jobs)
            lost = len(jobs) - (len(self._lanes[key]) - before)
            self.counts.failed += lost
            self._finished(lost)

    def _sampler(self, key: Hashable, job: Job) -> Sampler:
        if not job.writes:
            return job.make()
        if key not in self._samplers:
            self._samplers[key] = job.make()
        self._samplers.move_to_end(key)
        while len(self._samplers) > MAX_READY_SAMPLERS:
            self._samplers.popitem(last=False)
        return self._samplers[key]

    def _is_over(self, job: Job, now: float) -> bool:
        """Whether the client has left or the deadline has passed; the latter is told."""
        if job.enough:
            self._count(job)
            return True
        if job.cancelled:
            self.counts.cancelled += 1
            return True
        if now < job.deadline:
            return False
        self.counts.failed += 1
        job.tell(Failed(504, f"the deadline of {job.deadline - job.submitted:.0f} s has passed", "deadline_exceeded"))
        return True

    def _count(self, job: Job) -> None:
        counts, seconds = self.counts, time.monotonic() - job.submitted
        if not job.writes:
            return
        counts.finished += 1
        counts.tokens += int((job.canvas.free_BT[0] & (job.tokens_L != job.mask_id)).sum())
        self.observe(None if job.first is None else job.first - job.submitted, seconds)
        self._seconds += 0.1 * (seconds - self._seconds)

    def _finished(self, count: int) -> None:
        with self._lock:
            self._pending -= count

    def _end_all(self) -> None:
        while not self._inbox.empty():
            self._waiting.extend(self._inbox.get() or ())
        jobs: list[Any] = [*self._waiting, *(job for lane in self._lanes.values() for group in lane.groups for job in group.jobs)]
        for job in jobs:
            job.tell(Failed(503, "the server gave this request up", "unavailable"))
        self._waiting.clear()
        self._lanes = {}
        self._finished(len(jobs))
