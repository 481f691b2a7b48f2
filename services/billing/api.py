"""HTTP of billing for tenants: what was used, what it cost and why."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import AwareDatetime
from starlette.routing import BaseRoute

from infra.errors import InvalidMessage, NotFound, RetryLater
from infra.service.api import Anyone, Paging, Reader, api, page
from infra.service.service import Runtime
from services.billing import operator_api, prices_api, reports
from services.billing.reconciliation import Reconciliation, reconcile
from services.billing.reports import Balance, Grouping, Summary, UsageList, VerdictOf, Where

Since = Annotated[AwareDatetime | None, Query(description="from this time of use on")]
Until = Annotated[AwareDatetime | None, Query(description="before this time of use")]


def routes(runtime: Runtime) -> Sequence[BaseRoute]:
    return api("billing", runtime, _tenants(runtime), operator_api.router(runtime), prices_api.router(runtime))


def _tenants(runtime: Runtime) -> APIRouter:
    router = APIRouter(prefix="/api/v1/billing", tags=["billing"])

    @router.get("/balance")
    async def get_balance(who: Reader) -> Balance:
        """What was granted, spent and held, and what is left."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            try:
                return await reports.balance(tx, who.tenant_id)
            except NotFound as error:
                # The tenant exists, for somebody has its key; the fact is still on its way here.
                raise RetryLater(timedelta(seconds=1), "the account is being opened") from error

    @router.get("/usage")
    async def list_usage(
        who: Reader,
        paging: Paging,
        since: Since = None,
        until: Until = None,
        resource: Annotated[str | None, Query()] = None,
        run_id: Annotated[UUID | None, Query()] = None,
    ) -> UsageList:
        """Every usage record that has arrived with what became of it, by the time of use; each repeat once."""
        where = Where(who.tenant_id, since, until, resource, run_id)
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            found = await reports.usage(tx, where, after=paging.after_time(str), limit=paging.limit + 1)
        listed = page(found, paging, lambda verdict: f"{verdict.occurred_at.isoformat()} {verdict.usage_id}")
        return UsageList(**listed)

    @router.get("/usage/summary")
    async def sum_usage(
        who: Reader,
        since: Since = None,
        until: Until = None,
        resource: Annotated[str | None, Query()] = None,
        group: Annotated[Grouping, Query()] = "resource",
    ) -> Summary:
        """Sums per resource and unit, and messages delivered per type of channel."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            return await reports.summary(tx, Where(who.tenant_id, since, until, resource), group)

    @router.get("/ledger")
    async def get_ledger(who: Reader, paging: Paging) -> dict[str, Any]:
        """Every movement of the account, oldest first; their sum is the balance."""
        after = paging.after or "0"
        if not after.isdecimal():
            raise InvalidMessage("cursor", "is none that this list gave")
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            entries = await reports.ledger(tx, who.tenant_id, after=int(after), limit=paging.limit + 1)
        return page(entries, paging, lambda entry: entry.id)

    @router.get("/verdicts/{usage_id:path}")
    async def get_verdict(usage_id: str, who: Reader) -> VerdictOf:
        """What became of one usage record, and why."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            return await reports.verdict(tx, who.tenant_id, usage_id)

    @router.get("/reconciliation")
    async def get_reconciliation(who: Anyone) -> Reconciliation:
        """Is everything that was produced accounted for; the operator sees it over all tenants."""
        return await reconcile(runtime, who.tenant_id or None)

    return router
