"""The calling side of gRPC: connections to other services, with deadline, trace context and token in each call."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import grpc.aio
from opentelemetry.trace import SpanKind

from infra.errors import InvalidMessage, Transient
from infra.observe import telemetry
from infra.security.auth import Callers
from infra.web.rpc import CODES, FIELD, KEEPALIVE, TENANT, TOKEN, Code, Tls, deadline, note_code, span_attributes

DEFAULT_TIMEOUT_SECONDS = 5.0


class Channels:
    """This process's connections to other services, one per target."""

    def __init__(self, callers: Callers, tls: Tls | None = None) -> None:
        self._callers = callers
        self._tls = tls
        self._open: dict[tuple[str, str, tuple[str, ...]], grpc.aio.Channel] = {}

    def to(self, target: str, service: str, *, safe: Sequence[str] = ()) -> grpc.aio.Channel:
        """The channel to `service` at `target` (host:port), for unary calls.

        A call has five seconds unless it has a timeout of its own, and never more than the remaining time of the call
        being served. safe: methods (``memory.v1.Memory/Retrieve``) that are repeated while the service is unavailable.
        A call raises the error that the servicer raised; `Transient` if the service does not answer in time;
        AioRpcError for an error inside the service.
        """
        key = target, service, tuple(safe)
        if key not in self._open:
            options = [
                *KEEPALIVE,
                ("grpc.service_config", _service_config(safe)),
                # Reconnects to a restarted service in seconds; the default is up to two minutes.
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 3_000),
            ]
            interceptors = [_Outgoing(self._callers, target, service)]
            if self._tls is None:
                channel = grpc.aio.insecure_channel(target, interceptors=interceptors, options=options)
            else:
                tls = self._tls
                credentials = grpc.ssl_channel_credentials(tls.authority, tls.key, tls.certificate)
                # The certificate names the service and not its address.
                options.append(("grpc.ssl_target_name_override", service))
                channel = grpc.aio.secure_channel(target, credentials, interceptors=interceptors, options=options)
            self._open[key] = channel
        return self._open[key]

    async def close(self) -> None:
        for channel in self._open.values():
            await channel.close()
        self._open.clear()


def _service_config(safe: Sequence[str]) -> str:
    names = [dict(zip(("service", "method"), method.split("/"), strict=True)) for method in safe]
    policy = {
        "maxAttempts": 4,
        "initialBackoff": "0.05s",
        "maxBackoff": "1s",
        "backoffMultiplier": 3,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    return json.dumps({"methodConfig": [{"name": names, "retryPolicy": policy}]} if names else {})


class _Outgoing(grpc.aio.UnaryUnaryClientInterceptor):
    """Adds deadline, trace context and token to a call, and turns status codes back into errors."""

    def __init__(self, callers: Callers, target: str, service: str) -> None:
        self._callers = callers
        self._target = target
        self._service = service

    async def intercept_unary_unary(
        self, continuation: Callable[[Any, Any], Awaitable[Any]], details: Any, request: Any
    ) -> Any:
        name = details.method.decode() if isinstance(details.method, bytes) else details.method
        method = name.removeprefix("/")
        timeout = DEFAULT_TIMEOUT_SECONDS if details.timeout is None else details.timeout
        ends = deadline.get(None)
        if ends is not None:
            timeout = min(timeout, ends - time.monotonic())
        with telemetry.span(
            method, SpanKind.CLIENT, attributes=span_attributes(method) | {"server.address": self._target}
        ) as span:
            given = dict(details.metadata or ())
            token = self._callers.token(self._service, given.pop(TENANT, ""))
            metadata = grpc.aio.Metadata(*given.items(), *telemetry.carrier().items(), (TOKEN, f"Bearer {token}"))
            call = await continuation(details._replace(timeout=timeout, metadata=metadata), request)
            try:
                await call
            except grpc.aio.AioRpcError as error:
                note_code(span, error.code(), fault=True)
                raise self._error(error) from error
            note_code(span, Code.OK, fault=False)
            return call

    def _error(self, error: grpc.aio.AioRpcError) -> Exception:
        details = error.details() or ""
        match error.code():
            case Code.INVALID_ARGUMENT:
                field = dict(error.trailing_metadata() or ()).get(FIELD, b"request").decode()
                return InvalidMessage(field, details.removeprefix(f"{field}: "))
            # CANCELLED comes from a server that is shutting down; a cancelled caller gets a CancelledError.
            case Code.UNAVAILABLE | Code.DEADLINE_EXCEEDED | Code.CANCELLED:
                return Transient(f"{self._service} at {self._target}: {details}")
        by_code = {code: type_ for type_, code in CODES.items()}
        return by_code[error.code()](details) if error.code() in by_code else error
