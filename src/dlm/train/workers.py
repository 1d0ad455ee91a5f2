"""The pieces of a batch on several threads of Python, each with its share of torch's threads.

Threads that share an operation wait for each other at the end of each; those that share a batch wait once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

Job = TypeVar("Job")


class Workers:
    """Adds up the gradients of jobs: with one worker job by job, with several each those of its run of the jobs, in the order of the runs.

    The sums depend on the number of workers in their last digits alone, and not on which of them is ready first.
    threads: of torch, for all workers together.
    """

    def __init__(self, parameters: Sequence[Tensor], count: int, threads: int) -> None:
        self.parameters, self.count = list(parameters), count
        each = (max(1, threads // count),)
        self.pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=each) if count > 1 else None

    def backward(
        self, loss: Callable[[Job], tuple[Tensor, Tensor]], jobs: Sequence[Job], alone: Callable[[Tensor], object]
    ) -> list[Tensor]:
        """Add the gradients of all losses to those of the parameters.

        loss: the loss of a job, and a tensor that is returned for it. alone: adds the gradients of a loss, where there is one worker.
        """
        told = list[Tensor]()
        if self.pool is None:
            for value, kept in map(loss, jobs):
                alone(value)
                told.append(kept)
            return told

        def work(own: slice) -> tuple[list[Tensor], list[Tensor | None]]:
            of_run, sums = list[Tensor](), list[Tensor | None]()
            for value, kept in map(loss, jobs[own]):
                gradients = torch.autograd.grad(value, self.parameters, allow_unused=True)
                sums = [_sum(a, b) for a, b in zip(sums or [None] * len(gradients), gradients, strict=True)]
                of_run.append(kept)
            return of_run, sums

        for of_run, sums in self.pool.map(work, runs(len(jobs), self.count)):
            told += of_run
            for parameter, gradient in zip(self.parameters, sums, strict=True):
                parameter.grad = _sum(parameter.grad, gradient)
        return told


def runs(jobs: int, workers: int) -> list[slice]:
    """Jobs in a run for each worker, of lengths that differ by one at most."""
    return [slice(*edges) for edges in pairwise(jobs * k // workers for k in range(workers + 1))]


def _sum(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    """Of those that are there, in `total` or in a tensor of its own: autograd may give one tensor to two parameters."""
    return total if more is None else more.clone() if total is None else total.add_(more)
