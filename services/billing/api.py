"""HTTP of billing for tenants: balance, usage, ledger, verdicts and reconciliation."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import AwareDatetime
from starlette.routing import BaseRoute

from infra.errors import InvalidMessage, NotFound, RetryLater
from infra.service.api import Paging, Reader, Viewer, api, page
from infra.service.service import Runtime
from services.billing import operator_api, prices_api, reports
from services.billing.reconciliation import Reconciliation, reconcile
from services.billing.reports import Balance, Grouping, Summary, UsageFilter, UsageList, UsageVerdict

Since = Annotated[AwareDatetime | None, Query(description="only usage that occurred at or after this time")]
Until = Annotated[AwareDatetime | None, Query(description="only usage that occurred before this time")]


def routes(runtime: Runtime) -> Sequence[BaseRoute]:
    return api("billing", runtime, _tenants(runtime), operator_api.router(runtime), prices_api.router(runtime))


def _tenants(runtime: Runtime) -> APIRouter:
    router = APIRouter(prefix="/api/v1/billing", tags=["billing"])

    @router.get("/balance")
    async def get_balance(who: Reader) -> Balance:
        """Returns granted, spent, held and remaining credit."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            try:
                return await reports.balance(tx, who.tenant_id)
            except NotFound as error:
                # The tenant exists, because the caller has its key. The TenantCreated event has not arrived yet.
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
        """Lists usage records with their verdicts, by time of use. A repeated record is listed once."""
        wanted = UsageFilter(who.tenant_id, since, until, resource, run_id)
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            found = await reports.usage(tx, wanted, after=paging.after_time(str), limit=paging.limit + 1)
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
        """Returns sums by resource and unit, and the number of delivered messages by type of channel."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            return await reports.summary(tx, UsageFilter(who.tenant_id, since, until, resource), group)

    @router.get("/ledger")
    async def get_ledger(who: Reader, paging: Paging) -> dict[str, Any]:
        """Lists the entries of the account, oldest first. Their sum is the balance."""
        after = paging.after or "0"
        if not after.isdecimal():
            raise InvalidMessage("cursor", "is not a valid cursor")
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            entries = await reports.ledger(tx, who.tenant_id, after=int(after), limit=paging.limit + 1)
        return page(entries, paging, lambda entry: entry.id)

    @router.get("/verdicts/{usage_id:path}")
    async def get_verdict(usage_id: str, who: Reader) -> UsageVerdict:
        """Returns the verdict on one usage record with its reason."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            return await reports.verdict(tx, who.tenant_id, usage_id)

    @router.get("/reconciliation")
    async def get_reconciliation(who: Viewer) -> Reconciliation:
        """Compares the usage that services produced with the verdicts. The operator gets the figures of all tenants."""
        return await reconcile(runtime, who.tenant_id or None)

    return router
