"""The trace context on its way through messages."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import timedelta

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, get_current_span

from infra.observe import telemetry

TRACE = "0af7651916cd43dd8448eb211c80319c"
SENT = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
UNSAMPLED = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-00"}
MALFORMED = [
    {},
    {"traceparent": ""},
    {"traceparent": "garbage"},
    {"traceparent": f"00-{TRACE}-b7ad6b7169203331"},
    {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01-more"},
    {"traceparent": f"ff-{TRACE}-b7ad6b7169203331-01"},
    {"traceparent": f"00-{'0' * 32}-b7ad6b7169203331-01"},
    {"traceparent": f"00-{TRACE}-{'0' * 16}-01"},
    {"traceparent": f"00-{TRACE.upper()}-b7ad6b7169203331-01"},
    {"traceparent": f"00-{TRACE}-b7ad6b716920333١-01"},
    {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01\n"},
    {"traceparent": "0" * 1_000_000},
]


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    running = telemetry.setup("billing", "1.2.3", None, processor=SimpleSpanProcessor(exporter))
    yield exporter
    running.shutdown()


def finished(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


def trace_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.trace_id:032x}"


def links_of(span: ReadableSpan) -> list[str]:
    return [telemetry._inject(link.context)["traceparent"][3:52] for link in span.links if link.context is not None]


def test_without_a_span_there_is_nothing_to_carry(exporter: InMemorySpanExporter) -> None:
    assert telemetry.carrier() == {}
    assert exporter.get_finished_spans() == ()


def test_a_message_carries_the_span_that_produced_it(exporter: InMemorySpanExporter) -> None:
    with telemetry.span("POST /hook", SpanKind.SERVER):
        headers = telemetry.carrier()
    with telemetry.process("rabbitmq", "channel.inbound:telegram", headers):
        pass
    request, process = finished(exporter)["POST /hook"], finished(exporter)["process channel.inbound:telegram"]
    assert headers["traceparent"] == telemetry._inject(request.context)["traceparent"]
    assert process.parent is not None
    assert (process.parent.trace_id, process.parent.span_id) == (request.context.trace_id, request.context.span_id)
    assert links_of(process) == [headers["traceparent"][3:52]]


def test_one_message_continues_its_trace_and_is_linked_to_its_producer(exporter: InMemorySpanExporter) -> None:
    headers = {**SENT, "ce_id": "m1"}
    with (
        telemetry.span("another one"),
        telemetry.process("kafka", "usage.records", headers, partition=3, offset=7, group="billing"),
    ):
        assert telemetry.carrier()["traceparent"].startswith(f"00-{TRACE}-")
    span = finished(exporter)["process usage.records"]
    assert trace_of(span) == TRACE
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
    assert links_of(span) == [f"{TRACE}-b7ad6b7169203331"]
    assert span.kind is SpanKind.CONSUMER
    assert span.attributes == {
        "messaging.system": "kafka",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "usage.records",
        "messaging.destination.partition.id": "3",
        "messaging.kafka.offset": 7,
        "messaging.consumer.group.name": "billing",
        "messaging.message.id": "m1",
    }


def test_a_rabbitmq_queue_is_part_of_the_name_unless_it_is_the_routing_key(
    exporter: InMemorySpanExporter,
) -> None:
    with telemetry.process("rabbitmq", "document:index", SENT, queue="document.index"):
        pass
    with telemetry.process("rabbitmq", "plugin:event", SENT, queue="event"):
        pass
    assert finished(exporter).keys() == {"process document:index:document.index", "process plugin:event"}


def test_an_old_message_gets_its_own_trace_with_a_link(exporter: InMemorySpanExporter) -> None:
    with telemetry.process("rabbitmq", "young", SENT, age=timedelta(minutes=14, seconds=59)):
        pass
    with telemetry.process("rabbitmq", "old", SENT, age=timedelta(minutes=15)):
        pass
    young, old = finished(exporter)["process young"], finished(exporter)["process old"]
    assert trace_of(young) == TRACE
    assert trace_of(old) != TRACE
    assert old.parent is None
    assert links_of(old) == [f"{TRACE}-b7ad6b7169203331"]


@pytest.mark.parametrize("headers", MALFORMED, ids=lambda headers: headers.get("traceparent", "none")[:60])
def test_an_unreadable_context_means_an_own_trace(exporter: InMemorySpanExporter, headers: dict[str, str]) -> None:
    with telemetry.process("kafka", "one", headers):
        pass
    with telemetry.process_batch("kafka", "many", [headers, SENT]), telemetry.record(headers, "charge"):
        pass
    spans = finished(exporter)
    assert spans["process one"].parent is None
    assert links_of(spans["process one"]) == []
    assert links_of(spans["process many"]) == [f"{TRACE}-b7ad6b7169203331"]
    assert spans["charge"].parent is None


def test_a_later_version_of_the_header_is_read(exporter: InMemorySpanExporter) -> None:
    with telemetry.process("kafka", "one", {"traceparent": f"01-{TRACE}-b7ad6b7169203331-01-more"}):
        pass
    assert trace_of(finished(exporter)["process one"]) == TRACE


def test_an_error_is_recorded_and_raised(exporter: InMemorySpanExporter) -> None:
    with pytest.raises(ValueError, match="no price"), telemetry.process("kafka", "usage.records", SENT):
        raise ValueError("no price in postgresql://u:hunter2@h")
    assert telemetry.carrier() == {}
    span = finished(exporter)["process usage.records"]
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes is not None
    assert span.attributes["error.type"] == "ValueError"
    assert [event.name for event in span.events] == ["exception"]
    [event] = span.events
    assert event.attributes is not None
    assert "test_telemetry.py" in str(event.attributes["exception.stacktrace"])
    assert "hunter2" not in str([span.attributes, event.attributes, span.status.description])


def test_being_cancelled_is_not_an_error(exporter: InMemorySpanExporter) -> None:
    with pytest.raises(asyncio.CancelledError), telemetry.process("kafka", "usage.records", SENT):
        raise asyncio.CancelledError
    assert finished(exporter)["process usage.records"].status.status_code is StatusCode.UNSET


def test_a_batch_has_its_own_trace_and_a_link_per_message(exporter: InMemorySpanExporter) -> None:
    # More than the SDK's limit of 128, and all of one trace.
    carriers = [{"traceparent": f"00-{TRACE}-{n:016x}-01"} for n in range(1, 501)]
    with (
        telemetry.span("another one"),
        telemetry.process_batch("kafka", "usage.records", [*carriers, UNSAMPLED], partition=0),
    ):
        pass
    span = finished(exporter)["process usage.records"]
    assert span.parent is None
    assert trace_of(span) not in (TRACE, trace_of(finished(exporter)["another one"]))
    assert links_of(span) == [f"{TRACE}-{n:016x}" for n in range(1, 501)]
    assert span.kind is SpanKind.CONSUMER
    assert span.attributes is not None
    assert span.attributes["messaging.batch.message_count"] == 501


def test_a_record_of_a_batch_can_be_followed_in_its_own_trace(exporter: InMemorySpanExporter) -> None:
    with telemetry.process_batch("kafka", "usage.records", [SENT]):
        batch = telemetry.carrier()["traceparent"]
        with telemetry.record(SENT, "charge", usage_id="u1"):
            pass
        assert telemetry.carrier()["traceparent"] == batch
    charge = finished(exporter)["charge"]
    assert trace_of(charge) == TRACE
    assert charge.parent is not None
    assert f"{charge.parent.span_id:016x}" == "b7ad6b7169203331"
    assert links_of(charge) == [batch[3:52]]
    assert charge.attributes == {"usage_id": "u1"}


def test_the_relay_sends_in_its_own_trace_with_links(exporter: InMemorySpanExporter) -> None:
    with telemetry.publish_batch("rabbit", [SENT, {}, SENT]):
        pass
    span = finished(exporter)["send"]
    assert span.kind is SpanKind.CLIENT
    assert span.parent is None
    assert links_of(span) == [f"{TRACE}-b7ad6b7169203331"] * 2
    assert span.attributes == {
        "messaging.system": "rabbitmq",
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.batch.message_count": 3,
    }


def test_an_unsampled_context_is_not_recorded_and_travels_on(exporter: InMemorySpanExporter) -> None:
    with telemetry.process("kafka", "one", UNSAMPLED):
        assert telemetry.carrier() == UNSAMPLED
    with telemetry.record(UNSAMPLED, "charge"):
        assert telemetry.carrier() == UNSAMPLED
    assert exporter.get_finished_spans() == ()


def test_tracestate_travels_on(exporter: InMemorySpanExporter) -> None:
    with telemetry.process("kafka", "one", {**SENT, "tracestate": "vendor=a,other=b"}):
        assert telemetry.carrier()["tracestate"] == "vendor=a,other=b"
    with telemetry.process("kafka", "one", {**SENT, "tracestate": "=,;broken"}):
        assert "tracestate" not in telemetry.carrier()


async def test_the_context_does_not_leak_between_tasks(exporter: InMemorySpanExporter) -> None:
    inside = asyncio.Barrier(50)

    async def handle(n: int) -> None:
        trace = f"{n + 1:032x}"
        with telemetry.process("kafka", "t", {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}):
            await inside.wait()
            headers = telemetry.carrier()
            await inside.wait()
            assert headers["traceparent"][3:35] == telemetry.carrier()["traceparent"][3:35] == trace
            if n % 2:
                raise ValueError
        assert telemetry.carrier() == {}

    results = await asyncio.gather(*(handle(n) for n in range(50)), return_exceptions=True)
    assert [type(result) for result in results] == [type(None), ValueError] * 25
    assert telemetry.carrier() == {}


def test_without_a_collector_nothing_is_recorded_and_ids_still_travel() -> None:
    running = telemetry.setup("billing", "1.2.3", None)
    with telemetry.span("POST /hook", SpanKind.SERVER) as span:
        assert not span.is_recording()
        sent = telemetry.carrier()
        assert sent["traceparent"].endswith("-00") or sent["traceparent"].endswith("-02")
    with telemetry.process("kafka", "usage.records", sent):
        assert telemetry.carrier()["traceparent"][:35] == sent["traceparent"][:35]
    with telemetry.process_batch("kafka", "usage.records", [sent]):
        assert get_current_span().get_span_context().is_valid
    running.shutdown()


def test_after_shutdown_nothing_is_recorded(exporter: InMemorySpanExporter) -> None:
    telemetry.setup("billing", "1.2.3", None, processor=SimpleSpanProcessor(exporter)).shutdown()
    with telemetry.span("late") as span:
        assert not span.is_recording()
    assert exporter.get_finished_spans() == ()
