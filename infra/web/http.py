"""The HTTP application of a service: problems, health, metrics, spans and limits."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import TypeVar

import msgspec
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
PROCESS = "claw-process"
"""The header of ``/readyz`` that holds the process id: several processes may share a port."""

# Probes ask these every few seconds: no span, no metric, no log line.
_WATCHED = frozenset(("/health", "/healthz", "/readyz", "/api/health", "/api/health/dependencies", "/metrics"))
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
# The key of a request's `_Exchange` in its scope.
_EXCHANGE = "claw.exchange"
# Stands for the pattern of a path that has no route.
_UNMATCHED = "unmatched"
_log = get_logger("infra.web.http")


def create_app(
    routes: Sequence[BaseRoute], health: Health, metrics: Metrics, *, max_body: int = MAX_BODY_BYTES
) -> Starlette:
    """An application with `routes`, the health endpoints and ``/metrics``. Bodies over `max_body` bytes get a 413.

    A route raises errors of `infra.errors`; the application answers with problems.
    """

    async def alive(_: Request) -> Response:
        ok, body = health.alive()
        return JSONResponse(body, 200 if ok else 503)

    async def ready(_: Request) -> Response:
        ok, body = await health.ready()
        return JSONResponse(body, 200 if ok else 503, headers={PROCESS: str(os.getpid())})

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


def allow_body(scope: Scope, max_bytes: int) -> None:
    """Sets the limit of this request's body to `max_bytes`. Call it before the body is read."""
    scope[_EXCHANGE].max_body = max_bytes


def media_type(headers: Mapping[str, str]) -> str:
    """The content type without parameters, in lower case; empty if the header is missing."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def is_json(headers: Mapping[str, str]) -> bool:
    """The body is JSON: FastAPI reads the types with the suffix ``+json`` too."""
    type_ = media_type(headers)
    return type_ == "application/json" or type_.endswith("+json")


async def read_json(request: Request, type_: type[T]) -> T:
    """The request's JSON body as `type_`.

    Raises InvalidMessage naming the field (``items[2].price``; ``body`` if it is not JSON), HTTPException 415 for
    another content type.
    """
    if not is_json(request.headers):
        given = media_type(request.headers) or "missing"
        raise HTTPException(415, f"content-type: is {given}; must be application/json")
    return decode_json(await request.body(), type_)


_FIELD = re.compile(r"Object (?:missing required|contains unknown) field `(.*?)`")


def decode_json(body: bytes, type_: type[T]) -> T:
    """`body` as `type_`. Raises InvalidMessage naming the field, or ``body`` if it is not JSON."""
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
    """Around every request: span, metrics, log line, the body's limit, and errors as problems."""

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
        method = scope["method"] if scope["method"] in METHODS else "_OTHER"
        attributes = {"http.request.method": method, "url.scheme": scope["scheme"]}
        with telemetry.span(method, SpanKind.SERVER, parent=telemetry.extract(headers), attributes=attributes) as span:
            try:
                await self._answer(scope, exchange)
            finally:
                self._observe(scope, span, method, exchange, began)

    async def _open(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a WebSocket. Until it is accepted it is a request: counted, and an error is answered as a problem.

        It has no span, because it may last for days.
        """
        began = time.perf_counter()
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            if not status:
                if message["type"] == "websocket.close":
                    # Starlette's router closes a socket whose path it does not know.
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
            # Without this uvicorn believes that a refused handshake was forgotten, and logs an error.
            raise ClientDisconnected

    async def _answer(self, scope: Scope, exchange: _Exchange) -> None:
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            # The client has left. nginx too shows this as status 499.
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
                # A part of the answer was sent: to close the connection is the only way to show that it is incomplete.
                raise
            await response(scope, exchange.receive, exchange.send)

    def _observe(self, scope: Scope, span: Span, method: str, exchange: _Exchange, began: float) -> None:
        pattern, status, ended = _pattern(scope), exchange.status, time.perf_counter()
        seconds = ended - began
        # A stream of events lasts as long as its subject: it is slow if it begins late.
        answered = (exchange.streaming_since or ended) - began
        self._metrics.http_seconds.labels(method, pattern, str(status)).observe(answered)
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
    """The pattern of the route, never the path: span names and metric labels must be few."""
    route = scope.get("route")
    return scope.get("root_path", "") + route.path if isinstance(route, Route | WebSocketRoute) else _UNMATCHED


def _shown_path(scope: Scope) -> str:
    """The path for logs and spans, with parameters masked if their names in the route say that they are secret.

    Of a path without a route only the first part is shown: the rest may be a secret in a wrong place.
    """
    path: str = scope["path"]
    if _pattern(scope) == _UNMATCHED:
        first, _, rest = path.removeprefix("/").partition("/")
        return f"/{first[:40]}/{MASK}" if rest else f"/{first[:40]}"
    for name, value in scope.get("path_params", {}).items():
        if secret_name(name):
            path = path.replace(str(value), MASK)
    return path


class _Exchange:
    """Receive and send of one request: limits the body and keeps the status (0 before the answer begins)."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, max_body: int) -> None:
        self._receive = receive
        self._send = send
        self._length = max((int(value) for name, value in scope["headers"] if name == b"content-length"), default=0)
        self._received = 0
        self.max_body = max_body
        self.status = 0
        self.streaming_since: float | None = None
        """When a stream of events began, as `time.perf_counter`. None for another answer."""

    async def receive(self) -> Message:
        # With a declared length over the limit, nothing needs to be read.
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
            if dict(message.get("headers", ())).get(b"content-type", b"").startswith(b"text/event-stream"):
                self.streaming_since = time.perf_counter()
        await self._send(message)

    def _too_large(self) -> TooLarge:
        return TooLarge(f"body: larger than the limit of {self.max_body} bytes")
