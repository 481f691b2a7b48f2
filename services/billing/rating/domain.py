"""Rating: the cost of usage, the verdict on a usage record, and the state of an account. Pure.

Money is integer nano-units (10⁻⁹) of a currency. A price is an exact decimal of nano-units per unit used. A record is
rated in exact decimals and rounded once, half to even.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import cached_property
from typing import Literal, NamedTuple

from protos.messages.billing import UsageRecorded
from services.billing.rating.schemes import half_even

# Part → whole. If the price book has a price for the part, the part is charged by it and the whole without the part.
PART_OF = {
    "cached_tokens": "input_tokens",
    "cache_write_tokens": "input_tokens",
    "reasoning_tokens": "output_tokens",
}
_PARTS = {whole: [part for part in PART_OF if PART_OF[part] == whole] for whole in sorted(set(PART_OF.values()))}
UNITS = (
    frozenset(
        (
            "input_tokens",
            "output_tokens",
            "calls",
            "bytes",
            "messages",
            "documents",
            "storage_byte_hours",
            "run_seconds",
        )
    )
    | PART_OF.keys()
)

# The resource of delivered messages. Billing makes these records itself, from channel.events.
MESSAGE = "channel/message"

# The resource of the seconds of runs.
RUN = "agent/run"

# Values above these limits come from a fault in the producer, not from use. The second is one million currency units.
MAX_QUANTITY = 10**12
MAX_AMOUNT_NANOS = 10**15
# Byte-hours are many: a terabyte has 10¹² in an hour.
MAX_QUANTITIES = dict.fromkeys(sorted(UNITS), MAX_QUANTITY) | {"storage_byte_hours": 10**16}
# A producer's clock may be a little fast.
MAX_AHEAD = timedelta(hours=1)
# Usage may arrive as late as the topic keeps it (30 days), plus the outage of a producer.
MAX_AGE = timedelta(days=45)


Kind = Literal["counted", "duplicate", "rejected", "held"]


@dataclass(frozen=True)
class Tier:
    """Prices for a request with more than `above` input tokens. They apply to all units of the request."""

    above: int
    nanos: Mapping[str, Decimal]


@dataclass(frozen=True)
class Price:
    """One version of a resource's price. It never changes. Rating uses the version valid at the time of the use."""

    resource: str
    version: int
    currency: str
    valid_from: datetime
    nanos: Mapping[str, Decimal]
    """Unit → nano-units of `currency` per one unit. A unit without an entry has no price of its own."""
    tiers: tuple[Tier, ...] = ()
    """In ascending order of `above`."""

    @cached_property
    def name(self) -> str:
        """The name that a charge refers to: ``openai/gpt-4o-mini@1``."""
        return f"{self.resource}@{self.version}"

    @cached_property
    def costs_something(self) -> bool:
        """At least one unit has a price above zero."""
        return any(self.nanos.values())

    @cached_property
    def scaled(self) -> tuple[tuple[int, ScaledPrices], ...]:
        """The tiers in ascending order of `above`, the base prices first, as integers."""
        return tuple((tier.above, _scaled(tier.nanos)) for tier in (Tier(-1, self.nanos), *self.tiers))


class ScaledPrices(NamedTuple):
    """Prices as integers: `nanos` divided by `divisor` is the exact price. Integers rate faster than decimals."""

    nanos: Mapping[str, int]
    divisor: int


def _scaled(nanos: Mapping[str, Decimal]) -> ScaledPrices:
    ratios = {unit: price.as_integer_ratio() for unit, price in nanos.items()}
    divisor = math.lcm(*(denominator for _, denominator in ratios.values()))
    return ScaledPrices({unit: n * (divisor // d) for unit, (n, d) in ratios.items()}, divisor)


class Verdict(NamedTuple):
    """The decision on a usage record."""

    kind: Kind
    reason: str = ""
    amount_nanos: int | None = 0
    """The debit in the account's currency. None while the record is held."""
    price_version: str | None = None


class NotReported(Exception):
    """The price needs a unit that the record does not report. The text is the unit."""


def cost(price: Price, quantities: Mapping[str, int]) -> int:
    """Returns the cost of `quantities` in nano-units, rounded half to even.

    A part that is not reported is charged at the price of its whole. Raises NotReported if a whole unit has a price
    above zero and is not reported.
    """
    size = quantities.get("input_tokens", 0)
    for above, tier in price.scaled:
        if size > above:
            prices = tier
    total = 0
    for unit, nanos in prices.nanos.items():
        whole = PART_OF.get(unit)
        if whole is None:
            if nanos and unit not in quantities:
                raise NotReported(unit)
            total += nanos * quantities.get(unit, 0)
        elif unit in quantities:
            # A part is charged at its own price instead of the price of its whole.
            total += (nanos - prices.nanos.get(whole, 0)) * quantities[unit]
    return half_even(total, prices.divisor)


def estimate(prices: Sequence[Price], currency: str, quantities: Mapping[str, int], now: datetime) -> int | None:
    """Returns the cost of `quantities` at the current price; missing units count as zero. None if there is no price.

    Raises ValueError for implausible quantities.
    """
    asked = dict.fromkeys(UNITS - PART_OF.keys(), 0) | dict(quantities)
    if fault := implausible(asked):
        raise ValueError(fault)
    price = price_at(prices, currency, now)
    if price is None:
        return None
    amount = cost(price, asked)
    if amount > MAX_AMOUNT_NANOS:
        raise ValueError(f"would cost {amount} nano-units by {price.name}")
    return amount


def provisional(quantities: Mapping[str, int], currency: str) -> int:
    """Returns the amount to reserve for `quantities` of a resource without a price. It is high on purpose.

    The use will be held for review, and its hold stays open. So the credit ends even if the price is unknown. In a
    currency of unknown worth it is the largest amount, so that one such use holds all of the credit.
    """
    if currency not in _UNITS_PER_DOLLAR:
        return MAX_AMOUNT_NANOS
    nanos = cost(_UNPRICED, dict.fromkeys(UNITS, 0) | dict(quantities)) * _UNITS_PER_DOLLAR[currency]
    return min(nanos, MAX_AMOUNT_NANOS)


def price_at(prices: Sequence[Price], currency: str, moment: datetime) -> Price | None:
    """Returns the price that is valid at `moment`: one in `currency`, or one that is free in every currency."""
    return valid_at(prices, currency, moment) or _free_at(prices, moment)


def valid_at(prices: Sequence[Price], currency: str, moment: datetime) -> Price | None:
    """Returns the latest version in `currency` that is valid at `moment`. Of two with the same start, the newer one."""
    if len(prices) == 1:  # Most have one.
        [price] = prices
        return price if price.valid_from <= moment and price.currency == currency else None
    found = (price for price in _in_force(prices, moment) if price.currency == currency)
    return max(found, key=lambda price: (price.valid_from, price.version), default=None)


def _in_force(prices: Sequence[Price], moment: datetime) -> list[Price]:
    """Returns the versions that have begun at `moment`, of the first name that has any.

    prices: grouped by their resource, the most specific name first. So a new price of a more specific name changes
    nothing before its date.
    """
    begun = [price for price in prices if price.valid_from <= moment]
    return [price for price in begun if price.resource == begun[0].resource]


def _free_at(prices: Sequence[Price], moment: datetime) -> Price | None:
    """Returns a price that is valid at `moment` if all of them are zero: nothing needs an exchange rate."""
    found = [
        valid for code in sorted({price.currency for price in prices}) if (valid := valid_at(prices, code, moment))
    ]
    costs = any(price.costs_something or price.tiers for price in found)
    return found[0] if found and not costs else None


def judge(record: UsageRecorded, currency: str | None, prices: Sequence[Price], now: datetime) -> Verdict:
    """Returns the verdict on the first record with its usage_id.

    currency: the account's currency; None while the tenant has no account. prices: all versions of the resource's
    price. now: the time at which the record arrived.
    """
    # A record that cannot be true is held, not rejected: something was used, and rejected usage is free.
    if fault := implausible(record.quantities):
        return _held(f"implausible: {fault}")
    if record.occurred_at > now + MAX_AHEAD:
        return _held("implausible: occurred_at is in the future")
    if record.occurred_at < now - MAX_AGE:
        return _held(f"implausible: occurred_at is more than {MAX_AGE.days} days ago")
    if not UNITS.issuperset(record.quantities):
        return _held(f"no price has a unit {min(record.quantities.keys() - UNITS)!r}")
    if currency is None:
        return _held(NO_ACCOUNT)
    price = price_at(prices, currency, record.occurred_at)
    if price is None:
        return _held(_no_price(record, currency, prices))
    try:
        amount = cost(price, record.quantities)
    except NotReported as unit:
        return _held(f"{unit} was not reported, and {price.name} needs it")
    if amount > MAX_AMOUNT_NANOS:
        return _held(f"implausible: it would cost {amount} nano-units by {price.name}")
    if not amount and not any(record.quantities.values()) and price.costs_something:
        return _held(f"no use was reported: all quantities are 0, and {price.name} has a price")
    return Verdict("counted", "", amount, price.name)


# A record can overtake the event that its tenant was created. It is rated when that event arrives.
NO_ACCOUNT = "the tenant has no account yet"


def _held(reason: str) -> Verdict:
    return Verdict("held", reason, None)


def implausible(quantities: Mapping[str, int]) -> str:
    """Returns the fault of the quantities, or an empty text if they are plausible."""
    for unit, count in quantities.items():
        if not 0 <= count <= MAX_QUANTITIES.get(unit, MAX_QUANTITY):
            return f"quantities.{unit} is {count}"
    if PART_OF.keys().isdisjoint(quantities):
        return ""
    for whole, known_parts in _PARTS.items():
        parts = [unit for unit in known_parts if unit in quantities]
        if parts and whole in quantities and sum(quantities[unit] for unit in parts) > quantities[whole]:
            return f"quantities.{whole} is less than its {' and '.join(parts)}"
    return ""


def _no_price(record: UsageRecorded, currency: str, prices: Sequence[Price]) -> str:
    if not prices:
        return f"the price book does not know {record.resource}"
    if not (valid := _in_force(prices, record.occurred_at)):
        return f"{record.resource} had no price yet at {record.occurred_at.isoformat()}"
    others = ", ".join(sorted({price.currency for price in valid}))
    return f"no exchange rate: {record.resource} is priced in {others}, the account is in {currency}"


class UsageContent(NamedTuple):
    """The content by which two records with one usage_id are compared."""

    resource: str
    quantities: Mapping[str, int]


OTHER_CONTENT = "an earlier record with this usage_id has other content; the earlier record counts"


def repeated(record: UsageRecorded, first: UsageContent) -> Verdict:
    """Returns the verdict on a record whose usage_id is known already. `first` is the content that counts."""
    if first == UsageContent(record.resource, record.quantities):
        return Verdict("duplicate", "reported before")
    return Verdict("duplicate", OTHER_CONTENT)


def settle(
    records: Iterable[UsageRecorded],
    seen: MutableMapping[tuple[str, str], UsageContent],
    currencies: Mapping[str, str],
    prices: Mapping[str, Sequence[Price]],
    now: datetime,
) -> list[Verdict]:
    """Returns one verdict per record, in order.

    seen: (tenant, usage_id) → content of the first record. The new ones of `records` are added to it.
    """
    verdicts = []
    for record in records:
        key = record.tenant_id, record.usage_id
        first = seen.get(key)
        if first is None:
            seen[key] = UsageContent(record.resource, record.quantities)
            verdict = judge(record, currencies.get(record.tenant_id), prices.get(record.resource, ()), now)
        else:
            verdict = repeated(record, first)
        verdicts.append(verdict)
    return verdicts


CreditThreshold = Literal["nearly_spent", "exhausted"]
"""nearly_spent: 90 % of the credit is used. exhausted: no credit is left."""


# At least as many units as a dollar is worth. Only provisional amounts depend on it.
_UNITS_PER_DOLLAR = {
    **dict.fromkeys(("USD", "EUR", "GBP", "CHF"), 1),
    **dict.fromkeys(("AUD", "CAD", "NZD", "SGD"), 2),
    **dict.fromkeys(("BRL", "CNY", "DKK", "HKD", "ILS", "MYR", "PLN", "SAR", "AED"), 10),
    **dict.fromkeys(("CZK", "INR", "MXN", "NOK", "PHP", "SEK", "THB", "TRY", "TWD", "ZAR"), 150),
    **dict.fromkeys(("JPY", "KRW"), 3_000),
}
_UNPRICED = Price(
    "a resource without a price",
    1,
    "USD",
    datetime.min.replace(tzinfo=UTC),
    {
        "input_tokens": Decimal(200_000),
        "output_tokens": Decimal(200_000),
        "calls": Decimal(100_000_000),
        "bytes": Decimal(1_000),
    },
)


@dataclass(frozen=True)
class Account:
    """The money of one tenant."""

    credit_nanos: int | None
    """The sum of all credit ever granted. None: no limit."""
    debited_nanos: int
    """All charges minus corrections."""

    @property
    def balance_nanos(self) -> int | None:
        """The remaining credit. Below zero after late usage. None: no limit."""
        return None if self.credit_nanos is None else self.credit_nanos - self.debited_nanos

    def debit(self, amount_nanos: int) -> tuple[Account, list[CreditThreshold]]:
        """Returns the account after the debit, and the thresholds that this debit has passed."""
        after = Account(self.credit_nanos, self.debited_nanos + amount_nanos)
        return after, self.passed(after)

    def passed(self, after: Account) -> list[CreditThreshold]:
        """Returns the thresholds that a change to `after` has passed: by a debit, or because credit has ended."""
        passed: list[CreditThreshold] = []
        if self.credit_nanos is not None and after.credit_nanos is not None and self.credit_nanos > 0:
            if self.debited_nanos * 10 < self.credit_nanos * 9 and after.credit_nanos * 9 <= after.debited_nanos * 10:
                passed.append("nearly_spent")
            if self.debited_nanos < self.credit_nanos and after.credit_nanos <= after.debited_nanos:
                passed.append("exhausted")
        return passed
