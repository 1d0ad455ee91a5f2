"""Server-sent events, with keep-alive pings, to a client that may be slow, or leave."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus, SendTimeoutError
from starlette.types import Receive, Scope, Send

SEND_SECONDS = 30.0
"""A client that takes longer to read one event counts as gone."""
PING_SECONDS = 15.0
"""Between the comment lines that keep proxies from closing a stream on which nothing happens."""

AppStatus.enable_automatic_graceful_drain = False  # streams end with what the engine still runs, not at the first signal


def event(data: Any, name: str = "") -> bytes:
    """One event; a string is sent as it is."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair has no UTF-8
    return ServerSentEvent(text, event=name or None, sep="\n").encode()


class EventStream(EventSourceResponse):
    """Sends the events that `chunks` yields; `close` is called at its end, or as soon as the client is gone."""

    def __init__(self, chunks: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        super().__init__(chunks, sep="\n", ping=PING_SECONDS, send_timeout=SEND_SECONDS)
        self.close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except (SendTimeoutError, OSError):  # the client reads no more, or is gone
            pass
        finally:  # whatever ends the stream, the rows are freed
            self.close()


async def gone(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
