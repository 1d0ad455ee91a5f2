"""A real server in this process, on a free port, and what asks it."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import torch

from dlm.language_model import LanguageModel
from dlm.serve import run
from dlm.serve.engine.scheduler import Engine
from dlm.serve.engine.shelf import Shelf
from dlm.serve.guard import Limits


class Served:
    """url, engine, and a client without retries."""

    def __init__(self, url: str, engine: Engine, server: Any, thread: threading.Thread) -> None:
        self.url, self.engine, self.server, self.thread = url, engine, server, thread
        self.client = httpx.Client(base_url=url, timeout=60)

    def post(self, path: str, body: Any, **how: Any) -> httpx.Response:
        return self.client.post(path, json=body, **how)

    def native(self, body: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        """The events of one run."""
        answer = self.post("/v1/dlm/generate", body)
        assert answer.status_code == 200, answer.text
        return events(answer.text)

    def chunks(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The chunks of a stream that ends as it should."""
        answer = self.post(path, body | {"stream": True})
        assert answer.status_code == 200, answer.text
        *found, (_, last) = [(name, data) for name, data in events(answer.text, parse=False)]
        assert last == "[DONE]"
        return [json.loads(data) for _, data in found]


def events(text: str, parse: bool = True) -> list[tuple[str, Any]]:
    """(name, data) of server-sent events."""
    found = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((fields.get("event", ""), json.loads(fields["data"]) if parse else fields["data"]))
    return found


class Watch:
    """Counts the forward passes of a network and the rows in them, holds them up while its gate is shut, fails for a token."""

    def __init__(self, lm: LanguageModel) -> None:
        self.calls, self.rows, self.gate, self.poison = 0, 0, threading.Event(), None  # type: int, int, threading.Event, int | None
        self.seconds = 0.0
        self.gate.set()
        lm.network.register_forward_pre_hook(self.see)

    def see(self, _: Any, given: tuple[torch.Tensor, ...]) -> None:
        assert self.gate.wait(30)
        time.sleep(self.seconds)
        self.calls, self.rows = self.calls + 1, self.rows + len(given[0])
        if self.poison is not None and bool((given[0] == self.poison).any()):
            raise RuntimeError("poison")


@contextmanager
def serving(
    models: Sequence[LanguageModel], limits: Limits | None = None, max_tokens: int = 512, max_steps: int = 256, **engine: Any
) -> Iterator[Served]:
    """A server that is there when it is entered and gone when it is left."""
    made = Engine(**engine)
    sock = run.listening("127.0.0.1", 0)
    server = run.make(Shelf(models, max_tokens, max_steps), made, limits or Limits())
    thread = threading.Thread(target=lambda: server.run(sockets=[sock]), daemon=True)
    thread.start()
    served = Served(f"http://127.0.0.1:{sock.getsockname()[1]}", made, server, thread)
    wait(lambda: server.started)
    try:
        yield served
    finally:
        server.should_exit = True
        thread.join(30)
        served.client.close()
        sock.close()
    assert not thread.is_alive()
    assert not made.running


def wait(until: Callable[[], bool], seconds: float = 30.0) -> None:
    """Until it is so; AssertionError where it never is."""
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.005)


def curl(url: str, *words: str, body: bytes | None = None) -> tuple[int, str]:
    """(status, body) as curl gives it."""
    command = ["curl", "-sS", "-w", "\n%{http_code}", url, *words]
    if body is not None:
        command += ["-H", "Content-Type: application/json", "--data-binary", "@-"]
    done = subprocess.run(command, input=body, capture_output=True, timeout=60, check=True)
    text, _, status = done.stdout.decode().rpartition("\n")
    return int(status), text


def shape(text: str) -> dict[str, Any]:
    """The one shape of all errors."""
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    return dict(error)
