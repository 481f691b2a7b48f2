"""The way of spans to a collector: batches, a bounded queue, retries, and a stop that ends."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.trace import SpanKind
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from infra.observe import span_export, telemetry
from infra.observe.metrics import Metrics
from infra.observe.span_export import SpanExporter
from infra.observe.spans import RecordedSpan


class Collector(HTTPServer):
    """Answers with the statuses of `answers`, then 200; keeps the names of the spans that it takes, per request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: list[int] = []
        self.batches: list[list[str]] = []
        self.open = threading.Event()
        self.open.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        collector = self.server
        assert isinstance(collector, Collector)
        body = self.rfile.read(int(self.headers["content-length"]))
        collector.open.wait()
        status = collector.answers.pop(0) if collector.answers else 200
        if status == 200:
            request = ExportTraceServiceRequest.FromString(body)
            collector.batches.append([span.name for span in request.resource_spans[0].scope_spans[0].spans])
        self.send_response(status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield collector
        collector.open.set()
        collector.shutdown()
        thread.join()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


def dropped(metrics: Metrics) -> float:
    value = metrics.registry.get_sample_value("claw_spans_dropped_total")
    assert value is not None
    return value


def started(url: str, metrics: Metrics) -> SpanExporter:
    return SpanExporter(f"{url}/v1/traces", {"service.name": "x"}, "clawbus", metrics.spans_dropped.inc)


def add(exporter: SpanExporter, count: int) -> None:
    for n in range(count):
        RecordedSpan(str(n), SpanKind.INTERNAL, None, None, (), exporter.add, trace_id=1).end()


def test_spans_arrive_in_batches_and_in_order(collector: Collector, metrics: Metrics) -> None:
    exporter = started(collector.url, metrics)
    add(exporter, 1200)
    exporter.stop()
    assert [name for batch in collector.batches for name in batch] == [str(n) for n in range(1200)]
    assert max(map(len, collector.batches)) <= span_export.BATCH
    assert dropped(metrics) == 0


def test_a_full_queue_drops_counts_and_reports(
    collector: Collector, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(span_export, "MAX_QUEUED", 100)
    collector.open.clear()
    exporter = started(collector.url, metrics)
    with capture_logs() as lines:
        add(exporter, 1000)
        # At most two batches are outside the queue: one on its way, and one that is being taken.
        assert 1000 - 3 * 100 <= dropped(metrics) <= 900
        collector.open.set()
        exporter.stop()
    assert sum(map(len, collector.batches)) == 1000 - dropped(metrics)
    assert [line["spans"] for line in lines if line["event"] == "spans were dropped"] == [dropped(metrics)]


def test_a_batch_is_sent_again_after_a_fault_of_the_collector(
    collector: Collector, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(span_export, "RETRY_SECONDS", (0.0, 0.0))
    collector.answers = [503, 429]
    exporter = started(collector.url, metrics)
    add(exporter, 3)
    exporter.flush()
    assert (collector.batches, dropped(metrics)) == ([["0", "1", "2"]], 0)
    exporter.stop()


@pytest.mark.parametrize("answers", [[400], [503, 503, 503]])
def test_a_batch_that_is_refused_is_dropped(
    collector: Collector, metrics: Metrics, monkeypatch: pytest.MonkeyPatch, answers: list[int]
) -> None:
    monkeypatch.setattr(span_export, "RETRY_SECONDS", (0.0, 0.0))
    collector.answers = answers
    exporter = started(collector.url, metrics)
    add(exporter, 3)
    exporter.flush()
    assert (collector.batches, dropped(metrics)) == ([], 3)
    add(exporter, 1)
    exporter.stop()
    assert collector.batches == [["0"]]


def test_without_a_collector_a_stop_ends_and_the_spans_are_counted(metrics: Metrics) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        exporter = started(f"http://127.0.0.1:{taken.getsockname()[1]}", metrics)
        add(exporter, 1000)
        with capture_logs() as lines:
            exporter.stop()
    assert dropped(metrics) == 1000
    assert sum("collector" in line["event"] for line in lines) <= 1


def test_a_ratio_of_new_traces_is_recorded_and_children_follow(collector: Collector) -> None:
    running = telemetry.setup("billing", "1", collector.url, ratio=0.25)
    children = 0
    for _ in range(2000):
        with telemetry.span("root") as root, telemetry.span("child") as child:
            assert root.is_recording() == child.is_recording()
            children += child.is_recording()
    remote = {"traceparent": f"00-{'f' * 32}-{'1' * 16}-01"}
    with telemetry.process("kafka", "one", remote) as followed:
        assert followed.is_recording()
    running.shutdown()
    assert 350 < children < 650
    assert sum(map(len, collector.batches)) == 2 * children + 1
