"""Events to a client that is slow, or leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, MutableMapping
from typing import Any

import pytest

from dlm.serve.protocol import stream


async def chunks() -> AsyncIterator[bytes]:
    for k in range(1000):
        yield stream.event({"k": k}, "step")


def play(reads: int, leaves: bool) -> tuple[int, int]:
    """(chunks that were sent, times that it was closed), to a client that reads so many and then nothing, or leaves."""
    sent, closed = [], []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)
        if len(sent) > reads:
            await asyncio.sleep(3600)

    async def receive() -> dict[str, Any]:
        while leaves and len(sent) <= reads:
            await asyncio.sleep(0)
        if not leaves:
            await asyncio.sleep(3600)
        return {"type": "http.disconnect"}

    async def run() -> None:
        response = stream.EventStream(chunks(), lambda: closed.append(True))
        await asyncio.wait_for(response({"type": "http", "method": "POST"}, receive, send), 20)

    asyncio.run(run())
    return len(sent), len(closed)


def test_a_client_that_stops_reading_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SEND_SECONDS", 0.05)
    assert play(5, leaves=False) == (6, 1)


def test_a_client_that_leaves_ends_it() -> None:
    assert play(5, leaves=True) == (6, 1)


def test_one_that_reads_gets_all() -> None:
    assert play(5000, leaves=False) == (1002, 1)


def test_a_stream_on_which_nothing_happens_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PING_SECONDS", 0.05)
    sent: list[bytes] = []

    async def late() -> AsyncIterator[bytes]:
        await asyncio.sleep(0.3)
        yield stream.event("late")

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message.get("body", b""))

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(3600)
        return {"type": "http.disconnect"}

    asyncio.run(stream.EventStream(late(), lambda: None)({"type": "http", "method": "POST"}, receive, send))
    comments = [body for body in sent if body.startswith(b": ping")]
    assert len(comments) >= 2
    assert sent[-2:] == [b"data: late\n\n", b""]


def test_an_event_is_one_line_of_data() -> None:
    assert stream.event({"a": "\n\ud800"}, "step") == b'event: step\ndata: {"a":"\\n?"}\n\n'
