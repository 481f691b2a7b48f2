"""Spans behind the types of OpenTelemetry's API, and their encoding as OTLP protobuf.

The SDK's span costs about 140 µs of CPU from start to export, this one a twentieth: it has no locks, limits, samplers
and copies, and is encoded by hand when it ends (opentelemetry-proto, trace/v1/trace.proto). `trace.get_current_span()`
returns it, and it has the attributes of the SDK's `ReadableSpan` that exporters read.
"""

from __future__ import annotations

import os
import random
import struct
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from time import time_ns
from typing import Any, Final, NamedTuple, Protocol

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.span import TraceState

_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
_NO_STATE: Final = TraceState()
_UNSET: Final = StatusCode.UNSET

# The current span's key in a context.
_CURRENT: Final = next(iter(trace.set_span_in_context(trace.INVALID_SPAN, otel_context.Context())))

_random = random.Random(os.urandom(16))
# A forked process would otherwise make the same ids as its parent.
os.register_at_fork(after_in_child=lambda: _random.seed(os.urandom(16)))


class SpanEvent(NamedTuple):
    """Something that happened during a span, such as an exception. `timestamp`: nanoseconds since 1970."""

    name: str
    timestamp: int
    attributes: Mapping[str, Any]
    dropped_attributes: int = 0


class EncodedLinks(Protocol):
    """Links that are kept in a form of their own until they are read or encoded."""

    def __iter__(self) -> Any: ...

    def encoded(self) -> bytes:
        """Field 13 of OTLP's Span, repeated."""


class RecordedSpan(trace.Span):
    """A span that is recorded. When it ends it is passed to `ended`, and does not change any more.

    trace_id: for a span without a parent.
    """

    is_remote = False
    trace_flags = _SAMPLED
    dropped_attributes = dropped_events = dropped_links = 0
    end_time = 0
    _context: SpanContext | None = None
    _code = _UNSET
    _description: str | None = None
    _traceparent: str | None = None

    def __init__(
        self,
        name: str,
        kind: SpanKind,
        parent: RecordedSpan | SpanContext | None,
        attributes: Mapping[str, Any] | None,
        links: Sequence[Link] | EncodedLinks,
        ended: Callable[[RecordedSpan], None],
        trace_id: int = 0,
    ) -> None:
        if parent is None:
            self.trace_id, self.trace_state = trace_id, _NO_STATE
        else:
            self.trace_id, self.trace_state = parent.trace_id, parent.trace_state
        self.span_id = new_span_id()
        self.name = name
        self.kind = kind
        self.attributes: dict[str, Any] = dict(attributes) if attributes else {}
        self.events: list[SpanEvent] = []
        self.links = links
        self.start_time = time_ns()
        self._parent = parent
        self._ended = ended

    def get_span_context(self) -> SpanContext:
        if self._context is None:
            self._context = SpanContext(self.trace_id, self.span_id, False, _SAMPLED, self.trace_state)
        return self._context

    @property
    def context(self) -> SpanContext:
        return self.get_span_context()

    @property
    def traceparent(self) -> str:
        """As the function `traceparent`. All messages that are made in the span carry it."""
        if self._traceparent is None:
            self._traceparent = traceparent(self)
        return self._traceparent

    @property
    def parent(self) -> SpanContext | None:
        return self._parent.get_span_context() if isinstance(self._parent, RecordedSpan) else self._parent

    @property
    def status(self) -> Status:
        return Status(self._code, self._description)

    def is_recording(self) -> bool:
        return not self.end_time

    def update_name(self, name: str) -> None:
        if not self.end_time:
            self.name = name

    def set_attribute(self, key: str, value: Any) -> None:
        if not self.end_time:
            self.attributes[key] = value

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        if not self.end_time:
            self.attributes.update(attributes)

    def add_event(self, name: str, attributes: Mapping[str, Any] | None = None, timestamp: int | None = None) -> None:
        if not self.end_time:
            self.events.append(SpanEvent(name, timestamp or time_ns(), attributes or {}))

    def add_link(self, context: SpanContext, attributes: Mapping[str, Any] | None = None) -> None:
        if not self.end_time:
            self.links = [*self.links, Link(context, attributes)]

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        code = status.status_code if isinstance(status, Status) else status
        # By the specification OK is final, and UNSET changes nothing.
        if self.end_time or self._code is StatusCode.OK or code is _UNSET:
            return
        if isinstance(status, Status):
            description = status.description
        self._code, self._description = code, description if code is StatusCode.ERROR else None

    def record_exception(
        self,
        exception: BaseException,
        attributes: Mapping[str, Any] | None = None,
        timestamp: int | None = None,
        escaped: bool = False,
    ) -> None:
        type_, given = type(exception), attributes or {}
        prefix = "" if type_.__module__ == "builtins" else f"{type_.__module__}."
        shown = {
            "exception.type": f"{prefix}{type_.__qualname__}",
            "exception.message": str(exception),
            # Callers usually give it, redacted; to format it again would be slow.
            "exception.stacktrace": given.get("exception.stacktrace") or "".join(traceback.format_exception(exception)),
            "exception.escaped": str(escaped),
            **given,
        }
        self.add_event("exception", shown, timestamp)

    def end(self, end_time: int | None = None) -> None:
        if not self.end_time:
            self.end_time = end_time or time_ns()
            self._ended(self)


def current_span() -> RecordedSpan | SpanContext:
    """The current span, or its context if it is not recorded; invalid, with ids that are 0, if there is none.

    It takes a third of the time of `trace.get_current_span`, which checks against an abstract class.
    """
    span = otel_context.get_value(_CURRENT)
    if isinstance(span, RecordedSpan):
        return span
    return span.get_span_context() if isinstance(span, trace.Span) else trace.INVALID_SPAN_CONTEXT


def current_ids() -> tuple[str, str] | tuple[None, None]:
    """The ids of the current trace and span in hexadecimal digits, as they are stored and shown."""
    span = current_span()
    return (f"{span.trace_id:032x}", f"{span.span_id:016x}") if span.span_id else (None, None)


def traceparent(context: RecordedSpan | SpanContext) -> str:
    """The context as the header ``traceparent`` of W3C trace context."""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def new_trace_id() -> int:
    return _random.getrandbits(128) or 1


def new_span_id() -> int:
    return _random.getrandbits(64) or 1


def encode(span: RecordedSpan) -> bytes:
    """The span as an element of ``ScopeSpans.spans``, its tag included."""
    parent = span._parent
    parts = [b"\x0a\x10", span.trace_id.to_bytes(16), b"\x12\x08", span.span_id.to_bytes(8)]
    if span.trace_state:
        state = ",".join(f"{key}={value}" for key, value in span.trace_state.items())
        parts.append(_field(b"\x1a", _utf8(state)))
    if parent is not None:
        parts += (b"\x22\x08", parent.span_id.to_bytes(8))
    parts += (
        # `value` is a descriptor in Python; this is the same.
        _named(span.name, span.kind._value_),
        _TIMES.pack(0x39, span.start_time, 0x41, span.end_time),
        *_attributes(b"\x4a", span.attributes),
    )
    for event in span.events:
        body = _EVENT_TIME.pack(0x09, event.timestamp) + _field(b"\x12", _utf8(event.name))
        parts.append(_field(b"\x5a", body + b"".join(_attributes(b"\x1a", event.attributes))))
    links = span.links
    if links:
        parts.append(b"".join(map(_link, links)) if isinstance(links, list | tuple) else links.encoded())  # type: ignore[union-attr]
    if span._code is _UNSET:
        parts.append(b"\x7a\x00")
    else:
        message = _field(b"\x12", _utf8(span._description)) if span._description else b""
        parts.append(_field(b"\x7a", message + b"\x18" + bytes((span._code.value,))))
    parts.append(_REMOTE_PARENT if parent is not None and parent.is_remote else _LOCAL_PARENT)
    return _field(b"\x12", b"".join(parts))


def encode_request(resource: Mapping[str, str], scope: str, spans: Iterable[bytes]) -> bytes:
    """An ``ExportTraceServiceRequest`` with spans from `encode`, all of one resource and one instrumentation scope."""
    head = _field(b"\x0a", b"".join(_attributes(b"\x0a", resource)))
    scope_spans = _field(b"\x0a", _field(b"\x0a", _utf8(scope))) + b"".join(spans)
    return _field(b"\x0a", head + _field(b"\x12", scope_spans))


@lru_cache(maxsize=4096)
def _named(name: str, kind: int) -> bytes:
    # OTLP numbers the kinds from 1, the API from 0.
    return _field(b"\x2a", _utf8(name)) + b"\x30" + bytes((kind + 1,))


_TIMES = struct.Struct("<BQBQ")
_EVENT_TIME = struct.Struct("<BQ")
_DOUBLE = struct.Struct("<Bd")
# Field 16, fixed32: bit 8 says that bit 9 is known, bit 9 that the parent is in another process.
_LOCAL_PARENT, _REMOTE_PARENT = b"\x85\x01\x00\x01\x00\x00", b"\x85\x01\x00\x03\x00\x00"


def _link(link: Link) -> bytes:
    context = link.context
    body = [b"\x0a\x10", context.trace_id.to_bytes(16), b"\x12\x08", context.span_id.to_bytes(8)]
    if link.attributes:
        body += _attributes(b"\x22", link.attributes)
    body.append(b"\x35\x00\x03\x00\x00" if context.is_remote else b"\x35\x00\x01\x00\x00")
    return _field(b"\x6a", b"".join(body))


def _attributes(tag: bytes, attributes: Mapping[str, Any]) -> list[bytes]:
    return [
        _usual(tag, key, value)
        if type(value) is str or (type(value) is int and 0 <= value < 1000)
        else _field(tag, _key(key) + _field(b"\x12", _value(value)))
        for key, value in attributes.items()
        if value is not None
    ]


# Most texts are one of a few: names of operations, models, topics. Small numbers are statuses and attempts.
@lru_cache(maxsize=4096)
def _usual(tag: bytes, key: str, value: str | int) -> bytes:
    return _field(tag, _key(key) + _field(b"\x12", _value(value)))


@lru_cache(maxsize=1024)
def _key(key: str) -> bytes:
    return _field(b"\x0a", _utf8(key))


def _value(value: Any) -> bytes:
    """An ``AnyValue``. A value that OTLP does not have becomes its text."""
    match value:
        case bool():
            return b"\x10\x01" if value else b"\x10\x00"
        case int() if -(2**63) <= value < 2**63:
            return b"\x18" + _varint(value & 0xFFFF_FFFF_FFFF_FFFF)
        case float():
            return _DOUBLE.pack(0x21, value)
        case bytes():
            return _field(b"\x3a", value)
        case list() | tuple():
            return _field(b"\x2a", b"".join(_field(b"\x0a", _value(item)) for item in value))
    return _field(b"\x0a", _utf8(str(value)))


def _utf8(text: str) -> bytes:
    # A lone surrogate has no UTF-8, and must not fail the span.
    return text.encode(errors="backslashreplace")


def _field(tag: bytes, content: bytes) -> bytes:
    size = len(content)
    return tag + (_LENGTHS[size] if size < 128 else _varint(size)) + content


_LENGTHS = [bytes((size,)) for size in range(128)]


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)
