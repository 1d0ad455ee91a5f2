"""The server as a Ray Serve deployment: every replica is the whole server, with its own models and its own engine.

serve run dlm.serve.ray_app:app models=shakespeare-mask,shakespeare-ar replicas=2
"""

from __future__ import annotations

import logging
import os
from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError
from ray import serve
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dlm.errors import InputError
from dlm.language_model import load
from dlm.serve.engine.scheduler import Engine
from dlm.serve.engine.shelf import Shelf
from dlm.serve.guard import LOCAL, Limits
from dlm.serve.http import create_app
from dlm.serve.run import GRACE_SECONDS

log = logging.getLogger("dlm.serve")
SPARE_REQUESTS = 16
"""Requests beyond those that an engine takes: the engine rejects them itself with 429, and the page and /healthz get through."""


def _words(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


Words = Annotated[tuple[str, ...], BeforeValidator(_words)]


class Settings(BaseModel):
    """Arguments of `app` and `build`; texts are read as numbers, lists may be written with commas.

    replicas: that run always; max_replicas: up to which more come with the load, 0 for none; busy: requests under way at which a replica
    is to be kept. cpus, gpus: of each replica. api_keys: unless said, those of DLM_API_KEYS. hosts: names that requests may come under,
    `any` for all. The rest is as of `dlm serve`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: Words = Field(("shakespeare-mask",), min_length=1)
    replicas: PositiveInt = 1
    max_replicas: int = Field(0, ge=0)
    busy: PositiveFloat = 32.0
    cpus: PositiveFloat = 1.0
    gpus: float = Field(0.0, ge=0)
    api_keys: Words = Field(default_factory=lambda: os.environ.get("DLM_API_KEYS", ""), validate_default=True, repr=False)
    hosts: Words = LOCAL
    max_batch: PositiveInt = 64
    max_queue: int = Field(256, ge=0)
    max_length: PositiveInt = 4096
    max_steps: PositiveInt = 1024
    max_body: PositiveInt = 2**20
    deadline: PositiveFloat = 300.0
    grace: PositiveFloat = float(GRACE_SECONDS)
    dtype: str = "float32"
    deterministic: bool = False

    def limits(self) -> Limits:
        hosts = () if self.hosts == ("any",) else self.hosts
        return Limits(keys=self.api_keys, max_body_bytes=self.max_body, hosts=hosts, deadline=self.deadline)

    def application(self) -> FastAPI:
        """Made where a replica starts: loads the models."""
        device = "cuda" if self.gpus else "cpu"
        engine = Engine(max_batch=self.max_batch, max_queue=self.max_queue, threads=max(1, int(self.cpus)), device=device)
        models = [load(name, device=device, dtype=self.dtype, deterministic=self.deterministic) for name in self.models]
        made = create_app(Shelf(models, self.max_length, self.max_steps), engine, self.limits())
        made.state.engine = engine
        made.add_middleware(Named, name=serve.get_replica_context().replica_id.unique_id)
        return made

    def options(self) -> dict[str, Any]:
        """Of the deployment."""
        scale: dict[str, Any] = {"num_replicas": self.replicas}
        if self.max_replicas > self.replicas:
            bounds = {"min_replicas": self.replicas, "max_replicas": self.max_replicas}
            scale = {"autoscaling_config": bounds | {"target_ongoing_requests": self.busy}}
        return scale | {
            "name": "dlm",
            "max_ongoing_requests": self.max_batch + self.max_queue + SPARE_REQUESTS,
            "graceful_shutdown_wait_loop_s": 1.0,
            "graceful_shutdown_timeout_s": self.grace,
            "ray_actor_options": {"num_cpus": self.cpus, "num_gpus": self.gpus},
        }


class Replica:
    """The interface that Ray expects of a replica."""

    app: Any  # the application, which `serve.ingress` puts here

    def check_health(self) -> None:
        """Ray replaces a replica of which this raises."""
        if not self.app.state.engine.alive:
            raise RuntimeError("the engine has ended")


class Named:
    """Adds the name of the replica to every answer."""

    def __init__(self, app: ASGIApp, name: str) -> None:
        self.app, self.name = app, name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Replica"] = self.name
            await send(message)

        await self.app(scope, receive, named)


def build(**arguments: Any) -> serve.Application:
    """The deployment that `Settings` describe, for `serve.run`. InputError for a wrong argument."""
    try:
        settings = Settings.model_validate(arguments)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}; known: {', '.join(Settings.model_fields)}") from None
    if settings.hosts == ("any",) and not settings.api_keys:
        log.warning("other machines can use this server without a key: api_keys asks for one")

    def application() -> FastAPI:
        return settings.application()

    return serve.deployment(serve.ingress(application)(Replica)).options(**settings.options()).bind()


def app(arguments: dict[str, Any]) -> serve.Application:
    """The entry point of `serve run dlm.serve.ray_app:app key=value ...` and of config files of Ray Serve."""
    return build(**arguments)
