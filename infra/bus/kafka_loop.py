"""The loop that all Kafka readers share: connect, read until stopped, and connect again after a failure."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.errors import CorruptRecordException, KafkaError

from infra.clock import wait_at_most
from infra.connections import kafka_options
from infra.errors import describe
from infra.observe.logs import get_logger
from infra.observe.metrics import Metrics
from infra.postgres.database import Database
from protos.topology import Subscription, Topic

BACKOFF_SECONDS = (0.1, 0.5, 2.0, 5.0)
# A fetch returns after this time at the latest, so that the loop notices a stop.
FETCH_MS = 500
# The broker answers a fetch at once if it has records, otherwise after this time. Each answer costs CPU here and there.
# Not longer: a partition that was paused is fetched again only after the fetch in flight for the others returns.
BROKER_WAIT_MS = 250
# The longest time that a transaction may take while its partition is taken away, plus a heartbeat.
DRAIN_MS = 60_000
# Within this time a consumer notices that a topic has more partitions, or that it was deleted and created again.
METADATA_MS = 5_000


class KafkaLoop(ABC):
    """Reads Kafka with one consumer until stopped. After a failure it goes on with a new consumer.

    `about`: fields of each log line, such as the consumer group.
    """

    def __init__(self, module: str, *, bootstrap: str, client_id: str, **about: str) -> None:
        self.stopping = asyncio.Event()
        self._log = get_logger(module, **about)
        self._settings = {
            **kafka_options(bootstrap),
            "client_id": client_id,
            "enable_auto_commit": False,
            "fetch_max_wait_ms": BROKER_WAIT_MS,
            "metadata_max_age_ms": METADATA_MS,
        }
        self._failures = 0
        self.damaged: set[TopicPartition] = set()
        """Partitions with a batch that does not fit its checksum. They are not read again by this process."""

    @abstractmethod
    def _new_consumer(self) -> AIOKafkaConsumer:
        """A consumer that is not started yet."""

    @abstractmethod
    async def _read(self, consumer: AIOKafkaConsumer) -> None:
        """Reads until `stopping` is set. Raises KafkaError or OSError if the broker is away."""

    async def _leave(self) -> None:  # noqa: B027 (optional)
        """Called after `_read`, before its consumer is stopped."""

    async def run(self) -> None:
        while not self.stopping.is_set():
            try:
                await self._connect_and_read()
            except (KafkaError, OSError) as error:
                self._failures += 1
                await self.back_off("could not read from Kafka; will connect again", error, self._failures)

    async def _connect_and_read(self) -> None:
        consumer = self._new_consumer()
        try:
            await consumer.start()
            await self._read(consumer)
        finally:
            await self._leave()
            await _stop(consumer)

    async def stop(self) -> None:
        """Finishes the batch that is being processed. Then `run` leaves the group and returns."""
        self.stopping.set()

    async def fetch(self, consumer: AIOKafkaConsumer, records: int) -> dict[TopicPartition, list[Any]]:
        """At most so many records, by partition. Empty if none came within half a second.

        Raises CorruptRecordException once for a damaged partition. Without this, one damaged batch would keep the
        reader from all partitions: they come in one answer of the broker.
        """
        assigned = consumer.assignment()
        healthy = assigned - self.damaged
        if assigned and not healthy:
            await wait_at_most(FETCH_MS / 1000, self.stopping)
            return {}
        try:
            batches: dict[TopicPartition, list[Any]] = await consumer.getmany(
                *(healthy if self.damaged else ()), timeout_ms=FETCH_MS, max_records=records
            )
        except CorruptRecordException as error:
            # The error has the partition in its text only.
            for tp in healthy:
                if str(error).endswith(str(tp)):
                    self.damaged.add(tp)
                    self._stop_reading(tp)
            # The consumer has dropped records before the damage: a new one reads them from the stored position.
            raise
        if batches:
            self._failures = 0
        return batches

    def _stop_reading(self, tp: TopicPartition) -> None:
        self._log.error(
            "partition stopped: a batch of its log does not fit its checksum; docs/operations.md, Damaged data",
            topic=tp.topic,
            partition=tp.partition,
        )

    async def back_off(self, text: str, error: Exception, failures: int) -> None:
        """Logs the failure and waits, longer after each failure in a row. Returns at once if the loop is stopped."""
        self._log.warning(text, error=describe(error), failures=failures)
        await wait_at_most(backoff(failures), self.stopping)


class GroupReader(KafkaLoop):
    """Reads the topics of `subscriptions`, and shares their partitions with the other processes of `group`.

    prefix: of the names of topics and groups at the broker. session_ms: after this time without a sign of a process,
    the others get its partitions.
    """

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
        super().__init__(type(self).__module__, bootstrap=bootstrap, client_id=f"clawbus-{group}", group=group)
        self.group = group
        self._database = database
        self._metrics = metrics
        self._prefix = prefix
        self._session_ms = session_ms
        self._topics: dict[str, tuple[Topic, list[Subscription]]] = {}
        """By the topic's name at the broker."""
        metrics.dead_letters.labels(group)
        for subscription in subscriptions:
            assert isinstance(subscription.source, Topic)
            _, handlers = self._topics.setdefault(prefix + subscription.source.name, (subscription.source, []))
            handlers.append(subscription)

    def _stop_reading(self, tp: TopicPartition) -> None:
        super()._stop_reading(tp)
        self._metrics.partition_stopped.labels(self.group, self._topics[tp.topic][0].name, str(tp.partition)).set(1)

    @abstractmethod
    def stuck_for(self) -> float:
        """Seconds for which the reader has made no progress although it could. 0 if it makes progress."""

    def _new_consumer(self) -> AIOKafkaConsumer:
        consumer = AIOKafkaConsumer(
            **self._settings,
            group_id=self._prefix + self.group,
            # The transactional reader never relies on it: it seeks every position and looks into every gap.
            auto_offset_reset="earliest",
            partition_assignment_strategy=[StickyPartitionAssignor],
            session_timeout_ms=self._session_ms,
            heartbeat_interval_ms=self._session_ms // 10,
            rebalance_timeout_ms=DRAIN_MS,
            max_poll_interval_ms=300_000,
        )
        consumer.subscribe(list(self._topics), listener=self if isinstance(self, ConsumerRebalanceListener) else None)
        return consumer


def backoff(failures: int) -> float:
    """Seconds to wait after so many failures in a row (from 1)."""
    return BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS)) - 1]


async def _stop(consumer: AIOKafkaConsumer) -> None:
    """Leaves the group. While a fetch waits for its retry, aiokafka raises a CancelledError of its own here.

    If that error went on, it would end the reader without a log line, as if the task had been cancelled.
    """
    try:
        await consumer.stop()
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
