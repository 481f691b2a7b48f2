"""Counts of delivered messages by tenant, day (UTC) and channel. They are shown as usage and have no price."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID

from infra.postgres.tx import Tx


async def learn(tx: Tx, tenant_id: str, channel_id: UUID, type_: str) -> None:
    await tx.sql(
        "INSERT INTO channel (channel_id, tenant_id, type) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
        channel_id,
        tenant_id,
        type_,
    )


async def count(tx: Tx, tenant_id: str, channel_id: UUID, at: datetime) -> None:
    await tx.sql(
        "INSERT INTO delivered AS d (tenant_id, day, channel_id, messages) "
        "VALUES ($1, $3, $2, 1) "
        "ON CONFLICT (tenant_id, day, channel_id) DO UPDATE SET messages = d.messages + 1",
        tenant_id,
        channel_id,
        at.astimezone(UTC).date(),
    )
