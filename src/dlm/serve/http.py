"""The application: routes, errors in OpenAI's shape, the page."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Match
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from dlm.errors import InputError, nearest
from dlm.serve.engine.job import FAULT, Event
from dlm.serve.engine.scheduler import ClosingError, Engine, QueueFullError
from dlm.serve.engine.shelf import Plan, Shelf, UnknownModelError
from dlm.serve.export import export
from dlm.serve.guard import EXPORT, Guard, Limits, problem, refusal
from dlm.serve.metrics import Metrics
from dlm.serve.protocol import native, openai, schema
from dlm.serve.protocol.reply import Reply, Row, RowFailedError
from dlm.serve.protocol.stream import EventStream, event, gone
from dlm.serve.protocol.writer import Writer
from dlm.trajectory import Canvas

PAGE = Path(__file__).parent / "page"
log = logging.getLogger("dlm.serve")
T = TypeVar("T")


Events = AsyncIterator[tuple[int, Event]]


class ClientGoneError(Exception):
    """The client is gone: whatever is answered, nobody reads it."""


def create_app(shelf: Shelf, engine: Engine, limits: Limits | None = None) -> FastAPI:
    """The whole server; the engine starts and ends with it."""
    limits = limits or Limits()
    metrics = Metrics(engine)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(title="dlm", docs_url=None, redoc_url=None, lifespan=lifespan, responses=openai.ERRORS)
    service = Service(shelf, engine, limits)
    _errors(app)
    _routes(app, service, metrics)
    app.add_middleware(Guard, limits=limits, count=metrics.answered)
    return app


class Service:
    """From a request that was read to an answer."""

    def __init__(self, shelf: Shelf, engine: Engine, limits: Limits) -> None:
        self.shelf, self.engine, self.limits = shelf, engine, limits

    async def generate(self, asked: schema.GenerateRequest, request: Request) -> Response:
        """Native events."""
        seed = _seed(asked.seed)

        def prepare() -> tuple[Plan, Canvas]:
            self.shelf.check_counts(asked)
            said = (schema.content(message) for message in asked.messages or [])
            self.shelf.check_text([asked.prompt, asked.suffix, *said, *(part for part in asked.canvas or [] if isinstance(part, str))])
            plan = self.shelf.plan(asked, seed)
            return plan, self.shelf.check(plan, native.canvas(plan.model, asked))

        plan, canvas = await asyncio.to_thread(prepare)
        reply = Reply(self.engine)
        row = Row(canvas, Writer(plan.model.tokenizer, [], plan.model.stops))
        narrator = native.Narrator("dlm-" + secrets.token_hex(12), plan, row, answers=asked.messages is not None)
        reply.submit(plan.jobs([canvas], reply.deliver, records=asked.alternatives, seconds=self.limits.deadline))

        async def chunks(events: Events) -> AsyncIterator[bytes]:
            try:
                async for _, happened in events:
                    for name, data in narrator.events(happened):
                        yield event(data, name)
            except RowFailedError as broken:
                yield event({"error": _problem(broken)}, "error")

        return await self._stream(reply, request, chunks)

    async def complete(self, asked: schema.CompletionRequest | schema.ChatRequest, request: Request) -> Response:
        """Completions and chat, streamed or whole."""
        seed = _seed(asked.seed)

        def prepare() -> openai.Answer:
            self.shelf.check_counts(asked)
            self.shelf.check_text(openai.texts(asked))
            plan = self.shelf.plan(asked, seed)
            answer = openai.Answer.make(plan, asked)
            for canvas in answer.canvases:
                self.shelf.check(plan, canvas)
            return answer

        answer = await asyncio.to_thread(prepare)
        reply = Reply(self.engine)
        jobs = answer.plan.jobs(answer.written, reply.deliver, records=answer.records, seconds=self.limits.deadline)
        jobs += answer.plan.scorings(answer.scored, len(jobs), reply.deliver, records=answer.records or 0, seconds=self.limits.deadline)
        reply.submit(jobs)
        if not asked.stream:
            try:
                return JSONResponse(await _unless_gone(self._whole(answer, reply), request))
            finally:
                reply.close()

        async def chunks(events: Events) -> AsyncIterator[bytes]:
            try:
                async for index, happened in events:
                    for chunk in self._took(answer, reply, index, happened):
                        yield event(chunk)
                for chunk in answer.last():
                    yield event(chunk)
                yield event("[DONE]")
            except RowFailedError as broken:
                yield event({"error": _problem(broken)})

        return await self._stream(reply, request, chunks)

    async def _whole(self, answer: openai.Answer, reply: Reply) -> dict[str, Any]:
        async for index, happened in reply.events():
            for _ in self._took(answer, reply, index, happened):
                pass
        return answer.whole()

    def _took(self, answer: openai.Answer, reply: Reply, index: int, happened: Event) -> Iterator[dict[str, Any]]:
        """The chunks that an event gives; a row whose text has ended is freed."""
        before = answer.is_done(index)
        yield from answer.take(index, happened)
        if answer.is_done(index) and not before and answer.early(index):
            reply.free(index)

    async def _stream(self, reply: Reply, request: Request, chunks: Callable[[Events], AsyncIterator[bytes]]) -> Response:
        """Begins once the first row has its place, so that what fails before has its status."""
        events = reply.events()
        try:
            first = await _unless_gone(anext(events), request)
        except BaseException:
            reply.close()
            raise
        return EventStream(chunks(_after(first, events)), reply.close)


async def _unless_gone(work: Awaitable[T], request: Request) -> T:
    """The result of the work. ClientGoneError, with the work cancelled, once the client is gone."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        for task in (working, leaving):
            task.cancel()


def _problem(broken: RowFailedError) -> dict[str, Any]:
    return problem(broken.failed.status, broken.failed.message, broken.failed.code)


def _seed(asked: int | None) -> int:
    return secrets.randbelow(2**31) if asked is None else asked


async def _after(first: tuple[int, Event], rest: Events) -> Events:
    yield first
    async for one in rest:
        yield one


def _routes(app: FastAPI, service: Service, metrics: Metrics) -> None:
    shelf, engine = service.shelf, service.engine

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [shelf.describe(lm) for lm in shelf.models.values()]})

    @app.get("/v1/models/{name}")
    async def model(name: str) -> JSONResponse:
        return JSONResponse(shelf.describe(shelf.get(name)))

    @app.post("/v1/completions")
    async def completions(asked: schema.CompletionRequest, request: Request) -> Response:
        return await service.complete(asked, request)

    @app.post("/v1/chat/completions")
    async def chat(asked: schema.ChatRequest, request: Request) -> Response:
        return await service.complete(asked, request)

    @app.post("/v1/dlm/generate")
    async def generate(asked: schema.GenerateRequest, request: Request) -> Response:
        return await service.generate(asked, request)

    @app.post(EXPORT)
    async def exported(asked: schema.ExportRequest) -> Response:
        file = await asyncio.to_thread(export, asked.model_dump())
        disposition = f'attachment; filename="{file.name}"'
        return Response(file.content, media_type=file.media_type, headers={"Content-Disposition": disposition})

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        state = {"status": "ok" if engine.alive else "closing", "running": engine.running, "waiting": engine.waiting}
        return JSONResponse(state, 200 if engine.alive else 503)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    app.mount("/", Page(directory=PAGE, packages=[("dlm.viz", "shared")], html=True))


HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


class Page(StaticFiles):
    """The files of the page and those shared with the replay, under a strict content security policy; any other path or method is a 404."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        if scope["method"] not in ("GET", "HEAD"):
            known = any(route.matches(scope)[0] is Match.PARTIAL for route in scope["app"].routes)
            raise HTTPException(405 if known else 404, f"there is nothing at {scope['path']} for {scope['method']}")
        try:
            response = await super().get_response(path, scope)
        except HTTPException:
            raise HTTPException(404, f"there is nothing at {scope['path']}") from None
        response.headers.update(HEADERS)
        return response


def _invalid(error: RequestValidationError) -> Response:
    """The first mistake of a body, with the field that it is in; of an unknown field the nearest one."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    if first["type"] == "json_invalid":
        return refusal(400, "the body is no JSON", "invalid_json")
    field = str(first["loc"][1]) if len(first["loc"]) > 1 else None
    if first["type"] == "extra_forbidden":
        return refusal(400, f"unknown field {place!r}{nearest(str(first['loc'][-1]), schema.FIELDS)}", "invalid_request", param=field)
    return refusal(400, f"{place or 'body'}: {first['msg']}", "invalid_request", param=field)


def _errors(app: FastAPI) -> None:
    """Every error in one shape."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return _invalid(error)

    @app.exception_handler(HTTPException)
    async def known(_: Request, error: HTTPException) -> Response:
        headers = dict(error.headers) if error.headers else None
        return refusal(error.status_code, str(error.detail), None, headers)

    @app.exception_handler(InputError)
    async def unusable(_: Request, error: InputError) -> Response:
        return refusal(400, str(error), "invalid_request")

    @app.exception_handler(UnknownModelError)
    async def unknown(_: Request, error: UnknownModelError) -> Response:
        return refusal(404, str(error), "model_not_found", param="model")

    @app.exception_handler(QueueFullError)
    async def full(_: Request, error: QueueFullError) -> Response:
        return refusal(429, str(error), "queue_full", {"Retry-After": str(error.seconds)})

    @app.exception_handler(ClosingError)
    async def closing(_: Request, error: ClosingError) -> Response:
        return refusal(503, str(error), "unavailable", {"Retry-After": "10"})

    @app.exception_handler(RowFailedError)
    async def broken(_: Request, error: RowFailedError) -> Response:
        return refusal(error.failed.status, error.failed.message, error.failed.code)

    @app.exception_handler(ModuleNotFoundError)
    async def missing(_: Request, error: ModuleNotFoundError) -> Response:
        return refusal(501, str(error), "not_installed")

    @app.exception_handler(ClientGoneError)
    async def left(_: Request, _error: ClientGoneError) -> Response:
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def fault(_: Request, _error: Exception) -> Response:
        return refusal(500, FAULT, "internal_error")
