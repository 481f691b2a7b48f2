"""The rows of the outbox: messages in their final bytes, which a relay publishes after the commit."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from datetime import timedelta
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


INSERT_OUTBOX = """
INSERT INTO outbox (bus, bucket, message_id, destination, routing_key, key, headers, body, keep_until)
SELECT b, u, m, d, r, k, h, y, clock_timestamp() + t
FROM unnest($1::text[], $2::smallint[], $3::uuid[], $4::text[], $5::text[], $6::text[], $7::text[], $8::bytea[],
            $9::interval[]) AS n(b, u, m, d, r, k, h, y, t)
"""


def outbox_columns(rows: Sequence[OutboxRow]) -> list[list[Any]]:
    """The arguments of `INSERT_OUTBOX`."""
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
    await db.sql(connection, INSERT_OUTBOX, *outbox_columns(rows))
