"""Traces: one through every hop. Our own small code, because FastStream's middleware loses the context.

A message carries the context of the span that created it, stored with it in the outbox. A consumer of one
message is a child of that context, and linked to it; a batch, whose messages come from many traces, has its
own trace and a link to each. Names and attributes follow OpenTelemetry's semantic conventions for messaging.

`system` is ``kafka`` or ``rabbitmq``. A destination is a topic, or for RabbitMQ ``exchange:routing_key``.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace import Span as RecordedSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, SpanKind, StatusCode, TraceFlags
from opentelemetry.trace.span import TraceState

from infra.observe.redaction import redacted

Value = str | int | float | bool

# A message older than this belongs to a story that is over: its trace is linked, not continued.
PARENT_AGE = timedelta(minutes=15)
# Ids that are all zero are invalid, and only a later version than 00 has anything behind the flags.
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:(?<!00.{53})-.*)?"
)
# What the bus code says in short, in the conventions' names. Other names are used as they are.
_ATTRIBUTES = {
    "message_id": "messaging.message.id",
    "partition": "messaging.destination.partition.id",
    "group": "messaging.consumer.group.name",
    "offset": "messaging.kafka.offset",
    "key": "messaging.kafka.message.key",
    "routing_key": "messaging.rabbitmq.destination.routing_key",
    "attempt": "claw.lane.attempt",
}


class Telemetry:
    """This process's tracing; `shutdown` sends what is still queued."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider

    def flush(self) -> None:
        """Sends what is queued now. Blocks for up to the exporter's time limit."""
        self._provider.force_flush()

    def shutdown(self) -> None:
        """Sends what is queued and ends tracing. Blocks as `flush` does: call it in a thread."""
        global _tracer
        _tracer = trace.NoOpTracer()
        self._provider.shutdown()


_tracer: trace.Tracer = trace.NoOpTracer()


def setup(service: str, version: str, endpoint: str | None, *, processor: SpanProcessor | None = None) -> Telemetry:
    """Starts tracing in this process: spans go to the OTLP/HTTP collector at the base URL `endpoint`.

    Without one, nothing is recorded, and trace ids still travel: log lines of one story keep one id.
    `processor` takes the spans instead (tests).
    """
    global _tracer
    if endpoint and processor is None:
        processor = BatchSpanProcessor(_Exporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=5))
    provider = TracerProvider(
        # The default follows the parent, and records what has none.
        sampler=None if processor else ALWAYS_OFF,
        resource=Resource.create({SERVICE_NAME: service, SERVICE_VERSION: version}),
        shutdown_on_exit=False,
    )
    if processor:
        provider.add_span_processor(processor)
    _tracer = provider.get_tracer("clawbus")
    return Telemetry(provider)


def tracer() -> trace.Tracer:
    """The tracer of this process; one that does nothing before `setup` and after `shutdown`."""
    return _tracer


def carrier() -> dict[str, str]:
    """The current context as headers ``traceparent`` and ``tracestate``; empty where there is none."""
    return _inject(trace.get_current_span().get_span_context())


def _inject(context: SpanContext) -> dict[str, str]:
    if not context.is_valid:
        return {}
    headers = {"traceparent": f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"}
    if context.trace_state:
        headers["tracestate"] = context.trace_state.to_header()
    return headers


def extract(headers: Mapping[str, str]) -> SpanContext | None:
    """The context that `headers` carry (W3C trace context); None where there is none or it is malformed."""
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


def creation(system: str, destination: str, message_id: str) -> dict[str, str]:
    """The headers to store with a new message: a short span ``create <destination>`` under the current one.

    Where nothing is recorded there is no span: the current context travels as it is.
    """
    current = trace.get_current_span()
    if not current.is_recording():
        return _inject(current.get_span_context())
    span = _tracer.start_span(
        f"create {destination}",
        kind=SpanKind.PRODUCER,
        attributes={
            "messaging.system": system,
            "messaging.operation.name": "create",
            "messaging.operation.type": "create",
            "messaging.destination.name": destination,
            "messaging.message.id": message_id,
        },
    )
    span.end()
    return _inject(span.get_span_context())


@contextmanager
def process(
    system: str,
    destination: str,
    carrier: Mapping[str, str],
    *,
    queue: str | None = None,
    age: timedelta = timedelta(0),
    **attributes: Value,
) -> Iterator[Span]:
    """A span for the processing of one message, in the message's trace and linked to its creation.

    It has its own trace where the message is older than 15 minutes (still linked), and where the headers carry
    no readable context. `queue` is RabbitMQ's. What the block raises is recorded and raised.
    """
    context = extract(carrier)
    if context and not context.trace_flags.sampled:
        with _active(NonRecordingSpan(context)) as span:
            yield span
        return
    if queue and not destination.endswith(f":{queue}"):
        destination = f"{destination}:{queue}"
    span = _tracer.start_span(
        f"process {destination}",
        context=_child_of(context if age < PARENT_AGE else None),
        kind=SpanKind.CONSUMER,
        attributes=_attributes(system, "process", destination, carrier, attributes),
        links=[Link(context)] if context else None,
    )
    with _active(span):
        yield span


@contextmanager
def process_batch(
    system: str, destination: str, carriers: Sequence[Mapping[str, str]], **attributes: Value
) -> Iterator[Span]:
    """A span for the processing of a batch, in its own trace, with a link to each message's creation."""
    with _batch(SpanKind.CONSUMER, "process", system, destination, carriers, attributes) as span:
        yield span


@contextmanager
def publish_batch(
    system: str, carriers: Sequence[Mapping[str, str]], destination: str | None = None, **attributes: Value
) -> Iterator[Span]:
    """A span for the sending of stored messages, in its own trace, with a link to each message's creation."""
    with _batch(SpanKind.CLIENT, "send", system, destination, carriers, attributes) as span:
        yield span


@contextmanager
def record(carrier: Mapping[str, str], name: str, **attributes: Value) -> Iterator[Span]:
    """A span in the trace of one record of a batch, linked to it: for an effect a person follows."""
    context = extract(carrier)
    if context and not context.trace_flags.sampled:
        with _active(NonRecordingSpan(context)) as span:
            yield span
        return
    batch = trace.get_current_span().get_span_context()
    links = [Link(batch)] if batch.is_valid else None
    span = _tracer.start_span(name, context=_child_of(context), attributes=attributes, links=links)
    with _active(span):
        yield span


@contextmanager
def span(
    name: str,
    kind: SpanKind = SpanKind.INTERNAL,
    *,
    parent: SpanContext | None = None,
    attributes: Mapping[str, Value] | None = None,
) -> Iterator[Span]:
    """A span around the block, under the current one, or under the remote `parent`."""
    context = _child_of(parent) if parent else None
    with _active(_tracer.start_span(name, context=context, kind=kind, attributes=attributes)) as active:
        yield active


@contextmanager
def continued(traceparent: str | None) -> Iterator[None]:
    """Continues the trace of `traceparent` in the block, without a span: new messages name its span as their origin."""
    context = extract({"traceparent": traceparent}) if traceparent else None
    token = otel_context.attach(_child_of(context))
    try:
        yield
    finally:
        otel_context.detach(token)


@contextmanager
def _batch(
    kind: SpanKind,
    operation: str,
    system: str,
    destination: str | None,
    carriers: Sequence[Mapping[str, str]],
    attributes: Mapping[str, Value],
) -> Iterator[Span]:
    span = _tracer.start_span(
        f"{operation} {destination}" if destination else operation,
        context=Context(),
        kind=kind,
        attributes={
            **_attributes(system, operation, destination, {}, attributes),
            "messaging.batch.message_count": len(carriers),
        },
    )
    if isinstance(span, RecordedSpan):
        span._links = _Links(carriers)  # type: ignore[assignment]  # read again only by `links` and our exporter
    with _active(span):
        yield span


class _Links:
    """The links of a batch, to each message's creation; two messages of one trace are two links.

    Put together when they are read, and for the exporter in their final bytes: as objects of the SDK 500 of them
    cost as much as the rest of the batch.
    """

    def __init__(self, carriers: Sequence[Mapping[str, str]]) -> None:
        self._traceparents = [headers["traceparent"] for headers in carriers if "traceparent" in headers]

    def __iter__(self) -> Iterator[Link]:
        for trace_id, span_id in self._sampled():
            flags = TraceFlags(TraceFlags.SAMPLED)
            yield Link(SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=flags))

    def encoded(self) -> bytes:
        """Field 13 of OTLP's Span, repeated: trace id, span id, flags (it is known whether remote, and it is)."""
        return bytes.fromhex("".join(f"6a210a10{trace}1208{span}3500030000" for trace, span in self._sampled()))

    def _sampled(self) -> Iterator[tuple[str, str]]:
        for traceparent in self._traceparents:
            # A link says something only where the other end was recorded.
            if (match := _TRACEPARENT.fullmatch(traceparent)) and match[3][1] in "13579bdf":
                yield match[1], match[2]


class _Exporter(OTLPSpanExporter):
    """The SDK's exporter, with the links of batches."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        links: dict[bytes, bytes] = {}
        for span in spans:
            if isinstance(span._links, _Links) and span.context:
                links[span.context.span_id.to_bytes(8)] = span._links.encoded()
                span._links = ()
        request = encode_spans(spans)
        for encoded in request.resource_spans[0].scope_spans[0].spans:
            encoded.MergeFromString(links.get(encoded.span_id, b""))
        sent = self._client.export(request.SerializeToString())
        return SpanExportResult.SUCCESS if sent.success else SpanExportResult.FAILURE


@contextmanager
def _active(span: Span) -> Iterator[Span]:
    """Makes `span` current in the block, and ends it."""
    token = otel_context.attach(trace.set_span_in_context(span))
    try:
        yield span
    except Exception as error:
        fail(span, error)
        raise
    finally:
        otel_context.detach(token)
        span.end()


def fail(span: Span, error: Exception) -> None:
    """Records `error` on `span`, without the secrets that its text may have."""
    if span.is_recording():
        text = redacted(str(error))
        stack = redacted("".join(traceback.format_exception(error)))
        span.record_exception(error, {"exception.message": text, "exception.stacktrace": stack})
        span.set_attribute("error.type", type(error).__qualname__)
        span.set_status(StatusCode.ERROR, f"{type(error).__name__}: {text}")


def _child_of(parent: SpanContext | None) -> Context:
    """A context with only `parent` in it: what is current here is not the message's story."""
    return trace.set_span_in_context(NonRecordingSpan(parent), Context()) if parent else Context()


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
