"""HTTP of budgets."""

from __future__ import annotations

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from infra.errors import InvalidMessage
from infra.postgres.tx import Tx
from infra.security.audit import audit
from infra.service.api import Admin, Paging, Reader, id_cursor, page
from infra.service.idempotency import once
from infra.service.service import Runtime
from services.billing.credit import budgets
from services.billing.credit.budgets import Budget, Scope, Window


class NewBudget(BaseModel):
    """A limit for a tenant, an agent, a channel, a session or an API key."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "example": {"scope": "tenant", "nanos": 100_000_000_000, "period": "month", "soft_percent": [50, 80]}
        },
    )
    scope: Scope
    id: str = Field("", max_length=300)
    """The agent's, channel's or key's id, or the session's key. Empty for the tenant."""
    nanos: int = Field(ge=0, le=10**18)
    period: Window
    soft_percent: list[Annotated[int, Field(ge=1, le=100)]] = Field([80], max_length=10)
    """Not for a minute: it would send alerts every minute."""


def router(runtime: Runtime) -> APIRouter:
    router = APIRouter(prefix="/api/v1/budgets", tags=["budgets"])

    @router.post("", status_code=201, response_model=Budget)
    async def set_budget(body: NewBudget, who: Admin, request: Request) -> Response:
        """Makes a budget, or changes the one with the same scope, id and period. Work that does not fit is refused."""
        if (body.scope == "tenant") != (not body.id):
            raise InvalidMessage("id", "must be empty for the tenant and given for every other scope")
        if body.period == "minute" and "soft_percent" in body.model_fields_set:
            raise InvalidMessage("soft_percent", "must be omitted for a minute, which sends no alerts")
        soft_percent = [] if body.period == "minute" else body.soft_percent

        async def work(tx: Tx) -> tuple[int, Budget]:
            made = await budgets.set_budget(
                tx, who.tenant_id, body.scope, body.id, body.period, body.nanos, soft_percent
            )
            audit(tx, who.actor, "billing.budget", "budget", str(made.id), nanos=str(body.nanos))
            return 201, made

        return await once(request, runtime, who, work)

    @router.get("")
    async def list_budgets(who: Reader, paging: Paging) -> dict[str, Any]:
        """Lists the budgets with the amounts that are spent and held in the running period."""
        after = id_cursor(paging)
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            found = await budgets.listed(tx, who.tenant_id, after=after, limit=paging.limit + 1)
        return page(found, paging, lambda budget: str(budget.id))

    @router.delete("/{budget_id}", status_code=204)
    async def remove_budget(budget_id: UUID, who: Admin) -> None:
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            await budgets.remove(tx, who.tenant_id, budget_id)
            audit(tx, who.actor, "billing.remove_budget", "budget", str(budget_id))

    return router
