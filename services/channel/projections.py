"""Read models: the list of deliveries, and the counts of conversations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, assert_never
from uuid import UUID

from infra.postgres.read_models import Recorded, folded_read_model
from infra.postgres.tx import Tx
from services.channel.domain import part_id
from services.channel.events import (
    DeliveryEvent,
    DeliveryFailed,
    DeliveryQueued,
    DeliveryReceived,
    DeliveryResumed,
    DeliverySent,
    DeliveryUnknown,
)
from services.channel.publishing import CONVERSATION, DELIVERY


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
            await _settle(tx, delivery_id, "sent", vendor_message_id=event.vendor_message_id, part_ids=_part_ids(event))
        case DeliveryResumed():
            await _settle(tx, delivery_id, "queued")
        case DeliveryFailed():
            await _settle(tx, delivery_id, "failed", reason=event.reason, part_ids=_part_ids(event))
        case DeliveryUnknown():
            await _settle(tx, delivery_id, "unknown", reason=event.reason, part_ids=_part_ids(event))
        case DeliveryReceived(state):
            await _settle(tx, delivery_id, state)
        case _:
            assert_never(event)


def _part_ids(event: DeliverySent | DeliveryFailed | DeliveryUnknown) -> list[str] | None:
    return [part_id(event.channel_id, message) for message in event.parts if message] or None


async def _settle(
    tx: Tx,
    delivery_id: UUID,
    state: str,
    *,
    reason: str | None = None,
    vendor_message_id: str | None = None,
    part_ids: list[str] | None = None,
) -> None:
    await tx.sql(
        """
        UPDATE delivery
        SET state = $2, reason = $3, vendor_message_id = coalesce($4, vendor_message_id),
            part_ids = coalesce($5, part_ids), updated_at = clock_timestamp()
        WHERE id = $1
        """,
        delivery_id,
        state,
        reason,
        vendor_message_id,
        part_ids,
    )


def delivery(delivery_id: str, history: Sequence[Recorded]) -> Iterator[Mapping[str, Any]]:
    """The row that `project` leaves after these events."""
    row: dict[str, Any] = {}
    for event, tenant_id, at in history:
        match event:
            case DeliveryQueued():
                row |= {
                    "id": delivery_id,
                    "tenant_id": tenant_id,
                    "channel_id": event.channel_id,
                    "session_key": event.session_key,
                    "run_id": event.run_id,
                    "state": "queued",
                    "reason": None,
                    "vendor_message_id": None,
                    "part_ids": None,
                    "created_at": at,
                }
            case DeliverySent():
                row |= {"state": "sent", "reason": None}
                row["vendor_message_id"] = event.vendor_message_id or row["vendor_message_id"]
            case DeliveryResumed():
                row |= {"state": "queued", "reason": None}
            case DeliveryFailed():
                row |= {"state": "failed", "reason": event.reason}
            case DeliveryUnknown():
                row |= {"state": "unknown", "reason": event.reason}
            case DeliveryReceived(state):
                row |= {"state": state, "reason": None}
            case _:
                assert_never(event)
        if isinstance(event, DeliverySent | DeliveryFailed | DeliveryUnknown):
            row["part_ids"] = _part_ids(event) or row["part_ids"]
        row["updated_at"] = at
    yield row


def conversation(session_key: str, history: Sequence[Recorded]) -> Iterator[Mapping[str, Any]]:
    """The row that `services.channel.intake.ingest` leaves after these messages."""
    first, last = history[0], history[-1]
    yield {
        "session_key": session_key,
        "tenant_id": first.tenant_id,
        "channel_id": first.event.channel_id,
        "subject_id": last.event.subject_id,
        "position": len(history),
        "last_at": last.at,
    }


READ_MODELS = (
    folded_read_model(
        DELIVERY,
        delivery,
        name="deliveries",
        table="delivery",
        key=("id",),
        columns=(
            "tenant_id",
            "channel_id",
            "session_key",
            "run_id",
            "state",
            "reason",
            "vendor_message_id",
            "part_ids",
        ),
        stream="l.id::text",
        in_scope="l.id = ANY($1::text[]::uuid[])",
        new=("created_at", "updated_at"),
    ),
    folded_read_model(
        CONVERSATION,
        conversation,
        name="conversations",
        table="conversation",
        key=("session_key",),
        columns=("tenant_id", "channel_id", "subject_id", "position"),
        stream="l.session_key",
        in_scope="l.session_key = ANY($1::text[])",
        # A conversation to which we have written first.
        empty="l.position = 0",
        new=("last_at",),
    ),
)
