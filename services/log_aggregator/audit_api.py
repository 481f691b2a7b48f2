"""HTTP: the audit chains."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import AwareDatetime, BaseModel

from infra.errors import InvalidMessage
from infra.service.api import Paging, page
from infra.service.service import Runtime
from services.log_aggregator import audit
from services.log_aggregator.access import AskedTenant

# PostgreSQL takes no NUL.
_Text = Annotated[str | None, Query(min_length=1, max_length=500, pattern=r"^[^\x00]*$")]


class Verified(BaseModel):
    """records: how many are good. head: hash of the last record, hexadecimal. broken_at: where not `ok`, the first
    record that is changed or missing.
    """

    records: int
    ok: bool
    head: str
    broken_at: int | None


class AuditRecord(BaseModel):
    """seq: place in the chain, from 1. hash: of the hash before it and the record's canonical JSON (all fields but
    seq and hash, keys sorted, no spaces, ASCII), SHA-256, hexadecimal.
    """

    seq: int
    id: str
    service: str
    tenant_id: str | None
    at: datetime
    actor: str
    action: str
    object_kind: str
    object_id: str
    outcome: Literal["done", "denied", "failed"]
    details: dict[str, str]
    hash: str


def router(runtime: Runtime) -> APIRouter:
    routes = APIRouter(tags=["audit"])

    @routes.get("/api/v1/audit")
    async def list_acts(
        tenant: AskedTenant,
        paging: Paging,
        action: _Text = None,
        object_id: _Text = None,
        actor: _Text = None,
        since: AwareDatetime | None = None,
    ) -> dict[str, Any]:
        """Newest first. The operator sees the system's chain, or with `tenant_id` that tenant's."""
        wanted = {"action": action, "object_id": object_id, "actor": actor}
        found = await audit.listed(
            runtime.request if tenant else runtime.worker,
            tenant or "",
            {name: value for name, value in wanted.items() if value},
            since,
            _seq(paging.after),
            paging.limit + 1,
        )
        return page([AuditRecord(**record) for record in found], paging, lambda record: str(record.seq))

    @routes.get("/api/v1/audit/verify")
    async def verify(tenant: AskedTenant) -> Verified:
        """Recomputes every hash of the chain."""
        verdict = await audit.verify(runtime.request if tenant else runtime.worker, tenant or "")
        return Verified(
            records=verdict.records,
            ok=verdict.broken_at is None,
            head=verdict.head.hex(),
            broken_at=verdict.broken_at,
        )

    return routes


def _seq(cursor: str | None) -> int | None:
    if cursor is not None and not (cursor.isdecimal() and len(cursor) < 19):
        raise InvalidMessage("cursor", "is none that a list gave")
    return int(cursor) if cursor else None
