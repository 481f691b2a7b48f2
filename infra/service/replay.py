"""Replay: rebuilds a projection in shadow tables, compares them with the live tables, and switches them.

The records come from Kafka, or from the owner's event store through the same publishing code; the event store also has
records that are older than the topic's retention. The projection's own handler runs. Its search path holds only the
shadow tables and its transaction publishes nothing, so a write to any other table fails.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import msgspec
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import OffsetOutOfRangeError
from sqlalchemy.ext.asyncio import AsyncConnection

from infra.bus.dispatch import Decoded, decode, handle, readable_id
from infra.bus.kafka import printable_headers, topic_ids
from infra.connections import kafka_options
from infra.errors import Conflict, InvalidMessage
from infra.failpoint import failpoint
from infra.postgres.db import Pool, sql
from infra.postgres.event_store import Aggregate, Stream, read_all
from infra.postgres.inbox import mark_handled
from infra.postgres.tx import Tx, publications
from infra.service.shadow_tables import Reached, ShadowTables, TableComparison
from protos.envelope import Message
from protos.topology import Queue, Subscription, Topic

BATCH = 1000
INSTEAD = "replay from the owner's event store with --from-events"
OPEN_OR_GIVEN_UP = "('failed', 'waiting', 'redriving', 'discarded')"

Progress = Callable[[int, int], None]
"""Called with the number of replayed records and the number of all records."""


@dataclass
class ReplayResult:
    """The result of a replay."""

    records: int
    tables: list[TableComparison]
    switched: bool = False
    """True if the shadow tables replaced the live ones."""


class _ShadowTx(Tx):
    """A transaction without side effects: it publishes, sends and appends nothing."""

    def publish(self, topic: Topic, message: Message, *, key: str, message_id: UUID | None = None) -> UUID:
        return message_id or UUID(int=0)

    def send(
        self,
        queue: Queue,
        message: Message,
        *,
        key: str | None = None,
        position: int | None = None,
        message_id: UUID | None = None,
    ) -> UUID:
        return message_id or UUID(int=0)

    def after_commit(self, call: Callable[[], Awaitable[None]]) -> None:
        return

    def append(self, stream: Stream[Any], event: Any, *, event_id: UUID | None = None) -> None:
        raise Conflict("the handler appends events; only the handler of a projection can be replayed")


class Replay:
    """One rebuild of one subscription's tables. `engine` connects as an administrator of the service's schema.

    Raises Conflict if the subscription is not a projection.
    """

    def __init__(self, engine: Pool, service: str, subscription: Subscription, progress: Progress) -> None:
        if not subscription.projection or not isinstance(subscription.source, Topic):
            raise Conflict(f"{subscription.name} is not a projection: it does not declare tables to rebuild")
        self._engine = engine
        self._service = service
        self._shadow = ShadowTables(service, subscription.projection)
        self._subscription = subscription
        self._topic = subscription.source
        self._progress = progress
        self._done = 0
        # Records that were skipped because they were dead letters. They are applied at the end if redriven since.
        self._skipped: list[Any] = []

    async def from_kafka(
        self, bootstrap: str, *, prefix: str = "", switch_unequal: bool = False, restart: bool = False
    ) -> ReplayResult:
        """Rebuilds from the topic's log. An interrupted replay goes on, unless `restart` is set.

        Raises Conflict if the log has lost its first records.
        """
        topic = prefix + self._topic.name
        # No reset: records that retention deletes while they are read must end the replay, not be passed over.
        consumer = AIOKafkaConsumer(**kafka_options(bootstrap), enable_auto_commit=False, auto_offset_reset="none")
        try:
            await consumer.start()
            topic_id = (await topic_ids(consumer._client, [topic])).get(topic)
            if topic_id is None:
                raise Conflict(f"topic {topic} does not exist at the broker; {INSTEAD}")
            partitions = [TopicPartition(topic, n) for n in range(self._topic.partitions)]
            consumer.assign(partitions)
            for partition in partitions:
                consumer.seek(partition, 0)
            begin = await consumer.beginning_offsets(partitions)
            if any(begin.values()):
                raise Conflict(f"topic {topic} no longer holds its first records; {INSTEAD}")
            async with self._alone():
                reached = dict.fromkeys(partitions, 0)
                await self._begin(consumer, reached, topic_id, restart=restart)
                # Most records are read while the live consumers run; for the rest they are held.
                await self._read_to(consumer, reached, await self._live_offsets(topic, topic_id))
                async with self._engine.connect() as held:
                    targets = await self._hold(held, topic, topic_id)
                    await self._read_to(consumer, reached, targets)
                    return await self._finish(held, switch_unequal)
        except OffsetOutOfRangeError as error:
            raise Conflict(f"topic {topic} lost records while they were read; {INSTEAD}") from error
        finally:
            await consumer.stop()

    async def from_events(
        self, owner: str, aggregates: Sequence[Aggregate[Any]], *, switch_unequal: bool = False
    ) -> ReplayResult:
        """Rebuilds from the event store of service `owner`, with those facts that the live consumer has handled.

        The live consumer is held during the whole replay. Both services' schemas are in this one database.
        """
        async with self._alone(), self._engine.connect() as held:
            await self._make_shadow()
            await self._hold(held, "", None)
            await sql(held, f'SET LOCAL search_path = "{owner}"')
            names = [f"{aggregate.name}:" for aggregate in aggregates]
            [(total,)] = await sql(
                held,
                "SELECT count(*) FROM event JOIN unnest($1::text[]) AS n(name) ON starts_with(stream_id, name)",
                names,
            )
            batch: list[Decoded] = []
            async for item in self._emitted(held, aggregates):
                batch.append(item)
                if len(batch) == BATCH:
                    await self._apply(await self._handled(held, batch), total)
                    batch = []
            await self._apply(await self._handled(held, batch), total)
            return await self._finish(held, switch_unequal)

    async def _emitted(self, held: AsyncConnection, aggregates: Sequence[Aggregate[Any]]) -> AsyncIterator[Decoded]:
        for aggregate in aggregates:
            async for stored in read_all(held, aggregate, limit=BATCH):
                for id_, publication in publications(aggregate, stored.stream_id, stored.event_id, stored.event):
                    if publication.topic == self._topic:
                        # Encoded and decoded as on the bus, so that a detail that the bus loses is lost here too.
                        body = msgspec.json.encode(publication.message)
                        headers = {"ce_id": str(id_), "ce_type": publication.message.wire_name(), **stored.headers}
                        yield decode(headers, body, self._topic.messages)

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Allows one replay of the service at a time: two would write into the same shadow tables."""
        async with self._engine.connect() as connection:
            lock = f"replay {self._service}"
            [(mine,)] = await sql(connection, "SELECT pg_try_advisory_lock(hashtextextended($1, 0))", lock)
            if not mine:
                raise Conflict(f"another replay of {self._service} is running")
            await connection.commit()  # the lock belongs to the session, so no transaction needs to stay open
            try:
                yield
            finally:
                await sql(connection, "SELECT pg_advisory_unlock(hashtextextended($1, 0))", lock)

    async def _hold(self, held: AsyncConnection, topic: str, topic_id: UUID | None) -> dict[TopicPartition, int]:
        """Holds the live consumer at its offsets, and stops redrives of dead letters into the live tables."""
        await sql(held, "SET LOCAL idle_in_transaction_session_timeout = 0")
        await sql(held, "SET LOCAL statement_timeout = 0")
        await sql(held, "SET LOCAL transaction_timeout = 0")
        targets = await self._live_offsets(topic, topic_id, lock=held)
        # In the order in which consumer and redriver lock these tables. An EXCLUSIVE lock blocks FOR UPDATE too, so a
        # redriver stops before it locks the live tables, which the switch needs.
        for table in ("parked_key", "dead_letter"):
            await sql(held, f'LOCK TABLE "{self._service}".{table} IN EXCLUSIVE MODE')
        return targets

    async def _make_shadow(self) -> None:
        async with self._engine.begin() as connection:
            await self._shadow.make(connection)

    async def _begin(
        self, consumer: AIOKafkaConsumer, reached: dict[TopicPartition, int], topic_id: UUID, *, restart: bool
    ) -> None:
        """Makes the shadow tables, or moves `reached` to the end of an interrupted replay of the projection."""
        name = self._subscription.name
        async with self._engine.begin() as connection:
            before = None if restart else await self._shadow.progress(connection, name, topic_id)
            if before is None:
                await self._shadow.make(connection)
                await self._shadow.begin_progress(connection, name, topic_id)
                return
        for tp in reached:
            reached[tp], skipped = before.get(tp.partition, Reached(0, []))
            self._done += reached[tp]
            for offset in skipped:
                self._skipped.append(await _read_one(consumer, tp, offset))

    async def _live_offsets(
        self, topic: str, topic_id: UUID | None, *, lock: AsyncConnection | None = None
    ) -> dict[TopicPartition, int]:
        """The live consumer's offsets. With `lock`, it cannot advance until that transaction ends."""
        statement = f"""
            SELECT partition, topic_id, next_offset FROM "{self._service}".consumer_offset
            WHERE consumer = $1 AND topic = $2 ORDER BY partition
            """
        if lock is not None:
            rows = await sql(lock, statement + " FOR UPDATE", self._subscription.group, self._topic.name)
        else:
            async with self._engine.connect() as connection:
                rows = await sql(connection, statement, self._subscription.group, self._topic.name)
        if topic_id is not None and any(UUID(str(row[1])) != topic_id for row in rows):
            raise Conflict(f"topic {topic} was made again, and the live consumer has not switched to it yet; try later")
        return {TopicPartition(topic, partition): offset for partition, _, offset in rows}

    async def _handled(self, connection: AsyncConnection, items: Sequence[Decoded]) -> list[Decoded]:
        """Those of `items` that the live consumer has applied."""
        schema = f'"{self._service}"'
        rows = await sql(
            connection,
            f"""
            -- An id that is older than the inbox keeps ids (see inbox_partitions) counts as handled.
            SELECT n.id
            FROM unnest($2::uuid[]) AS n(id)
            WHERE (
                EXISTS (SELECT FROM {schema}.inbox WHERE message_id = n.id AND consumer = $1)
                OR n.id < {schema}.uuid7_floor(date_trunc('month', now() - interval '120 days', 'UTC'))
            )
            AND NOT EXISTS (
                SELECT FROM {schema}.dead_letter
                WHERE consumer = $1 AND source = 'kafka' AND destination = $3 AND message_id = n.id::text
                  AND state IN {OPEN_OR_GIVEN_UP}
            )
            """,
            self._subscription.group,
            [item.id for item in items],
            self._topic.name,
        )
        handled = {UUID(int=id_.int) for (id_,) in rows}
        return [item for item in items if item.id in handled]

    async def _read_to(
        self,
        consumer: AIOKafkaConsumer,
        reached: dict[TopicPartition, int],
        targets: Mapping[TopicPartition, int],
    ) -> None:
        """Applies the records from `reached` up to `targets`, which it advances."""
        async with self._engine.connect() as connection:
            rows = await sql(
                connection,
                f"SELECT message_id FROM \"{self._service}\".dead_letter WHERE consumer = $1 AND source = 'kafka' "
                f"AND destination = $2 AND state IN {OPEN_OR_GIVEN_UP}",
                self._subscription.group,
                self._topic.name,
            )
        not_applied = {message_id for (message_id,) in rows}
        total = sum(targets.values())
        before, self._skipped = self._skipped, []
        # Those that are applied now stay in the stored progress: the inbox drops them if they are read again.
        await self._apply(self._decoded(before, not_applied), total)
        for tp, target in targets.items():
            consumer.seek(tp, reached[tp])
            consumer.pause(*(other for other in targets if other != tp))
            consumer.resume(tp)
            while reached[tp] < target:
                records = (await consumer.getmany(tp, timeout_ms=1000, max_records=BATCH)).get(tp, [])
                records = [record for record in records if record.offset < target]
                if not records:
                    # After the last record there may be only control records; the position shows that they were read.
                    reached[tp] = min(await consumer.position(tp), target)
                    continue
                reached[tp] = records[-1].offset + 1
                aside = len(self._skipped)
                decoded = self._decoded(records, not_applied)
                skipped = [record.offset for record in self._skipped[aside:]]
                await self._apply(decoded, total, {tp.partition: Reached(reached[tp], skipped)})

    def _decoded(self, records: Sequence[Any], not_applied: set[str]) -> list[Decoded]:
        decoded = []
        for record in records:
            headers, _ = printable_headers(record.headers)
            if readable_id(headers, record.value) in not_applied:
                self._skipped.append(record)
                continue
            try:
                decoded.append(decode(headers, record.value, self._topic.messages))
            except InvalidMessage as error:
                # The live consumer made it a dead letter, which is skipped above, unless a version that could read the
                # record has redriven it.
                where = f"record {record.partition}/{record.offset}"
                raise Conflict(f"{where} cannot be read by this version: {error}") from None
        return decoded

    async def _apply(self, items: Sequence[Decoded], total: int, reached: Mapping[int, Reached] | None = None) -> None:
        """Applies the records, and stores with them how far the partitions were read."""
        if items or reached:
            tx = _ShadowTx(self._engine, self._service, tenant_id=None, cause=None)
            try:
                await tx.sql(f'SET LOCAL ROLE "{self._service}_owner"')
                await tx.sql(f'SET LOCAL search_path = "{self._shadow.schema}"')
                by_id = {item.id: item for item in reversed(items)}
                fresh = await mark_handled(await tx.connection(), self._subscription.group, list(by_id))
                new = [item for item in items if item.id in fresh and by_id[item.id] is item]
                if new:
                    await handle([self._subscription], new, tx)
                await self._shadow.save_progress(await tx.connection(), reached or {})
                failpoint("before_replayed_batch")
                await tx.close(commit=True)
            finally:
                await tx.close(commit=False)
            failpoint("after_replayed_batch")
        self._done += len(items)
        self._progress(self._done, total)

    async def _finish(self, held: AsyncConnection, switch_unequal: bool) -> ReplayResult:
        result = ReplayResult(self._done, await self._shadow.compare(held))
        if switch_unequal or all(comparison.equal for comparison in result.tables):
            await self._shadow.switch(held)
            failpoint("before_switch")
            await held.commit()
            failpoint("after_switch")
            result.switched = True
        else:
            await self._shadow.end_progress(held)
            await held.commit()
        return result


async def _read_one(consumer: AIOKafkaConsumer, tp: TopicPartition, offset: int) -> Any:
    consumer.seek(tp, offset)
    consumer.pause(*(other for other in consumer.assignment() if other != tp))
    consumer.resume(tp)
    while True:
        for record in (await consumer.getmany(tp, timeout_ms=1000, max_records=1)).get(tp, []):
            return record
