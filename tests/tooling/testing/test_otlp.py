"""The receiver of spans, over real OTLP/HTTP, and the view of a trace."""

from __future__ import annotations

import asyncio
import io
import socket

import pytest
from opentelemetry.trace import SpanKind
from rich.console import Console

from infra.observe import telemetry
from tooling.testing.otlp import OtlpReceiver, ReceivedSpan, render_trace


async def test_spans_arrive_as_they_were_made() -> None:
    async with OtlpReceiver() as receiver:
        running = telemetry.setup("billing", "1.2.3", receiver.endpoint)
        with telemetry.span("POST /hook", SpanKind.SERVER, attributes={"http.request.method": "POST", "n": 3}):
            sent = telemetry.carrier()
        with pytest.raises(ValueError, match="x"), telemetry.process_batch("kafka", "usage.records", [sent]):
            raise ValueError("x")
        # In a thread: the receiver needs the loop while the exporter blocks.
        await asyncio.to_thread(running.shutdown)
        await receiver.wait_for(lambda spans: len(spans) == 2)
        request, batch = receiver.spans
    assert (request.name, request.kind, request.service, request.parent_id) == (
        "POST /hook",
        "server",
        "billing",
        "",
    )
    assert request.attributes == {"http.request.method": "POST", "n": 3}
    assert request.start_ns <= request.end_ns <= batch.start_ns <= batch.end_ns
    assert batch.links == ((request.trace_id, request.span_id),)
    assert (batch.status, request.status) == ("error", "unset")
    assert receiver.trace(request.trace_id) == [request]


async def test_the_links_of_a_batch_arrive_where_the_other_end_was_recorded() -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    recorded = [{"traceparent": f"00-{trace}-{n:016x}-01"} for n in range(1, 501)]
    others = [
        {},
        {"traceparent": f"00-{trace}-b7ad6b7169203331-00"},
        {"traceparent": f"00-{'0' * 32}-b7ad6b7169203331-01"},
        {"traceparent": f"00-{trace}-b7ad6b7169203331-01-more"},
    ]
    async with OtlpReceiver() as receiver:
        running = telemetry.setup("billing", "1", receiver.endpoint)
        with telemetry.process_batch("kafka", "many", [*recorded, *others]):
            pass
        with telemetry.process_batch("kafka", "later version", [{"traceparent": f"01-{trace}-{1:016x}-03-more"}]):
            pass
        await asyncio.to_thread(running.shutdown)
        await receiver.wait_for(lambda spans: len(spans) == 2)
        many, later = receiver.spans
    assert many.links == tuple((trace, f"{n:016x}") for n in range(1, 501))
    assert later.links == ((trace, f"{1:016x}"),)


async def test_a_timeout_names_the_spans_that_came() -> None:
    async with OtlpReceiver() as receiver:
        with pytest.raises(TimeoutError, match="these came: none"):
            await receiver.wait_for(lambda spans: len(spans) > 0, seconds=0.01)


def test_a_collector_that_does_not_answer_stops_no_service() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        running = telemetry.setup("billing", "1", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with telemetry.span("lost"):
            pass
        running.shutdown()


def span(name: str, id_: str, parent: str = "", *, trace: str = "t", links: int = 0, **given: str) -> ReceivedSpan:
    started = int(id_, 16) * 1_000_000
    return ReceivedSpan(
        trace,
        id_,
        parent,
        name,
        "internal",
        given.get("service", "billing"),
        started,
        started + 1_500_000,
        {},
        tuple(("t", f"{n + 1:x}") for n in range(1, links + 1)),
        given.get("status", "unset"),
    )


def test_a_trace_is_a_tree_of_80_columns_with_links_marked() -> None:
    spans = [
        span("POST /notes", "1", service="front"),
        span("create sample.events", "2", "1", service="front"),
        span("process sample.events", "9", trace="batch", links=3),
        span("SELECT", "a", "9", trace="batch"),
        span("tell front", "b", "2", status="error"),
        span("a very long name of a span " * 5, "c", "1", service="a-very-long-name-of-a-service"),
        span("of another trace", "d", trace="other"),
    ]
    out = io.StringIO()
    Console(file=out, width=80).print(render_trace(spans, "t"))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80
    assert [line[:47].rstrip() for line in lines[1:6]] == [
        " POST /notes",
        " ├─ create sample.events",
        " │  ├─ tell front ✗",
        " │  └─ ⇢ process sample.events (3 links)",
        " │     └─ SELECT",
    ]
    assert lines[6].startswith(" └─ a very long name of a span")
    assert "…" in lines[6]
    assert lines[1].split()[-2:] == ["front", "1.5"]
    assert len(lines) == 7


def test_a_circle_of_links_ends() -> None:
    spans = [span("a", "1", links=1), span("b", "2", trace="u", links=0)]
    spans[1] = ReceivedSpan(**{**spans[1].__dict__, "links": (("t", "1"),)})
    spans[0] = ReceivedSpan(**{**spans[0].__dict__, "links": (("u", "2"),)})
    assert render_trace(spans, "t").row_count == 2
