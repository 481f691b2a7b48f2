"""Any history of one tenant's money: usage, late and repeated; periods, changes of the plan, cancellation; grants that
expire or roll over; finalisation, credit notes, void, write-off; payments, bank transfers, refunds, disputes; prices,
re-rating; deletion of old records; credit that the tenant buys. After each act the books agree with each other and with
the records."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, get_args
from uuid import UUID

import pytest

from infra.clock import utcnow, uuid7
from infra.errors import Conflict, InvalidMessage
from infra.postgres.database import Database
from infra.postgres.tx import Tx
from protos.messages.billing import UsageRecorded
from services.billing.credit import accounts, grants, journal
from services.billing.invoices import booking, closing, purchases, transfers
from services.billing.invoices import store as invoices
from services.billing.invoices.tax import Seller
from services.billing.payments import store as payments
from services.billing.payments.provider import EventKind, ProviderEvent
from services.billing.payments.store import Payment
from services.billing.plans import plans, subscriptions
from services.billing.plans.plans import Plan
from services.billing.rating import price_book
from services.billing.rating.currencies import nanos_per_minor, to_minor
from services.billing.usage import aggregates, corrections, rerate, retention
from tests.services.billing.conftest import count
from tooling.testing.platform import Platform

CASES = int(os.environ.get("CLAW_BOOKS_CASES", "24"))
BEGAN = timedelta(days=100)
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
MODULES = (
    "invoices.booking",
    "invoices.closing",
    "rating.price_book",
    "invoices.purchases",
    "usage.corrections",
    "usage.rerate",
    "plans.subscriptions",
    "usage.records",
    "usage.retention",
)
SELLER = Seller(country="DE")
# Usage and its corrections by the period whose invoice has them.
DEBITED = """
    WITH debited AS (
        SELECT period, quantity AS nanos
        FROM usage_bucket
        WHERE tenant_id = $1 AND meter IN ('cost_nanos', 'correction_nanos')
        UNION ALL
        SELECT period, -amount_nanos
        FROM ledger_entry
        WHERE tenant_id = $1 AND kind = 'correction' AND price_version IS NULL
    )
"""


@dataclass
class Clock:
    """The time of the service, which a history sets. Expiry of grants follows the database's."""

    now: datetime = field(default_factory=lambda: (utcnow() - BEGAN).replace(microsecond=0))

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture(scope="module")
async def store(platform: Platform) -> Database:
    await platform.prepare("billing")
    database = platform.database("billing")
    async with database.begin() as tx:
        await tx.sql(
            "INSERT INTO tax_rate (country, valid_from, percent, made_by) VALUES ('DE', $1, '19', '')", LONG_AGO
        )
    return database


@dataclass
class History:
    store: Database
    rng: random.Random
    clock: Clock
    currency: str
    tenant_id: str = field(default_factory=lambda: str(uuid7()))
    model: str = field(default_factory=lambda: f"acme/{uuid7()}")
    used: int = 0
    sent: list[UsageRecorded] = field(default_factory=list)
    plans: list[UUID] = field(default_factory=list)

    async def open(self) -> None:
        async with self.store.begin(tenant_id=self.tenant_id) as tx:
            credit = self.rng.choice([None, 0, 10**12])
            await accounts.open_account(tx, self.tenant_id, self.currency, credit)
            await self.price(tx)
            for base in (0, 3 * 10**9):
                plan = Plan(
                    name=f"{self.tenant_id} {base}",
                    currency=self.currency,
                    interval="month",
                    base_nanos=base,
                    usage_markup_percent=Decimal(0),
                )
                self.plans.append((await plans.add(tx, plan, made_by="test")).id)

    async def price(self, tx: Tx) -> None:
        nanos = {"input_tokens": Decimal(self.rng.randrange(1, 10**9)) / 8}
        await price_book.add(
            tx, self.model, self.currency, self.clock.now - timedelta(days=60), nanos, (), made_by="test"
        )

    async def use(self, tx: Tx) -> None:
        batch = []
        for _ in range(self.rng.randrange(1, 6)):
            self.used += 1
            late = timedelta(seconds=self.rng.choice([0, 0, self.rng.randrange(20 * 86_400)]))
            batch.append(
                UsageRecorded(
                    tenant_id=self.tenant_id,
                    usage_id=f"u/{self.used}",
                    resource=self.model,
                    quantities={"input_tokens": self.rng.randrange(1, 1000)},
                    occurred_at=self.clock.now - late,
                    tag=self.rng.choice([None, "a", "b"]),
                )
            )
        batch += self.rng.sample(self.sent, min(len(self.sent), 2))
        await count(tx, batch)
        self.sent += [item for item in batch if item not in self.sent]

    async def act(self, tx: Tx) -> None:
        rng, tenant_id = self.rng, self.tenant_id
        subs = await subscriptions.listed(tx, tenant_id, after=None, limit=50)
        known = await invoices.listed(tx, tenant_id, after=None, limit=100)
        paid = await payments.listed(tx, tenant_id, after=None, limit=100)
        match rng.randrange(20):
            case 0 | 1 | 2 | 3:
                await self.use(tx)
            case 4:
                await subscriptions.subscribe(
                    tx, tenant_id, rng.choice(self.plans), starts_at=None, anchor_day=rng.randrange(1, 32),
                    time_zone=rng.choice(["UTC", "Europe/Berlin"]),
                )  # fmt: skip
            case 5 if subs:
                when = rng.choice(["now", "period_end"])
                await subscriptions.change(tx, tenant_id, rng.choice(subs).id, rng.choice(self.plans), when)  # type: ignore[arg-type]
            case 6 if subs:
                await subscriptions.cancel(tx, tenant_id, rng.choice(subs).id, rng.choice(["now", "period_end"]))
            case 7 | 8:
                await closing.close(tx, tenant_id, self.clock.now, "DE")
            case 9 if known:
                if rng.random() < 0.5:
                    await booking.finalise(tx, tenant_id, rng.choice(known).id, SELLER, "test")
                else:
                    await self.finalise_as_shown(tx)
            case 10:
                # The database's clock ends it at the next act, or never.
                soon = utcnow() + timedelta(milliseconds=rng.choice([1, 10**9]))
                await accounts.add_credit(
                    tx, tenant_id, rng.randrange(1, 10**13), reason="g", actor="test",
                    kind=rng.choice(["prepaid", "promotional"]), priority=rng.randrange(3), expires_at=soon,
                    rollover_until=rng.choice([None, soon + timedelta(milliseconds=2)]),
                    rollover_nanos=rng.choice([None, 10**11]),
                )  # fmt: skip
            case 11 if known:
                one = rng.choice(known)
                most = max(2, one.total_minor)
                await booking.credit(
                    tx, tenant_id, one.id, rng.randrange(1, most), reason="r", actor="test", refund=rng.random() < 0.5
                )
            case 12 if known:
                await booking.end(tx, tenant_id, rng.choice(known).id, rng.choice(["void", "uncollectible"]), "test")
            case 13 if known:
                await payments.begin(tx, tenant_id, rng.choice(known).id, "stripe", None, SELLER)
            case 14 if paid:
                payment = rng.choice(paid)
                kind = rng.choice(get_args(EventKind))
                minor = payment.amount_minor if kind != "refunded" else rng.randrange(1, payment.amount_minor + 1)
                await self.report(tx, payment, kind, minor)
            case 15:
                nanos = rng.randrange(1, 10**5) * nanos_per_minor(self.currency)
                sold = await purchases.order(tx, tenant_id, nanos, "", SELLER)
                if rng.random() < 0.8:
                    payment = await payments.begin(tx, tenant_id, sold.id, "stripe", None, SELLER)
                    await self.report(tx, payment, "succeeded", payment.amount_minor)
            case 16:
                if rng.random() < 0.5:
                    await self.price(tx)
                else:
                    await retention.delete(tx, tenant_id, retention.kept_since(self.clock.now))
            case 17 if known:
                one = rng.choice(known)
                minor = rng.choice([max(1, one.total_minor), rng.randrange(1, 10**5)])
                await transfers.receive(tx, tenant_id, one.id, minor, reference=rng.choice("abc"), actor="test")
            case 18 if known:
                await transfers.reverse(tx, tenant_id, rng.choice(known).id, reference=rng.choice("abc"), actor="test")
            case 19:
                usage_id = rng.choice([None, *(item.usage_id for item in self.sent)])
                nanos = rng.randrange(-(10**11), 10**11)
                await corrections.correct(tx, tenant_id, nanos, usage_id, reason="r", actor="test")

    async def finalise_as_shown(self, tx: Tx) -> None:
        """Finalises all drafts in their order. Each becomes the invoice that was shown before the first one."""
        rows = await tx.sql(
            """
            SELECT invoice_id
            FROM invoice
            WHERE tenant_id = $1 AND status = 'draft' AND purpose = 'usage'
            ORDER BY made_at, invoice_id
            """,
            self.tenant_id,
        )
        shown = [await self.view(tx, invoice_id) for (invoice_id,) in rows]
        for (invoice_id,), before in zip(rows, shown, strict=True):
            await booking.finalise(tx, self.tenant_id, invoice_id, SELLER, "test")
            assert await self.view(tx, invoice_id) == before

    async def view(self, tx: Tx, invoice_id: UUID) -> tuple[Any, ...]:
        made, more = await booking.preview(tx, self.tenant_id, invoice_id, SELLER)
        stored = await invoices.lines(tx, self.tenant_id, invoice_id, after=0, limit=None)
        lines = [*(line for _, line in stored), *more]
        return made.subtotal_nanos, made.taxes, made.total_minor, lines

    async def report(self, tx: Tx, payment: Payment, kind: EventKind, minor: int) -> None:
        event = ProviderEvent(
            str(uuid7()), kind, f"pi_{payment.id}", str(payment.id), minor, self.currency, "dp_1",
            movements=self.rng.randrange(3),
        )  # fmt: skip
        await payments.handle(tx, "stripe", event)

    async def rerate(self) -> None:
        since = max(self.clock.now - timedelta(days=60), retention.kept_since(self.clock.now))
        await rerate.rerate(self.store, since, self.clock.now, self.tenant_id, dry_run=False, actor="test")


async def agree(history: History) -> None:
    """Every amount is in the books once."""
    tenant_id, unit = history.tenant_id, nanos_per_minor(history.currency)
    async with history.store.begin(tenant_id=tenant_id) as tx:
        await accounts.lock_one(tx, tenant_id)
        await grants.settle(tx, tenant_id)
        balances = await journal.balances(tx, tenant_id)
        computed = await tx.sql(journal.BALANCES.format("e.tenant_id = $1"), tenant_id)
        kept_balances = await tx.sql(
            """
            SELECT tenant_id, account, part, nanos
            FROM journal_balance
            WHERE tenant_id = $1
            ORDER BY tenant_id, account, part
            """,
            tenant_id,
        )
        known = await invoices.listed(tx, tenant_id, after=None, limit=1000)
        [(debited, invoiced, burned, credit)] = await tx.sql(
            "SELECT debited_nanos, invoiced_nanos, burned_nanos, credit_nanos FROM account WHERE tenant_id = $1",
            tenant_id,
        )
        [(not_asked,)] = await tx.sql(
            f"""
            {DEBITED}
            SELECT coalesce(sum(d.nanos), 0)::bigint
            FROM debited AS d
            WHERE d.period <> 0 AND NOT EXISTS (
                SELECT FROM invoice AS i
                WHERE i.tenant_id = $1 AND i.period = d.period AND i.status <> 'draft'
            )
            """,
            tenant_id,
        )
        kept = {
            kind: int(nanos)
            for kind, nanos in await tx.sql(
                """
                SELECT g.kind, sum(k.nanos)
                FROM kept_credit AS k JOIN credit_grant AS g USING (tenant_id, grant_id)
                WHERE tenant_id = $1 AND NOT EXISTS (
                    SELECT FROM invoice AS i
                    WHERE i.tenant_id = k.tenant_id AND i.period = k.period AND i.status <> 'draft'
                )
                GROUP BY g.kind
                """,
                tenant_id,
            )
        }
        sums = {
            outside: int(total)
            for outside, total in await tx.sql(
                f"""
                {DEBITED}
                SELECT period = 0, sum(nanos)
                FROM debited
                GROUP BY 1
                """,
                tenant_id,
            )
        }
        [(ledger,)] = await tx.sql(
            """
            SELECT coalesce(-sum(amount_nanos) FILTER (WHERE kind IN ('charge', 'correction')), 0)::bigint
            FROM ledger_entry WHERE tenant_id = $1
            """,
            tenant_id,
        )
        lines = await tx.sql(
            """
            SELECT i.period, coalesce(sum(l.amount_nanos) FILTER (WHERE l.source <> '{}'), 0)::bigint, (
                       SELECT coalesce(sum(b.quantity), 0)::bigint FROM usage_bucket AS b
                       WHERE b.tenant_id = i.tenant_id AND b.period = i.period
                         AND b.meter IN ('cost_nanos', 'correction_nanos')
                   )
            FROM invoice AS i LEFT JOIN invoice_line AS l USING (tenant_id, invoice_id)
            WHERE i.tenant_id = $1 GROUP BY i.tenant_id, i.period
            """,
            tenant_id,
        )
        [(unclosed,)] = await tx.sql(
            f"""
            {DEBITED}
            SELECT count(*)
            FROM debited AS d
            WHERE d.period <> 0 AND NOT EXISTS (
                SELECT FROM invoice AS i WHERE i.tenant_id = $1 AND i.period = d.period
            ) AND NOT EXISTS (
                SELECT FROM period AS p WHERE p.tenant_id = $1 AND p.period = d.period AND p.closed_at IS NULL
            )
            """,
            tenant_id,
        )
        owed = {
            kind: int(left)
            for kind, left in await tx.sql(
                """
                SELECT kind, sum(left_nanos) FROM credit_grant WHERE tenant_id = $1 GROUP BY kind
                """,
                tenant_id,
            )
        }
        [(frozen,)] = await tx.sql(
            "SELECT coalesce(sum(frozen_nanos), 0)::bigint FROM credit_grant WHERE tenant_id = $1", tenant_id
        )
        numbers = await tx.sql(
            """
            SELECT number FROM invoice WHERE tenant_id = $1 AND number IS NOT NULL
            UNION ALL SELECT number FROM credit_note WHERE tenant_id = $1 ORDER BY 1
            """,
            tenant_id,
        )
        stuck = await tx.sql(
            """
            SELECT k.nanos
            FROM kept_credit AS k
            JOIN invoice AS i USING (tenant_id, period)
            WHERE tenant_id = $1 AND i.status <> 'draft'
            """,
            tenant_id,
        )
        assert (await aggregates.rebuild(tx, tenant_id)).equal
        assert (await payments.reconcile(tx, tenant_id)).difference == 0

    assert sum(balances.values()) == 0
    assert kept_balances == computed
    # Usage: charged once, and in one invoice, in an open period, or covered by grants.
    assert debited == ledger == sum(sums.values())
    assert invoiced == sums.get(False, 0)
    assert unclosed == 0, "usage of a period without an invoice is free"
    assert all(in_lines == in_sums for _, in_lines, in_sums in lines), lines
    left = sum(owed.values())
    assert burned <= debited - invoiced
    assert burned == debited - invoiced or left == 0, "usage is not covered while there is credit"
    # Grants: the debt to the tenant.
    assert balances.get("prepaid", 0) == -owed.get("prepaid", 0) - kept.get("prepaid", 0)
    assert balances.get("promotional_credit", 0) == -owed.get("promotional", 0) - kept.get("promotional", 0)
    assert balances.get("purchased", 0) == -owed.get("purchased", 0) - frozen - kept.get("purchased", 0)
    unpaid = debited - invoiced - burned + not_asked
    assert credit is None or credit - debited <= left + sum(kept.values()) - unpaid, "more can be used than was paid"
    assert not stuck, "credit is kept for an invoice that will not take it any more"
    # Invoices.
    asked = 0
    for one in known:
        assert one.total_minor == to_minor(one.subtotal_nanos + one.tax_nanos, history.currency)
        if one.status in ("finalised", "paid"):
            # A total below zero became a grant.
            asked += max(0, one.total_minor) - one.applied_minor - one.credited_minor - one.paid_minor
        if one.status == "void":
            asked -= one.paid_minor
        if one.status == "uncollectible":
            asked -= one.owed_minor
        if one.status == "paid" and one.total_minor > 0:
            assert one.applied_minor + one.credited_minor + one.paid_minor >= one.total_minor
    assert balances.get("receivable", 0) == asked * unit
    for series in ("INV", "CN"):
        found = [number for (number,) in numbers if number.startswith(series)]
        assert found == [f"{series}-{n:06}" for n in range(1, len(found) + 1)]


@pytest.mark.parametrize("seed", range(CASES))
async def test_the_books_agree_after_every_act(store: Database, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, clock = random.Random(seed), Clock()
    for name in MODULES:
        monkeypatch.setattr(f"services.billing.{name}.utcnow", clock, raising=False)
    history = History(store, rng, clock, rng.choice(["USD", "JPY", "KWD"]))
    await history.open()
    for _ in range(40):
        clock.now += timedelta(seconds=rng.randrange(1, 4 * 86_400))
        try:
            async with store.begin(tenant_id=history.tenant_id) as tx:
                await history.act(tx)
        except (Conflict, InvalidMessage):
            # Refused by a rule: nothing may have changed.
            pass
        if rng.random() < 0.1:
            await history.rerate()
        await agree(history)
