"""The transactional Kafka reader, for consumers whose effect is in PostgreSQL.

A partition's batch is one transaction: effect, inbox and offset commit together. The offset row is the truth and the
fence (a paused consumer that wakes finds it moved on); what Kafka knows of the group's offsets is for monitoring.
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
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError

from infra.bus.batch import Batches, Fenced, OutsideLog, Position
from infra.bus.kafka import topic_incarnations
from infra.errors import RetryLater, Transient, describe
from infra.observe.logs import get_logger
from infra.observe.metrics import Metrics
from infra.postgres.db import is_transient
from infra.postgres.tx import Database
from protos.topology import Subscription, Topic

BATCH = 500
# Taken from the client at once: each time costs a look at the topics' ids at the broker.
FETCHED = 2_000
# Batches that wait per partition. More than one, because a partition that was paused is fetched again only after the
# fetch under way for its idle neighbours returns.
QUEUED_BATCHES = 4
BACKOFF_SECONDS = (0.1, 0.5, 2.0, 5.0)
# The longest a transaction may take while its partition is taken away, plus a heartbeat.
DRAIN_MS = 60_000


class Fetched(NamedTuple):
    """Records of one partition, and the log that they are of; None: the topic is gone."""

    incarnation: UUID | None
    records: Sequence[Any]


class Reader(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka is untyped
    """Reads all topics of one group until stopped."""

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
        self.group = group
        self._database = database
        self._topics: dict[str, tuple[Topic, list[Subscription]]] = {}
        for subscription in subscriptions:
            assert isinstance(subscription.source, Topic)
            _, handlers = self._topics.setdefault(prefix + subscription.source.name, (subscription.source, []))
            handlers.append(subscription)
        self._bootstrap = bootstrap
        self._prefix = prefix
        self._metrics = metrics
        self._session_ms = session_ms
        self._consumer: AIOKafkaConsumer | None = None
        self._partitions: dict[TopicPartition, _Partition] = {}
        self._stopping = asyncio.Event()
        self._log = get_logger("infra.bus.reader")

    async def run(self) -> None:
        """Joins the group and reads; joins again after whatever ended the membership."""
        failures = 0
        while not self._stopping.is_set():
            try:
                await self._read()
                failures = 0
            except (KafkaError, OSError) as error:
                failures += 1
                self._log.warning(
                    "Kafka cannot be read, trying again",
                    group=self.group,
                    error=describe(error),
                    failures=failures,
                )
                await self._pause(BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS)) - 1])

    async def stop(self) -> None:
        """Finishes the transactions under way; `run` then leaves the group and returns."""
        self._stopping.set()

    def stuck_for(self) -> float:
        """Seconds for which an assigned partition has had records to read and made no progress; 0 if none is so."""
        return max((0.0, *(p.stuck_for() for p in self._partitions.values())))

    async def _pause(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except TimeoutError:
            return

    async def _read(self) -> None:
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self._bootstrap,
            client_id=f"clawbus-{self.group}",
            group_id=self._prefix + self.group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",  # never relied on: every position is sought, and a gap is looked into
            partition_assignment_strategy=[StickyPartitionAssignor],
            session_timeout_ms=self._session_ms,
            heartbeat_interval_ms=self._session_ms // 10,
            rebalance_timeout_ms=DRAIN_MS,
            max_poll_interval_ms=300_000,
            fetch_max_wait_ms=50,
            metadata_max_age_ms=5_000,  # a topic that was made anew is found within seconds
        )
        self._consumer = consumer
        consumer.subscribe(list(self._topics), listener=self)
        try:
            await consumer.start()
            committed = time.monotonic()
            while not self._stopping.is_set():
                batches = await consumer.getmany(timeout_ms=200, max_records=FETCHED)
                if batches:
                    # Asked after the fetch: a topic's id never comes back, so if it is still the partition's, the
                    # records are of that log too. A topic made anew could otherwise be read from the old offset on.
                    incarnations = await topic_incarnations(consumer._client, list(self._topics))
                for tp, records in batches.items():
                    # A partition that was taken away meanwhile belongs to somebody else now.
                    if tp in self._partitions:
                        for first in range(0, len(records), BATCH):
                            batch = records[first : first + BATCH]
                            self._partitions[tp].put(Fetched(incarnations.get(tp.topic), batch))
                if time.monotonic() - committed > 5:
                    committed = time.monotonic()
                    await self._commit_for_monitoring(consumer)
        finally:
            await self.on_partitions_revoked(list(self._partitions))
            await _stop(consumer)
            self._consumer = None

    async def _commit_for_monitoring(self, consumer: AIOKafkaConsumer) -> None:
        offsets = {tp: p.position.next_offset for tp, p in self._partitions.items() if p.position}
        if offsets:
            try:
                await consumer.commit(offsets)
            except (CommitFailedError, IllegalStateError) as error:
                # A rebalance is under way. Nothing depends on these offsets.
                self._log.debug("offsets for monitoring were not taken", group=self.group, error=str(error))

    async def on_partitions_revoked(self, revoked: Sequence[TopicPartition]) -> None:
        """Drains: waits for the transactions under way, drops what is only queued."""
        going = [self._partitions.pop(tp) for tp in revoked if tp in self._partitions]
        await asyncio.gather(*(partition.stop() for partition in going))
        self._metrics.assigned_partitions.labels(self.group).set(len(self._partitions))

    async def on_partitions_assigned(self, assigned: Sequence[TopicPartition]) -> None:
        assert self._consumer is not None
        # First, before anything awaits: without it records from a stale position are handed out meanwhile.
        self._consumer.pause(*assigned)
        self._metrics.rebalances.labels(self.group).inc()
        for tp in assigned:
            if tp not in self._partitions:
                topic, handlers = self._topics[tp.topic]
                self._partitions[tp] = _Partition(self, self._consumer, tp, topic, handlers)
        self._metrics.assigned_partitions.labels(self.group).set(len(self._partitions))


async def _stop(consumer: AIOKafkaConsumer) -> None:
    """Leaves the group. aiokafka raises CancelledError of its own where a fetch is in its retry pause.

    Let through, it would end the reader without a word, as if somebody had cancelled it.
    """
    try:
        await consumer.stop()
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise


class _Partition:
    """One assigned partition: its queue of batches and the task that works them off."""

    def __init__(
        self,
        reader: Reader,
        consumer: AIOKafkaConsumer,
        tp: TopicPartition,
        topic: Topic,
        handlers: Sequence[Subscription],
    ) -> None:
        self._metrics = reader._metrics
        self._log = reader._log
        self._group = reader.group
        self._consumer = consumer
        self._tp = tp
        self._topic = topic
        self._queue: deque[Fetched] = deque()
        self._filled = asyncio.Event()
        self._stopping = asyncio.Event()
        self._progress = time.monotonic()
        self._batches = Batches(reader._database, reader.group, topic, tp.partition, handlers, reader._metrics)
        self._task = asyncio.create_task(self._work(), name=f"{self._group} {tp.topic}/{tp.partition}")

    def put(self, fetched: Fetched) -> None:
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
            except OutsideLog as error:
                # Going on would skip what was never read; only a person can say that this is right.
                self._log.error("partition stopped", group=self._group, **self._where(), error=str(error))
                self._metrics.partition_stopped.labels(*self._labels()).set(1)
                self._progress = math.inf  # not stuck: a restart would not cure it
                await self._stopping.wait()
            except Fenced:
                self._log.warning(
                    "batch refused, its position is not the stored one", group=self._group, **self._where()
                )
            except Exception as error:
                # Nothing of the batch was committed. It is read again from the stored offset.
                failures += 1
                self._log.warning(
                    "batch not processed, reading it again",
                    group=self._group,
                    **self._where(),
                    failures=failures,
                    error=describe(error),
                    exc_info=not is_transient(error),
                )
                self._metrics.retries.labels(self._group).inc()
                pause = BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS)) - 1]
                if isinstance(error, RetryLater):
                    pause = error.after.total_seconds()
                await self._wait(pause)
            if not self._stopping.is_set() and self._tp in self._consumer.assignment():
                self._consumer.pause(self._tp)

    def _where(self) -> dict[str, Any]:
        return {"topic": self._tp.topic, "partition": self._tp.partition}

    async def _wait(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except TimeoutError:
            return

    async def _next(self) -> Fetched | None:
        while not self._queue:
            self._filled.clear()
            if self._stopping.is_set():
                return None
            await self._filled.wait()
        if self._stopping.is_set():
            return None
        fetched = self._queue.popleft()
        if len(self._queue) == QUEUED_BATCHES - 2:
            self._consumer.resume(self._tp)
        return fetched

    async def _find_position(self) -> int:
        incarnations = await topic_incarnations(self._consumer._client, [self._tp.topic])
        if self._tp.topic not in incarnations:
            raise Transient(f"topic {self._tp.topic} does not exist at the broker now")
        begin = (await self._consumer.beginning_offsets([self._tp]))[self._tp]
        end = (await self._consumer.end_offsets([self._tp]))[self._tp]
        next_offset = await self._batches.find_position(incarnations[self._tp.topic], begin, end)
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
