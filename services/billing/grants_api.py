"""HTTP of grants. The operator makes them; a tenant reads its own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from infra.clock import utcnow
from infra.errors import InvalidMessage
from infra.postgres.tx import Tx
from infra.security.audit import audit
from infra.service.api import Operator, Paging, Viewer, id_cursor, page
from infra.service.idempotency import once
from infra.service.service import Runtime
from infra.web.times import Time
from services.billing import accounts, grants
from services.billing.accounts import MAX_CREDIT_NANOS
from services.billing.grants import Grant
from services.billing.plans_api import Text, owner_of_list


class NewGrant(BaseModel):
    model_config = ConfigDict(extra="forbid")
    tenant_id: Text
    nanos: int = Field(gt=0, le=MAX_CREDIT_NANOS)
    kind: Literal["prepaid", "promotional"] = "promotional"
    """prepaid: the tenant has paid for it."""
    priority: int = Field(grants.DEFAULT_PRIORITY, ge=0, le=1000)
    """Low numbers are burned first."""
    expires_at: Time | None = None
    rollover_until: Time | None = None
    """The rest at `expires_at` stays until then. Null: nothing does."""
    rollover_nanos: int | None = Field(None, gt=0, le=MAX_CREDIT_NANOS)
    """The largest amount that is rolled over. Null: the whole rest."""
    reason: Text


def router(runtime: Runtime) -> APIRouter:
    router = APIRouter(prefix="/api/v1", tags=["plans"])

    @router.post("/grants", status_code=201, response_model=Grant)
    async def add_grant(body: NewGrant, who: Operator, request: Request) -> Response:
        """Grants credit. Grants are burned by priority, then expiry, then age; the rest of an expired one is booked."""
        if body.expires_at and body.expires_at <= utcnow():
            raise InvalidMessage("expires_at", "must be in the future")
        if body.rollover_until and not (body.expires_at and body.expires_at < body.rollover_until):
            raise InvalidMessage("rollover_until", "must be after expires_at")
        if body.rollover_nanos and not body.rollover_until:
            raise InvalidMessage("rollover_nanos", "needs rollover_until")

        async def work(tx: Tx) -> tuple[int, Grant]:
            tx.tenant_id = body.tenant_id
            grant_id = await accounts.add_credit(
                tx,
                body.tenant_id,
                body.nanos,
                kind=body.kind,
                reason=body.reason,
                actor=who.actor,
                priority=body.priority,
                expires_at=body.expires_at,
                rollover_until=body.rollover_until,
                rollover_nanos=body.rollover_nanos,
                field="nanos",
            )
            audit(tx, who.actor, "billing.grant", "grant", str(grant_id), nanos=str(body.nanos))
            [made] = await grants.listed(tx, body.tenant_id, after=None, limit=1, grant_id=grant_id)
            return 201, made

        return await once(request, runtime, who, work)

    @router.get("/grants")
    async def list_grants(
        who: Viewer, paging: Paging, tenant_id: Annotated[str | None, Query(description="for the operator")] = None
    ) -> dict[str, Any]:
        """Lists a tenant's grants with the amounts that are left."""
        tenant = owner_of_list(who, tenant_id)
        after = id_cursor(paging)
        async with runtime.worker.begin(tenant_id=tenant) as tx:
            await accounts.lock_one(tx, tenant)
            await grants.settle(tx, tenant)
            found = await grants.listed(tx, tenant, after=after, limit=paging.limit + 1)
        return page(found, paging, lambda grant: str(grant.id))

    return router
