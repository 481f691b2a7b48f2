"""HTTP of the terms of payment."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import ConfigDict, Field

from infra.security.audit import audit
from infra.service.api import Operator, Viewer
from infra.service.service import Runtime
from services.billing.credit import accounts
from services.billing.plans import terms
from services.billing.plans.terms import Terms
from services.billing.plans_api import owner_of_list


class TermsBody(Terms):
    model_config = ConfigDict(extra="forbid")
    tenant_id: str = Field(min_length=1, max_length=200)


def router(runtime: Runtime) -> APIRouter:
    router = APIRouter(prefix="/api/v1/billing/payment-terms", tags=["invoices"])

    @router.get("")
    async def get_terms(
        who: Viewer, tenant_id: Annotated[str | None, Query(description="for the operator")] = None
    ) -> Terms:
        """Returns when a tenant's invoices are due, reminded of and written off."""
        async with runtime.worker.begin() as tx:
            return await terms.get(tx, owner_of_list(who, tenant_id))

    @router.put("")
    async def set_terms(body: TermsBody, who: Operator) -> Terms:
        """Sets a tenant's terms. Due dates of finalised invoices stay; their next steps follow the new terms."""
        body.check()
        made = Terms(**body.model_dump(exclude={"tenant_id"}))
        async with runtime.worker.begin(tenant_id=body.tenant_id) as tx:
            await accounts.lock_one(tx, body.tenant_id)
            await terms.put(tx, body.tenant_id, made)
            audit(tx, who.actor, "billing.terms", "account", body.tenant_id)
        return made

    return router
