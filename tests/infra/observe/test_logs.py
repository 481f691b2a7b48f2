"""Log lines: their shape, their sources, and the way to Kafka."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import structlog
from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from prometheus_client import CollectorRegistry

from infra.observe import logs, telemetry
from infra.observe.logs import KafkaLogSink, get_logger
from infra.observe.metrics import Metrics
from protos.envelope import read_headers
from protos.messages.logs import LogLine
from tooling.testing.stack import Stack

Printed = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Iterator[Printed]:
    """The lines printed since the last call."""
    handlers, level = logging.root.handlers, logging.root.level
    logs.setup("billing", "debug")
    yield lambda: [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    logging.root.handlers, logging.root.level = handlers, level
    structlog.reset_defaults()


def one(printed: Printed) -> dict[str, Any]:
    [line] = printed()
    return line


def test_a_line_has_exactly_the_required_shape(printed: Printed) -> None:
    get_logger("infra.outbox").info("outbox relay started", bus="kafka", rows=3)
    line = one(printed)
    assert list(line) == ["timestamp", "level", "service", "traceId", "spanId", "message", "data"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("timestamp"))
    assert line == {
        "level": "info",
        "service": "billing",
        "traceId": None,
        "spanId": None,
        "message": "outbox relay started",
        "data": {"component": "infra.outbox", "bus": "kafka", "rows": 3},
    }


@pytest.mark.parametrize(
    ("method", "level"),
    [
        ("debug", "debug"),
        ("info", "info"),
        ("warning", "warn"),
        ("error", "error"),
        ("exception", "error"),
        ("critical", "fatal"),
    ],
)
def test_levels_have_the_required_names(printed: Printed, method: str, level: str) -> None:
    getattr(get_logger("x"), method)("ours")
    getattr(logging.getLogger("library"), method)("theirs")
    # Debug lines of libraries show message contents, so they are never printed.
    assert [line["level"] for line in printed()] == [level] * (1 if level == "debug" else 2)


def test_lines_below_the_level_are_not_printed(printed: Printed) -> None:
    logs.setup("billing", "warn")
    get_logger("x").info("ours")
    logging.getLogger("library").info("theirs")
    assert printed() == []


def test_a_line_within_a_span_has_its_ids(printed: Printed) -> None:
    running = telemetry.setup("billing", "1", None)
    with telemetry.span("work"):
        traceparent = telemetry.carrier()["traceparent"]
        get_logger("x").info("inside")
    running.shutdown()
    line = one(printed)
    assert traceparent.startswith(f"00-{line['traceId']}-{line['spanId']}-")


@pytest.mark.parametrize("given", ["true", "error"])
def test_an_exception_is_in_the_data(printed: Printed, given: str) -> None:
    try:
        raise ValueError("no price for amqp://u:hunter2@h")
    except ValueError as error:
        get_logger("x").error("not rated", exc_info=True if given == "true" else error)
        logging.getLogger("library").exception("theirs")
    for line in printed():
        exception = line["data"]["exception"]
        assert exception["type"] == "ValueError"
        assert exception["message"] == "no price for amqp://u:***@h"
        assert "test_logs.py" in exception["stack"]
        assert "hunter2" not in exception["stack"]


def test_a_line_that_a_library_cannot_format_is_still_printed(printed: Printed) -> None:
    record = logging.LogRecord("library", logging.WARNING, "x.py", 1, "%d of %s", ("x",), None)
    logs._Libraries().handle(record)
    assert one(printed)["message"] == "%d of %s ('x',)"


def test_repeated_lines_of_a_library_are_suppressed_and_counted(printed: Printed) -> None:
    def outage(at: float, lines: int) -> None:
        for n in range(lines):
            record = logging.LogRecord("aiokafka.conn", logging.ERROR, "conn.py", 7, "no broker %s", (n,), None)
            record.created = at
            logging.root.handle(record)

    outage(1000.0, 1500)
    assert len(printed()) == 5
    outage(1031.0, 1)
    assert one(printed)["data"]["suppressed"] == 1495
    logging.getLogger("aiokafka.other").error("another place")
    assert one(printed)["message"] == "another place"


def test_a_full_disk_does_not_fail_the_work_and_is_reported_later(
    printed: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: str) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sys.stdout, "write", full)
        get_logger("x").info("lost")
        get_logger("x").info("lost")
    get_logger("x").info("back")
    get_logger("x").info("later")
    back, later = printed()
    assert back["data"]["lines_not_printed"] == 2
    assert "lines_not_printed" not in later["data"]


def test_a_line_too_long_for_a_record_is_sent_without_its_data(printed: Printed) -> None:
    get_logger("x").info("wide", data=[{str(n): "x" * 8000 for n in range(100)}])
    line = one(printed)
    assert (line["message"], list(line["data"])) == ("wide", ["left_out_bytes"])


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


def dropped(metrics: Metrics) -> float:
    value = metrics.registry.get_sample_value("claw_log_lines_dropped_total")
    assert value is not None
    return value


@pytest.fixture
async def topic(stack: Stack, topic_prefix: str) -> str:
    name = f"{topic_prefix}service.logs.{id(object())}"
    admin = AIOKafkaAdminClient(bootstrap_servers=stack.kafka_bootstrap_servers)
    await admin.start()
    await admin.create_topics([NewTopic(name, 2, 1)])
    await admin.close()
    return name


async def records(stack: Stack, topic: str, last: str) -> list[Any]:
    """The topic's records, up to the one with the message `last`."""
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=stack.kafka_bootstrap_servers, auto_offset_reset="earliest")
    await consumer.start()
    found: list[Any] = []
    try:
        async with asyncio.timeout(20):
            while not any(json.loads(record.value)["message"] == last for record in found):
                for batch in (await consumer.getmany(timeout_ms=500)).values():
                    found.extend(batch)
    finally:
        await consumer.stop()
    return found


async def test_lines_reach_kafka_as_messages_of_the_catalog(
    stack: Stack, topic: str, metrics: Metrics, printed: Printed
) -> None:
    sink = KafkaLogSink(stack.kafka_bootstrap_servers, topic, metrics)
    await sink.start()
    for n in range(1200):
        get_logger("x").info("line", n=n)
    get_logger("x").warning("the last")
    await sink.stop()
    found = await records(stack, topic, "the last")
    lines = [msgspec.json.decode(record.value, type=LogLine) for record in found]
    assert [line.data["n"] for line in lines if line.message == "line"] == list(range(1200))
    envelope = read_headers({name: value.decode() for name, value in found[0].headers})
    assert (envelope.type, envelope.source) == (LogLine.wire_name(), "billing")
    assert {record.key for record in found} == {b"billing"}
    assert dropped(metrics) == 0


async def test_dropped_lines_are_counted_and_reported(
    stack: Stack, topic: str, metrics: Metrics, printed: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KafkaLogSink, "MAX_QUEUED_BYTES", 2_000)
    sink = KafkaLogSink(stack.kafka_bootstrap_servers, topic, metrics)
    await sink.start()
    for n in range(100):
        get_logger("x").info("flood", n=n)
    assert 80 < dropped(metrics) < 100
    said = "log lines were dropped; they are on stdout only"
    try:
        await records(stack, topic, said)
    finally:
        await sink.stop()
    lines = printed()
    assert sum(line["data"]["lines"] for line in lines if line["message"] == said) == dropped(metrics)
    assert sum(line["message"] == "flood" for line in lines) == 100


@pytest.mark.parametrize("broker", ["refuses", "is silent"])
async def test_without_kafka_logging_goes_on_and_stopping_ends(
    metrics: Metrics, printed: Printed, monkeypatch: pytest.MonkeyPatch, broker: str
) -> None:
    monkeypatch.setattr(KafkaLogSink, "SECONDS_TO_STOP", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if broker == "is silent":
            silent.listen()
        sink = KafkaLogSink(f"127.0.0.1:{silent.getsockname()[1]}", "service.logs", metrics)
        await sink.start()
        for n in range(10):
            get_logger("x").info("line", n=n)
        await sink.stop()
        assert sink._task.done()
    lines = printed()
    assert sum(line["message"] == "line" for line in lines) == 10
    assert dropped(metrics) >= 10
    assert lines[-1]["data"]["lines"] == dropped(metrics)
