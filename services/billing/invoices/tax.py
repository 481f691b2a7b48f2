"""Taxes: the rate of an invoice by the buyer's country and VAT id. Pure, except the tables.

The rates are data of the operator, because they change by law. A country with other rules gets its own entry in RULES.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import datetime
from decimal import Decimal
from typing import NamedTuple

from pydantic import BaseModel

from infra.errors import InvalidMessage
from infra.postgres.tx import Tx
from services.billing.invoices import countries, vat_ids
from services.billing.plans import plans

# As many as EN 16931 has.
MAX_ADDRESS_LINES = 3


class Buyer(BaseModel):
    """The tenant as it stands on an invoice."""

    name: str = ""
    country: str = ""
    """ISO 3166, two letters. Empty: unknown, and the tax is that of the seller's country."""
    vat_id: str = ""
    address: str = ""
    """At most three lines, without the name and the country."""


class Seller(BaseModel):
    """The company that sends the invoices, as the operator has set it."""

    name: str = ""
    country: str = ""
    vat_id: str = ""
    address: str = ""
    """As the buyer's."""


class Tax(NamedTuple):
    percent: Decimal
    note: str


# The note of a rate is the rate and its country: ``19 % DE``.
_RATE = re.compile(r"([\d.]+) % [A-Z]{2}")


def rate(note: str) -> Decimal | None:
    """Returns the rate of a stored note. None: there is no tax, for the reason that it gives."""
    found = _RATE.fullmatch(note)
    return Decimal(found[1]) if found else None


def on(nanos: int, percent: Decimal) -> int:
    """Returns the tax on an amount, rounded once."""
    return plans.with_markup(nanos, percent) - nanos


_EU = "AT BE BG CY CZ DE DK EE ES FI FR GR HR HU IE IT LT LU LV MC MT NL PL PT RO SE SI SK"
EU = frozenset(_EU.split())
"""The countries of the EU's tax union."""
_PART_OF = {"IM": "GB", "MC": "FR", "XI": "GB"}
"""Countries that are taxed as a part of another one. Monaco and the Isle of Man: directive 2006/112/EC, article 7.
Northern Ireland is a part of the EU's tax union for goods only."""


def standard(buyer: Buyer, seller_country: str, rates: Mapping[str, Decimal]) -> Tax:
    """The rate of the buyer's country, and none for a business in another country than the seller's.

    A buyer without a country is taxed as at home. So is one of the EU whose rate is not stored, if the seller is in the
    EU.
    """

    def whole(country: str) -> str:
        return _PART_OF.get(country, country)

    country = buyer.country or seller_country
    is_abroad = whole(seller_country) not in ("", whole(country))
    # Again at each invoice: an id may have been stored before its rule was known here.
    if is_abroad and buyer.vat_id and not vat_ids.fault(buyer.vat_id, country):
        return Tax(Decimal(0), f"reverse charge: the buyer accounts for the tax under {buyer.vat_id}")
    if country not in rates:
        country = whole(country)
    if country not in rates and country in EU and seller_country in EU:
        country = seller_country if seller_country in rates else whole(seller_country)
    if country in rates:
        return Tax(rates[country], f"{rates[country].normalize():f} % {country}")
    if not country:
        return Tax(Decimal(0), "no tax: the countries of the buyer and the seller are not known")
    return Tax(Decimal(0), f"no tax: no rate is known for {country}")


RULES: dict[str, Callable[[Buyer, str, Mapping[str, Decimal]], Tax]] = {}
"""Country → its own rule. All other countries have `standard`."""


def tax_of(buyer: Buyer, seller_country: str, rates: Mapping[str, Decimal]) -> Tax:
    return RULES.get(buyer.country, standard)(buyer, seller_country, rates)


async def at(tx: Tx, buyer: Buyer, seller_country: str, ends: datetime) -> Tax:
    """`ends`: the end of the period, which decides about the rate, whenever the invoice is made."""
    return tax_of(buyer, seller_country, await rates(tx, ends))


def check(buyer: Buyer) -> None:
    """Raises InvalidMessage for an unknown country, for a VAT id that cannot be one of the country, and for an address
    with too many lines."""
    if len(buyer.address.splitlines()) > MAX_ADDRESS_LINES:
        raise InvalidMessage("address", f"must have at most {MAX_ADDRESS_LINES} lines")
    countries.check(buyer.country)
    if buyer.vat_id and (fault := vat_ids.fault(buyer.vat_id, buyer.country)):
        raise InvalidMessage("vat_id", fault)


async def buyer(tx: Tx, tenant_id: str) -> Buyer:
    """The tenant may change it at any time: an invoice is taxed and stored with one answer."""
    rows = await tx.sql("SELECT name, country, vat_id, address FROM buyer WHERE tenant_id = $1", tenant_id)
    return Buyer(**dict(zip(Buyer.model_fields, rows[0], strict=True))) if rows else Buyer()


async def set_buyer(tx: Tx, tenant_id: str, new: Buyer) -> None:
    await tx.sql(
        """
        INSERT INTO buyer (tenant_id, name, country, vat_id, address)
        VALUES ($1, $2, $3, $4, $5)
        ON CONFLICT (tenant_id) DO UPDATE SET name = $2, country = $3, vat_id = $4, address = $5
        """,
        tenant_id,
        new.name,
        new.country,
        new.vat_id,
        new.address,
    )


async def rates(tx: Tx, ends: datetime) -> dict[str, Decimal]:
    """Returns country → percent, as valid just before a time."""
    rows = await tx.sql(
        """
        SELECT DISTINCT ON (country) country, percent
        FROM tax_rate
        WHERE valid_from < $1
        ORDER BY country, valid_from DESC
        """,
        ends,
    )
    return {country: Decimal(percent) for country, percent in rows}
