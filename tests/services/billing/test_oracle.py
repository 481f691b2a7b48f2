"""Any multiset of records, in any order, repeated, delayed, with crashes and periods that close meanwhile: the ledger,
the sums, the invoices and the journal equal an oracle in fractions, which shares no code with the service."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.clock import utcnow, uuid7
from infra.postgres.database import Database
from protos.messages.billing import UsageRecorded
from services.billing.credit import accounts
from services.billing.invoices import booking, closing
from services.billing.invoices.store import Invoice
from services.billing.invoices.tax import Seller
from services.billing.plans import plans, subscriptions
from services.billing.plans.plans import Plan, PlanCharge
from services.billing.rating import price_book
from services.billing.rating.schemes import SchemeTier
from tests.services.billing.conftest import count
from tests.services.billing.invoices.test_invoices import ANCHOR, MIDNIGHT, START
from tooling.testing.platform import Platform

NOW = utcnow()
CASES = int(os.environ.get("CLAW_BOOKS_CASES", "16"))
# Cases of one example. They share batches, as the records of a partition do.
TENANTS = 8
# Nano-units with fractions, so that every record is rounded.
PRICES = {"input_tokens": Decimal("0.375"), "output_tokens": Decimal("1.5")}
TIERS = [SchemeTier(1000, Decimal("2.5"), 7), SchemeTier(None, Decimal("0.25"))]


class Made(NamedTuple):
    record: UsageRecorded
    delivered: int
    """How often it is delivered, in all."""


class Crash(Exception):
    pass


@pytest.fixture(scope="module")
async def store(platform: Platform) -> Database:
    await platform.prepare("billing")
    return platform.database("billing")


async def subscribe(store: Database, model: str) -> dict[str, UUID]:
    """Makes the tenants of an example. Returns tenant → subscription."""
    plan = Plan(
        name=model,
        currency="USD",
        interval="month",
        base_nanos=0,
        charges=[PlanCharge("input_tokens", "graduated", TIERS)],
        usage_markup_percent=Decimal(0),
    )
    made = {}
    async with store.begin() as tx:
        await price_book.add(tx, model, "USD", None, PRICES, (), made_by="test")
        stored = await plans.add(tx, plan, made_by="test")
        for _ in range(TENANTS):
            tenant_id = str(uuid7())
            await accounts.open_account(tx, tenant_id, "USD", 10**15)
            subscription = await subscriptions.subscribe(
                tx, tenant_id, stored.id, starts_at=START, anchor_day=ANCHOR["anchor_day"], time_zone="UTC"
            )
            made[tenant_id] = subscription.id
    return made


def cost(record: UsageRecorded) -> int:
    """Half to even, as Python rounds fractions."""
    return round(sum(Fraction(PRICES[unit]) * count for unit, count in record.quantities.items()))


def graduated(tokens: int) -> int:
    cheap = max(0, tokens - 1000)
    return round((tokens - cheap) * Fraction("2.5") + cheap * Fraction("0.25") + (7 if tokens else 0))


@dataclass
class Case:
    """One tenant: the records that are sent for it, and the invoice that each is due in by its first delivery."""

    subscription_id: UUID
    closes_before: int
    """The batch before which its first period is closed."""
    made: list[Made]
    in_first: dict[str, UsageRecorded] = field(default_factory=dict)
    in_second: dict[str, UsageRecorded] = field(default_factory=dict)
    invoices: list[Invoice] = field(default_factory=list)

    def first_delivery(self, record: UsageRecorded) -> None:
        if record.usage_id in self.in_first or record.usage_id in self.in_second:
            return
        due_in_first = not self.invoices and record.occurred_at < MIDNIGHT
        (self.in_first if due_in_first else self.in_second)[record.usage_id] = record


@settings(max_examples=max(1, CASES // TENANTS))
@given(rng=st.randoms(use_true_random=False))
async def test_invoices_ledger_and_sums_equal_the_oracle(store: Database, rng: random.Random) -> None:
    model = f"acme/{uuid7()}"
    made = {
        tenant_id: (id_, some_records(rng, tenant_id, model))
        for tenant_id, id_ in (await subscribe(store, model)).items()
    }
    deliveries = [item.record for _, records in made.values() for item in records for _ in range(item.delivered)]
    rng.shuffle(deliveries)
    batches: list[list[UsageRecorded]] = []
    while deliveries:
        size = rng.randrange(1, 12 * TENANTS)
        batches.append(deliveries[:size])
        deliveries = deliveries[size:]
    cases = {tenant_id: Case(id_, rng.randrange(len(batches)), records) for tenant_id, (id_, records) in made.items()}

    for number, batch in enumerate(batches):
        if closing_now := [tenant_id for tenant_id, case in cases.items() if case.closes_before == number]:
            async with store.begin() as tx:
                for tenant_id in closing_now:
                    cases[tenant_id].invoices += await closing.close(tx, tenant_id, utcnow(), "")
        while True:
            try:
                await deliver(store, batch, crash=rng.random() > 0.7)
                break
            except Crash:
                continue
        for record in batch:
            cases[record.tenant_id].first_delivery(record)
    async with store.begin() as tx:
        for tenant_id, case in cases.items():
            await subscriptions.cancel(tx, tenant_id, case.subscription_id, "now")
            case.invoices += await closing.close(tx, tenant_id, utcnow() + timedelta(seconds=1), "")
            for invoice in case.invoices:
                await booking.finalise(tx, tenant_id, invoice.id, Seller(), "test")

    books = await read_books(store, list(cases))
    for tenant_id, case in cases.items():
        expected = [expect(case.in_first), expect(case.in_second)]
        assert [invoice.subtotal_nanos for invoice in case.invoices] == expected
        total = sum(cost(item.record) for item in case.made)
        assert books[tenant_id] == Books(
            debited=total, charged=-total, entries=len(case.made), summed=total, revenue=-sum(expected), rest=0
        )


def some_records(rng: random.Random, tenant_id: str, model: str) -> list[Made]:
    made = []
    for n in range(rng.randrange(1, 80)):
        # Some are in the running period; most in the one that is closed in the middle of the deliveries.
        at = START + timedelta(seconds=rng.randrange(int((NOW - START).total_seconds())))
        quantities = {"input_tokens": rng.randrange(60), "output_tokens": rng.randrange(1, 9)}
        record = UsageRecorded(
            tenant_id=tenant_id,
            usage_id=f"u/{n}",
            resource=model,
            quantities=quantities,
            occurred_at=at,
            agent_id=rng.choice([UUID(int=1), UUID(int=2)]),
        )
        made.append(Made(record, rng.choice([1, 1, 1, 2, 3])))
    return made


class Books(NamedTuple):
    """Sums of a tenant's rows."""

    debited: int
    charged: int
    entries: int
    summed: int
    revenue: int
    rest: int


async def read_books(store: Database, tenant_ids: list[str]) -> dict[str, Books]:
    async with store.begin() as tx:
        rows = await tx.sql(
            """
            SELECT a.tenant_id, a.debited_nanos, l.charged, l.entries, b.summed, j.revenue, j.rest
            FROM account AS a,
                 LATERAL (SELECT sum(amount_nanos)::bigint AS charged, count(*) AS entries FROM ledger_entry
                          WHERE tenant_id = a.tenant_id AND kind = 'charge') AS l,
                 LATERAL (SELECT sum(quantity)::bigint AS summed FROM usage_bucket
                          WHERE tenant_id = a.tenant_id AND meter = 'cost_nanos') AS b,
                 LATERAL (SELECT sum(amount_nanos) FILTER (WHERE account = 'revenue')::bigint AS revenue,
                                 sum(amount_nanos)::bigint AS rest FROM journal_line
                          WHERE tenant_id = a.tenant_id) AS j
            WHERE a.tenant_id = ANY($1::text[])
            """,
            tenant_ids,
        )
    return {tenant_id: Books(*books) for tenant_id, *books in rows}


def expect(records: dict[str, UsageRecorded]) -> int:
    tokens = sum(record.quantities["input_tokens"] for record in records.values())
    return graduated(tokens) + sum(map(cost, records.values()))


async def deliver(store: Database, batch: list[UsageRecorded], *, crash: bool) -> None:
    """Handles a batch as the Kafka reader does. With `crash` the process dies before the commit."""
    async with store.begin() as tx:
        await count(tx, batch)
        if crash:
            raise Crash
