"""Receives spans like an OpenTelemetry collector: OTLP over HTTP, protobuf.

It has its own port and is not traced. Otherwise each received span would make another span.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from infra.errors import InvalidMessage, Transient
from infra.observe.logs import get_logger
from infra.service.service import Runtime
from infra.web.server import serve_http
from services.log_aggregator import adapters
from services.log_aggregator.index.documents import IndexedDocument
from services.log_aggregator.index.search_index import SearchIndex

# Size of one request, decompressed. The SDK sends 512 spans at once, and a batch span may have 500 links of 60 bytes.
MAX_BYTES = 32 * 1024 * 1024
PROTOBUF = "application/x-protobuf"

Value = str | int | float | bool


def receiver(runtime: Runtime) -> Receiver:
    settings = runtime.settings
    return Receiver(adapters.index(runtime), settings.otlp_port, settings.listen_host, shared=settings.share_ports)


class Receiver:
    """Answers after OpenSearch has stored the spans. While OpenSearch is away it answers 503: the sender retries."""

    def __init__(self, index: SearchIndex, port: int, host: str, *, shared: bool = False) -> None:
        self._index = index
        self._port = port
        self._host = host
        self._shared = shared
        self._stopping = asyncio.Event()
        self._log = get_logger("log_aggregator.otlp")

    async def run(self) -> None:
        app = Starlette(routes=[Route("/v1/traces", self._take, methods=["POST"])])
        server = await serve_http(app, self._port, self._host, shared=self._shared)
        await self._stopping.wait()
        await server.stop()

    async def stop(self) -> None:
        self._stopping.set()

    async def _take(self, request: Request) -> Response:
        if request.headers.get("content-type") != PROTOBUF:
            return Response(f"content-type: must be {PROTOBUF}", 415)
        try:
            body = await _body(request)
            documents = list(spans(ExportTraceServiceRequest.FromString(body)))
        except (DecodeError, zlib.error, ValueError) as error:
            return Response(f"body: is not a valid export request: {error}", 400)
        try:
            await self._index.store("spans", documents)
        except InvalidMessage as error:
            # A retry would be refused again. The other spans of the request are stored.
            return Response(f"body: a span was refused: {error}", 400)
        except Transient as error:
            self._log.warning("could not store spans; the sender will retry", error=str(error), spans=len(documents))
            return Response("the index does not answer; try again", 503, {"Retry-After": "1"})
        return Response(ExportTraceServiceResponse().SerializeToString(), media_type=PROTOBUF)


async def _body(request: Request) -> bytes:
    """Returns the decompressed body. Raises ValueError if it is larger than MAX_BYTES."""
    compressed = request.headers.get("content-encoding") == "gzip"
    inflate = zlib.decompressobj(wbits=31) if compressed else None
    body = bytearray()
    async for part in request.stream():
        body += inflate.decompress(part, MAX_BYTES + 1 - len(body)) if inflate else part
        if len(body) > MAX_BYTES:
            raise ValueError(f"must be at most {MAX_BYTES} bytes")
    return bytes(body)


def spans(message: ExportTraceServiceRequest) -> Iterator[IndexedDocument]:
    """Yields each span as a document. Ids are lower-case hexadecimal. Enum values have no prefix."""
    for resource in message.resource_spans:
        service = str(_attributes(resource.resource.attributes).get("service.name", ""))
        for scope in resource.scope_spans:
            for span in scope.spans:
                trace_id, span_id = span.trace_id.hex(), span.span_id.hex()
                links = [(link.trace_id.hex(), link.span_id.hex()) for link in span.links]
                at = datetime.fromtimestamp(span.start_time_unix_nano / 1e9, UTC)
                body = {
                    "timestamp": at.isoformat(timespec="milliseconds"),
                    "duration_ms": (span.end_time_unix_nano - span.start_time_unix_nano) / 1e6,
                    "trace_id": trace_id,
                    "span_id": span_id,
                    "parent_id": span.parent_span_id.hex(),
                    "name": span.name,
                    "kind": trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower(),
                    "service": service,
                    "start_ns": span.start_time_unix_nano,
                    "end_ns": span.end_time_unix_nano,
                    "attributes": _attributes(span.attributes),
                    "links": links,
                    "status": trace_pb2.Status.StatusCode.Name(span.status.code).removeprefix("STATUS_CODE_").lower(),
                    "error": span.status.message,
                    "linked": sorted({trace for trace, _ in links}),
                }
                yield IndexedDocument(f"{trace_id}-{span_id}", at, body)


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, Value]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Value:
    match value.WhichOneof("value"):
        case "string_value" | "int_value" | "double_value" | "bool_value" as kind:
            scalar: Value = getattr(value, kind)
            return scalar
        case _:
            return str(value)
