"""The asyncio side of a request: its rows as they stand, and the events that the engine's thread sends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from dlm.serve.engine.job import Began, Change, Ended, Event, Failed, Job, Stepped
from dlm.serve.engine.scheduler import Engine
from dlm.serve.protocol.writer import Writer
from dlm.trajectory import Canvas


class RowFailedError(Exception):
    """A row gave an error."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.message)
        self.failed = failed


@dataclass
class Row:
    """One text as it stands.

    first, last: columns of the first hole and after the last. settled: the column up to which the text is final, without a hole before
    it. written: for each position the change that wrote its token, with its confidence. A canvas without a hole is done at once.
    """

    canvas: Canvas
    writer: Writer
    tokens: list[int] = field(default_factory=list)
    written: dict[int, Change] = field(default_factory=dict)
    forwards: int = 0
    seconds: float = 0.0
    done: bool = False

    def __post_init__(self) -> None:
        free = self.canvas.free_BT[0].tolist()
        self.first = free.index(True) if True in free else len(free)
        self.last = len(free) - free[::-1].index(True) if True in free else len(free)
        self.settled = self.first
        self.open = {i for i, hole in enumerate(free) if hole}
        self.done = not self.open

    def take(self, event: Event) -> str:
        """The text that the event settles, from the left."""
        if isinstance(event, Began):
            self.tokens = list(event.tokens)
        elif isinstance(event, Stepped):
            self.forwards = event.forwards
            for change in event.changes:
                self.tokens[change.position] = change.token
                if change.logp is not None or change.position not in self.written:
                    self.written[change.position] = change
                if change.settled:
                    self.open.discard(change.position)
            begin = self.settled
            while self.settled < self.last and self.settled not in self.open:
                self.settled += 1
            return self.writer.add(self.tokens[begin : self.settled])
        elif isinstance(event, Ended):
            self.seconds, self.done = event.seconds, True
            return self.writer.finish()
        return ""

    @property
    def finish_reason(self) -> str:
        """`stop` where the text ended by itself or at a stop string, `length` where it filled its place."""
        return self.writer.finished or "length"


class Reply:
    """Rows handed to the engine; who makes one closes it."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.jobs, self._rows = engine, [], []  # type: Engine, list[Job], list[Row]
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue()  # type: asyncio.AbstractEventLoop, asyncio.Queue[tuple[int, Event]]
        self._left = 0

    def deliver(self, index: int, event: Event) -> None:
        """Called by the engine's thread. RuntimeError once the event loop is closed."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    def submit(self, jobs: Sequence[Job]) -> None:
        """Hand the rows over. QueueFullError or ClosingError."""
        self.engine.submit(jobs)
        self.jobs, self._left = list(jobs), len(jobs)

    def close(self) -> None:
        """Free the rows that are not done."""
        if self._left:
            self._left = 0
            self.engine.cancel(self.jobs)

    def free(self, index: int) -> None:
        """This row's text has ended before the engine is done with it."""
        self.jobs[index].enough = True
        self.engine.cancel([self.jobs[index]])
        self._left -= 1

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Until every row has ended. RowFailedError by the first that fails."""
        while self._left:
            index, event = await self._events.get()
            if isinstance(event, Failed):
                if self.jobs[index].cancelled:
                    continue
                raise RowFailedError(event)
            if self.jobs[index].cancelled:  # an event that was still on its way
                continue
            if isinstance(event, Ended):
                self._left -= 1
            yield index, event
