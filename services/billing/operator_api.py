"""HTTP of billing for the operator: credit, corrections, and held usage records."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from infra.errors import Conflict, InvalidMessage
from infra.postgres.tx import Tx
from infra.security.audit import audit
from infra.service.api import Operator, Paging, Viewer, page
from infra.service.idempotency import once
from infra.service.service import Runtime
from infra.web.times import Time
from services.billing.credit import accounts
from services.billing.credit.accounts import MAX_CREDIT_NANOS
from services.billing.rating.domain import MAX_AMOUNT_NANOS, MAX_QUANTITIES, Verdict, implausible
from services.billing.usage import corrections, reports
from services.billing.usage import records as usage
from services.billing.usage.reports import Balance, UsageVerdict

Text = Annotated[str, Field(min_length=1, max_length=500)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NewCredit(_Body):
    tenant_id: Text
    amount_nanos: int = Field(gt=0, le=MAX_CREDIT_NANOS)
    reason: str = Field("", max_length=500)


class Correction(_Body):
    tenant_id: Text
    amount_nanos: int = Field(ge=-MAX_AMOUNT_NANOS, le=MAX_AMOUNT_NANOS)
    """Above zero: given back to the tenant. Below zero: charged."""
    reason: Text
    usage_id: str | None = None


class UsageResolution(_Body):
    tenant_id: Text
    quantities: dict[str, Annotated[int, Field(ge=0, le=max(MAX_QUANTITIES.values()))]] = {}
    """Quantities of the units that the record did not report. If the reported quantities are implausible or all 0, they
    may be replaced."""
    occurred_at: Time | None = None
    """Replaces an implausible time of use."""
    reject: Text | None = None
    """The reason why the record will never be charged. Null: rate it again."""


def router(runtime: Runtime) -> APIRouter:
    router = APIRouter(prefix="/api/v1/billing", tags=["operator"])

    @router.post("/credit", status_code=201, response_model=Balance)
    async def add_credit(body: NewCredit, who: Operator, request: Request) -> Response:
        """Grants a tenant more to spend."""

        async def work(tx: Tx) -> tuple[int, Balance]:
            tx.tenant_id = body.tenant_id
            _, account = await accounts.lock_one(tx, body.tenant_id)
            if account.credit_nanos is None:
                raise Conflict(f"tenant {body.tenant_id} may spend without limit; it has no credit to add to")
            await accounts.add_credit(tx, body.tenant_id, body.amount_nanos, reason=body.reason, actor=who.actor)
            audit(tx, who.actor, "billing.credit", "account", body.tenant_id, amount_nanos=str(body.amount_nanos))
            return 201, await reports.balance(tx, body.tenant_id)

        return await once(request, runtime, who, work)

    @router.post("/corrections", status_code=201, response_model=Balance)
    async def correct(body: Correction, who: Operator, request: Request) -> Response:
        """Corrects a wrong charge with a new ledger entry. The charge itself never changes. If it is of the time of a
        subscription, the next invoice has the correction as a line, before tax."""

        async def work(tx: Tx) -> tuple[int, Balance]:
            tx.tenant_id = body.tenant_id
            await corrections.correct(
                tx, body.tenant_id, body.amount_nanos, body.usage_id, reason=body.reason, actor=who.actor
            )
            audit(tx, who.actor, "billing.correct", "account", body.tenant_id, amount_nanos=str(body.amount_nanos))
            return 201, await reports.balance(tx, body.tenant_id)

        return await once(request, runtime, who, work)

    @router.get("/held")
    async def get_held(who: Viewer, paging: Paging, tenant_id: Annotated[str | None, Query()] = None) -> dict[str, Any]:
        """Lists the held records. A tenant sees its own records."""
        try:
            after = msgspec.json.decode(paging.after or '["",""]', type=tuple[str, str])
        except msgspec.DecodeError:
            raise InvalidMessage("cursor", "is not a valid cursor") from None
        database = runtime.request if who.tenant_id else runtime.worker
        async with database.begin(tenant_id=who.tenant_id or None) as tx:
            found = await reports.held(tx, who.tenant_id or tenant_id, after=after, limit=paging.limit + 1)
        return page(found, paging, lambda item: msgspec.json.encode((item.tenant_id, item.usage_id)).decode())

    @router.post("/held/{usage_id:path}/resolve", response_model=UsageVerdict)
    async def resolve(usage_id: str, body: UsageResolution, who: Operator, request: Request) -> Response:
        """Rates a held record again with the current prices and the values of the body, or rejects it."""

        async def work(tx: Tx) -> tuple[int, UsageVerdict]:
            tx.tenant_id = body.tenant_id
            await _resolve(tx, usage_id, body)
            found = await reports.verdict(tx, body.tenant_id, usage_id)
            audit(tx, who.actor, "billing.resolve", "usage", usage_id, verdict=found.verdict)
            return 200, found

        return await once(request, runtime, who, work)

    return router


async def _resolve(tx: Tx, usage_id: str, body: UsageResolution) -> None:
    held = await usage.held(tx, body.tenant_id, usage_id=usage_id)
    found = await reports.verdict(tx, body.tenant_id, usage_id)
    if not held:
        raise Conflict(f"usage {usage_id} is {found.verdict}; only a held record can be resolved")
    [record] = held
    if body.reject is not None:
        await usage.decide(tx, record, Verdict("rejected", body.reject))
        return
    known = sorted(record.quantities.keys() & body.quantities.keys())
    if known and any(record.quantities.values()) and not implausible(record.quantities):
        raise InvalidMessage(f"quantities.{known[0]}", "was reported; a plausible quantity cannot be replaced")
    for unit, quantity in body.quantities.items():
        if fault := implausible({unit: quantity}):
            raise InvalidMessage(f"quantities.{unit}", fault)
    if body.quantities:
        record = msgspec.structs.replace(record, quantities=record.quantities | body.quantities, estimated=True)
    if body.occurred_at:
        if not found.reason.startswith("implausible: occurred_at"):
            raise InvalidMessage("occurred_at", "was reported; a plausible time cannot be replaced")
        record = msgspec.structs.replace(record, occurred_at=body.occurred_at)
    await usage.rate_again(tx, [record])
