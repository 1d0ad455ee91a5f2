"""The rows that share forward passes: one sampler, a run that they join and leave.

Shapes: B rows, K rows that stay.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dlm.protocols import RNG, Sampler
from dlm.sampling.batching import Joinable, Running, WrittenDistribution
from dlm.serve.engine.job import Job
from dlm.trajectory import Canvas, Frame, Likely

log = logging.getLogger("dlm.serve")


class Solo:
    """A run of one row with a sampler whose rows cannot join others."""

    reads_first: ClassVar[bool] = False
    distribution: WrittenDistribution | None = None

    def __init__(self, sampler: Sampler, canvas: Canvas, rng: RNG, mask_id: int) -> None:
        self.frames = sampler.steps(canvas, rng=rng)
        self.next: Frame | None = None
        tokens_BT = torch.where(canvas.free_BT, mask_id, canvas.tokens_BT)
        self.last = Frame(tokens_BT, ~canvas.free_BT, torch.ones(len(tokens_BT)), "", 0)

    @property
    def live_B(self) -> Tensor:
        open_B = (~self.last.settled_BT).any(-1)
        if bool(open_B.any()) and self.next is None:  # a text may end before its place
            self.next = next(self.frames, None)
        return open_B if self.next is not None else torch.zeros_like(open_B)

    def frame(self) -> Frame:
        return self.last

    def step(self) -> Frame:
        self.last = next(self.frames) if self.next is None else self.next
        self.next = None
        return self.last

    def join(self, other: Solo) -> None:
        raise ValueError("the rows of this sampler run by themselves")

    def keep(self, rows_K: Tensor) -> None:
        """There is one row."""


@dataclass
class Group:
    """Jobs in the order of the rows of their run."""

    run: Running
    jobs: list[Job]


class Lane:
    """Jobs of one sampler. forwards: forward passes so far; rows: rows in them; clock: seconds that each of its rows has had."""

    def __init__(self, sampler: Sampler, device: torch.device | str) -> None:
        self.sampler, self.device = sampler, device
        self.shares = isinstance(sampler, Joinable)
        self.groups: list[Group] = []
        self.forwards = self.rows = 0
        self.clock = 0.0

    def __len__(self) -> int:
        return sum(len(group.jobs) for group in self.groups)

    @property
    def jobs(self) -> list[Job]:
        """Of all its runs."""
        return [job for group in self.groups for job in group.jobs]

    def admit(self, jobs: Sequence[Job]) -> None:
        """Begin these rows, in a run of their own until they join; one that cannot begin fails alone."""
        parts = [list(jobs)] if self.shares else [[job] for job in jobs]
        for part in parts:
            try:
                found = [self._begin(part)]
            except Exception:
                found = [group for job in part if (group := self._begin_alone(job)) is not None]
            for group in found:
                frame = on_cpu(group.run.frame())
                for row, job in enumerate(group.jobs):
                    job.begin(frame, row)
                self.groups.append(group)

    def _begin(self, jobs: list[Job]) -> Group:
        rows = [[None if free else token for token, free in zip(*_row(job), strict=True)] for job in jobs]
        canvas, rng = Canvas.from_rows(rows, fill=jobs[0].mask_id).to(self.device), [job.generator() for job in jobs]
        if isinstance(self.sampler, Joinable):
            return Group(self.sampler.begin(canvas, rng=rng), jobs)
        return Group(Solo(self.sampler, canvas, rng, jobs[0].mask_id), jobs)

    def _begin_alone(self, job: Job) -> Group | None:
        try:
            return self._begin([job])
        except Exception as error:
            failed(job, error)
            return None

    def step(self) -> list[Job]:
        """One forward pass for every run of this lane, of which there are several while rows make their first. The jobs that are done."""
        if self.shares:
            self._gather()
        done: list[Job] = []
        for group in self.groups:
            try:
                frame = on_cpu(group.run.step())
                live = group.run.live_B.cpu().tolist()
                self.forwards += 1
                self.rows += len(group.jobs)
            except Exception as error:
                done += self._apart(group, error)
                continue
            for row, job in enumerate(group.jobs):
                job.step(frame, row, group.run.distribution)
            done += self._leave(group, live)
        for job in done:
            job.end()
        self.groups = [group for group in self.groups if group.jobs]
        return done

    def drop(self, jobs: Sequence[Job]) -> None:
        """Free the rows of these."""
        for group in self.groups:
            self._leave(group, [job not in jobs for job in group.jobs])
        self.groups = [group for group in self.groups if group.jobs]

    def _leave(self, group: Group, stays: list[bool]) -> list[Job]:
        gone = [job for job, stay in zip(group.jobs, stays, strict=True) if not stay]
        if gone:
            group.jobs = [job for job in group.jobs if job not in gone]
            if group.jobs:
                group.run.keep(torch.tensor([b for b, stay in enumerate(stays) if stay], device=self.device))
        return gone

    def _gather(self) -> None:
        """Runs become one; those whose first forward pass is longer than the next ones join after it."""
        ready = [group for group in self.groups if group.jobs[0].forwards or not group.run.reads_first]
        for group in ready[1:]:
            ready[0].run.join(group.run)
            ready[0].jobs += group.jobs
            self.groups.remove(group)

    def _apart(self, group: Group, error: Exception) -> list[Job]:
        """A joint forward pass failed: find the faulty row, by taking every row alone to where it stood, and one pass further.

        Decoding is batch-invariant, so no event that was delivered has to be taken back.
        """
        jobs, done = group.jobs, list[Job]()
        group.jobs = []
        if len(jobs) == 1:
            failed(jobs[0], error)
            return done
        log.warning("a forward pass of %d rows failed (%s): trying each alone", len(jobs), error)
        survivors: list[Group] = []
        for job in jobs:
            alone = None
            try:
                alone = self._begin([job])
                for _ in range(job.forwards):
                    alone.run.step()
                job.step(on_cpu(alone.run.step()), 0, alone.run.distribution)
            except Exception as own:
                failed(job, own)
                continue
            if bool(alone.run.live_B.any()):
                survivors.append(alone)
            else:
                done.append(job)
        if survivors:
            group.run, group.jobs = survivors[0].run, list(survivors[0].jobs)
            for other in survivors[1:]:
                group.run.join(other.run)
                group.jobs += other.jobs
        return done


def failed(job: Job, error: Exception) -> None:
    """Tell the job; the log gets the traceback too."""
    log.warning("a request failed: %s", error, exc_info=None if isinstance(error, ValueError) else error)
    job.fail(error)


def on_cpu(frame: Frame) -> Frame:
    """The parts of a frame that clients read, copied at once."""
    draft_BT = None if frame.draft_BT is None else frame.draft_BT.cpu()
    likely = None if frame.likely is None else Likely(*(part.cpu() for part in frame.likely))
    parts = frame.tokens_BT.cpu(), frame.settled_BT.cpu(), frame.t_B.cpu()
    return Frame(*parts, frame.model, frame.forwards, draft_BT=draft_BT, likely=likely)


def _row(job: Job) -> tuple[list[int], list[bool]]:
    return job.canvas.tokens_BT[0].tolist(), job.canvas.free_BT[0].tolist()
