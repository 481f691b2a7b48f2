"""Replay: a projection is built anew beside the live tables, compared with them, and put in their place.

The records come from Kafka, or from the owner's event store through the same publishing code, which reaches beyond
the topic's retention. The projection's own handler runs; its search path holds the shadow tables only and its
transaction publishes nothing, so it can change nothing else: a write to another table fails.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import msgspec
from aiokafka import AIOKafkaConsumer, TopicPartition
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from infra.bus.batch import readable_id
from infra.bus.dispatch import Decoded, decode, handle
from infra.bus.inbox import mark_handled
from infra.bus.kafka import printable_headers, topic_incarnations
from infra.db import sql
from infra.errors import Conflict, InvalidMessage
from infra.eventstore.store import Aggregate, Stream, read_all
from infra.tx import Tx, publications
from protos.envelope import Message
from protos.topology import Queue, Subscription, Topic

BATCH = 1000
OPEN_OR_GIVEN_UP = "('failed', 'waiting', 'redriving', 'discarded')"

Progress = Callable[[int, int], None]
"""Called with how many records are done and how many there are."""


@dataclass
class Comparison:
    """One table of the projection: rows and hash of the live one and of the rebuilt one, at the same offsets."""

    table: str
    live_rows: int
    live_hash: str
    rebuilt_rows: int
    rebuilt_hash: str

    @property
    def equal(self) -> bool:
        return (self.live_rows, self.live_hash) == (self.rebuilt_rows, self.rebuilt_hash)


@dataclass
class Rebuilt:
    """What a replay found and did."""

    records: int
    tables: list[Comparison] = field(default_factory=list)
    switched: bool = False


class _ShadowTx(Tx):
    """A transaction whose side effects are off."""

    def publish(self, topic: Topic, message: Message, *, key: str, message_id: UUID | None = None) -> UUID:
        return message_id or UUID(int=0)

    def send(self, queue: Queue, message: Message, *, message_id: UUID | None = None) -> UUID:
        return message_id or UUID(int=0)

    def after_commit(self, call: Callable[[], Awaitable[None]]) -> None:
        return

    def append(self, stream: Stream[Any], event: Any, *, event_id: UUID | None = None) -> None:
        raise Conflict("a projection appends no events; its handler cannot be replayed")


class Replay:
    """One rebuild of one subscription's tables. `engine` connects as an administrator of the service's schema.

    Raises ValueError where the subscription is no projection.
    """

    def __init__(self, engine: AsyncEngine, service: str, subscription: Subscription, progress: Progress) -> None:
        if not subscription.projection or not isinstance(subscription.source, Topic):
            raise ValueError(f"{subscription.name} is not a projection: it declares no tables that may be rebuilt")
        self._engine = engine
        self._service = service
        self._shadow = f"{service}_rebuild"
        self._subscription = subscription
        self._topic = subscription.source
        self._tables = subscription.projection
        self._progress = progress
        self._done = 0

    async def from_kafka(self, bootstrap: str, *, prefix: str = "", switch_unequal: bool = False) -> Rebuilt:
        """Rebuilds from the topic's log. Raises Conflict where the log no longer reaches back to its beginning."""
        topic = prefix + self._topic.name
        consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False, auto_offset_reset="earliest")
        await consumer.start()
        try:
            partitions = [TopicPartition(topic, n) for n in range(self._topic.partitions)]
            consumer.assign(partitions)
            begin = await consumer.beginning_offsets(partitions)
            if any(begin.values()):
                raise Conflict(f"topic {topic} no longer holds its first records; replay from the event store instead")
            incarnation = (await topic_incarnations(consumer._client, [topic]))[topic]
            await self._make_shadow()
            reached = dict.fromkeys(partitions, 0)
            # Most of the way without holding anybody up, then the rest with the live consumers held.
            await self._read_to(consumer, reached, await self._live_offsets(topic, incarnation))
            async with self._engine.connect() as held:
                await sql(held, "SET LOCAL idle_in_transaction_session_timeout = 0")
                await sql(held, "SET LOCAL statement_timeout = 0")
                targets = await self._live_offsets(topic, incarnation, lock=held)
                await self._read_to(consumer, reached, targets)
                return await self._finish(held, switch_unequal)
        finally:
            await consumer.stop()

    async def from_events(
        self, owner: str, aggregates: Sequence[Aggregate[Any]], *, switch_unequal: bool = False
    ) -> Rebuilt:
        """Rebuilds from the event store of service `owner`: of its facts, those that the live consumer has handled."""
        await self._make_shadow()
        async with self._engine.connect() as held:
            await sql(held, "SET LOCAL idle_in_transaction_session_timeout = 0")
            await sql(held, "SET LOCAL statement_timeout = 0")
            await self._live_offsets("", None, lock=held)
            handled = await self._handled(held)
            await sql(held, f'SET LOCAL search_path = "{owner}"')
            names = [f"{aggregate.name}:" for aggregate in aggregates]
            [(total,)] = await sql(
                held,
                "SELECT count(*) FROM event JOIN unnest($1::text[]) AS n(name) ON starts_with(stream_id, name)",
                names,
            )
            batch: list[Decoded] = []
            async for item in self._emitted(held, aggregates):
                if item.id in handled:
                    batch.append(item)
                if len(batch) == BATCH:
                    await self._apply(batch, total)
                    batch = []
            await self._apply(batch, total)
            return await self._finish(held, switch_unequal)

    async def _emitted(self, held: AsyncConnection, aggregates: Sequence[Aggregate[Any]]) -> AsyncIterator[Decoded]:
        for aggregate in aggregates:
            async for stored in read_all(held, aggregate, limit=BATCH):
                for id_, publication in publications(aggregate, stored.stream_id, stored.event_id, stored.event):
                    if publication.topic == self._topic:
                        # Through bytes, as it would come from the bus: what the wire loses must be lost here too.
                        body = msgspec.json.encode(publication.message)
                        headers = {"ce_id": str(id_), "ce_type": publication.message.wire_name(), **stored.headers}
                        yield decode(headers, body, self._topic.messages)

    async def _make_shadow(self) -> None:
        async with self._engine.begin() as connection:
            await sql(connection, f'DROP SCHEMA IF EXISTS "{self._shadow}" CASCADE')
            await sql(connection, f'CREATE SCHEMA "{self._shadow}" AUTHORIZATION "{self._service}_owner"')
            await sql(connection, f'SET LOCAL ROLE "{self._service}_owner"')
            for table in self._tables:
                live, shadow = self._names(table)
                await sql(connection, f"CREATE TABLE {shadow} (LIKE {live} INCLUDING ALL)")
                for role, rights in await sql(
                    connection,
                    "SELECT grantee, string_agg(privilege_type, ', ') FROM information_schema.role_table_grants "
                    "WHERE table_schema = $1 AND table_name = $2 AND grantee <> $1 || '_owner' GROUP BY grantee",
                    self._service,
                    table,
                ):
                    await sql(connection, f'GRANT {rights} ON {shadow} TO "{role}"')
                await self._copy_policies(connection, table)
            await sql(
                connection,
                f'CREATE TABLE "{self._shadow}".inbox '
                "(message_id uuid, consumer text, PRIMARY KEY (message_id, consumer))",
            )

    async def _copy_policies(self, connection: AsyncConnection, table: str) -> None:
        live, shadow = self._names(table)
        [(secured,)] = await sql(connection, "SELECT relrowsecurity FROM pg_class WHERE oid = $1::text::regclass", live)
        if secured:
            await sql(connection, f"ALTER TABLE {shadow} ENABLE ROW LEVEL SECURITY")
        for name, roles, command, using, check in await sql(
            connection,
            "SELECT policyname, roles::text[], cmd, qual, with_check FROM pg_policies "
            "WHERE schemaname = $1 AND tablename = $2",
            self._service,
            table,
        ):
            to = ", ".join(f'"{role}"' for role in roles)
            statement = f'CREATE POLICY "{name}" ON {shadow} FOR {command} TO {to}'
            statement += f" USING ({using})" if using else ""
            statement += f" WITH CHECK ({check})" if check else ""
            await sql(connection, statement)

    def _names(self, table: str) -> tuple[str, str]:
        return f'"{self._service}"."{table}"', f'"{self._shadow}"."{table}"'

    async def _live_offsets(
        self, topic: str, incarnation: UUID | None, *, lock: AsyncConnection | None = None
    ) -> dict[TopicPartition, int]:
        """Where the live consumer stands. With `lock`, it cannot move on until that transaction ends."""
        statement = (
            f'SELECT partition, incarnation, next_offset FROM "{self._service}".consumer_offset '
            "WHERE consumer = $1 AND topic = $2 ORDER BY partition"
        )
        if lock is not None:
            rows = await sql(lock, statement + " FOR UPDATE", self._subscription.group, self._topic.name)
        else:
            async with self._engine.connect() as connection:
                rows = await sql(connection, statement, self._subscription.group, self._topic.name)
        if incarnation is not None and any(UUID(str(row[1])) != incarnation for row in rows):
            raise Conflict(f"topic {topic} was made anew and the live consumer has not gone over to it yet")
        return {TopicPartition(topic, partition): offset for partition, _, offset in rows}

    async def _handled(self, connection: AsyncConnection) -> set[UUID]:
        rows = await sql(
            connection,
            f'SELECT message_id FROM "{self._service}".inbox WHERE consumer = $1 EXCEPT '
            f'SELECT message_id::uuid FROM "{self._service}".dead_letter WHERE consumer = $1 '
            f"AND state IN {OPEN_OR_GIVEN_UP} AND NOT starts_with(message_id, 'sha256:')",
            self._subscription.group,
        )
        return {UUID(int=id_.int) for (id_,) in rows}

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
        for tp, target in targets.items():
            consumer.seek(tp, reached[tp])
            consumer.pause(*(other for other in targets if other != tp))
            consumer.resume(tp)
            while reached[tp] < target:
                records = (await consumer.getmany(tp, timeout_ms=1000, max_records=BATCH)).get(tp, [])
                records = [record for record in records if record.offset < target]
                if not records:
                    # Past the last record there may be nothing but markers; the position tells.
                    reached[tp] = min(await consumer.position(tp), target)
                    continue
                await self._apply([d for r in records if (d := self._decoded(r, not_applied))], total)
                reached[tp] = records[-1].offset + 1

    def _decoded(self, record: Any, not_applied: set[str]) -> Decoded | None:
        headers, _ = printable_headers(record.headers)
        if readable_id(headers, record.value) in not_applied:
            return None
        try:
            return decode(headers, record.value, self._topic.messages)
        except InvalidMessage:
            # It became a dead letter live, with its own id or digest, and was passed over above unless it was
            # redriven by a reader that could read it; this one cannot, and says so.
            raise Conflict(f"record {record.partition}/{record.offset} cannot be read by this version") from None

    async def _apply(self, items: Sequence[Decoded], total: int) -> None:
        if items:
            tx = _ShadowTx(self._engine, self._service, tenant_id=None, cause=None)
            try:
                await tx.sql(f'SET LOCAL ROLE "{self._service}_owner"')
                await tx.sql(f'SET LOCAL search_path = "{self._shadow}"')
                by_id = {item.id: item for item in reversed(items)}
                fresh = await mark_handled(await tx.connection(), self._subscription.group, list(by_id))
                new = [item for item in items if item.id in fresh and by_id[item.id] is item]
                if new:
                    await handle([self._subscription], new, tx)
                await tx.close(commit=True)
            finally:
                await tx.close(commit=False)
        self._done += len(items)
        self._progress(self._done, total)

    async def _finish(self, held: AsyncConnection, switch_unequal: bool) -> Rebuilt:
        result = Rebuilt(records=self._done)
        for table in self._tables:
            live, shadow = [await self._hash(held, name) for name in self._names(table)]
            result.tables.append(Comparison(table, *live, *shadow))
        if switch_unequal or all(comparison.equal for comparison in result.tables):
            retired = f"{self._service}_retired"
            await sql(held, f'DROP SCHEMA IF EXISTS "{retired}" CASCADE')
            await sql(held, f'CREATE SCHEMA "{retired}" AUTHORIZATION "{self._service}_owner"')
            for table in self._tables:
                live_name, shadow_name = self._names(table)
                await sql(held, f'ALTER TABLE {live_name} SET SCHEMA "{retired}"')
                await sql(held, f'ALTER TABLE {shadow_name} SET SCHEMA "{self._service}"')
            await sql(held, f'DROP SCHEMA "{self._shadow}" CASCADE')
            await held.commit()
            result.switched = True
        return result

    async def _hash(self, connection: AsyncConnection, table: str) -> tuple[int, str]:
        """Rows and a hash that does not depend on their order: two tables with the same rows have the same."""
        [(rows, digest)] = await sql(
            connection,
            f"SELECT count(*), coalesce(sum(hashtextextended(t::text, 0)::numeric), 0)::text FROM {table} t",
        )
        return rows, digest
