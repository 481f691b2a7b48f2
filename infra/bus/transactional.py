"""The transactional Kafka reader, for consumers whose effect is in PostgreSQL.

A partition's batch is one transaction: effect, inbox rows and offset commit together. Reading goes on at the
offset row. The row is also the fence: a consumer that was paused and wakes up finds that the row has moved. The offsets
that Kafka keeps for the group serve monitoring only.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple
from uuid import UUID

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import CommitFailedError, CorruptRecordException, IllegalStateError, KafkaTimeoutError

from infra.bus.batch import SAVE_SECONDS, Batches, Fenced, OffsetNotInLog, Position
from infra.bus.kafka import topic_ids
from infra.bus.kafka_loop import GroupReader, backoff
from infra.clock import wait_at_most
from infra.errors import RetryLater, Transient, describe
from infra.observe.logs import get_logger
from infra.postgres.db import is_transient
from protos.topology import Subscription, Topic

BATCH = 500
# Records in one fetch. After each fetch the broker is asked for the topics' ids.
FETCHED = 2_000
# Batches that wait per partition. More than one, because a paused partition is fetched again only after the fetch in
# flight for its idle neighbours returns.
QUEUED_BATCHES = 4
COMMIT_SECONDS = 5.0


class FetchedRecords(NamedTuple):
    """Records of one partition."""

    topic_id: UUID | None
    """The topic whose log holds the records. None if the topic does not exist any more."""
    records: Sequence[Any]


class TransactionalReader(GroupReader, ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka is untyped
    """Reads all topics of one group until stopped."""

    _consumer: AIOKafkaConsumer | None = None
    # The client got no answer about a partition within its time.
    _is_lost = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._partitions: dict[TopicPartition, _Partition] = {}

    def stuck_for(self) -> float:
        """Seconds for which an assigned partition has had records to read and made no progress. 0 if there is none."""
        return max((0.0, *(p.stuck_for() for p in self._partitions.values())))

    def _new_consumer(self) -> AIOKafkaConsumer:
        self._consumer = super()._new_consumer()
        self._is_lost = False
        return self._consumer

    def connect_again(self) -> None:
        """Replaces the reader's Kafka client with a new one.

        After a power cut of the broker, one client got no metadata for 80 s. The broker answered other clients then.
        """
        self._is_lost = True

    async def _read(self, consumer: AIOKafkaConsumer) -> None:
        committed = time.monotonic()
        while not self.stopping.is_set():
            batches = await self.fetch(consumer, FETCHED)
            if batches:
                # Asked after the fetch. An id is never used for a second topic: if the partition's id is still the
                # topic's id, the records are from that log. Otherwise the old offset could be applied to a new log.
                ids = await topic_ids(consumer._client, list(self._topics))
            for tp, records in batches.items():
                # The partition may have been taken away since the fetch.
                if tp in self._partitions:
                    for first in range(0, len(records), BATCH):
                        self._partitions[tp].put(FetchedRecords(ids.get(tp.topic), records[first : first + BATCH]))
            if time.monotonic() - committed > COMMIT_SECONDS:
                committed = time.monotonic()
                await self._commit_for_monitoring(consumer)
            if self._is_lost:
                raise KafkaTimeoutError("the broker did not return the offsets of a partition")

    async def _leave(self) -> None:
        # First: a rebalance during the drain must not add partitions, which would outlive their consumer.
        self._consumer = None
        await self.on_partitions_revoked(list(self._partitions))

    async def _commit_for_monitoring(self, consumer: AIOKafkaConsumer) -> None:
        offsets = {tp: p.position.next_offset for tp, p in self._partitions.items() if p.position}
        if offsets:
            try:
                await consumer.commit(offsets)
            except (CommitFailedError, IllegalStateError) as error:
                # A rebalance is going on. Nothing depends on these offsets.
                self._log.debug("could not commit the offsets for monitoring; will retry", error=str(error))

    async def on_partitions_revoked(self, revoked: Sequence[TopicPartition]) -> None:
        """Waits until the running transactions end. Drops the batches that are only queued."""
        going = [self._partitions.pop(tp) for tp in revoked if tp in self._partitions]
        await asyncio.gather(*(partition.stop() for partition in going))
        self._metrics.assigned_partitions.labels(self.group).set(len(self._partitions))

    async def on_partitions_assigned(self, assigned: Sequence[TopicPartition]) -> None:
        if self._consumer is None:
            return
        # First, before the first await: otherwise the consumer hands out records from a stale position meanwhile.
        self._consumer.pause(*assigned)
        self._metrics.rebalances.labels(self.group).inc()
        for tp in assigned:
            if tp not in self._partitions:
                topic, handlers = self._topics[tp.topic]
                self._partitions[tp] = _Partition(self, self._consumer, tp, topic, handlers)
        self._metrics.assigned_partitions.labels(self.group).set(len(self._partitions))


class _Partition:
    """One assigned partition: its queue of batches, and the task that processes them."""

    def __init__(
        self,
        reader: TransactionalReader,
        consumer: AIOKafkaConsumer,
        tp: TopicPartition,
        topic: Topic,
        handlers: Sequence[Subscription],
    ) -> None:
        self._reader = reader
        self._metrics = reader._metrics
        self._log = get_logger("infra.bus.transactional", group=reader.group, topic=tp.topic, partition=tp.partition)
        self._group = reader.group
        self._consumer = consumer
        self._tp = tp
        self._topic = topic
        self._queue: deque[FetchedRecords] = deque()
        self._filled = asyncio.Event()
        self._stopping = asyncio.Event()
        self._progress = time.monotonic()
        self._batches = Batches(reader._database, reader.group, topic, tp.partition, handlers, reader._metrics)
        self._task = asyncio.create_task(self._work(), name=f"{self._group} {tp.topic}/{tp.partition}")

    def put(self, fetched: FetchedRecords) -> None:
        self._queue.append(fetched)
        self._filled.set()
        if len(self._queue) >= QUEUED_BATCHES:
            self._consumer.pause(self._tp)

    async def stop(self) -> None:
        self._stopping.set()
        self._filled.set()
        await self._task

    @property
    def position(self) -> Position | None:
        return self._batches.position

    def stuck_for(self) -> float:
        waiting = bool(self._queue) or self.position is None
        return time.monotonic() - self._progress if waiting else 0.0

    async def _work(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            try:
                next_offset = await self._find_position()
                self._queue.clear()
                self._consumer.seek(self._tp, next_offset)
                self._consumer.resume(self._tp)
                while (fetched := await self._next()) is not None:
                    await self._batches.process(*fetched)
                    failures = 0
                    self._progress = time.monotonic()
                    self._observe(fetched.records[-1].timestamp)
            except (OffsetNotInLog, CorruptRecordException) as error:
                # To go on would skip records that were never read. Only a person can decide that this is right.
                self._log.error("partition stopped", error=describe(error))
                self._metrics.partition_stopped.labels(*self._labels()).set(1)
                self._progress = math.inf  # not stuck: a restart would not help
                await self._stopping.wait()
            except Fenced:
                self._log.warning("batch refused: it does not begin at the stored position; will read from there")
            except Exception as error:
                # Nothing of the batch was committed. It is read again from the stored offset.
                failures += 1
                if isinstance(error, KafkaTimeoutError):
                    self._reader.connect_again()
                self._log.warning(
                    "could not process a batch; will read it again",
                    failures=failures,
                    error=describe(error),
                    exc_info=not is_transient(error),
                )
                self._metrics.retries.labels(self._group).inc()
                pause = error.after.total_seconds() if isinstance(error, RetryLater) else backoff(failures)
                await wait_at_most(pause, self._stopping)
            if not self._stopping.is_set() and self._tp in self._consumer.assignment():
                self._consumer.pause(self._tp)

    async def _next(self) -> FetchedRecords | None:
        while not self._queue:
            self._filled.clear()
            if self._stopping.is_set():
                return None
            if not self._batches.is_ahead:
                await self._filled.wait()
            elif not await wait_at_most(SAVE_SECONDS, self._filled):
                await self._batches.save()
        if self._stopping.is_set():
            return None
        fetched = self._queue.popleft()
        if len(self._queue) == QUEUED_BATCHES - 2:
            self._consumer.resume(self._tp)
        return fetched

    async def _find_position(self) -> int:
        if self._tp in self._reader.damaged:
            raise CorruptRecordException("a batch of the log does not fit its checksum")
        found = await topic_ids(self._consumer._client, [self._tp.topic])
        if self._tp.topic not in found:
            raise Transient(f"topic {self._tp.topic} does not exist at the broker")
        begin = (await self._consumer.beginning_offsets([self._tp]))[self._tp]
        end = (await self._consumer.end_offsets([self._tp]))[self._tp]
        next_offset = await self._batches.find_position(found[self._tp.topic], begin, end)
        self._metrics.partition_stopped.labels(*self._labels()).set(0)
        return next_offset

    def _labels(self) -> tuple[str, str, str]:
        return self._group, self._topic.name, str(self._tp.partition)

    def _observe(self, last_timestamp_ms: int) -> None:
        assert self.position is not None
        lag = (self._consumer.highwater(self._tp) or 0) - self.position.next_offset
        self._metrics.last_progress.labels(self._group).set_to_current_time()
        self._metrics.lag_records.labels(*self._labels()).set(max(lag, 0))
        behind = max(time.time() - last_timestamp_ms / 1000, 0) if lag > 0 else 0
        self._metrics.lag_seconds.labels(*self._labels()).set(behind)
