"""The rows of the outbox: messages in their final bytes, which a relay publishes after the commit."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection

from infra.postgres import db

# This must never change: rows of a key may be pending, and its bucket must stay the same.
BUCKETS = 16


class OutboxRow(NamedTuple):
    """A message in its final bytes. Order is kept per destination and key."""

    bus: str
    message_id: UUID
    destination: str
    routing_key: str
    key: str
    headers: str
    body: bytes
    keep_for: timedelta

    @property
    def bucket(self) -> int:
        return zlib.crc32(self.key.encode()) % BUCKETS


@cache
def insert_outbox_call(after: int = 0, *, unless_stored: bool = False) -> str:
    """The statement that writes `outbox_columns`, with parameters behind the first `after`. Positions are drawn in the
    order of the rows.

    unless_stored: a further parameter has the id of the event that each row reports, or null. The row is not written
    if ``stored.ids`` has this id.
    """
    columns = [f"${after + n}::{type_}[]" for n, type_ in enumerate((*_TYPES, "uuid"), 1)]
    if not unless_stored:
        return f"{_INSERT} FROM unnest({', '.join(columns[:-1])}) AS n(b, u, m, d, r, k, h, y, t)"
    return f"""
        {_INSERT} FROM stored, unnest({", ".join(columns)}) AS n(b, u, m, d, r, k, h, y, t, e)
        WHERE e IS NULL OR e <> ALL (stored.ids)
    """


_TYPES = ("text", "smallint", "uuid", "text", "text", "text", "text", "bytea", "interval")
_INSERT = """
INSERT INTO outbox (bus, bucket, message_id, destination, routing_key, key, headers, body, keep_until)
SELECT b, u, m, d, r, k, h, y, clock_timestamp() + t
"""


def outbox_columns(rows: Sequence[OutboxRow]) -> list[list[Any]]:
    """The arguments of `insert_outbox_call`."""
    return [
        [row.bus for row in rows],
        [row.bucket for row in rows],
        [row.message_id for row in rows],
        [row.destination for row in rows],
        [row.routing_key for row in rows],
        [row.key for row in rows],
        [row.headers for row in rows],
        [row.body for row in rows],
        [row.keep_for for row in rows],
    ]


async def insert_outbox(connection: AsyncConnection, rows: Sequence[OutboxRow]) -> None:
    """Writes messages into the outbox, positions in the order given."""
    await db.sql(connection, insert_outbox_call(), *outbox_columns(rows))
