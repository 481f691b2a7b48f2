"""The unit of work: one message, one transaction.

The events, messages and items of a handler are collected and written together with its other changes. The kernel
commits; application code never does. The connection is taken at first use: a handler that first calls another service
holds no connection during the call.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar
from uuid import UUID

import msgspec
from opentelemetry.trace import Span
from sqlalchemy.ext.asyncio import AsyncConnection

from infra.clock import utcnow, uuid7
from infra.errors import TooLarge, describe
from infra.failpoint import failpoint
from infra.observe import telemetry
from infra.observe.logs import get_logger
from infra.postgres import db, event_store
from infra.postgres.event_store import Aggregate, NewEvent, Publication, Stream
from infra.postgres.lane_items import AT_ONCE, Item, LaneKind, NewItem, NewItems, Places, enqueue_call
from infra.postgres.outbox_rows import OutboxRow, insert_outbox, insert_outbox_call, outbox_columns
from protos.envelope import Envelope, Message
from protos.topology import Queue, Topic

State = TypeVar("State")

# How long queue messages stay in the outbox so that a wiped broker can be filled again.
QUEUE_HORIZON = timedelta(hours=24)
MAX_MESSAGE_BYTES = 1_000_000
"""Of a body. Larger content belongs in the object store, with a reference in the message."""


@cache
def _write(*, events: bool, messages: bool, items: bool) -> str:
    """The statement that appends events, writes messages to the outbox and puts items into lanes: one round trip.

    Its parameters are those of the parts, in this order. Its columns are the ids of events that were stored already,
    and those of `enqueue_items`. The streams are locked first: `sent` and `enqueue_items` are evaluated for the row of
    `stored`. The lanes are locked last of all rows that other transactions wait for.
    """
    parts = [f"stored AS MATERIALIZED (SELECT {event_store.APPEND} AS ids)"] if events else []
    used = 8 if events else 0
    if messages:
        parts.append(f"sent AS ({insert_outbox_call(used, unless_stored=events)})")
        used += 10 if events else 9
    if events and items:
        # A left join reads its left side first.
        select = f"SELECT ids, e.* FROM stored LEFT JOIN {enqueue_call(used)} e ON true"
    elif events:
        select = "SELECT ids FROM stored"
    else:
        select = f"SELECT * FROM {enqueue_call(used)}" if items else "SELECT"
    return f"WITH {', '.join(parts)} {select}" if parts else select


class Tx:
    """One transaction of one service. Made by `Database`; a handler only uses it.

    `reads_only`: each statement is a transaction of its own.
    """

    def __init__(
        self,
        pool: db.Pool,
        service: str,
        *,
        tenant_id: str | None,
        cause: Envelope | None,
        tenanted: bool = False,
        reads_only: bool = False,
        places: Places | None = None,
    ) -> None:
        self._pool = pool
        self._reads_only = reads_only
        self.service = service
        self._tenanted = tenanted
        self._connection: AsyncConnection | None = None
        self._events: list[NewEvent] = []
        self._rows: list[OutboxRow] = []
        self.items = NewItems(places)
        # By the kind and id of the item that the message announces.
        self._hints: dict[tuple[str, UUID], OutboxRow] = {}
        self._buffered: dict[str, list[tuple[Any, ...]]] = {}
        self._loaded: dict[str, tuple[Any, int]] = {}
        self._after: list[Callable[[], Awaitable[None]]] = []
        # The last message that was encoded: a fact often goes to a topic and a queue.
        self._encoded: tuple[Message | None, bytes] = (None, b"")
        self.tenant_id = tenant_id
        # The trace context of the messages and items that are collected from now on. None: the current span's.
        self.carrier: dict[str, str] | None = None
        self.cause = cause
        # The buses for which it leaves messages in the outbox.
        self.buses: set[str] = set()
        # The kinds of lane in which there is something new to do.
        self.woken: set[str] = set()
        # The headers of the messages handed to a batch handler, by the message object's identity.
        self.origins: dict[int, Mapping[str, str]] = {}

    @contextmanager
    def follow(self, message: Message, name: str) -> Iterator[Span]:
        """A span in the own trace of one message of a batch, for an effect that a person follows."""
        with telemetry.record(self.origins[id(message)], name) as span:
            yield span

    @property
    def in_use(self) -> bool:
        """True once it has taken its connection."""
        return self._connection is not None

    def after_commit(self, call: Callable[[], Awaitable[None]]) -> None:
        """`call` is awaited after the commit, with no connection held: a wake-up, a live update.

        It may not happen at all (the process dies), so nothing may depend on it; its errors are logged.
        """
        self._after.append(call)

    async def connection(self) -> AsyncConnection:
        """The transaction's connection. Taken and begun at the first call."""
        if self._connection is None:
            connection = self._connection = await self._pool.take()
            if not self._reads_only:
                await db.begin(connection, self.tenant_id if self._tenanted else None)
        return self._connection

    async def sql(self, statement: str, *arguments: Any) -> Sequence[tuple[Any, ...]]:
        """Runs one statement with ``$1`` parameters and returns its rows."""
        return await db.sql(await self.connection(), statement, *arguments)

    async def take_turn(self, name: str) -> None:
        """Waits while another transaction of this database has taken a turn by this name. Others wait until this one
        ends."""
        await self.sql("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", name)

    @asynccontextmanager
    async def undone(self) -> AsyncIterator[None]:
        """Undoes the statements of the block at its end, and drops its messages. The block can read the rows that they
        would change. It must not append events, enqueue items or buffer rows, and an error in it must fail the
        transaction."""
        kept = len(self._rows)
        await self.sql("SAVEPOINT undone")
        yield
        await self.sql("ROLLBACK TO SAVEPOINT undone")
        del self._rows[kept:]

    async def load(self, stream: Stream[State]) -> State:
        """The stream's state, including the events that this transaction has appended."""
        if stream.row not in self._loaded:
            self._loaded[stream.row] = await event_store.load(await self.connection(), stream)
        state: State = self._loaded[stream.row][0]
        return state

    async def decide(self, stream: Stream[State], command: Any) -> Sequence[Any]:
        """Loads the stream, decides, and appends the decided events if no other transaction appends first.

        Decisions on one stream take turns: its row is locked until the transaction ends, so that a busy stream
        costs waiting and not conflicts. Only the first decisions on a new stream can still meet.
        """
        if stream.row in self._loaded:
            await self.sql("SELECT FROM stream WHERE stream_id = $1 FOR UPDATE", stream.row)
        else:
            self._loaded[stream.row] = await event_store.lock(await self.connection(), stream)
        state: State = self._loaded[stream.row][0]
        events = stream.aggregate.decide(command, state)
        version = self._loaded[stream.row][1]
        for event in events:
            self._events.append(NewEvent(stream, uuid7(), event, version, self.tenant_id, is_new=True))
            state = stream.aggregate.evolve(state, event)
        self._loaded[stream.row] = (state, version)
        return events

    def append(self, stream: Stream[Any], event: Any, *, event_id: UUID | None = None) -> None:
        """Appends at any version of the stream. Does nothing if an event with this `event_id` is stored already."""
        is_new = event_id is None
        self._events.append(NewEvent(stream, event_id or uuid7(), event, None, self.tenant_id, is_new))

    def buffer(self, statement: str, *row: Any) -> None:
        """Adds a row to a statement over ``unnest($1, $2, …)``. It runs once for all rows, before the commit.

        Rows are written in the order of these calls: only for rows that no other transaction writes at the same time.
        """
        self._buffered.setdefault(statement, []).append(row)

    @property
    def messages(self) -> Sequence[OutboxRow]:
        """The messages collected so far, in their order."""
        return self._rows

    def put_messages(self, rows: Sequence[OutboxRow]) -> None:
        """Adds messages in their final bytes."""
        self._rows += rows

    def _publish(self, new: NewEvent) -> None:
        own, self.tenant_id = self.tenant_id, new.tenant_id
        for id_, (topic, key, message) in publications(new.stream.aggregate, new.stream.id, new.event_id, new.event):
            self.publish(topic, message, key=key, message_id=id_)
        self.tenant_id = own

    def publish(self, topic: Topic, message: Message, *, key: str, message_id: UUID | None = None) -> UUID:
        """Sends a fact to a Kafka topic once the transaction commits. Returns the message's id.

        Order per key follows commit order only among transactions that lock the same row first, as an append does.
        """
        if type(message) not in topic.messages:
            raise ValueError(f"{type(message).__name__} is not a message of topic {topic.name}")
        row = self._fact(topic, message, key, message_id or uuid7())
        self._rows.append(row)
        return row.message_id

    def _fact(self, topic: Topic, message: Message, key: str, id_: UUID) -> OutboxRow:
        headers = self._headers(id_, message, key)
        return OutboxRow("kafka", id_, topic.name, "", key, headers, self._body(message), topic.retention)

    def send(
        self,
        queue: Queue,
        message: Message,
        *,
        key: str | None = None,
        position: int | None = None,
        message_id: UUID | None = None,
    ) -> UUID:
        """Sends work to a RabbitMQ queue after the transaction commits. Returns the message's id.

        Messages of one `key` are published in the order of their commits. RabbitMQ does not keep this order while it
        retries them: a receiver that needs it uses a resequencer, which also needs the `position`, from 1 per key.
        """
        if not isinstance(message, queue.message):
            raise ValueError(f"{type(message).__name__} is not the message of queue {queue.name}")
        id_ = message_id or uuid7()
        headers = self._headers(id_, message, key, position)
        body = self._body(message)
        row = OutboxRow(
            "rabbit",
            id_,
            queue.exchange.name,
            queue.routing_key,
            key or str(id_),
            headers,
            body,
            queue.expires or QUEUE_HORIZON,
        )
        self._rows.append(row)
        return id_

    def enqueue(
        self,
        lane_kind: LaneKind[Item],
        *,
        lane: str,
        item: Item,
        item_id: UUID | None = None,
        after: timedelta = AT_ONCE,
        expires_in: timedelta | None = None,
        hint: tuple[Topic, Message] | None = None,
    ) -> UUID:
        """Puts work at the end of a lane once the transaction commits. Returns the item's id.

        hint: a message that wakes other processes. It is not published if this process claims the lane with the item.

        A lane is one tenant's: that of this transaction. With an `item_id` that its kind has had already, nothing
        is enqueued. `after`: the item is not handled earlier. `expires_in`: if it has not begun by then, it is not done
        any more.
        """
        if type(item) is not lane_kind.item:
            raise ValueError(f"{type(item).__name__} is not the item of lane {lane_kind.name}")
        id_ = item_id or uuid7()
        headers = msgspec.json.encode(self._carrier()).decode()
        new = NewItem(
            lane_kind.name,
            self.tenant_id or "",
            lane,
            id_,
            msgspec.json.encode(item),
            headers,
            after,
            expires_in,
        )
        self.put(new)
        if hint:
            topic, message = hint
            self._hints[lane_kind.name, id_] = self._fact(topic, message, lane, uuid7())
        return id_

    def put(self, item: NewItem) -> None:
        """As `enqueue`, for an item in its stored form."""
        self.items.add(item)

    def _carrier(self) -> dict[str, str]:
        return telemetry.carrier() if self.carrier is None else self.carrier

    def _headers(self, id_: UUID, message: Message, subject: str | None, sequence: int | None = None) -> str:
        carrier = self._carrier()
        envelope = Envelope(
            id=id_,
            source=self.service,
            type=message.wire_name(),
            time=utcnow(),
            subject=subject,
            sequence=sequence,
            tenant_id=self.tenant_id,
            traceparent=carrier.get("traceparent"),
            tracestate=carrier.get("tracestate"),
        )
        return envelope.headers_json()

    def _body(self, message: Message) -> bytes:
        """Raises TooLarge if a bus cannot carry the message: the transaction of a message that could never be published
        must not commit, and the sender of the request must learn it."""
        last, body = self._encoded
        if message is not last:
            body = msgspec.json.encode(message)
            if len(body) > MAX_MESSAGE_BYTES:
                raise TooLarge(f"{message.wire_name()}: has {len(body)} bytes; a message may have {MAX_MESSAGE_BYTES}")
            self._encoded = message, body
        return body

    async def flush(self) -> None:
        """Writes the collected events, messages and items. The kernel calls it before the commit."""
        for statement, buffered in self._buffered.items():
            await self.sql(statement, *map(list, zip(*buffered, strict=True)))
        self._buffered.clear()
        events, self._events = self._events, []
        told: list[UUID | None] = [None] * len(self._rows)
        for new in events:
            self._publish(new)
            # The messages of an event that is stored already are not sent again.
            told += [None if new.is_new else new.event_id] * (len(self._rows) - len(told))
        messages, self._rows = self._rows, []
        if not (events or messages or self.items):
            return
        arguments: list[Any] = []
        if messages:
            arguments += outbox_columns(messages)
            if events:
                arguments.append(told)
        has_items = bool(self.items)
        statement = _write(events=bool(events), messages=bool(messages), items=has_items)
        if has_items:
            arguments += self.items.arguments()
        if events:
            rows = await event_store.append(await self.connection(), events, statement, *arguments)
            failpoint("after_append")
        else:
            rows = await self.sql(statement, *arguments)
        if has_items:
            self.woken |= self.items.inserted([row[-4:] for row in rows])
            hints = [hint for item, hint in self._hints.items() if not self.items.is_claimed(*item)]
            self._hints.clear()
            if hints:
                await insert_outbox(await self.connection(), hints)
                messages += hints
        self.buses |= {row.bus for row in messages}

    async def run_after_commit(self) -> None:
        for call in self._after:
            try:
                await call()
            except Exception as error:
                get_logger("infra.postgres.tx").warning(
                    "a call after the commit failed; the commit stands", error=describe(error)
                )

    async def close(self, *, commit: bool) -> None:
        if self._connection is None:
            return
        try:
            if commit:
                await db.commit(self._connection)
        finally:
            await self._pool.give_back(self._connection)
            self._connection = None


# The bits of a UUIDv7.
_TIME = 0xFFFFFFFFFFFF << 80
_RANDOM = 0x0FFF_3FFFFFFFFFFFFFFF
_VERSION_7 = 0x7000_8000000000000000


def derived_id(base: UUID, *parts: object) -> UUID:
    """The UUIDv7 that follows from `base` and `parts`, the same each time, with the time of `base`.

    Keeping the time keeps it in the inbox partition of `base`.
    """
    digest = hashlib.blake2b(repr(parts).encode(), key=base.bytes, digest_size=10).digest()
    return UUID(int=base.int & _TIME | int.from_bytes(digest) & _RANDOM | _VERSION_7)


def publications(
    aggregate: Aggregate[Any], stream_id: str, event_id: UUID, event: Any
) -> list[tuple[UUID, Publication]]:
    """The public messages of a stored fact, each with the id it has however often it is emitted."""
    return [
        (derived_id(event_id, "publication", n), publication)
        for n, publication in enumerate(aggregate.publish(stream_id, event))
    ]
