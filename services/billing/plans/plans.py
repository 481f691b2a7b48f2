"""Plans: the included quantities and the charges of a subscription. A version never changes. Pure, except the table."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import NamedTuple
from uuid import UUID

import msgspec

from infra.clock import uuid7
from infra.errors import NotFound
from infra.postgres.tx import Tx
from services.billing.plans.calendar import Interval
from services.billing.rating.domain import PART_OF
from services.billing.rating.schemes import Scheme, SchemeTier, amount, half_even, part


class Included(msgspec.Struct, frozen=True):
    meter: str
    quantity: int


class PlanCharge(msgspec.Struct, frozen=True):
    meter: str
    scheme: Scheme
    tiers: list[SchemeTier]
    by: str | None = None
    """Each model, agent or channel is charged by itself. None: all together."""
    package_size: int | None = None


class Plan(msgspec.Struct, frozen=True):
    """The content of one version."""

    name: str
    currency: str
    interval: Interval
    base_nanos: int
    included: list[Included] = []
    charges: list[PlanCharge] = []
    usage_markup_percent: Decimal | None = None
    """The price of all usage by the price book is charged with this markup. None: it is not charged."""
    minimum_nanos: int = 0
    """The commitment: the least that the lines of a whole period add up to, without corrections of other periods."""


class StoredPlan(NamedTuple):
    id: UUID
    version: int
    plan: Plan


class MeteredQuantity(NamedTuple):
    """The sum of a meter in a period for one model, agent and channel."""

    meter: str
    model: str
    agent: str
    channel: str
    late: bool
    quantity: int
    records: int


class DraftLine(NamedTuple):
    """A line of an invoice, without its ids."""

    description: str
    quantity: int
    unit_nanos: str
    """A decimal; empty if the units have different prices."""
    amount_nanos: int
    source: dict[str, str]
    """The buckets that it sums: meter, and model, agent or channel. without: the meters that are taken off.
    usage_period: the period whose commitment it changes."""


def lines(plan: Plan, metered: Sequence[MeteredQuantity], seconds: int, full_seconds: int) -> list[DraftLine]:
    """Returns the lines of a period that is `seconds` of a whole period of `full_seconds`, without the one up to the
    commitment.

    The base fee and the included quantities are shares of the whole period. A part with a charge of its own, such as
    cached tokens, is charged by it and the whole without the part, as in the price book. Late usage of an earlier
    period is charged like the other usage and named in the description.
    """
    found = []
    if plan.base_nanos and seconds:
        due = part(plan.base_nanos, seconds, full_seconds)
        found.append(DraftLine(f"{plan.name}: base fee{share(seconds, full_seconds)}", 1, str(due), due, {}))
    for charge in plan.charges:
        left = sum(part(item.quantity, seconds, full_seconds) for item in plan.included if item.meter == charge.meter)
        apart = sorted({other.meter for other in plan.charges if PART_OF.get(other.meter) == charge.meter})
        parts = [dict(_grouped(metered, meter, charge.by)) for meter in apart]
        for value, items in _grouped(metered, charge.meter, charge.by):
            without = [item for groups in parts for item in groups.get(value, ())]
            quantity = max(0, sum(item.quantity for item in items) - sum(item.quantity for item in without))
            free = min(left, quantity)
            left -= free
            meter = charge.meter + _without(apart)
            found.append(
                DraftLine(
                    f"{plan.name}: {meter}{_named(charge.by, value)}{_free(free)}{_late(items)}",
                    quantity,
                    str(charge.tiers[0].unit_nanos) if charge.scheme == "per_unit" else "",
                    amount(charge.scheme, charge.tiers, quantity, included=free, package_size=charge.package_size or 1),
                    {"meter": charge.meter}
                    | ({charge.by: value} if charge.by else {})
                    | ({"without": " ".join(apart)} if apart else {}),
                )
            )
    if plan.usage_markup_percent is not None:
        markup = plan.usage_markup_percent
        for meter, text in (("cost_nanos", "usage"), ("correction_nanos", "corrections of earlier usage")):
            for model, items in _grouped(metered, meter, "model"):
                due = with_markup(sum(item.quantity for item in items), markup)
                source = {"meter": meter, "model": model}
                description = (
                    f"{text} of {model} at the price book's prices plus {markup.normalize():f} %{_late(items)}"
                )
                found.append(DraftLine(description, sum(item.records for item in items), "", due, source))
    return found


def share(seconds: int, full_seconds: int) -> str:
    return "" if seconds == full_seconds else f", {seconds} of {full_seconds} seconds"


def missing(plan: Plan, counted_nanos: int, seconds: int, full_seconds: int) -> int:
    """Returns how much is missing to the commitment of a period, which is a share of that of a whole one."""
    return max(0, part(plan.minimum_nanos, seconds, full_seconds) - counted_nanos) if plan.minimum_nanos else 0


def with_markup(nanos: int, percent: Decimal) -> int:
    """Adds a percentage, rounded once."""
    numerator, denominator = (1 + percent / 100).as_integer_ratio()
    return half_even(nanos * numerator, denominator)


def _grouped(metered: Sequence[MeteredQuantity], meter: str, by: str | None) -> list[tuple[str, list[MeteredQuantity]]]:
    groups: dict[str, list[MeteredQuantity]] = {}
    for item in metered:
        if item.meter == meter:
            groups.setdefault(getattr(item, by) if by else "", []).append(item)
    return sorted(groups.items())


def _without(meters: Sequence[str]) -> str:
    return f" without {' and '.join(meters)}" if meters else ""


def _named(by: str | None, value: str) -> str:
    return f" of {by} {value or 'unknown'}" if by else ""


def _free(quantity: int) -> str:
    return f", {quantity} included" if quantity else ""


def _late(items: Sequence[MeteredQuantity]) -> str:
    late = sum(item.records for item in items if item.late)
    return f" ({late} records of an earlier period)" if late else ""


async def add(tx: Tx, plan: Plan, *, made_by: str) -> StoredPlan:
    """Adds a version of the plan with this name."""
    # Two calls at once must not make the same version.
    await tx.take_turn(f"billing plan {plan.name}")
    rows = await tx.sql("SELECT plan_id, version FROM plan WHERE name = $1 ORDER BY version DESC LIMIT 1", plan.name)
    plan_id, latest = rows[0] if rows else (uuid7(), 0)
    await tx.sql(
        "INSERT INTO plan (plan_id, version, name, content, made_by) VALUES ($1, $2, $3, $4, $5)",
        plan_id,
        latest + 1,
        plan.name,
        msgspec.json.encode(plan).decode(),
        made_by,
    )
    return StoredPlan(plan_id, latest + 1, plan)


async def latest(tx: Tx, plan_id: UUID) -> StoredPlan:
    """Raises NotFound."""
    rows = await tx.sql(
        "SELECT plan_id, version, content FROM plan WHERE plan_id = $1 ORDER BY version DESC LIMIT 1", plan_id
    )
    if not rows:
        raise NotFound(f"plan {plan_id}: not found")
    return read(*rows[0])


async def version(tx: Tx, plan_id: UUID, number: int) -> Plan:
    [(content,)] = await tx.sql("SELECT content FROM plan WHERE plan_id = $1 AND version = $2", plan_id, number)
    return read(plan_id, number, content).plan


def read(plan_id: UUID, number: int, content: str) -> StoredPlan:
    """Reads a row of the table ``plan``."""
    return StoredPlan(plan_id, number, msgspec.json.decode(content, type=Plan))
