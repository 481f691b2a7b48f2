"""HTTP of grants. The operator makes them; a tenant buys credit, and reads its own grants."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from infra.clock import utcnow
from infra.errors import InvalidMessage
from infra.postgres.tx import Tx
from infra.security.audit import audit
from infra.security.auth import Identity
from infra.service.api import Manager, Paging, Viewer, id_cursor, page
from infra.service.idempotency import once
from infra.service.service import Runtime
from infra.web.times import Time
from services.billing.credit import accounts, grants
from services.billing.credit.accounts import MAX_CREDIT_NANOS
from services.billing.credit.grants import Grant
from services.billing.invoices import purchases
from services.billing.invoices.store import Invoice
from services.billing.plans_api import Text, owner_of_list


class NewGrant(BaseModel):
    model_config = ConfigDict(extra="forbid")
    tenant_id: Text | None = None
    """For the operator. A tenant's own is the only one that it may name."""
    nanos: int = Field(gt=0, le=MAX_CREDIT_NANOS)
    """Of a tenant: the credit that it buys, before tax, in whole minor units (cents)."""
    kind: Literal["prepaid", "promotional"] = "promotional"
    """prepaid: the tenant has paid for it."""
    priority: int = Field(grants.DEFAULT_PRIORITY, ge=0, le=1000)
    """Low numbers are burned first."""
    expires_at: Time | None = None
    rollover_until: Time | None = None
    """The rest at `expires_at` stays until then. Null: nothing does."""
    rollover_nanos: int | None = Field(None, gt=0, le=MAX_CREDIT_NANOS)
    """The largest amount that is rolled over. Null: the whole rest."""
    reason: Text | None = None
    """For the operator. Of a tenant: a text for its invoice, or nothing."""


# Fields that only the operator sets.
_OPERATORS = ("kind", "priority", "expires_at", "rollover_until", "rollover_nanos")


def router(runtime: Runtime) -> APIRouter:
    router = APIRouter(prefix="/api/v1", tags=["plans"])

    @router.post("/grants", status_code=201, response_model=Grant | Invoice)
    async def add_grant(body: NewGrant, who: Manager, request: Request) -> Response:
        """The operator grants credit. Grants are burned by priority, then expiry, then age; the rest of an expired one
        is booked.

        A tenant buys credit with `nanos` and, if it likes, a `reason`: the answer is the draft of an invoice with the
        tax. When it is paid by `/api/v1/invoices/{id}/pay`, the invoice gets its number and the credit is granted."""
        return await (_buy(body, who, request) if who.tenant_id else _grant(body, who, request))

    async def _buy(body: NewGrant, who: Identity, request: Request) -> Response:
        if body.tenant_id not in (None, who.tenant_id):
            raise InvalidMessage("tenant_id", "must be the tenant itself")
        if given := [name for name in _OPERATORS if name in body.model_fields_set]:
            raise InvalidMessage(given[0], "only the operator may set it")

        async def work(tx: Tx) -> tuple[int, Invoice]:
            made = await purchases.order(tx, who.tenant_id, body.nanos, body.reason or "", runtime.settings.seller)
            audit(tx, who.actor, "billing.order", "invoice", str(made.id), nanos=str(body.nanos))
            return 201, made

        return await once(request, runtime, who, work)

    async def _grant(body: NewGrant, who: Identity, request: Request) -> Response:
        tenant_id, reason = body.tenant_id, body.reason
        if tenant_id is None or reason is None:
            raise InvalidMessage("tenant_id" if tenant_id is None else "reason", "is missing")
        if body.expires_at and body.expires_at <= utcnow():
            raise InvalidMessage("expires_at", "must be in the future")
        if body.rollover_until and not (body.expires_at and body.expires_at < body.rollover_until):
            raise InvalidMessage("rollover_until", "must be after expires_at")
        if body.rollover_nanos and not body.rollover_until:
            raise InvalidMessage("rollover_nanos", "needs rollover_until")

        async def work(tx: Tx) -> tuple[int, Grant]:
            tx.tenant_id = tenant_id
            grant_id = await accounts.add_credit(
                tx,
                tenant_id,
                body.nanos,
                kind=body.kind,
                reason=reason,
                actor=who.actor,
                priority=body.priority,
                expires_at=body.expires_at,
                rollover_until=body.rollover_until,
                rollover_nanos=body.rollover_nanos,
                field="nanos",
            )
            audit(tx, who.actor, "billing.grant", "grant", str(grant_id), nanos=str(body.nanos))
            [made] = await grants.listed(tx, tenant_id, after=None, limit=1, grant_id=grant_id)
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
