"""HTTP of billing for tenants: balance, usage, ledger, verdicts and reconciliation."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any
from uuid import UUID

import msgspec
from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.routing import BaseRoute

from infra.clock import utcnow
from infra.errors import InvalidMessage, NotFound, RetryLater
from infra.security.audit import audit
from infra.service.api import Operator, Paging, Reader, Viewer, api, bad_cursor, page
from infra.service.service import Runtime
from infra.web.times import Time
from services.billing import budgets_api, grants_api, invoices_api, operator_api, plans_api, prices_api, terms_api
from services.billing.credit import accounts
from services.billing.payments import api as payments
from services.billing.usage import aggregates, explain, reports, rerate
from services.billing.usage.aggregates import GROUPS, METERS, Meter, RebuiltBuckets, Sum, Window, full_hour
from services.billing.usage.reconciliation import UsageReconciliation, reconcile
from services.billing.usage.reports import Balance, Grouping, UsageFilter, UsageList, UsageSummary

Since = Annotated[Time | None, Query(description="only usage that occurred at or after this time")]
From = Annotated[Time | None, Query(alias="from", description="with group_by: first hour")]
To = Annotated[Time | None, Query(description="with group_by: the hour after the last one")]
Until = Annotated[Time | None, Query(description="only usage that occurred before this time")]


class RerateRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    from_: Time = Field(alias="from")
    to: Time
    tenant_id: str | None = None
    """Null: all tenants."""
    dry_run: bool


class UsageSums(BaseModel):
    items: list[Sum]
    next: str | None


def routes(runtime: Runtime) -> Sequence[BaseRoute]:
    return api(
        "billing",
        runtime,
        _tenants(runtime),
        _meters(),
        operator_api.router(runtime),
        prices_api.router(runtime),
        plans_api.router(runtime),
        grants_api.router(runtime),
        invoices_api.router(runtime),
        terms_api.router(runtime),
        budgets_api.router(runtime),
        payments.router(runtime),
    )


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
        group_by: Annotated[
            str | None,
            Query(description=f"sums in place of records; of {', '.join(GROUPS)}", examples=["meter,model,day"]),
        ] = None,
        from_: From = None,
        to: To = None,
    ) -> UsageList | UsageSums:
        """Lists usage records with their verdicts, by time of use. A repeated record is listed once.

        With `group_by` it lists the sums of counted usage from hour `from` until hour `to` (default: this month).
        """
        if group_by is not None:
            return await _sums(runtime, who.tenant_id, paging, group_by, from_, to)
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
    ) -> UsageSummary:
        """Returns sums by resource and unit, and the number of delivered messages by type of channel."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            return await reports.summary(tx, UsageFilter(who.tenant_id, since, until, resource), group)

    @router.post("/usage/rebuild")
    async def rebuild_usage(tenant_id: Annotated[str, Query()], who: Operator) -> RebuiltBuckets:
        """Computes the sums of a tenant's usage again from its records, and compares them with the stored ones."""
        async with runtime.worker.begin(tenant_id=tenant_id) as tx:
            await accounts.lock_one(tx, tenant_id)
            found = await aggregates.rebuild(tx, tenant_id)
            audit(tx, who.actor, "billing.rebuild", "account", tenant_id, equal=str(found.equal))
        return found

    @router.get("/lines/{line_id}/explain")
    async def explain_line(
        line_id: UUID,
        who: Viewer,
        usage_id: Annotated[str | None, Query(description="a record of the line, shown down to its answer")] = None,
    ) -> explain.Proof:
        """Proves a line of an invoice: its sums, compared with the records; price versions, runs, and one record."""
        async with runtime.worker.begin() as tx:
            rows = await tx.sql("SELECT tenant_id FROM invoice_line WHERE line_id = $1", line_id)
            if not rows or who.tenant_id not in ("", rows[0][0]):
                raise NotFound(f"line {line_id}: not found")
            return await explain.explain(tx, rows[0][0], line_id, usage_id)

    @router.post("/rerate")
    async def rerate_usage(body: RerateRequest, who: Operator) -> rerate.Rerated:
        """Rates the usage of a time again with the current versions of its prices, and books the differences.

        A repeated call books nothing. With `dry_run` it only shows them.
        """
        if body.from_ >= body.to:
            raise InvalidMessage("to", "must be after from")
        found = await rerate.rerate(
            runtime.worker, body.from_, body.to, body.tenant_id, dry_run=body.dry_run, actor=who.actor
        )
        async with runtime.worker.begin(tenant_id=body.tenant_id) as tx:
            details = {"dry_run": str(body.dry_run), "changed": str(found.changed)}
            audit(tx, who.actor, "billing.rerate", "usage", body.tenant_id or "all tenants", **details)
        return found

    @router.get("/ledger")
    async def get_ledger(who: Reader, paging: Paging) -> dict[str, Any]:
        """Lists the entries of the account, oldest first. Their sum is the balance."""
        after = paging.after or "0"
        if not after.isdecimal() or len(after) > 18:
            raise InvalidMessage("cursor", "is not a valid cursor")
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            entries = await reports.ledger(tx, who.tenant_id, after=int(after), limit=paging.limit + 1)
        return page(entries, paging, lambda entry: entry.id)

    @router.get("/verdicts/{usage_id:path}")
    async def get_verdict(usage_id: str, who: Reader) -> explain.InvoicedUse:
        """Returns the verdict on one usage record with its reason, and the lines of invoices that sum it."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            return await explain.invoiced(tx, who.tenant_id, usage_id)

    @router.get("/reconciliation")
    async def get_reconciliation(who: Viewer) -> UsageReconciliation:
        """Compares the usage that services produced with the verdicts. The operator gets the figures of all tenants."""
        return await reconcile(runtime, who.tenant_id or None)

    return router


def _meters() -> APIRouter:
    router = APIRouter(prefix="/api/v1/meters", tags=["billing"])

    @router.get("")
    async def list_meters(who: Viewer, paging: Paging) -> dict[str, Any]:
        """Lists everything that is measured."""
        names = [name for name in METERS if paging.after is None or name > paging.after]
        found = [Meter(name=name, description=METERS[name]) for name in sorted(names)]
        return page(found[: paging.limit + 1], paging, lambda meter: meter.name)

    return router


async def _sums(
    runtime: Runtime, tenant_id: str, paging: Any, group_by: str, since: datetime | None, until: datetime | None
) -> UsageSums:
    groups = aggregates.read_groups(group_by)
    hour = utcnow().replace(minute=0, second=0, microsecond=0)
    window = Window(
        tenant_id,
        full_hour("from", since or hour.replace(day=1, hour=0)),
        full_hour("to", until or hour + timedelta(hours=1)),
    )
    try:
        after = msgspec.json.decode(paging.after or "[]", type=list[str])
    except msgspec.DecodeError:
        raise bad_cursor() from None
    if after and len(after) != len(groups):
        raise bad_cursor()
    async with runtime.request.begin(tenant_id=tenant_id) as tx:
        found = await aggregates.sums(tx, window, groups, after=after, limit=paging.limit + 1)
    return UsageSums(**page(found, paging, lambda item: msgspec.json.encode(list(item.group.values())).decode()))
