"""Appending to streams and reading them.

Append is compare-and-set on the stream's version, idempotent by event id, and gapless: the version row is locked
before anything else, and versions are counted up from it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, NamedTuple, TypeVar, cast
from uuid import UUID

import msgspec
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from infra.errors import Conflict
from infra.postgres.db import CONFLICT, message, sql, sqlstate
from infra.postgres.upcasting import EventTypes, schema_version
from protos.envelope import Message
from protos.topology import Topic

State = TypeVar("State")


class Publication(NamedTuple):
    """A public message made from a stored fact."""

    topic: Topic
    key: str
    message: Message


@dataclass(frozen=True)
class Aggregate(Generic[State]):
    """A kind of stream: its events, its state, its commands and its messages."""

    name: str
    events: EventTypes
    initial: Callable[[], State]
    evolve: Callable[[State, Any], State]
    """The state after an event. Pure."""
    decide: Callable[[Any, State], Sequence[Any]]
    """The events that a command leads to. Pure."""
    publish: Callable[[str, Any], Iterable[Publication]] = lambda stream_id, event: ()
    """The messages that others get of an event; the arguments are the stream's own id and the event. A replay beyond
    the topic's retention calls the same function."""

    def stream(self, stream_id: str) -> Stream[State]:
        return Stream(self, stream_id)


@dataclass(frozen=True)
class Stream(Generic[State]):
    """One stream of a kind; its row in the store is ``<kind>:<id>``."""

    aggregate: Aggregate[State]
    id: str

    @property
    def row(self) -> str:
        return f"{self.aggregate.name}:{self.id}"


class NewEvent(NamedTuple):
    """`expected`: the version that the stream must have before the first event of the transaction; None: any.

    tenant_id: whose fact it is; in one transaction there may be several tenants' facts. is_new: its id was made in this
    very attempt of the transaction, so that it cannot be stored already.
    """

    stream: Stream[Any]
    event_id: UUID
    event: Any
    expected: int | None
    tenant_id: str | None = None
    is_new: bool = False


class StoredEvent(NamedTuple):
    """An event in the form of this version of the code, with its place."""

    position: int
    """In the order of all events of the service; with gaps."""
    stream_id: str
    version: int
    """In its stream, from 1, without gaps."""
    event_id: UUID
    event: Any
    headers: dict[str, str]


APPEND = """
append_events($1::text[], $2::uuid[], $3::bigint[], $4::text[], $5::int[], $6::bytea[], $7::text[], $8::uuid[])
"""
"""Locks the streams in the order of their names, as all transactions do: they never deadlock. Returns the ids of the
events that are stored already."""


async def append(
    connection: AsyncConnection, new: Sequence[NewEvent], statement: str = f"SELECT {APPEND}", *arguments: Any
) -> Sequence[tuple[Any, ...]]:
    """Stores the events of one transaction by `statement`: its first parameters are those of `APPEND`, its others are
    `arguments`. Returns its rows.

    A stream is not changed if all its events are stored already (same ids): the earlier append stands.
    Raises Conflict if a stream is not at the expected version any more, or if only a part of a stream's events is
    stored already.
    """
    try:
        return await sql(
            connection,
            statement,
            [e.stream.row for e in new],
            [e.event_id for e in new],
            [e.expected for e in new],
            [type(e.event).__name__ for e in new],
            [schema_version(type(e.event)) for e in new],
            [msgspec.json.encode(e.event) for e in new],
            [msgspec.json.encode({"tenant_id": e.tenant_id} if e.tenant_id else {}).decode() for e in new],
            [e.event_id for e in new if not e.is_new],
            *arguments,
        )
    except DBAPIError as error:
        if sqlstate(error) == CONFLICT:
            raise Conflict(message(error)) from error
        raise


async def lock(connection: AsyncConnection, stream: Stream[State]) -> tuple[State, int]:
    """As `load`. The stream's row is locked until the transaction ends, if it exists."""
    rows = await sql(connection, "SELECT * FROM lock_stream($1)", stream.row)
    return folded(stream, cast("Sequence[tuple[str, int, bytes]]", rows)), len(rows)


async def load(connection: AsyncConnection, stream: Stream[State]) -> tuple[State, int]:
    """The stream's state and version (0 for a stream that does not exist)."""
    rows = await sql(
        connection,
        "SELECT type, schema_version, data FROM event WHERE stream_id = $1 ORDER BY version",
        stream.row,
    )
    return folded(stream, cast("Sequence[tuple[str, int, bytes]]", rows)), len(rows)


def folded(stream: Stream[State], rows: Iterable[tuple[str, int, bytes]]) -> State:
    """The state after the stream's events: type, schema version and data of each, in order."""
    aggregate = stream.aggregate
    state = aggregate.initial()
    for name, version, data in rows:
        state = aggregate.evolve(state, aggregate.events.decode(name, version, data))
    return state


async def history(connection: AsyncConnection, stream: Stream[Any]) -> list[tuple[Any, datetime]]:
    """Every event of the stream, in order, with the time when it was stored."""
    rows = await sql(
        connection,
        "SELECT type, schema_version, data, recorded_at FROM event WHERE stream_id = $1 ORDER BY version",
        stream.row,
    )
    return [(stream.aggregate.events.decode(name, version, data), at) for name, version, data, at in rows]


async def rewrite(connection: AsyncConnection, facts: Mapping[UUID, Any]) -> None:
    """Replaces the content of stored events, by event id. Type, version and position stay.

    Only for texts that must be removed: the state that a fold makes of the events must stay the same.
    """
    ids = sorted(facts)
    await sql(
        connection,
        """
        UPDATE event SET data = n.data, schema_version = n.schema_version
        FROM unnest($1::uuid[], $2::bytea[], $3::int[]) AS n(event_id, data, schema_version)
        WHERE event.event_id = n.event_id
        """,
        ids,
        [msgspec.json.encode(facts[id_]) for id_ in ids],
        [schema_version(type(facts[id_])) for id_ in ids],
    )


async def read_all(
    connection: AsyncConnection, aggregate: Aggregate[Any], *, limit: int = 1000
) -> AsyncIterator[StoredEvent]:
    """Every event of a kind in position order, which per stream is the order of versions."""
    prefix, after = f"{aggregate.name}:", 0
    while True:
        rows = await sql(
            connection,
            """
            SELECT position, stream_id, version, event_id, type, schema_version, data, headers FROM event
            WHERE position > $1 AND starts_with(stream_id, $2) ORDER BY position LIMIT $3
            """,
            after,
            prefix,
            limit,
        )
        for position, stream_id, version, event_id, name, schema, data, headers in rows:
            event = aggregate.events.decode(name, schema, data)
            yield StoredEvent(
                position,
                stream_id.removeprefix(prefix),
                version,
                event_id,
                event,
                msgspec.json.decode(headers),
            )
        if len(rows) < limit:
            return
        after = rows[-1][0]
