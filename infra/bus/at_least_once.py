"""Reads Kafka for an effect that is not in PostgreSQL, such as a search index: at least once, so the effect has to
bear repetition (a document has its message's id).

The place in the log is the group's offset at Kafka, and it moves only after the handler has taken a batch. What cannot
be read or is refused is set aside alone, on ordered topics too; while the effect's store is away the batch is tried
again, and the group keeps its partitions meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError

from infra.bus.batch import ATTEMPTS, PAUSE_SECONDS, readable_id
from infra.bus.dispatch import Decoded, decode
from infra.bus.kafka import headers_json, printable_headers, topic_incarnations
from infra.bus.reader import BACKOFF_SECONDS, DRAIN_MS, _stop
from infra.errors import InvalidMessage, Transient, describe
from infra.observe import telemetry
from infra.observe.logs import get_logger
from infra.observe.metrics import Metrics
from infra.postgres.db import is_transient
from infra.postgres.dead_letters import DeadLetter, store_dead_letters
from infra.postgres.tx import Database
from protos.topology import Subscription, Topic

BATCH = 500


class OutsideReader:
    """Reads all topics of one group until stopped. `database` takes the dead letters."""

    def __init__(
        self,
        database: Database,
        group: str,
        subscriptions: Sequence[Subscription],
        *,
        bootstrap: str,
        metrics: Metrics,
        prefix: str = "",
        session_ms: int = 10_000,
    ) -> None:
        self._database = database
        self._group = group
        self._subscriptions = {prefix + s.source.name: s for s in subscriptions if isinstance(s.source, Topic)}
        self._bootstrap = bootstrap
        self._prefix = prefix
        self._metrics = metrics
        self._session_ms = session_ms
        self._turned = time.monotonic()
        self._stopping = asyncio.Event()
        self._log = get_logger("infra.bus.at_least_once")

    async def run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            try:
                await self._read()
                failures = 0
            except (KafkaError, OSError) as error:
                failures += 1
                self._warn("Kafka cannot be read, trying again", error, failures)
                await self._pause(failures)

    async def stop(self) -> None:
        """Finishes the batch under way; `run` then leaves the group and returns."""
        self._stopping.set()

    def stuck_for(self) -> float:
        """Seconds since the loop last went round. A store that is away is no reason: a restart would not cure it."""
        return time.monotonic() - self._turned

    async def _read(self) -> None:
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self._bootstrap,
            client_id=f"clawbus-{self._group}",
            group_id=self._prefix + self._group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            partition_assignment_strategy=[StickyPartitionAssignor],
            session_timeout_ms=self._session_ms,
            heartbeat_interval_ms=self._session_ms // 10,
            rebalance_timeout_ms=DRAIN_MS,
            fetch_max_wait_ms=50,
            metadata_max_age_ms=5_000,
        )
        consumer.subscribe(list(self._subscriptions))
        try:
            await consumer.start()
            failures = 0
            while not self._stopping.is_set():
                self._turned = time.monotonic()
                batches = await consumer.getmany(timeout_ms=200, max_records=BATCH)
                try:
                    await self._take_all(consumer, batches)
                    failures = 0
                except Exception as error:
                    if not _passing(error):
                        raise
                    failures += 1
                    self._metrics.retries.labels(self._group).inc()
                    self._warn("batch not taken, reading it again", error, failures)
                    # The consumer counts what it gave out as read.
                    for tp, records in batches.items():
                        if tp in consumer.assignment():
                            consumer.seek(tp, records[0].offset)
                    await self._pause(failures)
        finally:
            await _stop(consumer)

    async def _take_all(self, consumer: AIOKafkaConsumer, batches: dict[TopicPartition, list[Any]]) -> None:
        """Takes the batches out of `batches` one by one; what is left in it was not taken."""
        for tp in list(batches):
            records = batches[tp]
            began = time.perf_counter()
            await self._take(consumer, tp, records)
            del batches[tp]
            self._metrics.processed.labels(self._group, "handled").inc(len(records))
            self._metrics.processing_seconds.labels(self._group).observe(time.perf_counter() - began)
            try:
                await consumer.commit({tp: records[-1].offset + 1})
            except (CommitFailedError, IllegalStateError) as error:
                # The partition is another's now, who takes the batch again.
                self._log.debug("offset was not taken", group=self._group, topic=tp.topic, error=str(error))
            self._observe(consumer, tp, records[-1])

    async def _take(self, consumer: AIOKafkaConsumer, tp: TopicPartition, records: Sequence[Any]) -> None:
        subscription = self._subscriptions[tp.topic]
        assert isinstance(subscription.source, Topic)
        items: list[tuple[Any, Decoded]] = []
        for record in records:
            headers, bad = printable_headers(record.headers)
            try:
                if bad is not None:
                    raise InvalidMessage(f"header {bad}", "is not UTF-8")
                items.append((record, decode(headers, record.value, subscription.source.messages)))
            except InvalidMessage as error:
                await self._set_aside(consumer, tp, record, error, 1)
        if items:
            with self._span(subscription.source, tp, items):
                await self._hand_over(consumer, tp, items)

    async def _hand_over(
        self, consumer: AIOKafkaConsumer, tp: TopicPartition, items: Sequence[tuple[Any, Decoded]]
    ) -> None:
        """Gives `items` to the handler. Refused, they are given in halves, until the one is found that it was."""
        handler = self._subscriptions[tp.topic].handler
        attempts = ATTEMPTS if len(items) == 1 else 1
        for attempt in range(1, attempts + 1):
            try:
                return await handler([decoded for _, decoded in items])
            except Exception as error:
                if _passing(error):
                    raise
                if attempt == attempts or isinstance(error, InvalidMessage):
                    if len(items) == 1:
                        return await self._set_aside(consumer, tp, items[0][0], error, attempt)
                    break
                await asyncio.sleep(PAUSE_SECONDS[attempt - 1])
        half = len(items) // 2
        await self._hand_over(consumer, tp, items[:half])
        await self._hand_over(consumer, tp, items[half:])

    async def _set_aside(
        self, consumer: AIOKafkaConsumer, tp: TopicPartition, record: Any, error: Exception, attempts: int
    ) -> None:
        headers, _ = printable_headers(record.headers)
        incarnation = (await topic_incarnations(consumer._client, [tp.topic])).get(tp.topic)
        letter = DeadLetter(
            destination=self._subscriptions[tp.topic].source.name,
            place=f"{incarnation}/{tp.partition}/{record.offset}",
            message_id=readable_id(headers, record.value),
            key=None if record.key is None else record.key.decode(errors="backslashreplace"),
            tenant_id=headers.get("tenant_id"),
            attempts=attempts,
            error=describe(error),
            headers=headers_json(headers),
            payload=record.value or b"",
        )
        async with self._database.begin() as tx:
            await store_dead_letters(await tx.connection(), self._group, "kafka", [letter])
        self._metrics.dead_letters.labels(self._group).inc()
        self._log.error(
            "record set aside as dead letter; see claw dlq list",
            group=self._group,
            topic=tp.topic,
            place=letter.place,
            error=letter.error,
        )

    def _span(
        self, topic: Topic, tp: TopicPartition, items: Sequence[tuple[Any, Decoded]]
    ) -> AbstractContextManager[Any]:
        """None where no record has a trace, as log lines: there would be nothing to link to."""
        carriers = [decoded.headers for _, decoded in items if "traceparent" in decoded.headers]
        if not carriers:
            return nullcontext()
        return telemetry.process_batch(
            "kafka", topic.name, carriers, partition=tp.partition, offset=items[0][0].offset, group=self._group
        )

    def _observe(self, consumer: AIOKafkaConsumer, tp: TopicPartition, last: Any) -> None:
        lag = max((consumer.highwater(tp) or 0) - last.offset - 1, 0) if tp in consumer.assignment() else 0
        labels = self._group, self._subscriptions[tp.topic].source.name, str(tp.partition)
        self._metrics.last_progress.labels(self._group).set_to_current_time()
        self._metrics.lag_records.labels(*labels).set(lag)
        self._metrics.lag_seconds.labels(*labels).set(max(time.time() - last.timestamp / 1000, 0) if lag else 0)

    def _warn(self, what: str, error: Exception, failures: int) -> None:
        self._log.warning(what, group=self._group, error=describe(error), failures=failures)

    async def _pause(self, failures: int) -> None:
        try:
            await asyncio.wait_for(self._stopping.wait(), BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS)) - 1])
        except TimeoutError:
            return


def _passing(error: BaseException) -> bool:
    return isinstance(error, Transient) or is_transient(error)
