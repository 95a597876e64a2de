"""The application: routes, keys, shutdown."""

import asyncio
import hmac
import math
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib.resources import files
from socket import socket
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from diffkv_jax.arguments import instance, integer, number, refuse, text
from diffkv_jax.server.driver import GRACE, Closed, Driver, EngineFailed, Full
from diffkv_jax.server.endpoints import Endpoints
from diffkv_jax.server.errors import ApiError, answer_error
from diffkv_jax.server.metrics import Metrics
from diffkv_jax.server.watch import Watch
from diffkv_jax.serving import Engine

TOLD = (ApiError, HTTPException, Full, Closed, EngineFailed, TimeoutError, Exception)
METRICS = "text/plain; version=0.0.4; charset=utf-8"


def app(
    engine: Engine,
    *,
    model_name: str,
    api_key: str | None = None,
    max_body_bytes: int = 4 * 2**20,
    max_queue: int | None = 256,
    timeout_seconds: float | None = None,
    drain_seconds: float = 30.0,
) -> Starlette:
    """An ASGI application that serves an engine, which nobody else may step.

    Its lifespan ends with `app.state.driver.close(drain_seconds)`, to be called without one too.

    Args:
        engine: with a tokenizer.
        model_name: what requests have to name.
        api_key: what they have to send as bearer token; None: nothing.
        max_body_bytes: of a request body.
        max_queue: most requests beside the engine's `max_requests` that have not finished; more
            get 429. None: any number.
        timeout_seconds: most that an answer may take; None: any time.
        drain_seconds: how long a shutdown waits for running requests before it cancels them.

    Raises:
        TypeError, ValueError: bad input, named.
    """
    instance("engine", engine, Engine, "Engine(model, params, tokenizer=...) makes one")
    if engine.tokenizer is None:
        raise ValueError("a server answers in text: make the engine with tokenizer=")
    _check_key(api_key)
    drain_seconds = number("drain_seconds", drain_seconds, least=0)
    queue = integer("max_queue", max_queue, least=0, optional=True)
    most_open = None if queue is None else engine.max_requests + queue
    options: dict[str, Any] = {
        "model_name": text("model_name", model_name),
        "max_body_bytes": integer("max_body_bytes", max_body_bytes, least=1, most=None),
        "max_choices": most_open,
        "timeout_seconds": number("timeout_seconds", timeout_seconds, above=0, optional=True),
    }
    watch = Watch(engine, metrics := Metrics())
    driver = Driver(engine, most_open=most_open, watch=watch)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            await run_in_threadpool(driver.close, drain_seconds)

    found = Starlette(
        routes=_routes(Endpoints(driver, **options), watch, metrics),
        middleware=[Middleware(_Keys, api_key)] if api_key is not None else [],
        exception_handlers=dict.fromkeys(TOLD, answer_error),
        lifespan=lifespan,
    )
    found.router.redirect_slashes = False
    found.state.driver = driver
    return found


def serve(
    engine: Engine, *, model_name: str, host: str = "127.0.0.1", port: int = 8000, **options: Any
) -> None:
    """Serve until Ctrl-C or SIGTERM, which wait for running requests; `options` are those of `app`.

    Raises:
        TypeError, ValueError: bad input, named.
    """
    drain = number("drain_seconds", options.get("drain_seconds", 30.0), least=0)
    made = app(engine, model_name=model_name, **options)
    try:
        Server(made, host=host, port=port, drain_seconds=drain).run()
    except KeyboardInterrupt:
        pass  # it has been heeded
    finally:
        made.state.driver.close(0)


class Server(uvicorn.Server):
    """Closes the driver as soon as it is told to end: connections end when their requests do."""

    def __init__(self, made: Starlette, *, drain_seconds: float, **options: Any):
        self._driver, self._drain_seconds = made.state.driver, drain_seconds
        late = math.ceil(drain_seconds + 2 * GRACE + 1)  # for clients that do not read
        super().__init__(uvicorn.Config(made, timeout_graceful_shutdown=late, **options))

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        closing = asyncio.ensure_future(run_in_threadpool(self._driver.close, self._drain_seconds))
        await super().shutdown(sockets)
        while not (closing.done() or self.force_exit):
            await asyncio.sleep(0.02)


def _routes(endpoints: Endpoints, watch: Watch, metrics: Metrics) -> list[Route]:
    driver, created = endpoints.driver, int(time.time())
    page = files("diffkv_jax.server").joinpath("page.html").read_text(encoding="utf-8")
    name = endpoints.model_name
    card = {"id": name, "object": "model", "created": created, "owned_by": "diffkv_jax"}

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    async def model(request: Request) -> Response:
        endpoints.check_model(request.path_params["id"])
        return JSONResponse(card)

    async def health(_: Request) -> Response:
        if driver.failed is not None:
            return JSONResponse({"status": "failed", "error": repr(driver.failed)}, 500)
        if driver.closing:
            return JSONResponse({"status": "shutting down"}, 503)
        return JSONResponse({"status": "ok"})

    async def told(_: Request) -> Response:
        return Response(metrics.text(), media_type=METRICS)

    async def stats(_: Request) -> Response:
        failed = driver.failed is not None
        return JSONResponse({"model": name, "failed": failed, **watch.stats(driver.num_open)})

    async def home(_: Request) -> Response:
        return HTMLResponse(page)

    return [
        Route("/v1/completions", endpoints.completions, methods=["POST"]),
        Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{id:path}", model),
        Route("/health", health),
        Route("/metrics", told),
        Route("/stats.json", stats),
        Route("/", home),
    ]


def _check_key(api_key: str | None) -> None:
    if api_key is None:
        return
    text("api_key", api_key)
    if not api_key or api_key != api_key.strip():
        rule = "text that is not empty, without spaces around it; None: no key is asked for"
        refuse("api_key", "***", rule)


class _Keys:
    """Refuses requests under /v1 without the key."""

    def __init__(self, inner: ASGIApp, key: str):
        self._inner, self._key = inner, f"bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if scope["type"] == "http" and path.startswith("/v1"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            kind, _, key = given.partition(b" ")
            if not hmac.compare_digest(kind.lower() + b" " + key.strip(), self._key):
                refused = ApiError(
                    401,
                    "the API key is missing or wrong",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await refused.response()(scope, receive, send)
                return
        await self._inner(scope, receive, send)
