"""Any history of one subscription after another: changes of the plan, cancellation, late usage, also in the second of
a period's edge. Periods follow each other without gap or overlap, each costs its share to the second, and usage is
charged by the plan of its time."""

from __future__ import annotations

import os
import random
from calendar import monthrange
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Literal, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest

from infra.clock import uuid7
from infra.errors import Conflict, InvalidMessage
from infra.postgres.database import Database
from infra.postgres.tx import Tx
from protos.messages.billing import UsageRecorded
from services.billing.credit import accounts
from services.billing.invoices import booking, closing
from services.billing.invoices.tax import Seller
from services.billing.plans import plans, subscriptions
from services.billing.plans.plans import Plan
from services.billing.rating import price_book
from tests.services.billing.conftest import count
from tests.services.billing.test_histories import Clock
from tooling.testing.platform import Platform

CASES = int(os.environ.get("CLAW_BOOKS_CASES", "12"))
MODULES = (
    "invoices.booking",
    "invoices.closing",
    "plans.subscriptions",
    "rating.price_book",
    "usage.records",
)
SECOND = timedelta(seconds=1)
TOKEN = 1000
# The clocks of some change at midnight.
ZONES = ["UTC", "Europe/Berlin", "Africa/Cairo", "Asia/Beirut", "America/Santiago", "Asia/Kathmandu"]


@pytest.fixture(scope="module")
async def store(platform: Platform) -> Database:
    await platform.prepare("billing")
    return platform.database("billing")


class Offer(NamedTuple):
    id: UUID
    base: int
    markup: int
    interval: Literal["month", "year"]


@dataclass
class Span:
    """A period of the oracle, and the whole one that it is a part of."""

    begins: datetime
    ends: datetime
    offer: Offer
    whole: tuple[datetime, datetime]


@dataclass
class Oracle:
    """A subscription, without the code of the service."""

    id: UUID
    day: int
    zone: ZoneInfo
    month: int
    offer: Offer
    ends: datetime | None = None
    spans: list[Span] = field(default_factory=list)

    def whole(self, at: datetime) -> tuple[datetime, datetime]:
        months = range(1, 13) if self.offer.interval == "month" else [self.month]
        edges = [
            datetime(year, month, min(self.day, monthrange(year, month)[1]), tzinfo=self.zone).astimezone(UTC)
            for year in range(at.year - 2, at.year + 3)
            for month in months
        ]
        return max(edge for edge in edges if edge <= at), min(edge for edge in edges if edge > at)

    def begin(self, at: datetime) -> None:
        whole = self.whole(at)
        ends = whole[1] if self.ends is None else min(whole[1], self.ends)
        self.spans.append(Span(at, ends, self.offer, whole))

    def advance(self, now: datetime) -> None:
        while (last := self.spans[-1].ends) <= now and (self.ends is None or last < self.ends):
            self.begin(last)

    def goes_on(self, now: datetime) -> bool:
        return self.ends is None or self.ends > now


@dataclass
class History:
    rng: random.Random
    clock: Clock
    offers: list[Offer] = field(default_factory=list)
    tenant_id: str = field(default_factory=lambda: str(uuid7()))
    model: str = field(default_factory=lambda: f"acme/{uuid7()}")
    known: list[Oracle] = field(default_factory=list)
    used: dict[UUID | None, int] = field(default_factory=dict)
    """Cost by plan; None: outside of the time of a subscription."""
    records: int = 0

    async def open(self, tx: Tx) -> None:
        await accounts.open_account(tx, self.tenant_id, "USD", None)
        since = self.clock.now - timedelta(days=60)
        await price_book.add(tx, self.model, "USD", since, {"input_tokens": Decimal(TOKEN)}, (), made_by="test")
        for base, markup, interval in (
            (31 * 10**9 + 7, 0, "month"),
            (90 * 10**9, 100, "month"),
            (10**9 + 1, 300, "year"),
        ):
            plan = Plan(
                name=f"{self.tenant_id} {base}",
                currency="USD",
                interval=interval,  # type: ignore[arg-type]
                base_nanos=base,
                usage_markup_percent=Decimal(markup),
            )
            stored = await plans.add(tx, plan, made_by="test")
            self.offers.append(Offer(stored.id, base, markup, interval))  # type: ignore[arg-type]

    def pass_time(self) -> None:
        rng, now = self.rng, self.clock.now
        edge = self.known[-1].spans[-1].ends + rng.choice([-1, 0, 1]) * SECOND if self.known else now
        if rng.random() < 0.4 and now < edge < now + timedelta(days=40):
            self.clock.now = edge
        else:
            self.clock.now += rng.choice([0, 0, 1, rng.randrange(15 * 86_400)]) * SECOND
        for one in self.known:
            one.advance(self.clock.now)

    async def act(self, tx: Tx) -> None:
        rng, now, offer = self.rng, self.clock.now, self.rng.choice(self.offers)
        last = self.known[-1] if self.known and self.known[-1].goes_on(now) else None
        match rng.randrange(10):
            case 0 | 1 if not last:
                zone, day = ZoneInfo(rng.choice(ZONES)), rng.choice([None, 1, 28, 29, 30, 31])
                made = await subscriptions.subscribe(
                    tx, self.tenant_id, offer.id, starts_at=None, anchor_day=day, time_zone=zone.key
                )
                local = now.astimezone(zone)
                self.known.append(Oracle(made.id, day or local.day, zone, local.month, offer))
                self.known[-1].begin(now)
            case 2 if last:
                await subscriptions.change(tx, self.tenant_id, last.id, offer.id, "period_end")
                last.offer = offer
            case 3 if last:
                await subscriptions.change(tx, self.tenant_id, last.id, offer.id, "now")
                last.offer, last.spans[-1].ends = offer, now
                last.begin(now)
            case 4 if last and rng.random() < 0.5:
                when: Literal["now", "period_end"] = rng.choice(["now", "period_end"])
                await subscriptions.cancel(tx, self.tenant_id, last.id, when)
                last.ends = last.spans[-1].ends = now if when == "now" else last.spans[-1].ends
            case 5 | 6 | 7:
                await self.use(tx, now - rng.choice([0, 1, rng.randrange(30 * 86_400)]) * SECOND)
            case 8 | 9:
                for invoice in await closing.close(tx, self.tenant_id, now, ""):
                    if rng.random() < 0.5:
                        await booking.finalise(tx, self.tenant_id, invoice.id, Seller(), "test")

    async def use(self, tx: Tx, at: datetime) -> None:
        self.records += 1
        tokens = self.rng.randrange(1, 10**6)
        record = UsageRecorded(
            tenant_id=self.tenant_id,
            usage_id=f"u/{self.records}",
            resource=self.model,
            quantities={"input_tokens": tokens},
            occurred_at=at,
        )
        await count(tx, [record])
        spans = [span for one in self.known for span in one.spans if span.begins <= at < span.ends]
        plan = spans[0].offer.id if spans else None
        self.used[plan] = self.used.get(plan, 0) + tokens * TOKEN


@pytest.mark.parametrize("seed", range(CASES))
async def test_each_second_is_paid_once_by_the_plan_of_its_time(
    store: Database, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, clock = random.Random(seed), Clock()
    clock.now = datetime(2026, 1, 1, tzinfo=UTC) + rng.randrange(365 * 86_400) * SECOND
    for name in MODULES:
        monkeypatch.setattr(f"services.billing.{name}.utcnow", clock, raising=False)
    history = History(rng, clock)
    async with store.begin(tenant_id=history.tenant_id) as tx:
        await history.open(tx)
    for _ in range(30):
        history.pass_time()
        try:
            async with store.begin(tenant_id=history.tenant_id) as tx:
                await history.act(tx)
        except (Conflict, InvalidMessage):
            # Refused by a rule, such as two changes in one second: nothing may have changed.
            pass
    clock.now += timedelta(days=800)
    async with store.begin(tenant_id=history.tenant_id) as tx:
        for one in history.known:
            one.advance(clock.now)
        await closing.close(tx, history.tenant_id, clock.now, "")
        rows = await tx.sql(
            """
            SELECT p.plan_id, p.begins, p.ends, p.full_begins, p.full_ends, l.amount_nanos
            FROM period AS p
            LEFT JOIN invoice AS i USING (tenant_id, period)
            LEFT JOIN invoice_line AS l ON l.tenant_id = i.tenant_id AND l.invoice_id = i.invoice_id AND l.source = '{}'
            WHERE p.tenant_id = $1 AND p.begins < p.ends
            ORDER BY p.begins
            """,
            history.tenant_id,
        )
        charged = await tx.sql(
            """
            SELECT p.plan_id, sum(l.amount_nanos)::bigint
            FROM invoice AS i
            JOIN invoice_line AS l USING (tenant_id, invoice_id)
            JOIN period AS p USING (tenant_id, period)
            WHERE i.tenant_id = $1 AND l.source <> '{}'
            GROUP BY 1
            """,
            history.tenant_id,
        )
        [(outside,)] = await tx.sql(
            "SELECT coalesce(sum(amount_nanos), 0)::bigint FROM usage WHERE tenant_id = $1 AND period = 0",
            history.tenant_id,
        )
    spans = [span for one in history.known for span in one.spans if span.begins < span.ends]
    assert [row[:5] for row in rows] == [(span.offer.id, span.begins, span.ends, *span.whole) for span in spans]
    for span, (*_, fee) in zip(spans, rows, strict=True):
        share = Fraction(int((span.ends - span.begins) / SECOND), int((span.whole[1] - span.whole[0]) / SECOND))
        assert fee is None if span.ends > clock.now else abs(fee - span.offer.base * share) <= Fraction(1, 2)
    markups = {offer.id: 100 + offer.markup for offer in history.offers}
    used = {plan: nanos * markups[plan] // 100 for plan, nanos in history.used.items() if plan}
    assert dict(charged) == used
    assert outside == history.used.get(None, 0)
