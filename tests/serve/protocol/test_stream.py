"""Events to a client that is slow, or leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dlm.serve.protocol import stream


async def chunks() -> AsyncIterator[bytes]:
    for k in range(1000):
        yield stream.event({"k": k}, "step")


def play(reads: int, leaves: bool) -> tuple[int, int]:
    """(chunks that were sent, times that it was closed), to a client that reads so many and then nothing, or leaves."""
    sent, closed = [], []

    async def send(message: dict[str, Any]) -> None:
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
        await asyncio.wait_for(response({"type": "http"}, receive, send), 20)

    asyncio.run(run())
    return len(sent), len(closed)


def test_a_client_that_stops_reading_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SLOW", 0.05)
    assert play(5, leaves=False) == (6, 1)


def test_a_client_that_leaves_ends_it() -> None:
    assert play(5, leaves=True) == (6, 1)


def test_one_that_reads_gets_all() -> None:
    assert play(5000, leaves=False) == (1002, 1)
