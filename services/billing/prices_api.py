"""HTTP of the price book."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from infra.errors import InvalidMessage
from infra.postgres.tx import Tx
from infra.security.audit import audit
from infra.service.api import Operator, Paging, Viewer, bad_cursor, page
from infra.service.idempotency import once
from infra.service.service import Runtime
from infra.web.times import Time
from services.billing.rating import price_book
from services.billing.rating.currencies import DIGITS
from services.billing.rating.domain import UNITS, Price, Tier

# A string, because clients parse a JSON number as a binary fraction, which is not exact.
Nanos = Annotated[str, Field(pattern=r"^[0-9]{1,12}(\.[0-9]{1,18})?$", examples=["150", "0.5"])]

MAX_TIERS = 50


class PriceTier(BaseModel):
    """Prices for a request with more than `above_input_tokens` input tokens. They apply to all units of the request."""

    model_config = ConfigDict(extra="forbid")
    above_input_tokens: int = Field(ge=0)
    nanos_per_unit: dict[str, Nanos]


class NewPrice(BaseModel):
    """A new version of a resource's price."""

    model_config = ConfigDict(extra="forbid")
    resource: str = Field(min_length=3, max_length=200, pattern=r"^[^/\s]+/\S+$")
    currency: str = Field("USD", pattern=r"^[A-Z]{3}$")
    nanos_per_unit: dict[str, Nanos] = Field(min_length=1)
    """Unit → nano-units (10⁻⁹) of `currency` per one unit, as a decimal string."""
    tiers: list[PriceTier] = Field([], max_length=MAX_TIERS)
    valid_from: Time | None = None
    """Null: from now on, or since 1970 if the resource has no price in this currency yet, also not under a more general
    name. Earlier usage keeps its price; a time in the past is for corrections, which re-rating books."""


class PriceVersion(BaseModel):
    resource: str
    version: int
    price_version: str
    currency: str
    nanos_per_unit: dict[str, str]
    tiers: list[PriceTier]
    valid_from: datetime
    made_by: str
    made_at: datetime


def router(runtime: Runtime) -> APIRouter:
    router = APIRouter(prefix="/api/v1/prices", tags=["prices"])

    @router.get("")
    async def get_prices(
        who: Viewer,
        paging: Paging,
        resource: Annotated[
            str | None, Query(description="all versions of this resource, or of the resource that it is an alias of")
        ] = None,
    ) -> dict[str, Any]:
        """Lists every version of every price, the replaced ones included."""
        name, _, version = (paging.after or "@0").rpartition("@")
        if not version.isdecimal() or len(version) > 9:
            raise bad_cursor()
        async with runtime.worker.begin() as tx:
            names = None if resource is None else await price_book.name_in_book(tx, resource)
            rows = await tx.sql(
                """
                SELECT resource, version, currency, valid_from, prices, made_by, made_at FROM price
                WHERE ($1::text IS NULL OR resource = $1) AND (resource, version) > ($2, $3)
                ORDER BY resource, version LIMIT $4
                """,
                names,
                name,
                int(version),
                paging.limit + 1,
            )
        found = [_shown(price_book.read(*row[:5]), *row[5:]) for row in rows]
        return page(found, paging, lambda price: price.price_version)

    @router.post("", status_code=201, response_model=PriceVersion)
    async def add_price(body: NewPrice, who: Operator, request: Request) -> Response:
        """Adds a version. Usage that was rated before keeps its amount."""
        if body.currency not in DIGITS:
            raise InvalidMessage("currency", "is not a currency of ISO 4217")
        starts = [tier.above_input_tokens for tier in body.tiers]
        if double := [n for n, start in enumerate(starts) if start in starts[:n]]:
            raise InvalidMessage(f"tiers[{double[0]}].above_input_tokens", "is the start of another tier, too")
        nanos = _read(body.nanos_per_unit, "nanos_per_unit")
        tiers = tuple(
            Tier(tier.above_input_tokens, _read(tier.nanos_per_unit, f"tiers.{n}.nanos_per_unit"))
            for n, tier in enumerate(sorted(body.tiers, key=lambda tier: tier.above_input_tokens))
        )

        async def work(tx: Tx) -> tuple[int, PriceVersion]:
            price, made_at = await price_book.add(
                tx, body.resource, body.currency, body.valid_from, nanos, tiers, made_by=who.actor
            )
            audit(tx, who.actor, "billing.price", "price", price.name)
            return 201, _shown(price, who.actor, made_at)

        return await once(request, runtime, who, work)

    return router


def _read(nanos: dict[str, str], field: str) -> dict[str, Decimal]:
    if unknown := sorted(nanos.keys() - UNITS):
        raise InvalidMessage(f"{field}.{unknown[0]}", f"is not a unit; must be one of {', '.join(sorted(UNITS))}")
    return {unit: Decimal(text) for unit, text in nanos.items()}


def _shown(price: Price, made_by: str, made_at: datetime) -> PriceVersion:
    def texts(nanos: Any) -> dict[str, str]:
        return {unit: format(value, "f") for unit, value in nanos.items()}

    return PriceVersion(
        resource=price.resource,
        version=price.version,
        price_version=price.name,
        currency=price.currency,
        nanos_per_unit=texts(price.nanos),
        tiers=[PriceTier(above_input_tokens=t.above, nanos_per_unit=texts(t.nanos)) for t in price.tiers],
        valid_from=price.valid_from,
        made_by=made_by,
        made_at=made_at,
    )
