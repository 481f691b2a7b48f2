"""Log lines: JSON in one shape for our own code and for every library, to stdout and to the log topic.

``{"timestamp", "level", "service", "traceId", "spanId", "message", "data": {}}``: level is debug, info, warn, error
or fatal; the two ids are null outside a trace. Log lines are not facts: they do not go through the outbox, and a line
that cannot be sent is dropped and counted.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from itertools import islice
from types import MappingProxyType
from typing import Any

import msgspec
import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from structlog.typing import EventDict, FilteringBoundLogger, WrappedLogger

from infra.clock import utcnow, uuid7, wait_at_most
from infra.connections import kafka_options
from infra.observe.metrics import Metrics
from infra.observe.redaction import redacted
from infra.observe.spans import current_ids
from protos.envelope import Envelope
from protos.messages.logs import LogLine

_LEVELS = {"warning": "warn", "critical": "fatal", "exception": "error"}
# A library repeats its lines while a broker is away (aiokafka: 1,500 lines a consumer in 20 s). So each place in a
# library's code may log this many lines in this time.
_LIBRARY_LINES, _LIBRARY_SECONDS = 5, 30.0

MAX_LINE_BYTES = 512 * 1024
"""About half of the largest record that the log topic takes."""

_work: ContextVar[Mapping[str, str]] = ContextVar("work", default=MappingProxyType({}))
_service = ""
_unprinted = 0
_sinks: list[Callable[[bytes], None]] = []


def setup(service: str, level: str = "info") -> None:
    """Sends all log lines of this process, those of libraries included, through this module.

    level: debug, info, warn, error or fatal. A library's debug lines are never shown.
    """
    global _service
    _service = service
    number = logging.getLevelNamesMapping()[{"warn": "warning", "fatal": "critical"}.get(level, level).upper()]
    structlog.configure(
        processors=[_emit],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.ReturnLoggerFactory(),
    )
    logging.root.handlers = [_Libraries()]
    # Debug lines of libraries show message contents, and aiokafka would log a line about each line that it sends.
    logging.root.setLevel(max(number, logging.INFO))
    # httpx and uvicorn log a line per request or per socket, with the whole URL in it. aiokafka logs ten lines about
    # each start of a consumer.
    for library in ("httpx", "uvicorn.error", "aiokafka"):
        logging.getLogger(library).setLevel(logging.WARNING)


def get_logger(name: str, **fields: Any) -> FilteringBoundLogger:
    """A logger: ``log.info("a sentence", key=value, …)``; `exc_info=True` adds the exception being handled.

    `fields` are added to each line.
    """
    logger: FilteringBoundLogger = structlog.get_logger(component=name, **fields)
    return logger


def work_for(tenant_id: str) -> None:
    """The lines that this task logs from now on have the field ``for_tenant``; empty for the platform.

    The operator finds them. The tenant sees only lines with the field ``tenant``: others may show the inside of a
    service.
    """
    _work.set({"for_tenant": tenant_id} if tenant_id else {})


def work_on(**ids: str) -> None:
    """The lines that this task logs until the next `work_for` have these fields."""
    _work.set({**_work.get(), **ids})


def _emit(_: WrappedLogger, method: str, event: EventDict) -> str:
    message = event.pop("event", "")
    # The log call returns this; structlog has nothing left to print.
    _write(_LEVELS.get(method, method), message, {**_work.get(), **event})
    return ""


def _write(level: str, message: object, data: dict[str, Any]) -> None:
    global _unprinted
    error = _exception(data.pop("exc_info", None))
    if error is not None:
        data["exception"] = {
            "type": type(error).__qualname__,
            "message": str(error),
            "stack": "".join(traceback.format_exception(error))[-8000:],
        }
    if _unprinted:
        data["lines_not_printed"] = _unprinted
    trace_id, span_id = current_ids()
    fields = {
        "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": level,
        "service": _service,
        "traceId": trace_id,
        "spanId": span_id,
        "message": redacted(str(message)),
        "data": redacted(data),
    }
    line = msgspec.json.encode(fields)
    if len(line) > MAX_LINE_BYTES:
        line = msgspec.json.encode(fields | {"data": {"left_out_bytes": len(line)}})
    try:
        # One call, so that the lines of several threads do not mix.
        sys.stdout.write(line.decode() + "\n")
        sys.stdout.flush()
        _unprinted = 0
    except OSError:
        # A full disk or a closed pipe must not fail the work that logs. The next printed line holds the number.
        _unprinted += 1
    for sink in _sinks:
        sink(line)


def _exception(given: Any) -> BaseException | None:
    """The exception for an `exc_info` argument: an exception, a tuple, or a truth value."""
    if isinstance(given, BaseException):
        return given
    if isinstance(given, tuple):
        error: BaseException | None = given[1]
        return error
    return sys.exc_info()[1] if given else None


class _Libraries(logging.Handler):
    """Receives the lines of libraries, which use Python's own logging."""

    def __init__(self) -> None:
        super().__init__()
        self._windows: dict[tuple[str, int], tuple[float, int]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        suppressed = self._suppressed(record)
        if suppressed is None:
            return
        try:
            message = record.getMessage()
        except (TypeError, ValueError):
            message = f"{record.msg} {record.args}"
        data: dict[str, Any] = {"component": record.name, "exc_info": record.exc_info}
        if suppressed:
            data["suppressed"] = suppressed
        _write(_LEVELS.get(record.levelname.lower(), record.levelname.lower()), message, data)

    def _suppressed(self, record: logging.LogRecord) -> int | None:
        """How many earlier lines of this place were suppressed; None if this line is suppressed too."""
        place = (record.pathname, record.lineno)
        begun, count = self._windows.get(place, (record.created, 0))
        if record.created - begun >= _LIBRARY_SECONDS:
            begun, held, count = record.created, max(count - _LIBRARY_LINES, 0), 0
        else:
            held = 0
        self._windows[place] = (begun, count + 1)
        return held if count < _LIBRARY_LINES else None


class KafkaLogSink:
    """Sends every line to the log topic, in the background and from a bounded queue: logging never waits for Kafka.

    A line is dropped and counted if the queue is full or Kafka refuses it. It is still on stdout, and a warning with
    the number of dropped lines follows when Kafka takes lines again.
    """

    MAX_QUEUED_BYTES = 8 * 1024 * 1024
    BATCH = 500
    SECONDS_BETWEEN_BATCHES = 0.2
    SECONDS_TO_STOP = 5.0

    def __init__(self, bootstrap: str, topic: str, metrics: Metrics) -> None:
        self._bootstrap = bootstrap
        self._topic = topic
        self._metrics = metrics
        self._queue: deque[bytes] = deque()
        self._lock = threading.Lock()
        self._bytes = 0
        self._unreported = 0
        self._stopping = asyncio.Event()
        self._log = get_logger("infra.observe.logs")

    async def start(self) -> None:
        """Returns at once; lines that are logged before Kafka answers wait in the queue."""
        self._task = asyncio.create_task(self._run(), name="log sink")
        _sinks.append(self._put)

    async def stop(self) -> None:
        """Sends the queued lines, for at most five seconds; the rest is counted as dropped."""
        _sinks.remove(self._put)
        self._stopping.set()
        _, unfinished = await asyncio.wait((self._task,), timeout=self.SECONDS_TO_STOP)
        if unfinished:
            self._task.cancel()
            await asyncio.wait((self._task,), timeout=1)
            self._drop(len(self._queue))
        if self._unreported:
            self._report()

    def _put(self, line: bytes) -> None:
        with self._lock:
            room = self._bytes + len(line) <= self.MAX_QUEUED_BYTES
            if room:
                self._queue.append(line)
                self._bytes += len(line)
        if not room:
            self._drop(1)

    def _drop(self, lines: int) -> None:
        self._metrics.log_lines_dropped.inc(lines)
        with self._lock:
            self._unreported += lines

    def _report(self) -> None:
        lines, self._unreported = self._unreported, 0
        self._log.warning("log lines were dropped; they are on stdout only", lines=lines, topic=self._topic)

    async def _run(self) -> None:
        producer = await self._connected()
        if producer is None:
            return
        try:
            while self._queue or not self._stopping.is_set():
                while self._queue:
                    lost = await self._send(producer)
                    if self._unreported and not lost:
                        self._report()
                await wait_at_most(self.SECONDS_BETWEEN_BATCHES, self._stopping)
        finally:
            await producer.stop()

    async def _connected(self) -> AIOKafkaProducer | None:
        while True:
            producer = AIOKafkaProducer(**kafka_options(self._bootstrap), acks=1, linger_ms=20, compression_type="lz4")
            try:
                await producer.start()
                return producer
            except asyncio.CancelledError:
                await producer.stop()
                raise
            except KafkaError as error:
                await producer.stop()
                self._log.warning("could not connect to Kafka for log lines; will retry in 5 s", error=str(error))
                if self._stopping.is_set():
                    self._drop(len(self._queue))
                    return None
                await wait_at_most(5, self._stopping)

    async def _send(self, producer: AIOKafkaProducer) -> int:
        """Sends a batch; returns how many lines of it were lost."""
        with self._lock:
            lines = list(islice(self._queue, self.BATCH))
        sent: list[asyncio.Future[Any]] = []
        for line in lines:
            with suppress(KafkaError):
                sent.append(await producer.send(self._topic, line, key=_service.encode(), headers=_headers()))
        results = await asyncio.gather(*sent, return_exceptions=True)
        # Lines leave the queue only now: if the time to stop runs out during a send, its lines count as dropped.
        with self._lock:
            for line in lines:
                self._queue.popleft()
                self._bytes -= len(line)
        lost = len(lines) - sum(not isinstance(result, BaseException) for result in results)
        if lost:
            self._drop(lost)
        return lost


def _headers() -> list[tuple[str, bytes]]:
    envelope = Envelope(id=uuid7(), source=_service, type=LogLine.wire_name(), time=utcnow(), subject=_service)
    return [(name, value.encode()) for name, value in envelope.headers().items()]
