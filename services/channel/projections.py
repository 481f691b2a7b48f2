"""Read model: the list of deliveries."""

from __future__ import annotations

from typing import assert_never
from uuid import UUID

from infra.postgres.tx import Tx
from services.channel.events import (
    DeliveryEvent,
    DeliveryFailed,
    DeliveryQueued,
    DeliveryReceived,
    DeliverySent,
    DeliveryUnknown,
)


async def project(tx: Tx, delivery_id: UUID, event: DeliveryEvent) -> None:
    """Updates the row of the delivery in the transaction that appends the event."""
    match event:
        case DeliveryQueued():
            await tx.sql(
                """
                INSERT INTO delivery (id, tenant_id, channel_id, session_key, run_id, state)
                VALUES ($1, $2, $3, $4, $5, 'queued')
                """,
                delivery_id,
                tx.tenant_id,
                event.channel_id,
                event.session_key,
                event.run_id,
            )
        case DeliverySent():
            await _settle(tx, delivery_id, "sent", vendor_message_id=event.vendor_message_id)
        case DeliveryFailed():
            await _settle(tx, delivery_id, "failed", reason=event.reason)
        case DeliveryUnknown():
            await _settle(tx, delivery_id, "unknown", reason=event.reason)
        case DeliveryReceived(state):
            await _settle(tx, delivery_id, state)
        case _:
            assert_never(event)


async def _settle(
    tx: Tx, delivery_id: UUID, state: str, *, reason: str | None = None, vendor_message_id: str | None = None
) -> None:
    await tx.sql(
        """
        UPDATE delivery
        SET state = $2, reason = $3, vendor_message_id = coalesce($4, vendor_message_id),
            updated_at = clock_timestamp()
        WHERE id = $1
        """,
        delivery_id,
        state,
        reason,
        vendor_message_id,
    )
