"""Counts of delivered messages by tenant, day (UTC) and channel. They are shown as usage and have no price."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import date
from uuid import UUID

from infra.postgres.tx import Tx


async def store_channel_types(tx: Tx, channels: Iterable[tuple[UUID, str, str]]) -> None:
    """Stores the type of each new channel: (channel, tenant, type)."""
    # Rows are locked in the order of their key. Transactions of parallel partitions would otherwise deadlock.
    columns = list(zip(*sorted(set(channels)), strict=True))
    if columns:
        await tx.sql(
            """
            INSERT INTO channel (channel_id, tenant_id, type)
            SELECT * FROM unnest($1::uuid[], $2::text[], $3::text[])
            ON CONFLICT DO NOTHING
            """,
            *map(list, columns),
        )


async def count(tx: Tx, delivered: Iterable[tuple[str, date, UUID]]) -> None:
    """Adds one message for each (tenant, day, channel)."""
    # Rows are locked in the order of their key, as above.
    counts = sorted(Counter(delivered).items())
    if counts:
        await tx.sql(
            """
            INSERT INTO delivered AS d (tenant_id, day, channel_id, messages)
            SELECT * FROM unnest($1::text[], $2::date[], $3::uuid[], $4::bigint[])
            ON CONFLICT (tenant_id, day, channel_id) DO UPDATE SET messages = d.messages + excluded.messages
            """,
            [tenant_id for (tenant_id, _, _), _ in counts],
            [day for (_, day, _), _ in counts],
            [channel_id for (_, _, channel_id), _ in counts],
            [messages for _, messages in counts],
        )
