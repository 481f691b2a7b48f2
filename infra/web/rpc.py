"""Calls between services: gRPC with deadlines, retries of safe methods, traces, and the caller's identity.

A call carries its deadline, the trace context and a token that names the calling service and the tenant for which it
calls. A server refuses a call without deadline or token, one that `protos.calls` does not list, and more than
`MAX_CALLS` of a service at a time, before it reads the message. Errors of `infra.errors` cross the wire: the caller
gets the error that the servicer raised. With `Tls` both sides show a certificate of their service, and a token counts
only on a connection of its own service.

This module has the server and the parts of both sides. The calling side is `infra.web.rpc_client`.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health, health_pb2_grpc
from opentelemetry.trace import Span, SpanKind, StatusCode

from infra.connections import TLS_FILES
from infra.errors import (
    Conflict,
    Forbidden,
    InvalidMessage,
    NoCredit,
    NotFound,
    RetryLater,
    TooLarge,
    TooManyRequests,
    Transient,
    Unauthenticated,
    WrongType,
)
from infra.observe import telemetry
from infra.observe.logs import get_logger
from infra.observe.metrics import Metrics
from infra.outgoing import shares
from infra.postgres.db import is_transient
from infra.security.auth import Caller, Callers
from protos.calls import METHODS, AllowedCallers

Code = grpc.StatusCode

DRAIN_SECONDS = 10.0
MAX_CALLS = 1_000
"""That a process serves at a time: of one service, and on one connection."""
MAX_HEALTH_CALLS = 20
"""Of each method. They have no token, so anyone who reaches the port can make them."""
MAX_HEALTH_BYTES = 200
"""Of the name of a service."""
WATCH_SECONDS = 300.0
"""After which a watch of the health ends; the client watches again."""
READ_SECONDS = 10.0
"""In which a call's message arrives."""

TOKEN = "authorization"
TENANT = "claw-tenant"
# The field of an InvalidMessage; the status details are for people. Binary, because text metadata is ASCII only.
FIELD = "claw-field-bin"
CODES: dict[type[Exception], grpc.StatusCode] = {
    WrongType: Code.INVALID_ARGUMENT,
    InvalidMessage: Code.INVALID_ARGUMENT,
    Unauthenticated: Code.UNAUTHENTICATED,
    Forbidden: Code.PERMISSION_DENIED,
    NotFound: Code.NOT_FOUND,
    Conflict: Code.ABORTED,
    NoCredit: Code.FAILED_PRECONDITION,
    TooLarge: Code.RESOURCE_EXHAUSTED,
    TooManyRequests: Code.UNAVAILABLE,
    RetryLater: Code.UNAVAILABLE,
    Transient: Code.UNAVAILABLE,
}
# Faults of the server by the semantic conventions; other codes are answers.
_FAULTS = frozenset((Code.UNKNOWN, Code.DEADLINE_EXCEEDED, Code.INTERNAL, Code.UNAVAILABLE, Code.DATA_LOSS))
# Both sides ping quiet connections, so that a lost peer is noticed within a minute.
KEEPALIVE = [("grpc.keepalive_time_ms", 30_000), ("grpc.keepalive_timeout_ms", 10_000)]

_caller: ContextVar[Caller] = ContextVar("caller")
# The deadline of the call being served, on the monotonic clock.
deadline: ContextVar[float] = ContextVar("deadline")


def caller() -> str:
    """The service whose call is being served. Raises LookupError outside a call."""
    return _caller.get().service


def tenant() -> str:
    """The tenant of the call being served. Raises InvalidMessage if the caller does not name one."""
    if not (tenant_id := tenant_if_any()):
        raise InvalidMessage("tenant", "missing in the caller's token")
    return tenant_id


def tenant_if_any() -> str | None:
    """The tenant of the call being served; None if the call is for the platform."""
    return _caller.get().tenant_id or None


def tenant_metadata(tenant_id: str) -> grpc.aio.Metadata:
    """The ``metadata`` argument of a call for a tenant. `Channels` put the tenant into the token, not on the wire."""
    return grpc.aio.Metadata((TENANT, tenant_id))


@dataclass(frozen=True)
class Tls:
    """A service's certificate for both sides of its calls, and the authority that issues those of all. PEM."""

    authority: bytes
    certificate: bytes
    """Its subject alternative name is the service's name."""
    key: bytes

    @classmethod
    def read(cls, folder: Path) -> Tls:
        """From the `TLS_FILES` of the folder. Raises OSError."""
        return cls(*((folder / name).read_bytes() for name in TLS_FILES))


class Server:
    """A service's gRPC server: add servicers to `grpc`, then start. It also serves gRPC health.

    A servicer's streamed answer is an async generator. Methods with streamed requests are not served.
    """

    def __init__(
        self,
        service: str,
        callers: Callers,
        metrics: Metrics,
        methods: Mapping[str, AllowedCallers] = METHODS,
        tls: Tls | None = None,
        *,
        shared: bool = False,
    ) -> None:
        """shared: another process of the service may listen on the same port."""
        self._service = service
        self._tls = tls
        self._health = health.aio.HealthServicer()
        self.grpc: grpc.aio.Server = grpc.aio.server(
            interceptors=[_Incoming(service, callers, metrics, methods, with_tls=tls is not None)],
            options=[
                *KEEPALIVE,
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                # Without this, a second process could bind the same port by mistake and take half of the calls.
                ("grpc.so_reuseport", int(shared)),
                # A service's further calls wait at its side, within their deadlines.
                ("grpc.max_concurrent_streams", MAX_CALLS),
            ],
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)

    async def start(self, port: int | None, host: str = "127.0.0.1") -> int:
        """Starts to serve and returns the bound port; 0 takes a free port. Raises OSError if it cannot be bound."""
        if port is None:
            raise OSError(f"CLAW_GRPC_PORT: missing; {self._service} needs it to serve gRPC")
        try:
            bound = self._add_port(f"{host}:{port}")
        except RuntimeError as error:
            raise OSError(f"gRPC on {host}:{port}: {error}") from error
        await self.grpc.start()
        return bound

    def _add_port(self, address: str) -> int:
        if self._tls is None:
            return self.grpc.add_insecure_port(address)
        pair = (self._tls.key, self._tls.certificate)
        credentials = grpc.ssl_server_credentials([pair], self._tls.authority, require_client_auth=True)
        return self.grpc.add_secure_port(address, credentials)

    async def stop(self) -> None:
        """Reports that it no longer serves, gives running calls ten seconds to finish, then cancels them."""
        await self._health.enter_graceful_shutdown()
        await self.grpc.stop(DRAIN_SECONDS)


class _Incoming(grpc.aio.ServerInterceptor):
    """Around every call: deadline, caller, span, metrics, and errors as status codes."""

    def __init__(
        self, service: str, callers: Callers, metrics: Metrics, methods: Mapping[str, AllowedCallers], *, with_tls: bool
    ) -> None:
        self._service = service
        self._callers = callers
        self._with_tls = with_tls
        self._metrics = metrics
        self._methods = methods
        self._handlers: dict[str, Any] = {}
        self._running: Counter[str] = Counter()
        self._log = get_logger("infra.web.rpc")

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        if details.method not in self._handlers:
            handler = self._around(details.method, await continuation(details))
            if handler is None:
                return None
            self._handlers[details.method] = handler
        return self._handlers[details.method]

    def _around(self, method: str, handler: Any) -> Any:
        if handler is None or handler.request_streaming:
            return None
        read = _reader(handler.request_deserializer)

        # gRPC gets handlers of streamed requests: it would read another's request before it calls the handler, so that
        # anyone could hold calls open without a token and a deadline by sending no message.
        async def one(requests: Any, context: Any) -> Any:
            async with self._serving(method, context):
                return await handler.unary_unary(await read(requests), context)

        async def many(requests: Any, context: Any) -> None:
            # Written, not yielded: an abandoned generator would reset the span's context in another task.
            async with (
                self._serving(method, context),
                aclosing(handler.unary_stream(await read(requests), context)) as responses,
            ):
                async for response in responses:
                    await context.write(response)

        async def health(requests: Any, context: Any) -> Any:
            try:
                with self._place(method, MAX_HEALTH_CALLS):
                    request = await read(requests, MAX_HEALTH_BYTES)
                    async with asyncio.timeout(WATCH_SECONDS):
                        return await (handler.unary_unary or handler.unary_stream)(request, context)
            except (InvalidMessage, TooLarge, TooManyRequests) as error:
                await context.abort(CODES[type(error)], str(error))
            except TimeoutError:
                await context.abort(Code.DEADLINE_EXCEEDED, f"a watch ends after {WATCH_SECONDS:g} s; watch again")

        is_health = method.startswith("/grpc.health.v1.Health/")
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                health if is_health else many, response_serializer=handler.response_serializer
            )
        return grpc.stream_unary_rpc_method_handler(
            health if is_health else one, response_serializer=handler.response_serializer
        )

    @contextmanager
    def _place(self, whose: str, most: int) -> Iterator[None]:
        """Raises TooManyRequests."""
        if self._running[whose] >= most:
            raise TooManyRequests(timedelta(seconds=1), f"{whose}: {most} calls are under way in this process")
        self._running[whose] += 1
        try:
            yield
        finally:
            self._running[whose] -= 1

    @asynccontextmanager
    async def _serving(self, path: str, context: Any) -> AsyncIterator[None]:
        method = path.removeprefix("/")
        headers = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        began = time.perf_counter()
        code = Code.CANCELLED  # stays if a CancelledError is raised
        failure: tuple[grpc.StatusCode, str] | None = None
        try:
            parent = telemetry.extract(headers)
            with telemetry.span(method, SpanKind.SERVER, parent=parent, attributes=span_attributes(method)) as span:
                try:
                    tokens = deadline.set(self._deadline(context)), _caller.set(self._caller(method, headers, context))
                    shares.work_for(_caller.get().tenant_id)
                    try:
                        with self._place(caller(), MAX_CALLS):
                            yield
                    finally:
                        deadline.reset(tokens[0])
                        _caller.reset(tokens[1])
                    code = context.code() or Code.OK
                except grpc.aio.AbortError:
                    code = context.code()
                    raise
                except Exception as error:
                    failure = code, _ = self._failure(error, span, context)
                finally:
                    note_code(span, code, code in _FAULTS)
        finally:
            self._metrics.grpc_seconds.labels(method, code.name).observe(time.perf_counter() - began)
        if failure:
            await context.abort(*failure)

    def _deadline(self, context: Any) -> float:
        remaining: float | None = context.time_remaining()
        if remaining is None:
            raise InvalidMessage("deadline", "missing; set the call's timeout, or it could wait without a limit")
        return time.monotonic() + remaining

    def _caller(self, method: str, headers: dict[str, str], context: Any) -> Caller:
        scheme, _, token = headers.get(TOKEN, "").partition(" ")
        if scheme.lower() != "bearer":
            raise Unauthenticated("token: missing")
        caller = self._callers.verify(token)
        if self._with_tls:
            names = context.auth_context().get("x509_subject_alternative_name", ())
            if caller.service.encode() not in names:
                raise Unauthenticated("token: of another service than the connection's certificate")
        call = self._methods.get(method)
        if call is None or caller.service not in call.callers:
            raise Forbidden(f"{caller.service} must not call {method}: see ./claw map")
        if call.behalf == ("operator" if caller.tenant_id else "tenant"):
            raise Forbidden(f"{method} must be called for {'the' if caller.tenant_id else 'a'} {call.behalf}")
        return caller

    def _failure(self, error: Exception, span: Span, context: Any) -> tuple[grpc.StatusCode, str]:
        if isinstance(error, InvalidMessage):
            context.set_trailing_metadata(((FIELD, error.field.encode()),))
        if type(error) in CODES:
            return CODES[type(error)], str(error)
        telemetry.fail(span, error)
        if is_transient(error):
            self._log.warning("gRPC call failed; the caller may retry", exc_info=error)
            return Code.UNAVAILABLE, "a dependency of this service does not answer"
        self._log.error("gRPC call failed", exc_info=error)
        trace_id = span.get_span_context().trace_id
        return Code.INTERNAL, f"an error inside {self._service}; the request is not the cause (trace {trace_id:032x})"


def _reader(deserializer: Callable[[bytes], Any] | None) -> Callable[..., Awaitable[Any]]:
    async def read(requests: AsyncIterator[bytes], most: int | None = None) -> Any:
        try:
            async with asyncio.timeout(READ_SECONDS):
                body = await anext(requests)
            if most is not None and len(body) > most:
                raise TooLarge(f"body: larger than {most} bytes")
            request: Any = deserializer(body) if deserializer else body
        except (TimeoutError, StopAsyncIteration):
            raise InvalidMessage("body", "missing") from None
        except DecodeError as error:
            raise InvalidMessage("body", "is not the message of this method") from error
        # Most bodies have no zero byte, so few messages are searched. PostgreSQL's text cannot hold the character.
        if deserializer and b"\0" in body and (field := _field_with_nul(request)):
            raise InvalidMessage(field, "must not contain the character U+0000")
        return request

    return read


def _field_with_nul(message: Message) -> str | None:
    """The name of the first field whose text contains U+0000, such as ``items.id``."""
    for field, value in message.ListFields():
        values = [value] if not field.is_repeated else [*value, *(value.values() if isinstance(value, Mapping) else ())]
        for each in values:
            if isinstance(each, str) and "\0" in each:
                return str(field.name)
            if isinstance(each, Message) and (inner := _field_with_nul(each)):
                return f"{field.name}.{inner}"
    return None


def span_attributes(method: str) -> dict[str, telemetry.Value]:
    """Of the span of a call, on either side."""
    return {"rpc.system.name": "grpc", "rpc.method": method}


def note_code(span: Span, code: grpc.StatusCode, fault: bool) -> None:
    """Writes the status code of a call to its span. fault: the span has failed."""
    span.set_attribute("rpc.response.status_code", code.name)
    if fault:
        span.set_attribute("error.type", code.name)
        span.set_status(StatusCode.ERROR)
