"""The transactional Kafka reader, for consumers whose effect is in PostgreSQL.

A partition's batch is one transaction: effect, inbox and offset commit together. The offset row is the truth and the
fence (a paused consumer that wakes finds it moved on); what Kafka knows of the group's offsets is for monitoring.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple
from uuid import UUID

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError

from infra import telemetry
from infra.bus.deadletter import DeadLetter, lock_parked, park, store_dead_letters
from infra.bus.dispatch import Decoded, decode, handle
from infra.bus.inbox import mark_handled
from infra.bus.kafka import headers_json, printable_headers, topic_incarnations
from infra.db import is_transient
from infra.errors import InvalidMessage, RetryLater, Transient
from infra.failpoint import failpoint
from infra.logs import get_logger
from infra.metrics import Metrics
from infra.tx import Database
from protos.topology import Subscription, Topic

BATCH = 500
# Batches that wait per partition. More than one, because a partition that was paused is fetched again only after the
# fetch under way for its idle neighbours returns.
QUEUED_BATCHES = 4
# What is neither invalid nor passing is tried this often before it becomes a dead letter.
ATTEMPTS = 3
BACKOFF_SECONDS = (0.1, 0.5, 2.0, 5.0)
# The longest a transaction may take while its partition is taken away, plus a heartbeat.
DRAIN_MS = 60_000


class OutsideLog(Exception):
    """The stored offset is not in the log: records are gone that were never read. Never skipped by itself."""


class Fenced(Exception):
    """The batch does not begin at the stored position: another owner went on, or the records are stale."""


class Item(NamedTuple):
    """A record, read or not."""

    offset: int
    key: str | None
    headers: dict[str, str]
    body: bytes | None
    result: Decoded | InvalidMessage


class Position(NamedTuple):
    """Where a partition is read from next, as the database has it."""

    incarnation: UUID
    next_offset: int


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
        self._log = get_logger("infra.kafka")

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
                    error=f"{type(error).__name__}: {error}",
                    failures=failures,
                )
                await self._pause(BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS)) - 1])

    async def stop(self) -> None:
        """Finishes the transactions under way; `run` then leaves the group and returns."""
        self._stopping.set()

    def stuck_for(self) -> float:
        """Seconds for which an assigned partition has had records to read and made no progress; 0 if none is so."""
        return max((p.stuck_for() for p in self._partitions.values()), default=0.0)

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
        )
        self._consumer = consumer
        consumer.subscribe(list(self._topics), listener=self)
        try:
            await consumer.start()
            committed = time.monotonic()
            while not self._stopping.is_set():
                batches = await consumer.getmany(timeout_ms=200, max_records=BATCH)
                for tp, records in batches.items():
                    # A partition that was taken away meanwhile belongs to somebody else now.
                    if tp in self._partitions:
                        self._partitions[tp].put(records)
                if time.monotonic() - committed > 5:
                    committed = time.monotonic()
                    await self._commit_for_monitoring(consumer)
        finally:
            await self.on_partitions_revoked(list(self._partitions))
            await consumer.stop()
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
        self._reader = reader
        self._database = reader._database
        self._metrics = reader._metrics
        self._log = reader._log
        self._group = reader.group
        self._consumer = consumer
        self._tp = tp
        self._topic = topic
        self._handlers = handlers
        self._queue: deque[Sequence[Any]] = deque()
        self._filled = asyncio.Event()
        self._stopping = asyncio.Event()
        self._progress = time.monotonic()
        self._gap_before: int | None = None
        self.position: Position | None = None
        self._task = asyncio.create_task(self._work(), name=f"{self._group} {tp.topic}/{tp.partition}")

    def put(self, records: Sequence[Any]) -> None:
        self._queue.append(records)
        self._filled.set()
        if len(self._queue) >= QUEUED_BATCHES:
            self._consumer.pause(self._tp)

    async def stop(self) -> None:
        self._stopping.set()
        self._filled.set()
        await self._task

    def stuck_for(self) -> float:
        waiting = bool(self._queue) or self.position is None
        return time.monotonic() - self._progress if waiting else 0.0

    async def _work(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            try:
                self.position = await self._find_position()
                self._queue.clear()
                self._consumer.seek(self._tp, self.position.next_offset)
                self._consumer.resume(self._tp)
                while (records := await self._next()) is not None:
                    await self._process(records)
                    failures = 0
                    self._progress = time.monotonic()
            except OutsideLog as error:
                # Going on would skip what was never read; only a person can say that this is right.
                self._log.error("partition stopped", group=self._group, **self._where(), error=str(error))
                self._metrics.partition_stopped.labels(self._group, self._topic.name, str(self._tp.partition)).set(1)
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
                    error=f"{type(error).__name__}: {error}",
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

    async def _next(self) -> Sequence[Any] | None:
        while not self._queue:
            self._filled.clear()
            if self._stopping.is_set():
                return None
            await self._filled.wait()
        if self._stopping.is_set():
            return None
        records = self._queue.popleft()
        if len(self._queue) == QUEUED_BATCHES - 2:
            self._consumer.resume(self._tp)
        return records

    async def _find_position(self) -> Position:
        """The stored position; made if there is none, begun anew where the topic was.

        Raises OutsideLog where the stored offset is not in the log.
        """
        incarnations = await topic_incarnations(self._consumer._client, [self._tp.topic])
        if self._tp.topic not in incarnations:
            raise Transient(f"topic {self._tp.topic} does not exist at the broker now")
        incarnation = incarnations[self._tp.topic]
        begin = (await self._consumer.beginning_offsets([self._tp]))[self._tp]
        end = (await self._consumer.end_offsets([self._tp]))[self._tp]
        async with self._database.begin() as tx:
            rows = await tx.sql(
                "INSERT INTO consumer_offset AS c (consumer, topic, partition, incarnation, next_offset) "
                "VALUES ($1, $2, $3, $4, $5) ON CONFLICT (consumer, topic, partition) DO UPDATE SET "
                # The same topic: stays where it is. Made anew: from its beginning; repeats are dropped by id.
                "next_offset = CASE WHEN c.incarnation = excluded.incarnation THEN c.next_offset "
                "ELSE excluded.next_offset END, incarnation = excluded.incarnation RETURNING next_offset",
                self._group,
                self._topic.name,
                self._tp.partition,
                incarnation,
                begin,
            )
        next_offset: int = rows[0][0]
        if not begin <= next_offset <= end:
            raise OutsideLog(
                f"the next offset to read is {next_offset}, the log holds {begin} to {end}: records are gone that were "
                "never read. Send them again (claw outbox resend) or rebuild (claw replay), then set the offset."
            )
        self._metrics.partition_stopped.labels(self._group, self._topic.name, str(self._tp.partition)).set(0)
        return Position(incarnation, next_offset)

    async def _process(self, records: Sequence[Any]) -> None:
        assert self.position is not None
        records = [record for record in records if record.offset >= self.position.next_offset]
        if not records:
            return
        if records[0].offset > self.position.next_offset and records[0].offset != self._gap_before:
            # Records fetched before the last seek, or a log cut under us, or a gap that is really there (a
            # transaction's marker). Looked up once more: only the last of these comes back the same.
            self._gap_before = records[0].offset
            raise Fenced
        items = [self._read(record) for record in records]
        began = time.perf_counter()
        with telemetry.process_batch(
            "kafka",
            self._topic.name,
            [item.headers for item in items],
            partition=self._tp.partition,
            offset=items[0].offset,
            group=self._group,
        ):
            try:
                await self._commit(items, {})
            except Exception as error:
                if _passing(error) or isinstance(error, Fenced):
                    raise
                await self._one_by_one(items)
        self._metrics.processed.labels(self._group, "handled").inc(len(items))
        self._metrics.processing_seconds.labels(self._group).observe(time.perf_counter() - began)
        lag = (self._consumer.highwater(self._tp) or 0) - self.position.next_offset
        labels = (self._group, self._topic.name, str(self._tp.partition))
        self._metrics.lag_records.labels(*labels).set(max(lag, 0))
        self._metrics.lag_seconds.labels(*labels).set(max(time.time() - records[-1].timestamp / 1000, 0) if lag else 0)

    async def _one_by_one(self, items: Sequence[Item]) -> None:
        """Finds out which record of a failed batch it was; the others are not held up by it."""
        for item in items:
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    await self._commit([item], {})
                    break
                except Exception as error:
                    if _passing(error) or isinstance(error, Fenced):
                        raise
                    if attempt == ATTEMPTS or isinstance(error, InvalidMessage):
                        await self._commit([item], {item.offset: _failure(error, attempt)})
                        break
                    self._metrics.retries.labels(self._group).inc()
                    await self._wait(BACKOFF_SECONDS[attempt - 1])

    def _read(self, record: Any) -> Item:
        headers, bad = printable_headers(record.headers)
        key = None if record.key is None else record.key.decode(errors="backslashreplace")
        result: Decoded | InvalidMessage
        try:
            if bad is not None:
                raise InvalidMessage(f"header {bad}", "is not UTF-8")
            result = decode(headers, record.value, self._topic.messages)
        except InvalidMessage as error:
            result = error
        return Item(record.offset, key, headers, record.value, result)

    async def _commit(self, items: Sequence[Item], failed: dict[int, tuple[str, int]]) -> None:
        """Handles `items` in one transaction; those in `failed` (offset → error, attempts) become dead letters."""
        assert self.position is not None
        next_offset = items[-1].offset + 1
        async with self._database.begin() as tx:
            moved = await tx.sql(
                "UPDATE consumer_offset SET next_offset = $5, updated_at = clock_timestamp() WHERE consumer = $1 "
                "AND topic = $2 AND partition = $3 AND incarnation = $6 AND next_offset = $4 RETURNING 1",
                self._group,
                self._topic.name,
                self._tp.partition,
                self.position.next_offset,
                next_offset,
                self.position.incarnation,
            )
            if not moved:
                raise Fenced
            good = await self._set_aside(tx, items, failed)
            by_id = {item.id: item for item in reversed(good)}  # of a repeat within the batch the first one stands
            fresh = await mark_handled(await tx.connection(), self._group, list(by_id)) if by_id else set()
            if fresh:
                await handle(
                    self._handlers,
                    [item for item in good if item.id in fresh and by_id[item.id] is item],
                    tx,
                    partition=self._tp.partition,
                    group=self._group,
                )
            failpoint("after_effect_before_commit")
        failpoint("after_commit_of_batch")
        self.position = Position(self.position.incarnation, next_offset)

    async def _set_aside(self, tx: Any, items: Sequence[Item], failed: dict[int, tuple[str, int]]) -> list[Decoded]:
        """Stores what cannot be handled, or waits behind such a record of its key; returns the rest."""
        connection = await tx.connection()
        keys = {item.key for item in items if item.key is not None} if self._topic.ordered else set()
        parked = await lock_parked(connection, self._group, self._topic.name, sorted(keys)) if keys else set()
        letters: list[DeadLetter] = []
        good: list[Decoded] = []
        for item in items:
            error, attempts = failed.get(item.offset, ("", 0))
            if isinstance(item.result, InvalidMessage):
                error, attempts = _failure(item.result, 1)
            if item.key in parked:
                letters.append(self._letter(item, f"waits behind a failed record of its key. {error}", 0, "waiting"))
            elif error:
                letters.append(self._letter(item, error, attempts, "failed"))
                if item.key in keys:
                    assert item.key is not None
                    parked.add(item.key)
                    await park(connection, self._group, self._topic.name, item.key)
            else:
                assert isinstance(item.result, Decoded)
                good.append(item.result)
        if letters:
            # A repeat of what was handled before it was parked behind (sent again after a wipe) is no dead letter.
            await store_dead_letters(connection, self._group, "kafka", await self._unhandled(tx, letters))
            self._metrics.dead_letters.labels(self._group).inc(len(letters))
            first = letters[0]
            self._log.error(
                "records set aside as dead letters; see claw dlq list",
                group=self._group,
                **self._where(),
                count=len(letters),
                first_message_id=first.message_id,
                key=first.key,
                error=first.error,
            )
        return good

    async def _unhandled(self, tx: Any, letters: Sequence[DeadLetter]) -> list[DeadLetter]:
        ids = [UUID(letter.message_id) for letter in letters if not letter.message_id.startswith("sha256:")]
        handled = {
            str(id_)
            for (id_,) in await tx.sql(
                "SELECT message_id FROM inbox WHERE consumer = $1 AND message_id = ANY($2::uuid[])",
                self._group,
                ids,
            )
        }
        return [letter for letter in letters if letter.message_id not in handled]

    def _letter(self, item: Item, error: str, attempts: int, state: str) -> DeadLetter:
        assert self.position is not None
        return DeadLetter(
            destination=self._topic.name,
            place=f"{self.position.incarnation}/{self._tp.partition}/{item.offset}",
            message_id=readable_id(item.headers, item.body),
            key=item.key,
            tenant_id=item.headers.get("tenant_id"),
            attempts=attempts,
            error=error,
            headers=headers_json(item.headers),
            payload=item.body or b"",
            state=state,
        )


def readable_id(headers: dict[str, str], body: bytes | None) -> str:
    """The message's id, or a digest of the message where it has none that can be read."""
    try:
        return str(UUID(headers["ce_id"]))
    except (KeyError, ValueError):
        return "sha256:" + hashlib.sha256(repr(sorted(headers.items())).encode() + (body or b"")).hexdigest()


def _passing(error: BaseException) -> bool:
    return isinstance(error, (Transient, RetryLater)) or is_transient(error)


def _failure(error: Exception, attempts: int) -> tuple[str, int]:
    return f"{type(error).__name__}: {error}", attempts
