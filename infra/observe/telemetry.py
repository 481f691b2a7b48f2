"""Traces: one trace through every hop of a message. FastStream's own middleware loses the context.

A message carries the context of the span that produced it, stored with it in the outbox. The consumer of a single
message continues that trace with a child span, which also has a link to the producer's span. A batch, whose messages
come from many traces, has a trace of its own and a link to each producer's span. Names and attributes follow
OpenTelemetry's semantic conventions for messaging.

`system` is ``kafka`` or ``rabbitmq``. A destination is a topic, or for RabbitMQ ``exchange:routing_key``.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, SpanKind, StatusCode, TraceFlags
from opentelemetry.trace.span import TraceState

from infra.observe import spans
from infra.observe.metrics import Metrics
from infra.observe.redaction import redacted
from infra.observe.span_export import SpanExporter
from infra.observe.spans import EncodedLinks, RecordedSpan, new_span_id, new_trace_id

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

Value = str | int | float | bool

PARENT_AGE = timedelta(minutes=15)
"""A consumer does not continue the trace of an older message, which is finished; it links to it."""
# Ids that are all zero are invalid, and only versions after 00 have further fields behind the flags.
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:(?<!00.{53})-.*)?"
)
# The sampled ones among several contexts that are separated by line ends.
_SAMPLED_TRACEPARENTS = re.compile(
    r"^(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f][13579bdf](?:(?<!00.{53})-.*)?$", re.M
)
# Short names of the bus code and the names of the semantic conventions. Other names are used unchanged.
_ATTRIBUTES = {
    "message_id": "messaging.message.id",
    "partition": "messaging.destination.partition.id",
    "group": "messaging.consumer.group.name",
    "offset": "messaging.kafka.offset",
    "key": "messaging.kafka.message.key",
    "routing_key": "messaging.rabbitmq.destination.routing_key",
    "attempt": "claw.lane.attempt",
}
_SCOPE = "clawbus"
_TRACE_ID_BITS = 2**64 - 1


class Telemetry:
    """The tracing of this process. Without `exporter` and `processor`, trace ids travel but nothing is recorded."""

    def __init__(self, ratio: float, exporter: SpanExporter | None, processor: SpanProcessor | None) -> None:
        self._exporter = exporter
        self._processor = processor
        self.recording = exporter is not None or processor is not None
        # As the SDK's TraceIdRatioBased, so that all services choose the same traces.
        self._bound = round(ratio * 2**64)

    def samples(self, trace_id: int) -> bool:
        """Whether a new trace with this id is recorded."""
        return self.recording and trace_id & _TRACE_ID_BITS < self._bound

    def ended(self, span: RecordedSpan) -> None:
        if self._exporter:
            self._exporter.add(span)
        if self._processor:
            # RecordedSpan has the attributes that the SDK's exporters read.
            self._processor.on_end(cast("Any", span))

    def flush(self) -> None:
        """Sends the queued spans now. Blocks until the collector has answered or was given up."""
        if self._exporter:
            self._exporter.flush()

    def shutdown(self) -> None:
        """Sends the queued spans and ends tracing. Blocks for up to ten seconds: call it in a thread."""
        global _running
        _running = None
        if self._exporter:
            self._exporter.stop()
        if self._processor:
            self._processor.shutdown()


_running: Telemetry | None = None


def setup(
    service: str,
    version: str,
    endpoint: str | None,
    *,
    ratio: float = 1.0,
    metrics: Metrics | None = None,
    processor: SpanProcessor | None = None,
) -> Telemetry:
    """Starts tracing in this process: spans go to the OTLP/HTTP collector at the base URL `endpoint`.

    Without an endpoint nothing is recorded, and trace ids still travel, so that log lines of one trace have one id.
    ratio: the part of new traces that is recorded, 0 to 1; a trace that another process began is recorded if that
    process records it. metrics: counts dropped spans. processor: takes the spans instead (tests).
    """
    global _running
    exporter = None
    if endpoint and processor is None:
        resource = {"telemetry.sdk.language": "python", "telemetry.sdk.name": _SCOPE, "telemetry.sdk.version": version}
        exporter = SpanExporter(
            f"{endpoint.rstrip('/')}/v1/traces",
            {**resource, "service.name": service, "service.version": version},
            _SCOPE,
            metrics.spans_dropped.inc if metrics else lambda _: None,
        )
    _running = Telemetry(ratio, exporter, processor)
    return _running


def start_span(
    name: str,
    kind: SpanKind = SpanKind.INTERNAL,
    *,
    attributes: Mapping[str, Value] | None = None,
) -> Span:
    """A span under the current one. The caller ends it; it does not become the current span."""
    return _start(name, kind, _current(), attributes)


def start_server_span(name: str, headers: Mapping[str, str], attributes: Mapping[str, Value]) -> Span:
    """A span of a request with these `headers` (names in lower case): under its sender's span, or a root.

    The caller ends it; it does not become the current span.
    """
    return _start(name, SpanKind.SERVER, extract(headers) if "traceparent" in headers else None, attributes)


@contextmanager
def current(span: Span) -> Iterator[None]:
    """Makes `span` the current one in the block. It does not end it."""
    token = otel_context.attach(trace.set_span_in_context(span))
    try:
        yield
    finally:
        otel_context.detach(token)


def traceparent(span: Span) -> str | None:
    """The context of `span` as the header ``traceparent``; None if it has none."""
    if isinstance(span, RecordedSpan):
        return span.traceparent
    context = span.get_span_context()
    return spans.traceparent(context) if context.span_id else None


def carrier() -> dict[str, str]:
    """The current context as headers ``traceparent`` and ``tracestate``; empty if there is none.

    They are stored with a message: its consumer continues the trace, or links to it.
    """
    return _inject(spans.current_span())


def _inject(context: RecordedSpan | SpanContext) -> dict[str, str]:
    if not context.span_id:
        return {}
    headers = {"traceparent": context.traceparent if isinstance(context, RecordedSpan) else spans.traceparent(context)}
    if context.trace_state:
        headers["tracestate"] = context.trace_state.to_header()
    return headers


def extract(headers: Mapping[str, str]) -> SpanContext | None:
    """The context in `headers` (W3C trace context); None if it is missing or malformed."""
    match = _TRACEPARENT.fullmatch(headers.get("traceparent", ""))
    if match is None:
        return None
    trace_id, span_id, flags = match.groups()
    state = headers.get("tracestate")
    return SpanContext(
        int(trace_id, 16),
        int(span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(int(flags, 16)),
        trace_state=TraceState.from_header([state]) if state else None,
    )


def process(
    system: str,
    destination: str,
    carrier: Mapping[str, str],
    *,
    queue: str | None = None,
    age: timedelta = timedelta(0),
    **attributes: Value,
) -> AbstractContextManager[Span]:
    """A span for the processing of one message, in the message's trace and linked to its producer's span.

    It has a trace of its own if the message is older than 15 minutes (still linked), or if the headers have no readable
    context. queue: the name of the RabbitMQ queue. An exception of the block is recorded and raised.
    """
    context = extract(carrier)
    if context and not context.trace_flags.sampled:
        return _Active(NonRecordingSpan(context))
    if queue and not destination.endswith(f":{queue}"):
        destination = f"{destination}:{queue}"
    return _Active(
        _start(
            f"process {destination}",
            SpanKind.CONSUMER,
            context if age < PARENT_AGE else None,
            _attributes(system, "process", destination, carrier, attributes),
            (Link(context),) if context else (),
        )
    )


def process_batch(
    system: str, destination: str, carriers: Sequence[Mapping[str, str]], **attributes: Value
) -> AbstractContextManager[Span]:
    """A span for the processing of a batch, in a trace of its own, with a link to each message's producer."""
    return _batch(SpanKind.CONSUMER, "process", system, destination, carriers, attributes)


def publish_batch(
    system: str, carriers: Sequence[Mapping[str, str]], destination: str | None = None, **attributes: Value
) -> AbstractContextManager[Span]:
    """A span for the sending of stored messages, in a trace of its own, with a link to each message's producer."""
    return _batch(SpanKind.CLIENT, "send", system, destination, carriers, attributes)


def record(carrier: Mapping[str, str], name: str, **attributes: Value) -> AbstractContextManager[Span]:
    """A span in the trace of one record of a batch, linked to the batch: for an effect that a person follows."""
    context = extract(carrier)
    if context and not context.trace_flags.sampled:
        return _Active(NonRecordingSpan(context))
    batch = trace.get_current_span().get_span_context()
    return _Active(_start(name, SpanKind.INTERNAL, context, attributes, (Link(batch),) if batch.is_valid else ()))


def span(
    name: str,
    kind: SpanKind = SpanKind.INTERNAL,
    *,
    parent: SpanContext | None = None,
    attributes: Mapping[str, Value] | None = None,
) -> AbstractContextManager[Span]:
    """A span around the block, under the current one, or under the remote `parent`."""
    return _Active(_start(name, kind, parent or _current(), attributes))


@contextmanager
def continued(traceparent: str | None) -> Iterator[None]:
    """Continues the trace of `traceparent` in the block, without a span: messages of the block name its span as their
    producer's."""
    context = extract({"traceparent": traceparent}) if traceparent else None
    only_this = Context()
    token = otel_context.attach(
        trace.set_span_in_context(NonRecordingSpan(context), only_this) if context else only_this
    )
    try:
        yield
    finally:
        otel_context.detach(token)


def _batch(
    kind: SpanKind,
    operation: str,
    system: str,
    destination: str | None,
    carriers: Sequence[Mapping[str, str]],
    attributes: Mapping[str, Value],
) -> AbstractContextManager[Span]:
    all_attributes = _attributes(system, operation, destination, {}, attributes)
    all_attributes["messaging.batch.message_count"] = len(carriers)
    name = f"{operation} {destination}" if destination else operation
    return _Active(_start(name, kind, None, all_attributes, _Links(carriers)))


def _start(
    name: str,
    kind: SpanKind,
    parent: RecordedSpan | SpanContext | None,
    attributes: Mapping[str, Value] | None,
    links: Sequence[Link] | EncodedLinks = (),
) -> Span:
    """A recorded span if this process records and the parent, or for a root the ratio, says so."""
    if parent is not None:
        if _running and _running.recording and parent.trace_flags & TraceFlags.SAMPLED:
            return RecordedSpan(name, kind, parent, attributes, links, _running.ended)
        # The ids travel on unchanged: a later span finds its parent among the recorded ones.
        return NonRecordingSpan(parent.get_span_context() if isinstance(parent, RecordedSpan) else parent)
    if not _running:
        return trace.INVALID_SPAN
    trace_id = new_trace_id()
    if _running.samples(trace_id):
        return RecordedSpan(name, kind, None, attributes, links, _running.ended, trace_id)
    return NonRecordingSpan(SpanContext(trace_id, new_span_id(), is_remote=False))


def _current() -> RecordedSpan | SpanContext | None:
    current = spans.current_span()
    return current if current.span_id else None


class _Links:
    """The links of a batch, one to each message's producer; two messages of one producer are two links.

    They stay texts until they are read or encoded: 500 link objects would cost as much as the rest of the batch.
    """

    def __init__(self, carriers: Sequence[Mapping[str, str]]) -> None:
        # One expression reads all of them. A line end inside of one makes it malformed.
        self._traceparents = "\n".join([headers.get("traceparent", "").replace("\n", " ") for headers in carriers])

    def __iter__(self) -> Iterator[Link]:
        for trace_id, span_id in self._sampled():
            flags = TraceFlags(TraceFlags.SAMPLED)
            yield Link(SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=flags))

    def encoded(self) -> bytes:
        """Field 13 of OTLP's Span, repeated: trace id, span id, flags (remote)."""
        return bytes.fromhex("".join([f"6a210a10{trace}1208{span}3500030000" for trace, span in self._sampled()]))

    def _sampled(self) -> list[tuple[str, str]]:
        # A link to a span that was not recorded is of no use.
        found: list[tuple[str, str]] = _SAMPLED_TRACEPARENTS.findall(self._traceparents)
        return found


class _Active(AbstractContextManager[Span]):
    """Makes a span current in the block, records an exception of the block, and ends the span."""

    __slots__ = ("_span", "_token")

    def __init__(self, span: Span) -> None:
        self._span = span

    def __enter__(self) -> Span:
        self._token = otel_context.attach(trace.set_span_in_context(self._span))
        return self._span

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            fail(self._span, error)
        otel_context.detach(self._token)
        self._span.end()


def fail(span: Span, error: Exception) -> None:
    """Records `error` on `span`, with secrets removed from its text."""
    if span.is_recording():
        text = redacted(str(error))
        stack = redacted("".join(traceback.format_exception(error)))
        span.record_exception(error, {"exception.message": text, "exception.stacktrace": stack})
        span.set_attribute("error.type", type(error).__qualname__)
        span.set_status(StatusCode.ERROR, f"{type(error).__name__}: {text}")


def _attributes(
    system: str,
    operation: str,
    destination: str | None,
    headers: Mapping[str, str],
    short: Mapping[str, Value],
) -> dict[str, Value]:
    result: dict[str, Value] = {
        "messaging.system": "rabbitmq" if system == "rabbit" else system,
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
    }
    if destination is not None:
        result["messaging.destination.name"] = destination
    if "ce_id" in headers:
        result["messaging.message.id"] = headers["ce_id"]
    for name, value in short.items():
        # The conventions have a partition's id as a string.
        result[_ATTRIBUTES.get(name, name)] = str(value) if name == "partition" else value
    return result
