"""What usage costs, and what becomes of a usage record: pure.

Money is integer nano-units (10⁻⁹) of a currency. A price is an exact decimal of nano-units per unit used; a record is
rated in exact decimals and rounded once, half to even.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import ROUND_HALF_EVEN, Context, Decimal, DivisionByZero, Inexact, InvalidOperation, Overflow
from typing import Literal

from protos.messages.billing import UsageRecorded

# A part of another unit: it has its own price where the price book gives one, and the whole is charged without it.
PART_OF = {
    "cached_tokens": "input_tokens",
    "cache_write_tokens": "input_tokens",
    "reasoning_tokens": "output_tokens",
}
UNITS = frozenset(("input_tokens", "output_tokens", "calls", "bytes", *PART_OF))

# Beyond these a record tells of a fault at its producer, not of use. The second is a million of any currency.
MAX_QUANTITY = 10**12
MAX_AMOUNT_NANOS = 10**15
# A clock may be a little fast; more is no time at which something was used.
MAX_AHEAD = timedelta(hours=1)

# Sums and products of what is allowed here are never inexact; if one were, it would raise and not round.
_EXACT = Context(prec=200, traps=[Inexact, InvalidOperation, Overflow, DivisionByZero])

Kind = Literal["counted", "duplicate", "rejected", "held"]


@dataclass(frozen=True)
class Tier:
    """Prices of a request with more than `above` input tokens; all of its units go by them."""

    above: int
    nanos: Mapping[str, Decimal]


@dataclass(frozen=True)
class Price:
    """One version of a resource's price. Never changes; rating takes the one valid when the use occurred.

    nanos: unit → nano-units of `currency` per one. A unit that is not in it costs nothing of its own.
    tiers: by `above`, rising.
    """

    resource: str
    version: int
    currency: str
    valid_from: datetime
    nanos: Mapping[str, Decimal]
    tiers: tuple[Tier, ...] = ()

    @property
    def name(self) -> str:
        """What a charge names it by: ``openai/gpt-4o-mini@1``."""
        return f"{self.resource}@{self.version}"

    def at(self, input_tokens: int) -> Mapping[str, Decimal]:
        """The prices per unit of a request of that size."""
        return next((tier.nanos for tier in reversed(self.tiers) if input_tokens > tier.above), self.nanos)


@dataclass(frozen=True)
class Verdict:
    """What became of a record. amount_nanos: what was debited, in the account's currency; None while it is held."""

    kind: Kind
    reason: str = ""
    amount_nanos: int | None = 0
    price_version: str | None = None


class NotReported(Exception):
    """The price needs a unit of which the record says nothing; the text is the unit."""


def cost(price: Price, quantities: Mapping[str, int]) -> int:
    """What `quantities` cost, in nano-units, rounded half to even.

    A part that is not reported is charged as the rest of its whole. Raises NotReported where the price has a unit
    that is no part, costs something, and is missing.
    """
    nanos = price.at(quantities.get("input_tokens", 0))
    total = Decimal(0)
    parts: dict[str, int] = {}
    for unit, whole in PART_OF.items():
        if unit in nanos and unit in quantities:
            parts[whole] = parts.get(whole, 0) + quantities[unit]
            total = _EXACT.fma(nanos[unit], Decimal(quantities[unit]), total)
    for unit, per_unit in nanos.items():
        if unit in PART_OF or not per_unit:
            continue
        if unit not in quantities:
            raise NotReported(unit)
        total = _EXACT.fma(per_unit, Decimal(quantities[unit] - parts.get(unit, 0)), total)
    return int(total.to_integral_value(ROUND_HALF_EVEN))


def estimate(prices: Sequence[Price], currency: str, quantities: Mapping[str, int], now: datetime) -> int | None:
    """What `quantities` would cost now, those that are missing being zero; None where there is no price.

    Raises ValueError for quantities that no record could have.
    """
    asked = dict.fromkeys(UNITS - PART_OF.keys(), 0) | dict(quantities)
    if fault := _implausible(asked):
        raise ValueError(fault)
    price = valid_at(prices, currency, now)
    if price is None:
        return None
    amount = cost(price, asked)
    if amount > MAX_AMOUNT_NANOS:
        raise ValueError(f"would cost {amount} nano-units by {price.name}")
    return amount


def valid_at(prices: Sequence[Price], currency: str, moment: datetime) -> Price | None:
    """Of the versions in `currency`, the one that began last before `moment`; of two that began together the newer."""
    begun = [price for price in prices if price.currency == currency and price.valid_from <= moment]
    return max(begun, key=lambda price: (price.valid_from, price.version), default=None)


def judge(record: UsageRecorded, currency: str | None, prices: Sequence[Price], now: datetime) -> Verdict:
    """What becomes of a record that is the first with its usage_id.

    currency: the account's; None while there is no account. prices: all versions of the record's resource.
    """
    if fault := _implausible(record.quantities):
        return Verdict("rejected", f"implausible: {fault}")
    if record.occurred_at > now + MAX_AHEAD:
        return Verdict("rejected", "implausible: occurred_at is in the future")
    if unknown := sorted(record.quantities.keys() - UNITS):
        return _held(f"no price has a unit {unknown[0]!r}")
    if currency is None:
        return _held(NO_ACCOUNT)
    price = valid_at(prices, currency, record.occurred_at)
    if price is None:
        return _held(_no_price(record, currency, prices))
    try:
        amount = cost(price, record.quantities)
    except NotReported as unit:
        return _held(f"{unit} was not reported, and {price.name} needs it")
    if amount > MAX_AMOUNT_NANOS:
        return Verdict("rejected", f"implausible: it would cost {amount} nano-units by {price.name}")
    return Verdict("counted", "", amount, price.name)


# Records can overtake the fact that their tenant exists; they are rated as soon as it comes.
NO_ACCOUNT = "the tenant has no account yet"


def _held(reason: str) -> Verdict:
    return Verdict("held", reason, None)


def _implausible(quantities: Mapping[str, int]) -> str:
    """What is wrong with them; empty: nothing."""
    for unit, count in quantities.items():
        if not 0 <= count <= MAX_QUANTITY:
            return f"quantities.{unit} is {count}"
    for whole in sorted(set(PART_OF.values())):
        parts = [unit for unit in PART_OF if PART_OF[unit] == whole and unit in quantities]
        if whole in quantities and sum(quantities[unit] for unit in parts) > quantities[whole]:
            return f"quantities.{whole} is less than its {' and '.join(parts)}"
    return ""


def _no_price(record: UsageRecorded, currency: str, prices: Sequence[Price]) -> str:
    if not prices:
        return f"the price book does not know {record.resource}"
    others = sorted({price.currency for price in prices})
    if currency not in others:
        return f"no exchange rate: {record.resource} is priced in {', '.join(others)}, the account is in {currency}"
    return f"{record.resource} had no price yet at {record.occurred_at.isoformat()}"


@dataclass(frozen=True)
class Use:
    """What makes two records with one usage_id the same: resource, and unit → count."""

    resource: str
    quantities: Mapping[str, int]


def repeated(record: UsageRecorded, first: Use) -> Verdict:
    """The verdict on a record whose usage_id was there before, in `first`, which stands."""
    if first == Use(record.resource, record.quantities):
        return Verdict("duplicate", "reported before")
    return Verdict("duplicate", "another record with this usage_id came first, with other content; the first stands")


def settle(
    records: Iterable[UsageRecorded],
    seen: MutableMapping[tuple[str, str], Use],
    currencies: Mapping[str, str],
    prices: Mapping[str, Sequence[Price]],
    now: datetime,
) -> list[Verdict]:
    """One verdict per record, in order. `seen`: the first use by tenant and usage_id; those of `records` are added."""
    verdicts = []
    for record in records:
        key = record.tenant_id, record.usage_id
        first = seen.get(key)
        if first is None:
            seen[key] = Use(record.resource, record.quantities)
            verdict = judge(record, currencies.get(record.tenant_id), prices.get(record.resource, ()), now)
        else:
            verdict = repeated(record, first)
        verdicts.append(verdict)
    return verdicts


Mark = Literal["nearly_spent", "exhausted"]


@dataclass(frozen=True)
class Account:
    """credit_nanos: all that was ever granted; None: without limit. debited_nanos: all charges less corrections."""

    credit_nanos: int | None
    debited_nanos: int

    @property
    def balance_nanos(self) -> int | None:
        """What is left; below zero after late usage. None: without limit."""
        return None if self.credit_nanos is None else self.credit_nanos - self.debited_nanos

    def debit(self, amount_nanos: int) -> tuple[Account, list[Mark]]:
        """The account afterwards, and which marks this debit has passed: 90 % of the credit used, nothing left."""
        after = Account(self.credit_nanos, self.debited_nanos + amount_nanos)
        passed: list[Mark] = []
        if self.credit_nanos is not None and self.credit_nanos > 0:
            if self.debited_nanos * 10 < self.credit_nanos * 9 <= after.debited_nanos * 10:
                passed.append("nearly_spent")
            if self.debited_nanos < self.credit_nanos <= after.debited_nanos:
                passed.append("exhausted")
        return after, passed
