"""The HTTP base of a service: problems, health, metrics, a span per request, limits; and the server in our own loop."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import msgspec
import uvicorn
from opentelemetry.trace import Span, SpanKind, StatusCode
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect
from uvicorn.protocols.utils import ClientDisconnected

from infra.errors import InvalidMessage, TooLarge
from infra.observe import telemetry
from infra.observe.logs import get_logger
from infra.observe.metrics import Metrics
from infra.observe.redaction import MASK, secret_name
from infra.web.health import Health as Health
from infra.web.problems import problem

T = TypeVar("T")

MAX_BODY_BYTES = 1_048_576
DRAIN_SECONDS = 10
# A socket is asked for a sign of life so often, and cut off where none comes in the time after that.
PING_SECONDS = 30.0
PONG_SECONDS = 60.0

# Asked every few seconds by machines: no span, no metric, no log line.
_WATCHED = frozenset(("/health", "/healthz", "/readyz", "/api/health", "/api/health/dependencies", "/metrics"))
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
# Where a request's scope keeps its `_Exchange`.
_EXCHANGE = "claw.exchange"
_log = get_logger("infra.web.http")


def create_app(
    routes: Sequence[BaseRoute], health: Health, metrics: Metrics, *, max_body: int = MAX_BODY_BYTES
) -> Starlette:
    """An application with `routes`, the health endpoints and ``/metrics``. Bodies over `max_body` bytes get a 413."""

    async def alive(_: Request) -> Response:
        ok, body = health.alive()
        return JSONResponse(body, 200 if ok else 503)

    async def ready(_: Request) -> Response:
        ok, body = await health.ready()
        return JSONResponse(body, 200 if ok else 503)

    async def prometheus(_: Request) -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def http_problem(_: Request, error: Exception) -> Response:
        return problem(error)

    watched = [Route(path, alive) for path in ("/health", "/healthz", "/api/health")]
    watched += [Route(path, ready) for path in ("/readyz", "/api/health/dependencies")]
    return Starlette(
        routes=[*watched, Route("/metrics", prometheus), *routes],
        middleware=[Middleware(_Observed, metrics=metrics, max_body=max_body)],
        exception_handlers={HTTPException: http_problem},
    )


def allow_body(request: Request, max_bytes: int) -> None:
    """Lets this request's body have up to `max_bytes`, for a route that streams it; before it is read."""
    request.scope[_EXCHANGE].max_body = max_bytes


def media_type(headers: Mapping[str, str]) -> str:
    """What a message is by its content-type, without parameters, in small letters; empty where it does not say."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_json(request: Request, type_: type[T]) -> T:
    """The request's JSON body as `type_`.

    Raises InvalidMessage naming the field (``items[2].price``; ``body`` if it is no JSON), HTTPException 415 for
    another content type.
    """
    content_type = media_type(request.headers)
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise HTTPException(415, f"content-type: {content_type or 'missing'}; this takes application/json")
    return decode_json(await request.body(), type_)


_FIELD = re.compile(r"Object (?:missing required|contains unknown) field `(.*?)`")


def decode_json(body: bytes, type_: type[T]) -> T:
    """`body` as `type_`. Raises InvalidMessage naming the field, or ``body`` if it is no JSON."""
    try:
        return msgspec.json.decode(body, type=type_)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$")
        names = [path.removesuffix("`").removeprefix(".")]
        if match := _FIELD.match(reason):
            names.append(match[1])
            reason = "missing" if "missing" in reason else "unknown"
        raise InvalidMessage(".".join(name for name in names if name) or "body", reason) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidMessage("body", str(error)) from error


class _Observed:
    """Around every request: trace, metrics, log, the body's limit, and what became an error."""

    def __init__(self, app: ASGIApp, metrics: Metrics, max_body: int) -> None:
        self._app = app
        self._metrics = metrics
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._open(scope, receive, send)
            return
        exchange = scope[_EXCHANGE] = _Exchange(scope, receive, send, self._max_body)
        if scope["path"] in _WATCHED:
            await self._answer(scope, exchange)
            return
        began = time.perf_counter()
        headers = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in (b"traceparent", b"tracestate")
        }
        method = scope["method"] if scope["method"] in _METHODS else "_OTHER"
        attributes = {"http.request.method": method, "url.scheme": scope["scheme"], "url.path": scope["path"]}
        with telemetry.span(method, SpanKind.SERVER, parent=telemetry.extract(headers), attributes=attributes) as span:
            try:
                await self._answer(scope, exchange)
            finally:
                self._observe(scope, span, method, exchange.status, time.perf_counter() - began)

    async def _open(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Until it is accepted a socket is a request: counted, and what goes wrong is a problem. It has no span, for it
        may last for days."""
        began = time.perf_counter()
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            if not status:
                if message["type"] == "websocket.close":
                    # The router's word for a path that it does not have.
                    raise HTTPException(404)
                status = message.get("status", 101)
                seconds = time.perf_counter() - began
                self._metrics.http_seconds.labels("GET", _pattern(scope), str(status)).observe(seconds)
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except WebSocketDisconnect:
            return
        except Exception as error:
            response = problem(error)
            if response.status_code >= 500:
                _log.error("socket failed", path=_shown_path(scope), status=response.status_code, exc_info=True)
            if status:
                raise
            await response(scope, receive, noted)
        if status != 101:
            # uvicorn takes a handshake that was refused for one that was forgotten, and logs an error; not after this.
            raise ClientDisconnected

    async def _answer(self, scope: Scope, exchange: _Exchange) -> None:
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            # Nobody is there to answer. 499 is nginx's word for it.
            exchange.status = exchange.status or 499
        except Exception as error:
            response = problem(error)
            if response.status_code >= 500:
                _log.error(
                    "request failed",
                    method=scope["method"],
                    path=_shown_path(scope),
                    status=response.status_code,
                    exc_info=True,
                )
            if exchange.status:
                # The answer is under way: cutting it off is the only way left to say that it is not whole.
                raise
            await response(scope, exchange.receive, exchange.send)

    def _observe(self, scope: Scope, span: Span, method: str, status: int, seconds: float) -> None:
        pattern = _pattern(scope)
        self._metrics.http_seconds.labels(method, pattern, str(status)).observe(seconds)
        log = _log.debug if status < 400 else _log.info
        path = _shown_path(scope)
        log("request served", method=method, path=path, status=status, ms=round(seconds * 1000, 1))
        if span.is_recording():
            span.update_name(f"{method} {pattern}")
            span.set_attributes({"http.route": pattern, "http.response.status_code": status, "url.path": path})
            if status >= 500:
                span.set_attribute("error.type", str(status))
                span.set_status(StatusCode.ERROR)


def _pattern(scope: Scope) -> str:
    """Of the route, never the path: names and labels must be few."""
    route = scope.get("route")
    return scope.get("root_path", "") + route.path if isinstance(route, Route | WebSocketRoute) else "unmatched"


def _shown_path(scope: Scope) -> str:
    """The path without those of its parts whose names in the route say that they are secret."""
    path: str = scope["path"]
    for name, value in scope.get("path_params", {}).items():
        if secret_name(name):
            path = path.replace(str(value), MASK)
    return path


class _Exchange:
    """The two directions of one request: counts the body, notes the status (0 before the answer begins)."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, max_body: int) -> None:
        self._receive = receive
        self._send = send
        self._length = max((int(value) for name, value in scope["headers"] if name == b"content-length"), default=0)
        self._received = 0
        self.max_body = max_body
        self.status = 0

    async def receive(self) -> Message:
        # By the length that it says, nothing of it needs to be read.
        if self._length > self.max_body:
            raise self._too_large()
        message = await self._receive()
        self._received += len(message.get("body", b""))
        if self._received > self.max_body:
            raise self._too_large()
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)

    def _too_large(self) -> TooLarge:
        return TooLarge(f"body: more than the {self.max_body} bytes that this takes")


class _Server(uvicorn.Server):
    """Signals belong to the process, not to one of its parts; and somebody waits for the start."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()


class HttpServer:
    """A running server. `port` is the one it is bound to."""

    def __init__(self, server: _Server, task: asyncio.Task[None], port: int) -> None:
        self._server = server
        self._task = task
        self.port = port

    async def stop(self) -> None:
        """Takes no more connections, lets requests under way finish for ten seconds, then cuts them off."""
        self._server.should_exit = True
        await self._task


async def serve_http(app: ASGIApp, port: int, host: str = "127.0.0.1") -> HttpServer:
    """Serves `app` in this loop, and returns once it does. Port 0 takes a free one.

    Raises OSError saying which address cannot be bound.
    """
    # asyncio sends small pieces without waiting (TCP_NODELAY) only where the protocol is named.
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"HTTP on {host}:{port}: {error.strerror}") from error
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        ws="websockets-sansio",
        # What a body may have, a message may have, too; one that is larger ends its socket (1009).
        ws_max_size=MAX_BODY_BYTES,
        ws_ping_interval=PING_SECONDS,
        ws_ping_timeout=PONG_SECONDS,
        # It would cost each socket more memory than all else, and our messages are small.
        ws_per_message_deflate=False,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve([sock]), name="http server")
    up = asyncio.create_task(server.up.wait())
    await asyncio.wait((task, up), return_when=asyncio.FIRST_COMPLETED)
    up.cancel()
    if task.done():
        task.result()
    return HttpServer(server, task, sock.getsockname()[1])
