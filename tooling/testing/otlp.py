"""A receiver of spans by OTLP over HTTP that keeps them, and a view of a trace as a tree."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2
from rich.table import Table
from rich.text import Text
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from infra.web.server import HttpServer, serve_http

Value = str | int | float | bool | bytes | None


@dataclass(frozen=True)
class ReceivedSpan:
    """A finished span. Ids are hexadecimal."""

    trace_id: str
    span_id: str
    parent_id: str
    """Empty for a root."""
    name: str
    kind: str
    """As in the specification, in lower case: server, client, producer, consumer, internal."""
    service: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Value]
    links: tuple[tuple[str, str], ...]
    """Trace id and span id of each linked span."""
    status: str
    """unset, ok or error."""

    @property
    def ms(self) -> float:
        return (self.end_ns - self.start_ns) / 1e6


class OtlpReceiver:
    """``async with OtlpReceiver() as receiver`` listens on loopback. Its base URL is `receiver.endpoint`."""

    def __init__(self) -> None:
        self.spans: list[ReceivedSpan] = []
        self._server: HttpServer | None = None
        self._arrived = asyncio.Condition()

    async def __aenter__(self) -> OtlpReceiver:
        self._server = await serve_http(Starlette(routes=[Route("/v1/traces", self._take, methods=["POST"])]), 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        await self._server.stop()

    @property
    def endpoint(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.port}"

    def trace(self, trace_id: str) -> list[ReceivedSpan]:
        """The spans of one trace, in the order of their start."""
        return sorted((s for s in self.spans if s.trace_id == trace_id), key=lambda span: span.start_ns)

    async def wait_for(self, complete: Callable[[Sequence[ReceivedSpan]], bool], seconds: float = 60) -> None:
        """Returns when `complete` is true of the received spans. Raises TimeoutError naming those that came."""
        try:
            async with asyncio.timeout(seconds), self._arrived:
                await self._arrived.wait_for(lambda: complete(self.spans))
        except TimeoutError:
            came = ", ".join(f"{span.service}: {span.name}" for span in self.spans) or "none"
            raise TimeoutError(f"the expected spans did not arrive within {seconds:g} s; these came: {came}") from None

    async def _take(self, request: Request) -> Response:
        message = ExportTraceServiceRequest.FromString(await request.body())
        async with self._arrived:
            self.spans.extend(_spans(message))
            self._arrived.notify_all()
        return Response(ExportTraceServiceResponse().SerializeToString(), media_type="application/x-protobuf")


def _spans(message: ExportTraceServiceRequest) -> Iterator[ReceivedSpan]:
    for resource in message.resource_spans:
        service = str(_attributes(resource.resource.attributes).get("service.name", "?"))
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield ReceivedSpan(
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    name=span.name,
                    kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower(),
                    service=service,
                    start_ns=span.start_time_unix_nano,
                    end_ns=span.end_time_unix_nano,
                    attributes=_attributes(span.attributes),
                    links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
                    status=trace_pb2.Status.StatusCode.Name(span.status.code).removeprefix("STATUS_CODE_").lower(),
                )


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, Value]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Value:
    kind = value.WhichOneof("value")
    scalar: Value = getattr(value, kind) if kind and kind not in ("array_value", "kvlist_value") else None
    return str(value) if scalar is None and kind else scalar


def render_trace(spans: Sequence[ReceivedSpan], trace_id: str) -> Table:
    """One trace as a tree of 80 columns: span, service, milliseconds.

    A span of another trace that links to a span of this one (a batch) stands below it, marked ``⇢``.
    """
    table = Table(box=None, width=80, padding=(0, 1), header_style="bold")
    table.add_column("span", no_wrap=True, overflow="ellipsis", ratio=1)
    table.add_column("service", no_wrap=True, overflow="ellipsis", max_width=18)
    table.add_column("ms", justify="right", no_wrap=True)
    ordered = sorted(spans, key=lambda span: span.start_ns)
    known = {(span.trace_id, span.span_id) for span in ordered}
    shown: set[tuple[str, str]] = set()

    def show(span: ReceivedSpan, guide: str, branch: str, linked: bool) -> None:
        me = span.trace_id, span.span_id
        shown.add(me)
        label = Text(f"{guide}{branch}{'⇢ ' if linked else ''}{span.name}")
        if span.status == "error":
            label.append(" ✗", "bold red")
        if len(span.links) > 1:
            label.append(f" ({len(span.links)} links)", "dim")
        table.add_row(label, span.service, f"{span.ms:.1f}")
        below = [(other, False) for other in ordered if (other.trace_id, other.parent_id) == me]
        below += [
            (other, True)
            for other in ordered
            if me in other.links and other.trace_id != span.trace_id and (other, False) not in below
        ]
        guide += {"": "", "├─ ": "│  ", "└─ ": "   "}[branch]
        below = [pair for pair in below if (pair[0].trace_id, pair[0].span_id) not in shown]
        for other, is_link in below:
            if (other.trace_id, other.span_id) not in shown:
                show(other, guide, "└─ " if other is below[-1][0] else "├─ ", is_link)

    for span in ordered:
        if span.trace_id == trace_id and (span.trace_id, span.parent_id) not in known:
            show(span, "", "", False)
    return table
