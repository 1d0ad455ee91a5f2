"""The training loop that `dlm.fit` and `dlm.convert` share: update, log, validate, save, stop.

A `Task` is what one step does; the loop knows when. Everything random at step n is a function of (seed, n), so a killed run that
resumes is bitwise identical to one that never stopped.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.train.log import Log
from dlm.train.processes import Processes

Figures = dict[str, Any]
"""The figures of a run, by name."""


@dataclass(frozen=True)
class Update:
    """One optimiser step. nats: mean training loss over the rows of this process; gradient_norm: of all rows, before clipping."""

    nats: Tensor
    gradient_norm: Tensor
    learning_rate: float


@dataclass(frozen=True)
class Validation:
    """figures: for the result of the run; logged: for log.jsonl; text: for people."""

    figures: Figures
    logged: dict[str, float]
    text: str


class Task(Protocol):
    """The object of training. loss: the name of the training loss in figures and log; remedy: for a loss that is not finite."""

    loss: str
    tokens_per_step: int
    remedy: str

    def update(self, step: int, /) -> Update:
        """Take step `step` of the run."""

    def validate(self, step: int, /) -> Validation:
        """Measure on held-out text after so many steps."""

    def save(self, step: int, figures: Figures, recent: list[float], /) -> None:
        """Write a model that loads, then the state to resume from. recent: losses since the last line of the log."""


class Intervals(Protocol):
    """How many steps, and how many between two lines of the log, validations and saves."""

    @property
    def steps(self) -> int: ...
    @property
    def log_every(self) -> int: ...
    @property
    def eval_every(self) -> int: ...
    @property
    def save_every(self) -> int: ...


@dataclass(frozen=True)
class Progress:
    """The argument of a progress callback after a step, and between two for a message in `text`.

    nats: mean training loss up to the last line of the log, as tokens_per_second and eta (time that is left) None before the first.
    logged: whether that line was just written. measured: whether there are such figures at all.
    """

    label: str
    done: int
    total: int
    nats: float | None = None
    tokens_per_second: float | None = None
    eta: timedelta | None = None
    logged: bool = False
    measured: bool = True
    text: str = ""


Tell = Callable[[Progress], None]


def quiet(progress: Progress) -> None:
    """A callback that shows nothing."""


@dataclass
class Throughput:
    """Tokens per second since the last line of the log, validation and saves left out."""

    tokens: int = 0
    since: float = field(default_factory=time.perf_counter)

    def take(self) -> float:
        rate, self.tokens = self.tokens / (time.perf_counter() - self.since), 0
        self.since = time.perf_counter()
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.since += time.perf_counter() - begin


class Loop:
    """Runs a task from step `first`. recent: losses since the last line of the log, of the run that is resumed."""

    def __init__(
        self, task: Task, every: Intervals, log: Log, processes: Processes, tell: Tell, label: str, first: int, recent: Sequence[float]
    ) -> None:
        self.task, self.every, self.log, self.processes = task, every, log, processes
        self.tell = tell if processes.main else quiet
        self.progress = Progress(label, first, every.steps)
        self.first, self.figures = first, Figures(step=first)
        self.recent = [torch.tensor(nats, device=processes.device) for nats in recent]

    def say(self, text: str) -> None:
        """A line for people."""
        self.tell(replace(self.progress, text=text))

    def run(self, stop_after: int | None = None) -> Figures:
        """Take the steps that are left; stop_after: leave after that step, as Ctrl-C would.

        Raises KeyboardInterrupt after saving when interrupted; InputError for a loss that is not finite.
        """
        every, interrupted = self.every, False
        last = every.steps if stop_after is None else min(every.steps, stop_after)
        with Stop(patient=self.processes.count > 1) as stop:
            throughput = Throughput()
            for done in range(self.first + 1, last + 1):
                update = self.task.update(done - 1)
                self.recent.append(update.nats)
                throughput.tokens += self.task.tokens_per_step
                interrupted = self.processes.any(stop.asked)
                stopping = interrupted or done == last
                final = done == every.steps
                logging, saving = done % every.log_every == 0 or final, done % every.save_every == 0 or stopping
                if logging or saving:
                    nats = self._check(done, update)
                if logging:
                    self._log(done, nats, update, throughput.take())
                with throughput.paused():
                    if done % every.eval_every == 0 or final:
                        self._validate(done)
                    self.progress = replace(self.progress, done=done)
                    self.tell(self.progress)
                    if saving:
                        self.task.save(done, self.figures, torch.stack(self.recent).tolist() if self.recent else [])
                        self.processes.wait()
                if stopping:
                    break
        if interrupted and done < every.steps:
            raise KeyboardInterrupt(f"stopped at step {done}, saved; go on with --resume")
        return self.figures

    def _check(self, done: int, update: Update) -> float:
        """The mean loss since the last line of the log, over all processes. InputError where it or the gradient is not finite."""
        recent_N = self.processes.mean(torch.stack(self.recent))
        self.recent = list(recent_N)
        nats, gradient = recent_N.mean().item(), float(update.gradient_norm)
        if not math.isfinite(nats + gradient):
            wrong = f"gradient norm is {gradient}" if math.isfinite(nats) else f"loss is {nats}"
            raise InputError(f"the {wrong} at step {done}: {self.task.remedy}; the last save is kept")
        self.figures |= {"step": done, self.task.loss: nats}
        return nats

    def _log(self, done: int, nats: float, update: Update, rate: float) -> None:
        self.figures["tokens_per_second"] = rate
        values = {self.task.loss: nats, "lr": update.learning_rate, "gradient_norm": float(update.gradient_norm)}
        self.log.write(done, **values, tokens_per_second=rate)
        left = timedelta(seconds=round((self.every.steps - done) * self.task.tokens_per_step / rate))
        self.progress = replace(self.progress, done=done, nats=nats, tokens_per_second=rate, eta=left)
        self.tell(replace(self.progress, logged=True))
        self.recent = []

    def _validate(self, done: int) -> None:
        found = self.task.validate(done)
        self.figures |= found.figures
        self.log.write(done, **found.logged)
        self.say(f"step {done}: {found.text}")


class Stop:
    """Ctrl-C and SIGTERM ask the loop to finish its step and save; a second Ctrl-C stops at once.

    patient: it does not, for a launcher passes on the Ctrl-C that its processes have had already.
    """

    def __init__(self, patient: bool) -> None:
        self.patient, self.asked = patient, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, *_: object) -> None:
        self.asked = True
        if not self.patient:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
