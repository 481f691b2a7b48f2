"""HTTP API of deliveries: the state of each outbound message."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import BaseModel

from infra.errors import InvalidMessage, NotFound
from infra.service.api import Paging, Reader, page
from infra.service.service import Runtime
from services.channel.domain import State

_COLUMNS = "id, channel_id, session_key, run_id, state, reason, vendor_message_id, created_at, updated_at, seq"


class DeliveryView(BaseModel):
    """A delivery as the API shows it."""

    id: UUID
    channel_id: UUID
    session_key: str
    run_id: UUID | None
    state: State
    """``unknown``: the message was sent, but the vendor did not confirm it."""
    reason: str | None
    """Why the state is ``failed`` or ``unknown``; else null."""
    vendor_message_id: str | None
    created_at: datetime
    updated_at: datetime


class DeliveryPage(BaseModel):
    items: list[DeliveryView]
    next: str | None


def router(runtime: Runtime) -> APIRouter:
    router = APIRouter(prefix="/api/v1/deliveries", tags=["deliveries"])

    @router.get("")
    async def list_deliveries(
        who: Reader,
        paging: Paging,
        run_id: Annotated[UUID | None, Query()] = None,
        channel_id: Annotated[UUID | None, Query()] = None,
        state: Annotated[State | None, Query()] = None,
    ) -> DeliveryPage:
        """The deliveries of the tenant, newest first."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            rows = await tx.sql(
                f"""
                SELECT {_COLUMNS} FROM delivery WHERE seq < $1 AND ($2::uuid IS NULL OR run_id = $2)
                AND ($3::uuid IS NULL OR channel_id = $3) AND ($4::text IS NULL OR state = $4)
                ORDER BY seq DESC LIMIT $5
                """,
                position(paging.after, start=2**63 - 1),
                run_id,
                channel_id,
                state,
                paging.limit + 1,
            )
        found = page(rows, paging, key=lambda row: str(row[-1]))
        return DeliveryPage(items=[_view(row) for row in found["items"]], next=found["next"])

    @router.get("/{delivery_id}")
    async def get_delivery(delivery_id: UUID, who: Reader) -> DeliveryView:
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            rows = await tx.sql(f"SELECT {_COLUMNS} FROM delivery WHERE id = $1", delivery_id)
        if not rows:
            raise NotFound("the tenant has no delivery with this id")
        return _view(rows[0])

    return router


def position(cursor: str | None, *, start: int) -> int:
    """The number of the row after which a page begins; `start` for the first page. Raises InvalidMessage."""
    if cursor is None:
        return start
    if not (cursor.isascii() and cursor.isdecimal() and len(cursor) < 19):
        raise InvalidMessage("cursor", "is not a valid cursor")
    return int(cursor)


def _view(row: tuple[Any, ...]) -> DeliveryView:
    id_, channel_id, session_key, run_id, state, reason, vendor_message_id, created_at, updated_at, _ = row
    return DeliveryView(
        id=id_,
        channel_id=channel_id,
        session_key=session_key,
        run_id=run_id,
        state=state,
        reason=reason,
        vendor_message_id=vendor_message_id,
        created_at=created_at,
        updated_at=updated_at,
    )
