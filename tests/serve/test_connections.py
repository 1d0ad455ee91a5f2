"""Half-sent requests fill neither the server nor its file descriptors; who runs is not harmed."""

from __future__ import annotations

import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse

import pytest

from conftest import make_model

pytest.importorskip("fastapi")

from dlm.serve.connections import BACKLOG, MOST_CONNECTIONS, SPARE_DESCRIPTORS, most_connections
from dlm.serve.guard import Limits
from serve.serving import Served, Watch, serving, shape, wait

HALF = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Le"


@contextmanager
def half_sent(served: Served, count: int) -> Iterator[list[socket.socket]]:
    """So many connections that send the beginning of a request."""
    address = ("127.0.0.1", int(served.url.rpartition(":")[2]))
    made = []
    try:
        for _ in range(count):
            made.append(socket.create_connection(address, timeout=10))
            made[-1].sendall(HALF)
        yield made
    finally:
        for sock in made:
            sock.close()


def answer(sock: socket.socket) -> bytes:
    """All that comes until the server closes; nothing where the door was shut."""
    found = b""
    try:
        while part := sock.recv(4096):
            found += part
    except ConnectionResetError:
        pass
    return found


def test_half_sent_requests_leave_running_clients_alone() -> None:
    lm = make_model("autoregressive")
    watch = Watch(lm)
    watch.gate.clear()
    with serving([lm], Limits(max_connections=6, header_seconds=1.0)) as served:
        got: list[int] = []
        running = threading.Thread(target=lambda: got.append(served.post("/v1/completions", {"max_tokens": 5}).status_code))
        running.start()
        wait(lambda: served.engine.running == 1)
        with half_sent(served, 30) as sockets:
            told = [answer(sock) for sock in sockets[5:]]  # five have a place beside the one that runs
            refused = [text for text in told if text]
            assert refused
            assert all(text.startswith(b"HTTP/1.1 503 ") and b"too many connections" in text for text in refused)
            shape(refused[0].partition(b"\r\n\r\n")[2].decode())
            watch.gate.set()
            running.join(10)
            assert got == [200]
            assert [answer(sock) for sock in sockets[:5]] == [b""] * 5  # closed, as their headers do not come
        assert served.post("/v1/completions", {"max_tokens": 2}).status_code == 200


def status(sock: socket.socket) -> int:
    """Of an answer that is read to its end."""
    with HTTPResponse(sock) as found:
        found.begin()
        found.read()
        return found.status


def test_a_second_request_of_a_connection_has_its_own_time() -> None:
    whole = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with serving([make_model()], Limits(header_seconds=0.3)) as served, half_sent(served, 1) as (sock,):
        sock.sendall(b"ngth: 0\r\n\r\n")  # the rest
        assert status(sock) == 400
        time.sleep(0.4)  # idle, which is no request
        sock.sendall(whole)
        assert status(sock) == 200
        sock.sendall(HALF)
        began = time.monotonic()
        assert answer(sock) == b""
        assert 0.2 < time.monotonic() - began < 3


def test_a_long_request_is_no_idle_connection() -> None:
    lm = make_model("autoregressive")
    watch = Watch(lm)
    watch.seconds = 0.1
    with serving([lm], Limits(header_seconds=0.2)) as served:
        assert served.post("/v1/completions", {"max_tokens": 8}).status_code == 200


def test_connections_stay_below_the_file_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    def descriptors(count: int) -> None:
        monkeypatch.setattr(resource, "getrlimit", lambda _: (count, count))

    descriptors(1024)
    assert most_connections(Limits()) == 1024 - BACKLOG - SPARE_DESCRIPTORS
    assert most_connections(Limits(max_connections=100)) == 100
    descriptors(100)
    assert most_connections(Limits(max_connections=1000)) == 1
    descriptors(10**6)
    assert most_connections(Limits()) == MOST_CONNECTIONS
