"""Checks before any request is read: its key, its host, the size of its body and the time that it takes to arrive."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN = ("/v1/", "/metrics", "/openapi.json")  # paths that a key protects; the page itself holds no data
DRAIN_FACTOR = 32  # times the allowed size: a body up to that is read to its end, so that the client sees the rejection
EXPORT = "/v1/dlm/export"
LOCAL = ("localhost", "127.0.0.1", "::1")


def refusal(
    status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None, param: str | None = None
) -> JSONResponse:
    """An answer that is an error."""
    return JSONResponse({"error": problem(status, message, code, param)}, status, headers)


def problem(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients expect it."""
    usual = "invalid_request_error" if status < 500 else "server_error"
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, usual)
    return {"message": message, "type": kind, "param": param, "code": code}


@dataclass(frozen=True)
class Limits:
    """Limits of the server.

    keys: any of them opens the server; an empty list asks for none. max_body_bytes: of a request; max_export_bytes: of a run that is
    sent back to be exported; body_seconds: until the body has arrived; deadline: seconds for a request.
    max_connections: at once, 0 for as many as the file descriptors allow; header_seconds: until the headers of a request have arrived.
    hosts: names that a request may come under, none for all (a page elsewhere could reach a loopback server by a name of its own).
    """

    keys: Sequence[str] = field(default=(), repr=False)
    max_body_bytes: int = 2**20
    max_export_bytes: int = 2**25
    body_seconds: float = 30.0
    hosts: Sequence[str] = LOCAL
    deadline: float = 300.0
    max_connections: int = 0
    header_seconds: float = 20.0


class Guard:
    """The outermost layer of the application. count: told the path and status of every answer."""

    def __init__(self, app: ASGIApp, limits: Limits, count: Callable[[str, int], None]) -> None:
        self.app, self.limits, self.count = app, limits, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.count(scope["path"], message["status"])
            await send(message)

        rejected = self._rejected(scope["path"], Headers(scope=scope))
        if rejected is None:
            try:
                body = await asyncio.wait_for(self._body(receive, self._max_bytes(scope["path"])), self.limits.body_seconds)
            except TimeoutError:
                rejected = refusal(408, f"the body did not arrive within {self.limits.body_seconds:.0f} s", "timeout")
            else:
                if body is None:
                    return
                if len(body) > self._max_bytes(scope["path"]):
                    rejected = self._too_large(scope["path"])
                else:
                    await self.app(scope, _again(body, receive), counted)
                    return
        await rejected(scope, receive, counted)

    def _rejected(self, path: str, headers: Headers) -> Any:
        limits = self.limits
        if limits.hosts and _name(headers.get("host", "")) not in limits.hosts:
            return refusal(400, "this server answers to localhost only: start it with --host to serve others", "unknown_host")
        if limits.keys and path.startswith(OPEN):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            known = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in limits.keys]
            if scheme.lower() != "bearer" or not any(known):
                return refusal(401, "a key is needed: send Authorization: Bearer KEY", "invalid_api_key", {"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > DRAIN_FACTOR * self._max_bytes(path):
            return self._too_large(path)
        return None

    def _max_bytes(self, path: str) -> int:
        return self.limits.max_export_bytes if path == EXPORT else self.limits.max_body_bytes

    def _too_large(self, path: str) -> JSONResponse:
        return refusal(413, f"the body is larger than {self._max_bytes(path)} bytes", "too_large", {"Connection": "close"})

    async def _body(self, receive: Receive, max_bytes: int) -> bytes | None:
        """The whole body, or its beginning if it is larger than allowed; None where the client left.

        The rest is read and thrown away: a client that is cut off while it sends does not see the answer.
        """
        body, size = bytearray(), 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            size += len(message.get("body", b""))
            if len(body) <= max_bytes:
                body += message.get("body", b"")
            if not message.get("more_body") or size > DRAIN_FACTOR * max_bytes:
                return bytes(body)


def _name(host: str) -> str | None:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _again(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
