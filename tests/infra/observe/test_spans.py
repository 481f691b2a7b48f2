"""Our spans beside those of OpenTelemetry's SDK: the same calls must give the same OTLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.span import TraceState

from infra.observe.spans import RecordedSpan, encode, encode_request

RESOURCE = {"service.name": "billing", "service.version": "1"}
# Without the SDK's limits on numbers, which ours does not have.
UNLIMITED = SpanLimits(max_span_attributes=SpanLimits.UNSET, max_events=SpanLimits.UNSET, max_links=SpanLimits.UNSET)
STATES = [TraceState(), TraceState([("vendor", "a"), ("other", "b")])]

# The SDK refuses lone surrogates; ours are tested below.
texts = st.text(st.characters(codec="utf-8"), max_size=40)
keys = texts.filter(bool)
times = st.integers(1, 2**63 - 1)
scalars = st.one_of(texts, st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.binary(max_size=20))
lists = st.one_of(*(st.lists(one, max_size=4) for one in (texts, st.booleans(), st.integers(-(2**63), 2**63 - 1))))
attributes = st.dictionaries(keys, st.one_of(scalars, lists), max_size=6)
contexts = st.builds(
    SpanContext,
    st.integers(1, 2**128 - 1),
    st.integers(1, 2**64 - 1),
    st.booleans(),
    st.just(TraceFlags(TraceFlags.SAMPLED)),
    st.sampled_from(STATES),
)
links = st.lists(st.builds(Link, contexts, attributes), max_size=4)

# A call on a span, which both kinds get.
calls: st.SearchStrategy[Callable[[trace.Span], None]] = st.one_of(
    st.builds(lambda more: lambda span: span.set_attributes(more), attributes),
    st.builds(lambda name: lambda span: span.update_name(name), keys),
    st.builds(lambda name, more, at: lambda span: span.add_event(name, more, at), keys, attributes, times),
    st.builds(lambda context, more: lambda span: span.add_link(context, more), contexts, attributes),
    st.builds(
        lambda error, at: lambda span: span.record_exception(error, timestamp=at), st.builds(OSError, texts), times
    ),
    st.builds(
        lambda code, text: lambda span: span.set_status(code, text), st.sampled_from(StatusCode), st.none() | texts
    ),
    st.builds(lambda text: lambda span: span.set_status(Status(StatusCode.ERROR, text)), texts),
)


def sdk_span(name: str, kind: SpanKind, parent: SpanContext | None, given: Any, links: list[Link], start: int) -> Any:
    provider = TracerProvider(resource=Resource(RESOURCE), span_limits=UNLIMITED, shutdown_on_exit=False)
    ended = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(ended))
    around = trace.set_span_in_context(NonRecordingSpan(parent)) if parent else None
    tracer = provider.get_tracer("clawbus")
    return tracer.start_span(name, around, kind, given, links, start)


def decoded(body: bytes) -> Any:
    """The request as a dictionary, in which NaN equals NaN; attributes sorted, because they are a map."""
    return _in_order(MessageToDict(ExportTraceServiceRequest.FromString(body)))


def _in_order(node: Any) -> Any:
    if isinstance(node, list):
        return [_in_order(item) for item in node]
    if not isinstance(node, dict):
        return node
    done = {name: _in_order(item) for name, item in node.items()}
    if "attributes" in done:
        done["attributes"].sort(key=lambda item: item.get("key", ""))
    return done


@settings(max_examples=300)
@given(
    keys, st.sampled_from(SpanKind), st.none() | contexts, attributes, links, times, times, st.lists(calls, max_size=6)
)
def test_the_same_calls_give_the_same_bytes_as_the_sdk(
    name: str,
    kind: SpanKind,
    parent: SpanContext | None,
    given: Any,
    links: list[Link],
    start: int,
    end: int,
    calls: list[Callable[[trace.Span], None]],
) -> None:
    theirs = sdk_span(name, kind, parent, given, links, start)
    ours = RecordedSpan(name, kind, parent, given, links, lambda _: None, trace_id=theirs.context.trace_id)
    ours.span_id, ours.start_time = theirs.context.span_id, start
    for span in (theirs, ours):
        for call in calls:
            call(span)
        span.end(end)
    by_sdk = decoded(encode_spans([theirs]).SerializeToString())
    assert decoded(encode_request(RESOURCE, "clawbus", [encode(ours)])) == by_sdk
    # The SDK's own exporters can read our span too.
    readable: Any = ours
    readable.resource, readable.instrumentation_scope = theirs.resource, theirs.instrumentation_scope
    assert decoded(encode_spans([readable]).SerializeToString()) == by_sdk


def recorded(parent: RecordedSpan | None = None) -> tuple[RecordedSpan, list[RecordedSpan]]:
    ended: list[RecordedSpan] = []
    return RecordedSpan("work", SpanKind.INTERNAL, parent, None, (), ended.append, trace_id=7), ended


def test_a_child_has_the_trace_of_its_parent() -> None:
    parent, _ = recorded()
    child, _ = recorded(parent)
    assert (child.trace_id, child.parent) == (parent.trace_id, parent.context)
    [one] = decoded(encode_request({}, "x", [encode(child)]))["resourceSpans"][0]["scopeSpans"][0]["spans"]
    # Bit 8 without bit 9: the parent is in this process.
    assert one["flags"] == 0x100


def test_a_span_ends_once_and_does_not_change_after_its_end() -> None:
    span, ended = recorded()
    span.end(5)
    span.end(6)
    span.set_attribute("a", 1)
    span.add_event("late")
    span.set_status(StatusCode.ERROR)
    assert (ended, span.end_time, span.is_recording()) == ([span], 5, False)
    assert (span.attributes, span.events, span.status.status_code) == ({}, [], StatusCode.UNSET)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("\ud800", {"stringValue": "\\ud800"}),
        (2**63, {"stringValue": "9223372036854775808"}),
        (object, {"stringValue": "<class 'object'>"}),
    ],
)
def test_a_value_that_otlp_does_not_have_becomes_a_text(value: Any, shown: Any) -> None:
    span, _ = recorded()
    span.set_attributes({"a": value, "left out": None})
    [one] = decoded(encode_request({}, "x", [encode(span)]))["resourceSpans"][0]["scopeSpans"][0]["spans"]
    assert one["attributes"] == [{"key": "a", "value": shown}]


def test_equal_values_of_other_types_are_not_mixed_up() -> None:
    span, _ = recorded()
    span.set_attributes({"a": 1, "b": True, "c": 1.0})
    [one] = decoded(encode_request({}, "x", [encode(span)]))["resourceSpans"][0]["scopeSpans"][0]["spans"]
    shown = {item["key"]: item["value"] for item in one["attributes"]}
    assert shown == {"a": {"intValue": "1"}, "b": {"boolValue": True}, "c": {"doubleValue": 1.0}}


def test_ids_of_many_spans_differ() -> None:
    assert len({recorded()[0].span_id for _ in range(1000)}) == 1000
