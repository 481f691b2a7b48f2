"""Read models that a service writes in the transaction of their source: its own events, or rows of its own tables.

Source and read model change in one commit, so every snapshot of the database has them in agreement. A verification
rebuilds the rows scope by scope (a stream, a tenant) and compares them with the live ones in the same snapshot, while
the service writes. `infra.service.verification` drives it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection

from infra.postgres.db import sql
from infra.postgres.event_store import Aggregate

Rebuild = Callable[[AsyncConnection, Sequence[str]], Awaitable[str]]
"""Makes the rows of some scopes again: a JSON array of objects, column → value."""


class Recorded(NamedTuple):
    """A stored event in its current form."""

    event: Any
    tenant_id: str
    at: datetime


Fold = Callable[[str, Sequence[Recorded]], Iterable[Mapping[str, Any]]]
"""The rows that follow from all events of a stream, whose own id is the first argument. Pure."""


class FoldedEvents(NamedTuple):
    """The source of a read model that is folded from the events of its streams."""

    aggregate: Aggregate[Any]
    fold: Fold


@dataclass(frozen=True)
class ReadModel:
    """Columns of a table that follow from a source in the same database. The statements name the table's rows `l`."""

    name: str
    table: str
    key: tuple[str, ...]
    columns: tuple[str, ...]
    """Those that are compared, besides the key."""
    scopes: str
    """Statement: the scopes of the source after $1, in order, at most $2 of them."""
    total: str
    """Statement: the number of scopes."""
    strays: str
    """Statement: at most $1 scopes of rows whose source is not there."""
    in_scope: str
    """Condition: the row belongs to one of the scopes $1."""
    rebuild: Rebuild
    new: tuple[str, ...] = ()
    """Columns that are not compared, and that a missing row gets when it is made again."""
    restorable: str = "true"
    """Condition on a rebuilt row `r`: it has all that a new row needs."""
    whole: bool = True
    """False: the rows have columns of another origin too, so a repair neither makes nor deletes rows."""
    batch: int = 500
    """The number of scopes that are compared in one snapshot."""
    events: FoldedEvents | None = None
    """None: the source are rows."""


def folded_read_model(
    aggregate: Aggregate[Any],
    fold: Fold,
    *,
    name: str,
    table: str,
    key: tuple[str, ...],
    columns: tuple[str, ...],
    stream: str,
    in_scope: str,
    empty: str = "false",
    new: tuple[str, ...] = (),
    restorable: str = "true",
    whole: bool = True,
) -> ReadModel:
    """A read model of the service's events. A scope is a stream.

    stream: expression for the stream's own id. empty: condition of a row that has no stream yet.
    """
    prefix = f"{aggregate.name}:"

    async def rebuild(connection: AsyncConnection, ids: Sequence[str]) -> str:
        rows = await sql(
            connection,
            """
            SELECT stream_id, type, schema_version, data, headers, recorded_at
            FROM event
            WHERE stream_id = ANY($1::text[])
            ORDER BY stream_id, version
            """,
            [prefix + id_ for id_ in ids],
        )
        streams: dict[str, list[Recorded]] = {}
        for stream_id, type_, version, data, headers, at in rows:
            event = aggregate.events.decode(type_, version, data)
            tenant_id = msgspec.json.decode(headers, type=_Headers).tenant_id
            streams.setdefault(stream_id.removeprefix(prefix), []).append(Recorded(event, tenant_id, at))
        made = [row for id_, events in streams.items() for row in fold(id_, events)]
        return msgspec.json.encode([_readable(row) for row in made]).decode()

    return ReadModel(
        name=name,
        table=table,
        key=key,
        columns=columns,
        scopes=f"""
            SELECT substr(stream_id, {len(prefix) + 1}) FROM stream
            WHERE stream_id > '{prefix}' || $1 AND starts_with(stream_id, '{prefix}')
            ORDER BY stream_id LIMIT $2
        """,
        total=f"SELECT count(*) FROM stream WHERE starts_with(stream_id, '{prefix}')",
        strays=f"""
            SELECT DISTINCT {stream} FROM "{table}" AS l
            WHERE NOT ({empty}) AND NOT EXISTS (SELECT FROM stream AS s WHERE s.stream_id = '{prefix}' || {stream})
            LIMIT $1
        """,
        in_scope=in_scope,
        rebuild=rebuild,
        new=new,
        restorable=restorable,
        whole=whole,
        events=FoldedEvents(aggregate, fold),
    )


class _Headers(msgspec.Struct):
    tenant_id: str = ""


def rebuilt_by_query(rows: str) -> Rebuild:
    """Rebuilds by a query for the rows of the scopes $1."""

    async def rebuild(connection: AsyncConnection, scopes: Sequence[str]) -> str:
        [(made,)] = await sql(
            connection, f"SELECT coalesce(jsonb_agg(to_jsonb(r)), '[]')::text FROM ({rows}) AS r", list(scopes)
        )
        return str(made)

    return rebuild


def _readable(row: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes in the form that PostgreSQL reads."""
    return {name: f"\\x{value.hex()}" if isinstance(value, bytes) else value for name, value in row.items()}


class RowDifference(msgspec.Struct, frozen=True):
    """A row that differs from its source."""

    key: str
    what: str
    """missing, extra, or the columns that differ."""


@dataclass
class Comparison:
    """Row counts and hashes of live and rebuilt rows in one snapshot. A hash does not depend on the rows' order."""

    live_rows: int
    live_hash: int
    rebuilt_rows: int
    rebuilt_hash: int
    differences: list[RowDifference] = field(default_factory=list)


def _names(columns: Iterable[str], of: str = "") -> str:
    return ", ".join(f'{of}"{column}"' for column in columns)


def _rebuilt(model: ReadModel, columns: Iterable[str]) -> str:
    return f'SELECT {_names(columns)} FROM jsonb_populate_recordset(NULL::"{model.table}", $2::text::jsonb)'


async def compare(connection: AsyncConnection, model: ReadModel, scopes: Sequence[str]) -> Comparison:
    """Rebuilds the rows of these scopes and compares them with the live ones."""
    made = await model.rebuild(connection, scopes)
    columns = (*model.key, *model.columns)
    both = f"""
        live AS MATERIALIZED (SELECT {_names(columns)} FROM "{model.table}" AS l WHERE {model.in_scope}),
        rebuilt AS MATERIALIZED ({_rebuilt(model, columns)})
    """
    [(live_rows, live_hash, rebuilt_rows, rebuilt_hash)] = await sql(
        connection,
        f"""
        WITH {both}
        SELECT l.*, r.*
        FROM (SELECT count(*), coalesce(sum(hashtextextended(t::text, 0)::numeric), 0) FROM live AS t) AS l,
             (SELECT count(*), coalesce(sum(hashtextextended(t::text, 0)::numeric), 0) FROM rebuilt AS t) AS r
        """,
        list(scopes),
        made,
    )
    found = Comparison(live_rows, int(live_hash), rebuilt_rows, int(rebuilt_hash))
    if (found.live_rows, found.live_hash) != (found.rebuilt_rows, found.rebuilt_hash):
        first = f'"{model.key[0]}"'
        differs = ", ".join(f'CASE WHEN l."{c}" IS DISTINCT FROM r."{c}" THEN \'{c}\' END' for c in model.columns)
        rows = await sql(
            connection,
            f"""
            WITH {both}
            SELECT concat_ws('/', {", ".join(f'coalesce(l."{c}"::text, r."{c}"::text)' for c in model.key)}),
                   CASE WHEN l.{first} IS NULL THEN 'missing' WHEN r.{first} IS NULL THEN 'extra'
                        ELSE concat_ws(', ', {differs}) END
            FROM live AS l FULL JOIN rebuilt AS r USING ({_names(model.key)})
            WHERE l.{first} IS NULL OR r.{first} IS NULL OR
                  ROW({_names(model.columns, "l.")}) IS DISTINCT FROM ROW({_names(model.columns, "r.")})
            ORDER BY 1
            """,
            list(scopes),
            made,
        )
        found.differences = [RowDifference(key, what) for key, what in rows]
    return found


async def repair(connection: AsyncConnection, model: ReadModel, scopes: Sequence[str]) -> None:
    """Makes the live rows of these scopes equal to the rebuilt ones. The caller holds the table's lock."""
    made = await model.rebuild(connection, scopes)
    same = " AND ".join(f'l."{c}" = r."{c}"' for c in model.key)
    if model.whole:
        # First: such a row may have a unique value that another row gets now.
        await sql(
            connection,
            f"""
            DELETE FROM "{model.table}" AS l
            WHERE {model.in_scope} AND NOT EXISTS (SELECT FROM ({_rebuilt(model, model.key)}) AS r WHERE {same})
            """,
            list(scopes),
            made,
        )
    await sql(
        connection,
        f"""
        UPDATE "{model.table}" AS l
        SET {", ".join(f'"{c}" = r."{c}"' for c in model.columns)}
        FROM ({_rebuilt(model, (*model.key, *model.columns))}) AS r
        WHERE {same} AND {model.in_scope}
            AND ROW({_names(model.columns, "l.")}) IS DISTINCT FROM ROW({_names(model.columns, "r.")})
        """,
        list(scopes),
        made,
    )
    if not model.whole:
        return
    columns = (*model.key, *model.columns, *model.new)
    await sql(
        connection,
        f"""
        INSERT INTO "{model.table}" ({_names(columns)})
        SELECT {_names(columns, "r.")}
        FROM ({_rebuilt(model, columns)}) AS r
        WHERE {model.restorable} AND NOT EXISTS (SELECT FROM "{model.table}" AS l WHERE {same} AND {model.in_scope})
        ORDER BY {_names(model.key, "r.")}
        """,
        list(scopes),
        made,
    )
