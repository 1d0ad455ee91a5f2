"""Connections: fewer than file descriptors, and none that stays open without a request.

A client that opens many connections, and sends half a request on each, would use up the descriptors of the process: then no file opens
and no connection is accepted. So a connection above the limit gets 503 at once, and one whose headers do not arrive in time is closed.
Those that run are never touched.
"""

from __future__ import annotations

import asyncio
import json
from asyncio import TimerHandle
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from dlm.serve.guard import Limits, problem

BACKLOG = 128
"""Connections that wait to be accepted, and that are accepted at once: they hold a descriptor before they are counted."""
SPARE_DESCRIPTORS = 64
"""For models, pages, logs and the parts of the server itself."""
MOST_CONNECTIONS = 4096


def most_connections(limits: Limits) -> int:
    """As many as were asked for, or as the file descriptors of this process allow."""
    try:
        import resource

        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    except ImportError:  # a system without
        descriptors = 512
    free = MOST_CONNECTIONS if descriptors < 0 else max(1, descriptors - BACKLOG - SPARE_DESCRIPTORS)
    return min(limits.max_connections or MOST_CONNECTIONS, free)


def protocol(limits: Limits) -> type[asyncio.Protocol]:
    """uvicorn's protocol with these limits."""
    most, seconds = most_connections(limits), limits.header_seconds
    error = json.dumps({"error": problem(503, "too many connections: try again", "too_many_connections")}).encode()
    head = "HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\nContent-Type: application/json\r\n"
    full = f"{head}Content-Length: {len(error)}\r\n\r\n".encode() + error
    base: Any = AutoHTTPProtocol

    class Limited(base):  # type: ignore[misc]
        """One connection."""

        waiting: TimerHandle | None = None
        """Closes the connection unless the headers of a request arrive before."""

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if len(self.connections) > most:
                transport.write(full)
                transport.close()
            else:
                self.waiting = self.loop.call_later(seconds, transport.close)

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_waiting()
            elif self.waiting is None:  # the beginning of the next request
                self.waiting = self.loop.call_later(seconds, self.transport.close)

        def on_response_complete(self) -> None:
            self._stop_waiting()
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _stop_waiting(self) -> None:
            if self.waiting is not None:
                self.waiting.cancel()
                self.waiting = None

    return Limited
