"""Server-sent events to a client that may be slow, or leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

SLOW = 30.0
"""Seconds that a client may take to read what it was sent before it counts as gone."""


def event(data: Any, name: str = "") -> bytes:
    """One event; a string is sent as it is."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return (f"event: {name}\n" * bool(name) + f"data: {text}\n\n").encode("utf-8", "replace")


class EventStream(Response):
    """Sends what `chunks` yields; `close` is called at its end, or as soon as the client is gone."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.chunks, self.close = chunks, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(gone(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, leaving):
                task.cancel()
            try:  # whatever `receive` raises where the server gives up on the client, the row is freed
                fault, _ = await asyncio.gather(sending, leaving, return_exceptions=True)
            finally:
                self.close()
        if isinstance(fault, Exception):
            raise fault

    async def _send(self, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for chunk in self.chunks:
                await asyncio.wait_for(send({"type": "http.response.body", "body": chunk, "more_body": True}), SLOW)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (TimeoutError, OSError):  # slow beyond patience, or gone
            pass


async def gone(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
