"""Subscriptions and their periods, in the tables ``subscription`` and ``period``.

Each counted record belongs to one period, chosen when it is counted under the lock of the tenant's account: the open
period that contains its time or, if that one is closed, the oldest open one with the same plan, and then the record is
marked late. If there is none, because the subscription has ended or its plan was changed, an empty period with that
plan is added. So late usage and corrections are charged by the plan of their time. A period is closed under the same
lock, once. So each record is in exactly one invoice.

A subscription that goes on always has an open period. A change of the plan ends the period and begins another one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import cache
from typing import Literal, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo, available_timezones

from pydantic import BaseModel

from infra.clock import utcnow, uuid7
from infra.errors import Conflict, InvalidMessage, NotFound
from infra.postgres.tx import Tx
from services.billing.credit import accounts
from services.billing.plans import plans
from services.billing.plans.calendar import full_period

# Farther in the past, usage of that time would be too old to be counted.
MAX_DAYS_AGO = 45
MAX_DAYS_AHEAD = 3_660

# It reads hundreds of files.
_time_zones = cache(available_timezones)


class PlanSubscription(BaseModel):
    id: UUID
    tenant_id: str
    plan_id: UUID
    """The plan of the periods to come."""
    plan_version: int
    anchor_day: int
    """The day of the month on which periods begin, or the last day of a shorter month."""
    time_zone: str
    starts_at: datetime
    ends_at: datetime | None
    """Null: it goes on."""


class Period(NamedTuple):
    period: int
    subscription_id: UUID
    plan_id: UUID
    plan_version: int
    begins: datetime
    ends: datetime
    full_begins: datetime
    full_ends: datetime
    closed_at: datetime | None
    counted_nanos: int | None
    """The amount that counts for the commitment. Null until it is closed."""

    @property
    def seconds(self) -> int:
        return int((self.ends - self.begins).total_seconds())

    @property
    def full_seconds(self) -> int:
        return int((self.full_ends - self.full_begins).total_seconds())


class Place(NamedTuple):
    """The period of a record. 0: none."""

    period: int
    late: bool


NOWHERE = Place(0, False)


class _Known(NamedTuple):
    """A period that is open, or closed and contains usage that comes now."""

    subscription_id: UUID
    plan_id: UUID
    plan_version: int
    period: int
    begins: datetime
    ends: datetime
    is_open: bool

    def contains(self, at: datetime) -> bool:
        return self.begins <= at < self.ends

    @property
    def terms(self) -> tuple[UUID, UUID, int]:
        return self.subscription_id, self.plan_id, self.plan_version


_PERIOD = (
    "period, subscription_id, plan_id, plan_version, begins, ends, full_begins, full_ends, closed_at, counted_nanos"
)


async def place(tx: Tx, records: Sequence[tuple[str, datetime]]) -> list[Place]:
    """Returns the period of each record (tenant, time of use). The caller has locked the tenants' accounts."""
    now = utcnow()
    tenants = sorted({tenant_id for tenant_id, _ in records})
    # A held record may be old when it is resolved.
    since = min((at for _, at in records), default=now)
    found = await _extended(tx, tenants, now, since, ())
    places = []
    for tenant_id, at in records:
        if tenant_id not in found:
            places.append(NOWHERE)
            continue
        place, closed = _place(found[tenant_id], min(at, now))
        if closed:
            await _add_supplement(tx, tenant_id, closed, now)
            found |= await _periods(tx, [tenant_id], since, ())
            place, _ = _place(found[tenant_id], min(at, now))
        places.append(place)
    return places


async def place_corrections(tx: Tx, tenant_id: str, numbers: Sequence[int]) -> list[int]:
    """Returns the open period for a correction of a record of each of these periods: that period or, if it is closed,
    the oldest open one with its plan. The time of use does not decide: a period that was cut has records from after its
    end. The caller has locked the account."""
    now = utcnow()
    found = await _extended(tx, [tenant_id], now, now, numbers)
    places = []
    for number in numbers:
        place = _open_like(found.get(tenant_id, ()), number) if number else 0
        if place is None:
            await _add_supplement(tx, tenant_id, number, now)
            found = await _periods(tx, [tenant_id], now, numbers)
            place = _open_like(found[tenant_id], number)
            assert place
        places.append(place)
    return places


def _open_like(periods: Sequence[_Known], number: int) -> int | None:
    """Returns a period if it is open, or the oldest open one with its plan."""
    own = next(period for period in periods if period.period == number)
    if own.is_open:
        return number
    return next((period.period for period in periods if period.is_open and period.terms == own.terms), None)


def _place(periods: Sequence[_Known], at: datetime) -> tuple[Place, int | None]:
    """Returns the period, or the closed period that needs another one with its plan."""
    for period in periods:
        if period.is_open and period.contains(at):
            return Place(period.period, False), None
    for closed in periods:
        if closed.contains(at):
            for period in periods:
                if period.is_open and period.terms == closed.terms:
                    return Place(period.period, True), None
            return NOWHERE, closed.period
    return NOWHERE, None


async def _extended(
    tx: Tx, tenants: Iterable[str], now: datetime, since: datetime, numbers: Sequence[int]
) -> dict[str, list[_Known]]:
    """Returns the periods as `_periods` does, with those that have begun since the last call."""
    found = await _periods(tx, tenants, since, numbers)
    for tenant_id, periods in found.items():
        ends = [period.ends for period in periods if period.is_open]
        if ends and now >= max(ends):
            await extend(tx, tenant_id, now)
            found |= await _periods(tx, [tenant_id], since, numbers)
    return found


async def _periods(tx: Tx, tenants: Iterable[str], since: datetime, numbers: Sequence[int]) -> dict[str, list[_Known]]:
    """Returns the open periods, the closed ones that contain a time from `since` on, and those with these numbers, in
    the order of their time."""
    rows = await tx.sql(
        """
        SELECT tenant_id, subscription_id, plan_id, plan_version, period, begins, ends, closed_at IS NULL
        FROM period
        WHERE tenant_id = ANY($1::text[]) AND (closed_at IS NULL OR ends > $2 OR period = ANY($3::bigint[]))
        ORDER BY tenant_id, begins
        """,
        list(tenants),
        since,
        list(numbers),
    )
    found: dict[str, list[_Known]] = {}
    for tenant_id, *period in rows:
        found.setdefault(tenant_id, []).append(_Known(*period))
    return found


async def _add_supplement(tx: Tx, tenant_id: str, closed: int, now: datetime) -> None:
    """Adds an empty period with the plan of a closed one, for usage that came too late for it. It is invoiced like the
    others. It has no fee and no included quantities, which are shares of a period's time."""
    await tx.sql(
        """
        INSERT INTO period (tenant_id, subscription_id, plan_id, plan_version, begins, ends, full_begins, full_ends)
        SELECT tenant_id, subscription_id, plan_id, plan_version, $3, $3, full_begins, full_ends
        FROM period
        WHERE tenant_id = $1 AND period = $2
        """,
        tenant_id,
        closed,
        # Periods end at full seconds: a subscription that is cancelled now must not end before this one.
        now.replace(microsecond=0),
    )


async def extend(tx: Tx, tenant_id: str, until: datetime) -> None:
    """Adds the periods of the tenant's subscriptions that begin at or before `until`."""
    rows = await tx.sql(
        """
        SELECT s.subscription_id, s.plan_id, s.plan_version, s.anchor_day, s.time_zone, s.starts_at,
               nullif(s.ends_at, 'infinity'),
               (SELECT max(p.ends) FROM period AS p
                WHERE p.tenant_id = s.tenant_id AND p.subscription_id = s.subscription_id)
        FROM subscription AS s
        WHERE s.tenant_id = $1
        ORDER BY s.starts_at
        """,
        tenant_id,
    )
    for subscription_id, plan_id, plan_version, day, zone, starts_at, ends_at, reached in rows:
        begins = reached or starts_at
        plan = await plans.version(tx, plan_id, plan_version)
        while begins <= until and (ends_at is None or begins < ends_at):
            full = full_period(begins, day, plan.interval, ZoneInfo(zone), starts_at.astimezone(ZoneInfo(zone)).month)
            ends = min(full.ends, ends_at or full.ends)
            await _insert(tx, tenant_id, subscription_id, plan_id, plan_version, begins, ends, *full)
            begins = ends


async def _insert(tx: Tx, tenant_id: str, *columns: object) -> None:
    await tx.sql(
        """
        INSERT INTO period (tenant_id, subscription_id, plan_id, plan_version, begins, ends, full_begins, full_ends)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
        """,
        tenant_id,
        *columns,
    )


async def subscribe(
    tx: Tx,
    tenant_id: str,
    plan_id: UUID,
    *,
    starts_at: datetime | None,
    anchor_day: int | None,
    time_zone: str,
) -> PlanSubscription:
    """Raises Conflict if the tenant has a subscription at that time or if the currencies differ, and InvalidMessage for
    a start that is too early or has usage after it that was counted before the subscription existed."""
    currency, _ = await accounts.lock_one(tx, tenant_id)
    if time_zone not in _time_zones():
        raise InvalidMessage("time_zone", "is not the name of a time zone, such as Europe/Berlin")
    stored = await plans.latest(tx, plan_id)
    if stored.plan.currency != currency:
        raise Conflict(f"the plan is in {stored.plan.currency}, the account in {currency}")
    now = utcnow()
    begins = (starts_at or now).replace(microsecond=0)
    if (now - begins).days > MAX_DAYS_AGO:
        raise InvalidMessage("starts_at", f"must not be more than {MAX_DAYS_AGO} days ago")
    if (begins - now).days > MAX_DAYS_AHEAD:
        raise InvalidMessage("starts_at", f"must not be more than {MAX_DAYS_AHEAD} days ahead")
    if await tx.sql(
        "SELECT 1 FROM subscription WHERE tenant_id = $1 AND ends_at > $2 AND starts_at < ends_at", tenant_id, begins
    ):
        raise Conflict(f"tenant {tenant_id} has a subscription at that time; change or end it first")
    [(counted,)] = await tx.sql(
        "SELECT max(occurred_at) FROM usage WHERE tenant_id = $1 AND verdict = 'counted' AND occurred_at >= $2",
        tenant_id,
        begins,
    )
    if starts_at and counted:
        raise InvalidMessage(
            "starts_at", f"usage up to {counted.isoformat()} was counted without a subscription; begin after it"
        )
    day = anchor_day or begins.astimezone(ZoneInfo(time_zone)).day
    subscription_id = uuid7()
    await tx.sql(
        """
        INSERT INTO subscription (tenant_id, subscription_id, plan_id, plan_version, anchor_day, time_zone, starts_at)
        VALUES ($1, $2, $3, $4, $5, $6, $7)
        """,
        tenant_id,
        subscription_id,
        plan_id,
        stored.version,
        day,
        time_zone,
        begins,
    )
    await extend(tx, tenant_id, max(now, begins))
    return await get(tx, tenant_id, subscription_id)


async def change(
    tx: Tx, tenant_id: str, subscription_id: UUID, plan_id: UUID, when: Literal["now", "period_end"]
) -> PlanSubscription:
    """Moves a subscription to the latest version of a plan. `now` ends the current period and begins another one.

    Raises Conflict for a subscription that has ended, for another currency, if no period could be cut `now`, and for a
    change at the `period_end` if no period follows.
    """
    currency, _ = await accounts.lock_one(tx, tenant_id)
    current = await get(tx, tenant_id, subscription_id)
    stored = await plans.latest(tx, plan_id)
    now = utcnow().replace(microsecond=0)
    _check_goes_on(current, now)
    if stored.plan.currency != currency:
        raise Conflict(f"the plan is in {stored.plan.currency}, the account in {currency}")
    await extend(tx, tenant_id, now)
    if when == "period_end" and current.ends_at == await _reached(tx, tenant_id, subscription_id):
        raise Conflict(f"the subscription ends at the end of its period, {current.ends_at}; begin another one then")
    await tx.sql(
        "UPDATE subscription SET plan_id = $3, plan_version = $4 WHERE tenant_id = $1 AND subscription_id = $2",
        tenant_id,
        subscription_id,
        plan_id,
        stored.version,
    )
    if when == "now":
        await _cut(tx, tenant_id, subscription_id, now)
        await extend(tx, tenant_id, max(now, current.starts_at))
    return await get(tx, tenant_id, subscription_id)


async def cancel(tx: Tx, tenant_id: str, subscription_id: UUID, when: Literal["now", "period_end"]) -> PlanSubscription:
    """Ends a subscription. Its periods are still invoiced. One that has not begun never begins."""
    await accounts.lock_one(tx, tenant_id)
    current = await get(tx, tenant_id, subscription_id)
    now = utcnow().replace(microsecond=0)
    _check_goes_on(current, now)
    await extend(tx, tenant_id, now)
    if current.starts_at > now:
        await tx.sql(
            """
            UPDATE period
            SET ends = begins, closed_at = clock_timestamp()
            WHERE tenant_id = $1 AND subscription_id = $2
            """,
            tenant_id,
            subscription_id,
        )
    elif when == "now":
        await _cut(tx, tenant_id, subscription_id, now)
    await tx.sql(
        "UPDATE subscription SET ends_at = $3 WHERE tenant_id = $1 AND subscription_id = $2",
        tenant_id,
        subscription_id,
        await _reached(tx, tenant_id, subscription_id),
    )
    return await get(tx, tenant_id, subscription_id)


async def _reached(tx: Tx, tenant_id: str, subscription_id: UUID) -> datetime:
    """Returns the end of the last period that the subscription has by now."""
    [(ends,)] = await tx.sql(
        "SELECT max(ends) FROM period WHERE tenant_id = $1 AND subscription_id = $2", tenant_id, subscription_id
    )
    assert isinstance(ends, datetime)
    return ends


def _check_goes_on(current: PlanSubscription, now: datetime) -> None:
    if current.ends_at and (current.ends_at <= now or current.ends_at == current.starts_at):
        raise Conflict("the subscription has ended")


async def end_all(tx: Tx, tenant_id: str) -> None:
    """Ends every subscription of the tenant now. A repeated call changes nothing."""
    now = utcnow()
    rows = await tx.sql(
        """
        SELECT subscription_id
        FROM subscription
        WHERE tenant_id = $1 AND ends_at > $2 AND ends_at > starts_at
        ORDER BY starts_at
        """,
        tenant_id,
        now,
    )
    for (subscription_id,) in rows:
        await cancel(tx, tenant_id, subscription_id, "now")


async def _cut(tx: Tx, tenant_id: str, subscription_id: UUID, now: datetime) -> None:
    """Ends the running period now. Raises Conflict if it has just begun or begins later."""
    cut = await tx.sql(
        """
        UPDATE period
        SET ends = $3
        WHERE tenant_id = $1 AND subscription_id = $2 AND begins < $3 AND ends > $3 AND closed_at IS NULL
        RETURNING period
        """,
        tenant_id,
        subscription_id,
        now,
    )
    if not cut:
        raise Conflict("no period is running that could end now; try a second later or choose period_end")


async def get(tx: Tx, tenant_id: str, subscription_id: UUID) -> PlanSubscription:
    """Raises NotFound."""
    found = await listed(tx, tenant_id, after=None, limit=1, subscription_id=subscription_id)
    if not found:
        raise NotFound(f"subscription {subscription_id}: not found")
    return found[0]


async def listed(
    tx: Tx, tenant_id: str, *, after: UUID | None, limit: int, subscription_id: UUID | None = None
) -> list[PlanSubscription]:
    """Returns the subscriptions after the id `after`, or the one with `subscription_id`."""
    rows = await tx.sql(
        """
        SELECT subscription_id, tenant_id, plan_id, plan_version, anchor_day, time_zone, starts_at,
               nullif(ends_at, 'infinity')
        FROM subscription
        WHERE tenant_id = $1 AND ($2::uuid IS NULL OR subscription_id > $2)
              AND ($4::uuid IS NULL OR subscription_id = $4)
        ORDER BY subscription_id
        LIMIT $3
        """,
        tenant_id,
        after,
        limit,
        subscription_id,
    )
    return [PlanSubscription(**dict(zip(PlanSubscription.model_fields, row, strict=True))) for row in rows]


async def by_number(tx: Tx, tenant_id: str, number: int) -> Period:
    [row] = await tx.sql(f"SELECT {_PERIOD} FROM period WHERE tenant_id = $1 AND period = $2", tenant_id, number)
    return Period(*row)


async def due(tx: Tx, tenant_id: str, until: datetime) -> list[Period]:
    """Returns the open periods that have ended at or before `until`, oldest first."""
    rows = await tx.sql(
        f"SELECT {_PERIOD} FROM period WHERE tenant_id = $1 AND closed_at IS NULL AND ends <= $2 ORDER BY begins",
        tenant_id,
        until,
    )
    return [Period(*row) for row in rows]
