"""The server as a process: listens, prints its address, and ends after the running requests."""

from __future__ import annotations

import contextlib
import json
import socket

import uvicorn

from dlm.errors import InputError
from dlm.serve.connections import BACKLOG, protocol
from dlm.serve.engine.scheduler import Engine
from dlm.serve.engine.shelf import Shelf
from dlm.serve.guard import Limits
from dlm.serve.http import create_app

GRACE_SECONDS = 30
"""Requests may take this long to end once the server shuts down."""


def listening(host: str, port: int) -> socket.socket:
    """A socket on this address, port 0 for a free one. InputError where it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        raise InputError(f"cannot listen on {host}:{port} ({error}): use another --port or --host") from None
    return sock


def make(shelf: Shelf, engine: Engine, limits: Limits) -> uvicorn.Server:
    """The server around the application; `run(sockets=[...])` starts it, `should_exit` ends it."""
    app = create_app(shelf, engine, limits)
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=protocol(limits),
            backlog=BACKLOG,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
    )


def forever(shelf: Shelf, engine: Engine, limits: Limits, host: str, port: int) -> None:
    """Serve until Ctrl-C."""
    sock = listening(host, port)
    server, url = make(shelf, engine, limits), f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"
    texts = [name for name, lm in shelf.models.items() if lm.grid is None]
    key = ' -H "Authorization: Bearer $KEY"' if limits.keys else ""
    print(f"{url}  the page; {url}/v1  the OpenAI protocol\nmodels: {', '.join(shelf.models)}")
    for first in texts[:1]:
        body = json.dumps({"model": first, "prompt": "ROMEO:"})
        print(f"curl {url}/v1/completions{key} -H 'Content-Type: application/json' -d '{body}'", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # which is raised once more after all has ended
        server.run(sockets=[sock])
