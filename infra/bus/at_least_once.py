"""The at-least-once Kafka reader, for an effect that is not in PostgreSQL, such as a search index.

The effect must bear repetition (a document has its message's id). The reader's position is the group's offset at
Kafka, with the id of the topic: the log of a topic that was made again is read from its beginning. The position moves
only after the handler has taken a batch. A record that cannot be read, or that the handler refuses, becomes a dead
letter alone, on ordered topics too. While the effect's store is away, the batch is tried again and the group keeps its
partitions.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from uuid import UUID

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError

from infra.bus.batch import ATTEMPTS, PAUSE_SECONDS
from infra.bus.dispatch import Decoded, decode, readable_id
from infra.bus.kafka import headers_json, printable_headers, topic_ids
from infra.bus.kafka_loop import GroupReader
from infra.errors import InvalidMessage, describe
from infra.observe import telemetry
from infra.postgres.db import is_transient
from infra.postgres.dead_letters import DeadLetter, store_dead_letters
from protos.topology import Topic

BATCH = 500


class AtLeastOnceReader(GroupReader, ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka is untyped
    """Reads all topics of one group until stopped. Its database takes the dead letters."""

    _turned: float | None = None
    """When the loop last went round; None while the reader is not connected."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._logs: dict[TopicPartition, UUID] = {}
        """The id of the topic whose log the position of an assigned partition belongs to."""

    def stuck_for(self) -> float:
        """Seconds since the loop last went round. It goes round while the store is away: a restart would not help."""
        return 0.0 if self._turned is None else time.monotonic() - self._turned

    async def _leave(self) -> None:
        self._turned = None
        self._logs.clear()

    async def on_partitions_revoked(self, revoked: Sequence[TopicPartition]) -> None:
        for tp in revoked:
            self._logs.pop(tp, None)

    async def on_partitions_assigned(self, assigned: Sequence[TopicPartition]) -> None:
        pass

    async def _read(self, consumer: AIOKafkaConsumer) -> None:
        failures = 0
        while not self.stopping.is_set():
            self._turned = time.monotonic()
            batches = await self.fetch(consumer, BATCH)
            # Asked after the fetch. An id is never used for a second topic, so the records are from this one's log.
            ids = await topic_ids(consumer._client, list(self._topics)) if batches else {}
            for tp in list(batches):
                if not await self._continues(consumer, tp, ids.get(tp.topic), batches[tp][0].offset):
                    del batches[tp]
            try:
                await self._take_all(consumer, ids, batches)
                failures = 0
            except Exception as error:
                if not is_transient(error):
                    raise
                failures += 1
                self._metrics.retries.labels(self.group).inc()
                # The consumer has moved on behind the records that it handed out.
                for tp, records in batches.items():
                    if tp in consumer.assignment():
                        consumer.seek(tp, records[0].offset)
                await self.back_off("could not process a batch; will read it again", error, failures)

    async def _continues(self, consumer: AIOKafkaConsumer, tp: TopicPartition, topic_id: UUID | None, at: int) -> bool:
        """True if records from the offset `at` of the topic's log follow the stored position. Otherwise the reader goes
        there: an offset of a log that is gone would skip the records before it in the new one."""
        if topic_id is None or tp not in consumer.assignment():
            self._logs.pop(tp, None)
            return False
        known = self._logs.get(tp)
        if known == topic_id:
            return True
        stored = None if known else (await consumer._coordinator.fetch_committed_offsets([tp])).get(tp)
        if tp not in consumer.assignment():
            return False
        self._logs[tp] = topic_id
        # Former versions stored no id.
        if stored is None or stored.metadata not in ("", str(topic_id)):
            await consumer.seek_to_beginning(tp)
            return False
        if stored.offset != at:
            consumer.seek(tp, stored.offset)
        return bool(stored.offset == at)

    async def _take_all(
        self, consumer: AIOKafkaConsumer, ids: Mapping[str, UUID], batches: dict[TopicPartition, list[Any]]
    ) -> None:
        """Processes the batches one by one and removes each from `batches`. Those that are left were not processed."""
        for tp in list(batches):
            records = batches[tp]
            began = time.perf_counter()
            topic_id = ids[tp.topic]
            await self._take(tp, topic_id, records)
            del batches[tp]
            self._metrics.processed.labels(self.group, "handled").inc(len(records))
            self._metrics.processing_seconds.labels(self.group).observe(time.perf_counter() - began)
            try:
                await consumer.commit({tp: (records[-1].offset + 1, str(topic_id))})
            except (CommitFailedError, IllegalStateError) as error:
                # The partition belongs to another process now. It processes the batch again.
                self._log.debug("could not commit the offset of a batch", topic=tp.topic, error=str(error))
            self._observe(consumer, tp, records[-1])

    async def _take(self, tp: TopicPartition, topic_id: UUID, records: Sequence[Any]) -> None:
        topic, _ = self._topics[tp.topic]
        items: list[tuple[Any, Decoded]] = []
        for record in records:
            headers, bad = printable_headers(record.headers)
            try:
                if bad is not None:
                    raise InvalidMessage(f"header {bad}", "is not UTF-8")
                items.append((record, decode(headers, record.value, topic.messages)))
            except InvalidMessage as error:
                await self._dead_letter(tp, topic_id, record, error, 1)
        if items:
            with self._span(topic, tp, items):
                await self._hand_over(tp, topic_id, items)

    async def _hand_over(self, tp: TopicPartition, topic_id: UUID, items: Sequence[tuple[Any, Decoded]]) -> None:
        """Gives `items` to the handler. If it refuses them, gives it each half, until the record at fault is found."""
        _, [subscription] = self._topics[tp.topic]
        attempts = ATTEMPTS if len(items) == 1 else 1
        for attempt in range(1, attempts + 1):
            try:
                return await subscription.handler([decoded for _, decoded in items])
            except Exception as error:
                if is_transient(error):
                    raise
                if attempt == attempts or isinstance(error, InvalidMessage):
                    if len(items) == 1:
                        return await self._dead_letter(tp, topic_id, items[0][0], error, attempt)
                    break
                await asyncio.sleep(PAUSE_SECONDS[attempt - 1])
        half = len(items) // 2
        await self._hand_over(tp, topic_id, items[:half])
        await self._hand_over(tp, topic_id, items[half:])

    async def _dead_letter(
        self, tp: TopicPartition, topic_id: UUID, record: Any, error: Exception, attempts: int
    ) -> None:
        headers, _ = printable_headers(record.headers)
        letter = DeadLetter(
            destination=self._topics[tp.topic][0].name,
            place=f"{topic_id}/{tp.partition}/{record.offset}",
            message_id=readable_id(headers, record.value),
            key=None if record.key is None else record.key.decode(errors="backslashreplace"),
            tenant_id=headers.get("tenant_id"),
            attempts=attempts,
            error=describe(error),
            headers=headers_json(headers),
            payload=record.value or b"",
        )
        async with self._database.begin() as tx:
            await store_dead_letters(await tx.connection(), self.group, "kafka", [letter], self._database.sealing)
        self._metrics.dead_letters.labels(self.group).inc()
        self._log.error(
            "record stored as a dead letter; see ./claw dlq list",
            topic=tp.topic,
            tenant=letter.tenant_id,
            place=letter.place,
            error=letter.error,
        )

    def _span(
        self, topic: Topic, tp: TopicPartition, items: Sequence[tuple[Any, Decoded]]
    ) -> AbstractContextManager[Any]:
        """No span if no record has a trace, as with log lines: there would be nothing to link to."""
        carriers = [decoded.headers for _, decoded in items if "traceparent" in decoded.headers]
        if not carriers:
            return nullcontext()
        return telemetry.process_batch(
            "kafka", topic.name, carriers, partition=tp.partition, offset=items[0][0].offset, group=self.group
        )

    def _observe(self, consumer: AIOKafkaConsumer, tp: TopicPartition, last: Any) -> None:
        lag = max((consumer.highwater(tp) or 0) - last.offset - 1, 0) if tp in consumer.assignment() else 0
        labels = self.group, self._topics[tp.topic][0].name, str(tp.partition)
        self._metrics.last_progress.labels(self.group).set_to_current_time()
        self._metrics.lag_records.labels(*labels).set(lag)
        self._metrics.lag_seconds.labels(*labels).set(max(time.time() - last.timestamp / 1000, 0) if lag else 0)
