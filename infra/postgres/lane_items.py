"""Inserts items at the end of lanes, in the transaction that asks for the work. `infra.lanes` processes them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import NamedTuple, Protocol, TypeVar
from uuid import UUID

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection

from infra.postgres.db import sql

Item = TypeVar("Item", bound=msgspec.Struct)
ItemOf = TypeVar("ItemOf", bound=msgspec.Struct, covariant=True)


class LaneKind(Protocol[ItemOf]):
    """The part of `infra.lanes.lane.Lane` that a transaction needs."""

    @property
    def name(self) -> str: ...

    @property
    def item(self) -> type[ItemOf]: ...


class NewItem(NamedTuple):
    """An item to be enqueued. `body` and `headers` are JSON."""

    kind: str
    tenant_id: str
    lane: str
    item_id: UUID
    body: bytes
    headers: str
    not_before: datetime | None = None
    expires_in: timedelta | None = None


async def insert_items(connection: AsyncConnection, items: Sequence[NewItem]) -> None:
    """Appends items to their lanes, in the order given. An item whose id exists already is skipped.

    The lanes' rows are locked until the transaction ends: an item that commits later stands behind.
    """
    # Lanes are locked in the order of their key, everywhere. Transactions with the same lanes would otherwise deadlock.
    lanes = sorted({(item.kind, item.tenant_id, item.lane) for item in items})
    rows = await sql(
        connection,
        """
        INSERT INTO lane AS l (kind, tenant_id, lane)
        SELECT * FROM unnest($1::text[], $2::text[], $3::text[])
        ON CONFLICT (kind, tenant_id, lane) DO UPDATE SET last_seq = l.last_seq
        RETURNING kind, tenant_id, lane, lane_id
        """,
        *map(list, zip(*lanes, strict=True)),
    )
    ids = {(kind, tenant_id, lane): lane_id for kind, tenant_id, lane, lane_id in rows}
    await sql(
        connection,
        # A statement of its own: it sees the items that others enqueued before the locks were granted. Items are
        # inserted in the order of their ids: two transactions may enqueue the same ids in different lanes.
        """
        WITH fresh AS (
            INSERT INTO lane_item (lane_id, seq, kind, tenant_id, item_id, body, headers, not_before, expires_at)
            SELECT l.lane_id, l.last_seq + row_number() OVER (PARTITION BY l.lane_id ORDER BY n.n),
                l.kind, l.tenant_id, n.id, n.body, n.headers, coalesce(n.not_before, clock_timestamp()),
                clock_timestamp() + n.expires_in
            FROM unnest($1::bigint[], $2::uuid[], $3::bytea[], $4::text[], $5::timestamptz[], $6::interval[])
                WITH ORDINALITY AS n(lane_id, id, body, headers, not_before, expires_in, n)
            JOIN lane l USING (lane_id)
            WHERE NOT EXISTS (
                SELECT FROM lane_item o
                WHERE o.kind = l.kind AND o.tenant_id = l.tenant_id AND o.item_id = n.id
            )
            ORDER BY n.id
            ON CONFLICT (kind, tenant_id, item_id) DO NOTHING
            RETURNING lane_id, seq, least(not_before, expires_at) AS ready_at
        )
        UPDATE lane l SET last_seq = f.last, ready_at = coalesce(l.ready_at, f.ready_at)
        FROM (
            SELECT lane_id, max(seq) AS last, (array_agg(ready_at ORDER BY seq))[1] AS ready_at
            FROM fresh
            GROUP BY lane_id
        ) f
        WHERE l.lane_id = f.lane_id
        """,
        [ids[item.kind, item.tenant_id, item.lane] for item in items],
        [item.item_id for item in items],
        [item.body for item in items],
        [item.headers for item in items],
        [item.not_before for item in items],
        [item.expires_in for item in items],
    )
