"""The batches of a partition: effect, inbox rows and offset in one transaction. A record that fails parks its key.

This is the transactional half of the Kafka reader. It knows records, not the broker.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy.exc import IntegrityError

from infra.bus.dispatch import Decoded, decode, decode_records, handle, readable_id
from infra.bus.kafka import headers_json, printable_headers
from infra.errors import InvalidMessage, describe
from infra.failpoint import failpoint
from infra.observe import telemetry
from infra.observe.logs import get_logger
from infra.observe.metrics import Metrics
from infra.postgres.database import Database
from infra.postgres.db import is_transient, storable
from infra.postgres.dead_letters import DeadLetter, lock_parked, park, store_dead_letters
from infra.postgres.inbox import mark_handled
from infra.postgres.tx import Tx
from protos.topology import Subscription, Topic

# A record whose error is neither invalid input nor transient becomes a dead letter after so many attempts.
ATTEMPTS = 3
PAUSE_SECONDS = (0.1, 0.5)
# A position behind batches without an effect is stored after this time, if no batch with an effect came before.
SAVE_SECONDS = 5.0


class OffsetNotInLog(Exception):
    """The stored offset is not in the log: records are gone that were never read. The reader never skips them."""


class Fenced(Exception):
    """The batch does not begin at the stored position: another process has gone on, or the records are stale."""


class _NotPlain(Exception):
    """The batch has a repeat, or the topic has parked keys."""


class Item(NamedTuple):
    """A record."""

    offset: int
    key: str | None
    headers: dict[str, str]
    body: bytes | None
    result: Decoded | InvalidMessage
    """The message, or the reason why the record cannot be read."""


class Position(NamedTuple):
    """The place in a partition from which it is read next, as stored in the database."""

    topic_id: UUID
    next_offset: int


class Batches:
    """One partition, as one consumer group reads it."""

    def __init__(
        self,
        database: Database,
        group: str,
        topic: Topic,
        partition: int,
        handlers: Sequence[Subscription],
        metrics: Metrics,
    ) -> None:
        self._database = database
        self._group = group
        self._topic = topic
        self._partition = partition
        self._handlers = handlers
        self._metrics = metrics
        self._gap_before: int | None = None
        self._careful = False
        """The last batch had repeats, or met parked keys. The next one probably does too."""
        self._log = get_logger("infra.bus.batch")
        self.position: Position | None = None
        """The place up to which the partition is handled."""
        self._stored = 0
        """The next offset in the database. Batches without an effect do not move it, so they may be read again."""
        self._stored_at = 0.0

    async def find_position(self, topic_id: UUID, begin: int, end: int) -> int:
        """The offset to read next, in a log that holds the offsets `begin` to `end`.

        The first time, and if the topic was deleted and created again, that is `begin`. Raises OffsetNotInLog if the
        log does not hold the stored offset.
        """
        async with self._database.begin() as tx:
            rows = await tx.sql(
                # Locks the offset row. A topic that was created again has another id: it is read from its beginning,
                # and the inbox drops the messages that were handled before.
                """
                INSERT INTO consumer_offset AS c (consumer, topic, partition, topic_id, next_offset)
                VALUES ($1, $2, $3, $4, $5)
                ON CONFLICT (consumer, topic, partition) DO UPDATE
                SET next_offset = CASE
                        WHEN c.topic_id = excluded.topic_id THEN c.next_offset
                        ELSE excluded.next_offset
                    END,
                    topic_id = excluded.topic_id
                RETURNING next_offset
                """,
                self._group,
                self._topic.name,
                self._partition,
                topic_id,
                begin,
            )
        next_offset: int = rows[0][0]
        if not begin <= next_offset <= end:
            raise OffsetNotInLog(
                f"the next offset to read is {next_offset}, but the log holds {begin} to {end}: records are gone that "
                "were never read. Send them again (claw outbox resend) or rebuild (claw replay), then set the offset."
            )
        self._metrics.partition_stopped.labels(self._group, self._topic.name, str(self._partition)).set(0)
        self.position = Position(topic_id, next_offset)
        self._stored, self._stored_at = next_offset, time.monotonic()
        return next_offset

    @property
    def is_ahead(self) -> bool:
        """The stored position is behind batches that had no effect."""
        return self.position is not None and self.position.next_offset != self._stored

    async def save(self) -> None:
        """Stores the position. Raises Fenced."""
        assert self.position is not None
        next_offset = self.position.next_offset
        async with self._database.begin() as tx:
            await self._move(tx, next_offset, [])
        self._moved(next_offset)

    async def process(self, topic_id: UUID | None, records: Sequence[Any]) -> None:
        """Handles records from the log of the topic `topic_id`, in order, and moves the position behind them.

        Raises Fenced if they do not begin at the stored position, and transient errors. Then nothing of the
        transaction that failed was kept, and the records must be read again.
        """
        assert self.position is not None
        first = records[0].offset
        if topic_id != self.position.topic_id or first < self.position.next_offset:
            raise Fenced
        if first > self.position.next_offset and first != self._gap_before:
            # The records were fetched before the last seek, or the log was cut meanwhile, or the log has a gap there
            # (the marker of a transaction). They are read once more: only a real gap looks the same again.
            self._gap_before = first
            raise Fenced
        began = time.perf_counter()
        decoded = decode_records(records, self._topic.messages)
        if decoded and not self._has_effect(decoded) and time.monotonic() - self._stored_at < SAVE_SECONDS:
            await self._pass_by(decoded)
            self.position = Position(self.position.topic_id, records[-1].offset + 1)
            self._metrics.processed.labels(self._group, "handled").inc(len(records))
            return
        with telemetry.process_batch(
            "kafka",
            self._topic.name,
            [e.headers for e in decoded] if decoded else [printable_headers(r.headers)[0] for r in records],
            partition=self._partition,
            offset=first,
            group=self._group,
        ):
            try:
                if not (decoded and await self._commit_plain(decoded, records[-1].offset + 1)):
                    await self._commit(records, {}, decoded)
            except Exception as error:
                if is_transient(error) or isinstance(error, Fenced):
                    raise
                await self._one_by_one(records)
        self._metrics.processed.labels(self._group, "handled").inc(len(records))
        self._metrics.processing_seconds.labels(self._group).observe(time.perf_counter() - began)

    def _has_effect(self, decoded: Sequence[Decoded]) -> bool:
        return any(
            not handler.hint and (handler.at_least_once or any(handler.takes(each.message) for each in decoded))
            for handler in self._handlers
        )

    async def _pass_by(self, decoded: Sequence[Decoded]) -> None:
        """Handles messages that change nothing in the database: hints, and types that no handler takes."""
        if taken := [each for each in decoded if any(handler.takes(each.message) for handler in self._handlers)]:
            tx = self._database.collector("")
            await handle(self._handlers, taken, tx, partition=self._partition, group=self._group)
            self._database.wake((), tx.woken)

    async def _one_by_one(self, records: Sequence[Any]) -> None:
        """Finds the record at fault in a batch that failed, so that it does not hold up the others."""
        for record in records:
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    await self._commit([record], {})
                    break
                except Exception as error:
                    if is_transient(error) or isinstance(error, Fenced):
                        raise
                    if attempt == ATTEMPTS or isinstance(error, InvalidMessage):
                        await self._commit([record], {record.offset: (describe(error), attempt)})
                        break
                    self._metrics.retries.labels(self._group).inc()
                    await asyncio.sleep(PAUSE_SECONDS[attempt - 1])

    def _read(self, record: Any) -> Item:
        headers, bad = printable_headers(record.headers)
        key = None if record.key is None else storable(record.key.decode(errors="backslashreplace"))
        result: Decoded | InvalidMessage
        try:
            if bad is not None:
                raise InvalidMessage(f"header {bad}", "is not UTF-8")
            result = decode(headers, record.value, self._topic.messages)
        except InvalidMessage as error:
            result = error
        return Item(record.offset, key, headers, record.value, result)

    async def _commit_plain(self, decoded: Sequence[Decoded], next_offset: int) -> bool:
        """Handles the messages in one transaction. False, and nothing is changed, if one of them is a repeat, or if the
        topic has parked keys."""
        if self._careful:
            return False
        try:
            async with self._database.begin() as tx:
                if await self._move(tx, next_offset, sorted([each.id for each in decoded])):
                    raise _NotPlain
                await self._handle(decoded, tx)
        except _NotPlain:
            return False
        self._moved(next_offset)
        return True

    async def _commit(
        self, records: Sequence[Any], failed: dict[int, tuple[str, int]], decoded: Sequence[Decoded] | None = None
    ) -> None:
        """Handles the records in one transaction. Those in `failed` (offset → error, attempts) become dead letters.

        decoded: the messages of all records, if each of them could be decoded.
        """
        next_offset = records[-1].offset + 1
        async with self._database.begin() as tx:
            any_parked = await self._move(tx, next_offset, [])
            if decoded and not any_parked:
                good = decoded
            else:
                good = await self._store_dead_letters(tx, [self._read(r) for r in records], failed, any_parked)
            by_id: dict[UUID, Decoded] = {}
            for item in good:
                by_id.setdefault(item.id, item)  # a message that the batch holds twice is handled once
            fresh = await mark_handled(await tx.connection(), self._group, list(by_id)) if by_id else set()
            await self._handle([item for id_, item in by_id.items() if id_ in fresh], tx)
        self._careful = any_parked or len(fresh) < len(good)
        self._moved(next_offset)

    async def _move(self, tx: Tx, next_offset: int, ids: Sequence[UUID]) -> bool:
        """Moves the stored position and marks the messages `ids` as handled. Returns whether the topic has parked keys.

        Raises Fenced, and _NotPlain if one of the messages is marked already, or is twice in `ids`.
        """
        assert self.position is not None
        try:
            moved = await tx.sql(
                # Locks the offset row, before all other rows of the batch; then inserts into the inbox, in the order of
                # the ids. It waits for a transaction that marks one of the ids, and fails if that one commits.
                """
                WITH moved AS (
                    UPDATE consumer_offset
                    SET next_offset = $5, updated_at = clock_timestamp()
                    WHERE consumer = $1 AND topic = $2 AND partition = $3 AND topic_id = $6 AND next_offset = $4
                    RETURNING EXISTS (SELECT FROM parked_key WHERE consumer = $1 AND topic = $2) AS any_parked
                ), marked AS (
                    INSERT INTO inbox (message_id, consumer)
                    SELECT id, $1 FROM unnest($7::uuid[]) AS n(id) WHERE EXISTS (SELECT FROM moved)
                )
                SELECT any_parked FROM moved
                """,
                self._group,
                self._topic.name,
                self._partition,
                self._stored,
                next_offset,
                self.position.topic_id,
                ids,
            )
        except IntegrityError as error:
            raise _NotPlain from error
        if not moved:
            raise Fenced
        any_parked: bool = moved[0][0]
        return any_parked

    async def _handle(self, messages: Sequence[Decoded], tx: Tx) -> None:
        if messages:
            await handle(self._handlers, messages, tx, partition=self._partition, group=self._group)
        failpoint("after_effect_before_commit")

    def _moved(self, next_offset: int) -> None:
        failpoint("after_commit_of_batch")
        assert self.position is not None
        self.position = Position(self.position.topic_id, next_offset)
        self._stored, self._stored_at = next_offset, time.monotonic()

    async def _store_dead_letters(
        self, tx: Tx, items: Sequence[Item], failed: dict[int, tuple[str, int]], any_parked: bool
    ) -> Sequence[Decoded]:
        """Stores the records that cannot be handled, and those whose key is parked. Returns the others.

        `any_parked`: the topic has parked keys. This stays true until the commit: only a transaction that holds the
        partition's offset row, as this one does, parks a key of the partition.
        """
        connection = await tx.connection()
        keys = {item.key for item in items if item.key is not None} if self._topic.ordered else set()
        parked: set[str] = set()
        if any_parked and keys:
            parked = await lock_parked(connection, self._group, self._topic.name, sorted(keys))
        failed = failed | {i.offset: (describe(i.result), 1) for i in items if isinstance(i.result, InvalidMessage)}
        if not parked and not failed:
            return [item.result for item in items if isinstance(item.result, Decoded)]
        # A message that was handled or discarded before (and is sent again after a wipe) does not become a dead letter
        # and does not park its key.
        handled = await self._handled(tx, items)
        letters: list[DeadLetter] = []
        good: list[Decoded] = []
        for item in items:
            error, attempts = failed.get(item.offset, ("", 0))
            id_ = readable_id(item.headers, item.body)
            if id_ in handled:
                continue
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
                handled.add(id_)
        if letters:
            await store_dead_letters(connection, self._group, "kafka", letters, self._database.sealing)
            self._metrics.dead_letters.labels(self._group).inc(len(letters))
            for tenant_id in dict.fromkeys(letter.tenant_id for letter in letters):
                own = [letter for letter in letters if letter.tenant_id == tenant_id]
                self._log.error(
                    "records stored as dead letters; see ./claw dlq list",
                    group=self._group,
                    topic=self._topic.name,
                    partition=self._partition,
                    tenant=tenant_id,
                    count=len(own),
                    first_message_id=own[0].message_id,
                    key=own[0].key,
                    error=own[0].error,
                )
        return good

    async def _handled(self, tx: Tx, items: Sequence[Item]) -> set[str]:
        ids = [readable_id(item.headers, item.body) for item in items]
        rows = await tx.sql(
            """
            SELECT message_id FROM inbox
            WHERE consumer = $1 AND message_id = ANY($2::uuid[])
            """,
            self._group,
            [UUID(id_) for id_ in ids if not id_.startswith("sha256:")],
        )
        return {str(id_) for (id_,) in rows}

    def _letter(self, item: Item, error: str, attempts: int, state: str) -> DeadLetter:
        assert self.position is not None
        return DeadLetter(
            destination=self._topic.name,
            place=f"{self.position.topic_id}/{self._partition}/{item.offset}",
            message_id=readable_id(item.headers, item.body),
            key=item.key,
            tenant_id=item.headers.get("tenant_id"),
            attempts=attempts,
            error=error,
            headers=headers_json(item.headers),
            payload=item.body or b"",
            state=state,
        )
