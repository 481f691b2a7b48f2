"""Sends ended spans to an OTLP/HTTP collector, in batches, from a thread of its own."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping

import urllib3

from infra.observe.logs import get_logger
from infra.observe.spans import RecordedSpan, encode, encode_request

MAX_QUEUED = 8192
"""Spans. While the collector is away the queue fills; further spans are dropped and counted."""
BATCH = 512
INTERVAL_SECONDS = 1.0
"""A span waits at most this long for others of its batch."""
TIMEOUT_SECONDS = 5.0
RETRY_SECONDS = (0.5, 2.0)
"""The pauses before a batch is sent again; after the last attempt it is dropped."""
STOP_SECONDS = 10.0

_log = get_logger("infra.observe.span_export")


class SpanExporter:
    """A bounded queue and a thread that empties it. `add` never waits: a span that finds no place is dropped."""

    def __init__(self, url: str, resource: Mapping[str, str], scope: str, dropped: Callable[[int], None]) -> None:
        """url: of the collector's traces, ``http://host:4318/v1/traces``. dropped: called with each number of spans
        that were dropped."""
        self._url = url
        self._resource = resource
        self._scope = scope
        self._dropped = dropped
        self._queue: deque[RecordedSpan] = deque()
        self._filled = threading.Event()
        self._hurry = threading.Event()
        self._stopping = threading.Event()
        self._sending = threading.Lock()
        self._unreported = 0
        self._failing = False
        self._http = urllib3.PoolManager(
            maxsize=1, retries=False, timeout=TIMEOUT_SECONDS, headers={"content-type": "application/x-protobuf"}
        )
        self._thread = threading.Thread(target=self._run, name="span exporter", daemon=True)
        self._thread.start()

    def add(self, span: RecordedSpan) -> None:
        """Queues an ended span. The thread encodes it: one after the other, spans cost a third of the time that each
        costs between other work."""
        size = len(self._queue)
        if size >= MAX_QUEUED:
            self._drop(1)
            return
        self._queue.append(span)
        if size == 0:
            self._filled.set()
        elif size == BATCH - 1:
            self._hurry.set()

    def flush(self) -> None:
        """Sends the queued spans now. Blocks, while the collector is away for up to 18 s a batch."""
        with self._sending:
            while self._queue:
                batch = [encode(self._queue.popleft()) for _ in range(min(BATCH, len(self._queue)))]
                if not self._send(encode_request(self._resource, self._scope, batch)):
                    self._drop(len(batch))

    def stop(self) -> None:
        """Sends the queued spans and ends the thread. Blocks for up to 10 s; the remaining spans are dropped."""
        self._stopping.set()
        self._filled.set()
        self._hurry.set()
        self._thread.join(STOP_SECONDS)
        self._drop(len(self._queue))
        self._queue.clear()
        self._http.clear()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._filled.wait()
            self._filled.clear()
            self._hurry.wait(INTERVAL_SECONDS)
            if not self._stopping.is_set():
                self._hurry.clear()
            self.flush()

    def _send(self, body: bytes) -> bool:
        for pause in (*RETRY_SECONDS, None):
            try:
                status = self._http.request("POST", self._url, body=body).status
                if status < 300:
                    self._report_success()
                    return True
                error = f"HTTP status {status}"
                retriable = status in (408, 429) or status >= 500
            except urllib3.exceptions.HTTPError as failure:
                error, retriable = type(failure).__name__, True
            if not self._failing:
                self._failing = True
                _log.warning("the collector refuses spans; will drop them", url=self._url, error=error)
            if not retriable or pause is None or self._stopping.wait(pause):
                return False
        return False

    def _report_success(self) -> None:
        self._failing = False
        if self._unreported:
            spans, self._unreported = self._unreported, 0
            _log.warning("spans were dropped", spans=spans)

    def _drop(self, spans: int) -> None:
        if spans:
            self._unreported += spans
            self._dropped(spans)
