"""Any multiset of records, in any order, repeated, delayed, with crashes and periods that close meanwhile: the ledger,
the sums, the invoices and the journal equal an oracle in fractions, which shares no code with the service."""

from __future__ import annotations

import os
import random
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
from services.billing import accounts, booking, closing, plans, price_book, subscriptions
from services.billing.invoices import Invoice
from services.billing.plans import Plan, PlanCharge
from services.billing.schemes import SchemeTier
from services.billing.tax import Seller
from tests.services.billing.conftest import count
from tests.services.billing.test_invoices import ANCHOR, MIDNIGHT, START
from tooling.testing.platform import Platform

NOW = utcnow()
CASES = int(os.environ.get("CLAW_BOOKS_CASES", "12"))
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


async def subscribed(store: Database, model: str) -> tuple[str, UUID]:
    tenant_id = str(uuid7())
    plan = Plan(
        name=tenant_id,
        currency="USD",
        interval="month",
        base_nanos=0,
        charges=[PlanCharge("input_tokens", "graduated", TIERS)],
        usage_markup_percent=Decimal(0),
    )
    async with store.begin(tenant_id=tenant_id) as tx:
        await accounts.open_account(tx, tenant_id, "USD", 10**15)
        await price_book.add(tx, model, "USD", None, PRICES, (), made_by="test")
        stored = await plans.add(tx, plan, made_by="test")
        made = await subscriptions.subscribe(
            tx, tenant_id, stored.id, starts_at=START, anchor_day=ANCHOR["anchor_day"], time_zone="UTC"
        )
    return tenant_id, made.id


def cost(record: UsageRecorded) -> int:
    """Half to even, as Python rounds fractions."""
    return round(sum(Fraction(PRICES[unit]) * count for unit, count in record.quantities.items()))


def graduated(tokens: int) -> int:
    total = Fraction(0)
    for token in range(1, tokens + 1):
        total += Fraction("2.5") if token <= 1000 else Fraction("0.25")
    return round(total + (7 if tokens else 0))


@settings(max_examples=CASES)
@given(rng=st.randoms(use_true_random=False))
async def test_invoices_ledger_and_sums_equal_the_oracle(store: Database, rng: random.Random) -> None:
    model = f"acme/{uuid7()}"
    tenant_id, subscription_id = await subscribed(store, model)
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
    deliveries = [item.record for item in made for _ in range(item.delivered)]
    rng.shuffle(deliveries)
    batches: list[list[UsageRecorded]] = []
    while deliveries:
        size = rng.randrange(1, 12)
        batches.append(deliveries[:size])
        deliveries = deliveries[size:]
    closes_before = rng.randrange(len(batches))

    in_first: dict[str, UsageRecorded] = {}
    in_second: dict[str, UsageRecorded] = {}
    found: list[Invoice] = []
    for number, batch in enumerate(batches):
        if number == closes_before:
            async with store.begin(tenant_id=tenant_id) as tx:
                found += await closing.close(tx, tenant_id, utcnow(), "")
        while True:
            try:
                await deliver(store, batch, crash=rng.random() > 0.7)
                break
            except Crash:
                continue
        for record in batch:
            if record.usage_id in in_first or record.usage_id in in_second:
                continue
            (in_first if not found and record.occurred_at < MIDNIGHT else in_second)[record.usage_id] = record
    async with store.begin(tenant_id=tenant_id) as tx:
        await subscriptions.cancel(tx, tenant_id, subscription_id, "now")
        found += await closing.close(tx, tenant_id, utcnow() + timedelta(seconds=1), "")
        for invoice in found:
            await booking.finalise(tx, tenant_id, invoice.id, Seller(), "test")

    expected = [expect(in_first), expect(in_second)]
    assert [invoice.subtotal_nanos for invoice in found] == expected
    total = sum(cost(item.record) for item in made)
    async with store.begin(tenant_id=tenant_id) as tx:
        assert await tx.sql("SELECT debited_nanos FROM account WHERE tenant_id = $1", tenant_id) == [(total,)]
        [(charged, entries)] = await tx.sql(
            "SELECT sum(amount_nanos)::bigint, count(*) FROM ledger_entry WHERE tenant_id = $1 AND kind = 'charge'",
            tenant_id,
        )
        assert (charged, entries) == (-total, len(made))
        [(summed,)] = await tx.sql(
            "SELECT sum(quantity)::bigint FROM usage_bucket WHERE tenant_id = $1 AND meter = 'cost_nanos'", tenant_id
        )
        assert summed == total
        [(revenue,)] = await tx.sql(
            "SELECT sum(amount_nanos)::bigint FROM journal_line WHERE tenant_id = $1 AND account = 'revenue'", tenant_id
        )
        assert -revenue == sum(expected)
        [(rest,)] = await tx.sql("SELECT sum(amount_nanos)::bigint FROM journal_line WHERE tenant_id = $1", tenant_id)
        assert rest == 0


def expect(records: dict[str, UsageRecorded]) -> int:
    tokens = sum(record.quantities["input_tokens"] for record in records.values())
    return graduated(tokens) + sum(map(cost, records.values()))


async def deliver(store: Database, batch: list[UsageRecorded], *, crash: bool) -> None:
    """Handles a batch as the Kafka reader does. With `crash` the process dies before the commit."""
    async with store.begin() as tx:
        await count(tx, batch)
        if crash:
            raise Crash
