"""HTTP of plans and subscriptions. The operator changes them; a tenant reads its own."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from starlette.responses import Response

from infra.errors import InvalidMessage, NotFound
from infra.postgres.tx import Tx
from infra.security.audit import audit
from infra.security.auth import Identity
from infra.service.api import Operator, Paging, Viewer, bad_cursor, id_cursor, page
from infra.service.idempotency import once
from infra.service.service import Runtime
from infra.web.times import Time
from services.billing.plans import plans, subscriptions
from services.billing.plans.plans import Included, Plan, PlanCharge, StoredPlan
from services.billing.plans.subscriptions import PlanSubscription
from services.billing.rating import schemes
from services.billing.rating.currencies import DIGITS
from services.billing.rating.schemes import Scheme, SchemeTier
from services.billing.usage.aggregates import METERS

Text = Annotated[str, Field(min_length=1, max_length=200)]
When = Literal["now", "period_end"]
MAX_TIERS = 50
_DECIMAL = re.compile(r"-?[0-9]{1,16}(?:\.([0-9]+))?")


def _decimal(least: int, most: int, *, places: int) -> BeforeValidator:
    """Checks an integer, or a decimal as text: a JSON number with a fraction is not exact. Before the union is tried,
    so an error names the field."""

    def check(value: Any) -> Any:
        found = _DECIMAL.fullmatch(str(value)) if type(value) in (int, str) else None
        if not found or len(found[1] or "") > places or not least <= Decimal(found[0]) <= most:
            raise ValueError(
                f"must be an integer or a decimal string from {least} to {most}, with {places} places at most"
            )
        return value

    return BeforeValidator(check)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TierBody(_Body):
    up_to: int | None = Field(None, gt=0, le=10**15)
    """The last unit of the tier. Null: no end; only in the last tier."""
    unit_nanos: Annotated[int | str, _decimal(0, 10**15, places=18)] = 0
    """Nano-units per unit, per package for the scheme package. A string may have a fraction."""
    flat_nanos: int = Field(0, ge=0, le=10**15)


class ChargeBody(_Body):
    meter: str
    by: Literal["model", "agent", "channel"] | None = None
    scheme: Scheme
    tiers: list[TierBody] = Field(max_length=MAX_TIERS)
    package_size: int | None = Field(None, gt=0, le=10**12)


class IncludedBody(_Body):
    meter: str
    quantity: int = Field(gt=0, le=10**15)


class NewPlan(_Body):
    """A new version of the plan with this name, or a new plan."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "example": {
                "name": "Team",
                "currency": "USD",
                "interval": "month",
                "base_nanos": 49_000_000_000,
                "included": [{"meter": "input_tokens", "quantity": 1_000_000}],
                "charges": [
                    {
                        "meter": "input_tokens",
                        "scheme": "graduated",
                        "tiers": [{"up_to": 5_000_000, "unit_nanos": 200}, {"unit_nanos": 150}],
                    }
                ],
                "usage_markup_percent": "10",
            }
        },
    )
    name: Text
    currency: str
    interval: Literal["month", "year"]
    base_nanos: int = Field(ge=0, le=10**15)
    included: list[IncludedBody] = Field([], max_length=50)
    charges: list[ChargeBody] = Field([], max_length=50)
    usage_markup_percent: Annotated[int | str, _decimal(-100, 1000, places=6)] | None = None
    """All usage is charged at the price book's prices with this markup. Null: only `charges` are."""
    minimum_nanos: int = Field(0, ge=0, le=10**15)
    """The commitment: an invoice that would be lower gets a line with the difference. Before tax."""


class PlanView(NewPlan):
    id: UUID
    version: int


class NewSubscription(_Body):
    tenant_id: Text
    plan_id: UUID
    starts_at: Time | None = None
    anchor_day: int | None = Field(None, ge=1, le=31)
    """The day of the month on which periods begin, or the last day of a shorter month. Null: the day of the start."""
    time_zone: str = Field("UTC", max_length=64)


class SubscriptionChange(_Body):
    plan_id: UUID
    when: When


def router(runtime: Runtime) -> APIRouter:
    router = APIRouter(prefix="/api/v1", tags=["plans"])

    @router.post("/plans", status_code=201, response_model=PlanView)
    async def add_plan(body: NewPlan, who: Operator, request: Request) -> Response:
        """Adds a version. Subscriptions keep theirs until they are moved."""
        plan = _read(body)

        async def work(tx: Tx) -> tuple[int, PlanView]:
            stored = await plans.add(tx, plan, made_by=who.actor)
            audit(tx, who.actor, "billing.plan", "plan", str(stored.id), version=str(stored.version))
            return 201, _shown(stored)

        return await once(request, runtime, who, work)

    @router.get("/plans")
    async def list_plans(who: Viewer, paging: Paging) -> dict[str, Any]:
        """Lists every version of every plan."""
        name, _, version = (paging.after or "@0").rpartition("@")
        if not version.isdecimal() or len(version) > 9:
            raise bad_cursor()
        async with runtime.worker.begin() as tx:
            rows = await tx.sql(
                """
                SELECT plan_id, version, content
                FROM plan
                WHERE (name, version) > ($1, $2)
                ORDER BY name, version
                LIMIT $3
                """,
                name,
                int(version),
                paging.limit + 1,
            )
        found = [_shown(plans.read(*row)) for row in rows]
        return page(found, paging, lambda plan: f"{plan.name}@{plan.version}")

    @router.post("/subscriptions", status_code=201, response_model=PlanSubscription)
    async def subscribe(body: NewSubscription, who: Operator, request: Request) -> Response:
        """Subscribes a tenant to the latest version of a plan. The first period is a part of a whole one."""

        async def work(tx: Tx) -> tuple[int, PlanSubscription]:
            tx.tenant_id = body.tenant_id
            made = await subscriptions.subscribe(
                tx,
                body.tenant_id,
                body.plan_id,
                starts_at=body.starts_at,
                anchor_day=body.anchor_day,
                time_zone=body.time_zone,
            )
            audit(tx, who.actor, "billing.subscribe", "subscription", str(made.id), plan=str(body.plan_id))
            return 201, made

        return await once(request, runtime, who, work)

    @router.get("/subscriptions")
    async def list_subscriptions(
        who: Viewer, paging: Paging, tenant_id: Annotated[str | None, Query(description="for the operator")] = None
    ) -> dict[str, Any]:
        """Lists a tenant's subscriptions."""
        tenant = owner_of_list(who, tenant_id)
        after = id_cursor(paging)
        async with runtime.worker.begin(tenant_id=tenant) as tx:
            found = await subscriptions.listed(tx, tenant, after=after, limit=paging.limit + 1)
        return page(found, paging, lambda item: str(item.id))

    @router.patch("/subscriptions/{subscription_id}", response_model=PlanSubscription)
    async def change_subscription(
        subscription_id: UUID, body: SubscriptionChange, who: Operator, request: Request
    ) -> Response:
        """Moves a subscription to the latest version of a plan, now (prorated to the second) or at the period's end."""

        async def work(tx: Tx) -> tuple[int, PlanSubscription]:
            tx.tenant_id = tenant = await _subscriber(tx, subscription_id)
            changed = await subscriptions.change(tx, tenant, subscription_id, body.plan_id, body.when)
            audit(tx, who.actor, "billing.change_plan", "subscription", str(subscription_id), when=body.when)
            return 200, changed

        return await once(request, runtime, who, work)

    @router.delete("/subscriptions/{subscription_id}", response_model=PlanSubscription)
    async def cancel_subscription(
        subscription_id: UUID, who: Operator, request: Request, when: Annotated[When, Query()] = "period_end"
    ) -> Response:
        """Ends a subscription. Usage until then is still invoiced."""

        async def work(tx: Tx) -> tuple[int, PlanSubscription]:
            tx.tenant_id = tenant = await _subscriber(tx, subscription_id)
            ended = await subscriptions.cancel(tx, tenant, subscription_id, when)
            audit(tx, who.actor, "billing.unsubscribe", "subscription", str(subscription_id), when=when)
            return 200, ended

        return await once(request, runtime, who, work)

    return router


def owner_of_list(who: Identity, asked: str | None) -> str:
    """The tenant that a list is about. A tenant always sees its own list."""
    if not (tenant_id := who.tenant_id or asked):
        raise InvalidMessage("tenant_id", "is missing")
    return tenant_id


async def _subscriber(tx: Tx, subscription_id: UUID) -> str:
    rows = await tx.sql("SELECT tenant_id FROM subscription WHERE subscription_id = $1", subscription_id)
    if not rows:
        raise NotFound(f"subscription {subscription_id}: not found")
    return str(rows[0][0])


def _read(body: NewPlan) -> Plan:
    """Raises InvalidMessage with the field for a plan that cannot work."""
    if body.currency not in DIGITS:
        raise InvalidMessage("currency", "is not a currency of ISO 4217")
    charges = []
    for n, charge in enumerate(body.charges):
        _known_meter(f"charges[{n}].meter", charge.meter)
        tiers = [SchemeTier(t.up_to, Decimal(str(t.unit_nanos)), t.flat_nanos) for t in charge.tiers]
        try:
            schemes.check(charge.scheme, tiers, charge.package_size)
        except schemes.Fault as fault:
            raise InvalidMessage(f"charges[{n}].{fault.field}", fault.reason) from fault
        charges.append(PlanCharge(charge.meter, charge.scheme, tiers, charge.by, charge.package_size))
    for n, item in enumerate(body.included):
        _known_meter(f"included[{n}].meter", item.meter)
        charged = [charge.meter for charge in charges].count(item.meter)
        if charged == 0:
            raise InvalidMessage(f"included[{n}].meter", "has no charge, so nothing of it can be included")
        if charged > 1:
            # Each of them would take off the whole quantity.
            raise InvalidMessage(f"included[{n}].meter", "has two charges; a quantity can be included in one only")
    for name in ("included", "charges"):
        seen = [(item.meter, getattr(item, "by", None)) for item in getattr(body, name)]
        if double := [n for n, item in enumerate(seen) if item in seen[:n]]:
            raise InvalidMessage(f"{name}[{double[0]}].meter", "is there twice")
    return Plan(
        name=body.name,
        currency=body.currency,
        interval=body.interval,
        base_nanos=body.base_nanos,
        included=[Included(item.meter, item.quantity) for item in body.included],
        charges=charges,
        usage_markup_percent=None if body.usage_markup_percent is None else Decimal(str(body.usage_markup_percent)),
        minimum_nanos=body.minimum_nanos,
    )


def _known_meter(field: str, meter: str) -> None:
    known = sorted(name for name in METERS if not name.endswith("_nanos"))
    if meter not in known:
        raise InvalidMessage(field, f"is not a meter; must be one of {', '.join(known)}")


def _shown(stored: StoredPlan) -> PlanView:
    plan = stored.plan
    return PlanView(
        id=stored.id,
        version=stored.version,
        name=plan.name,
        currency=plan.currency,
        interval=plan.interval,
        base_nanos=plan.base_nanos,
        included=[IncludedBody(meter=item.meter, quantity=item.quantity) for item in plan.included],
        charges=[
            ChargeBody(
                meter=charge.meter,
                by=charge.by,  # type: ignore[arg-type]  # it was read from this model
                scheme=charge.scheme,
                tiers=[
                    TierBody(
                        up_to=tier.up_to,
                        unit_nanos=int(tier.unit_nanos)
                        if tier.unit_nanos == int(tier.unit_nanos)
                        else str(tier.unit_nanos),
                        flat_nanos=tier.flat_nanos,
                    )
                    for tier in charge.tiers
                ],
                package_size=charge.package_size,
            )
            for charge in plan.charges
        ],
        usage_markup_percent=None if plan.usage_markup_percent is None else str(plan.usage_markup_percent),
        minimum_nanos=plan.minimum_nanos,
    )
