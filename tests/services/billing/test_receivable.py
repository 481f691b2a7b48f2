"""The receivable in the journal equals the open amounts of the invoices, after any acts of payers and operators."""

from __future__ import annotations

import random
from datetime import timedelta
from uuid import UUID

import asyncpg
import pytest

from infra.clock import utcnow, uuid7
from infra.errors import Conflict, InvalidMessage
from infra.postgres.database import Database
from infra.postgres.read_models import compare
from infra.postgres.tx import Tx
from services.billing.credit import accounts, journal
from services.billing.invoices import booking, closing, transfers
from services.billing.invoices import store as invoices
from services.billing.invoices.tax import Seller
from services.billing.payments import store as payments
from services.billing.payments.provider import ProviderEvent
from services.billing.plans import plans, subscriptions
from services.billing.plans.plans import Plan
from services.billing.usage.read_models import READ_MODELS
from tests.services.billing.invoices.test_invoices import ANCHOR, START
from tooling.testing.platform import Platform

CENT = 10**7
TOTAL = 3000


@pytest.fixture(scope="module")
async def store(platform: Platform) -> Database:
    await platform.prepare("billing")
    return platform.database("billing")


async def invoiced(store: Database, promised_nanos: int) -> tuple[str, UUID, UUID]:
    """A tenant, its finalised invoice of 30.00, and its payment. Grants have paid `promised_nanos`."""
    tenant_id = str(uuid7())
    plan = Plan(name=tenant_id, currency="USD", interval="month", base_nanos=TOTAL * CENT)
    async with store.begin(tenant_id=tenant_id) as tx:
        await accounts.open_account(tx, tenant_id, "USD", promised_nanos or None)
        stored = await plans.add(tx, plan, made_by="test")
        made = await subscriptions.subscribe(
            tx, tenant_id, stored.id, starts_at=START, anchor_day=ANCHOR["anchor_day"], time_zone="UTC"
        )
        [draft] = await closing.close(tx, tenant_id, utcnow(), "")
        invoice = await booking.finalise(tx, tenant_id, draft.id, Seller(), "test")
        payment = await payments.begin(tx, tenant_id, invoice.id, "stripe", None, Seller(country="DE"))
        assert made.starts_at < utcnow() - timedelta(days=1)
    return tenant_id, invoice.id, payment.id


async def act(tx: Tx, rng: random.Random, tenant_id: str, invoice_id: UUID, payment_id: UUID) -> None:
    payment = await payments.get(tx, payment_id)

    def event(kind: str, minor: int, detail: str = "") -> ProviderEvent:
        return ProviderEvent(str(uuid7()), kind, f"pi_{payment_id}", str(payment_id), minor, "USD", detail)  # type: ignore[arg-type]

    minor = rng.randrange(1, TOTAL + 1)
    match rng.randrange(8):
        case 0:
            await payments.handle(tx, "stripe", event("succeeded", payment.amount_minor))
        case 1:
            await payments.handle(tx, "stripe", event("refunded", min(minor, payment.amount_minor)))
        case 2:
            kind = rng.choice(["dispute_open", "dispute_won", "dispute_lost"])
            # The money is withdrawn, reinstated, and withdrawn again.
            movements = rng.randrange(4)
            one = event(kind, payment.amount_minor * (movements % 2), rng.choice(["dp_1", "dp_2"]))
            await payments.handle(tx, "stripe", one._replace(movements=movements))
        case 3 | 4:
            refund = rng.random() < 0.5
            await booking.credit(tx, tenant_id, invoice_id, minor, reason="r", actor="test", refund=refund)
        case 5:
            await booking.end(tx, tenant_id, invoice_id, "uncollectible", "test")
        case 6:
            reference, amount = rng.choice([("a", minor), ("b", TOTAL), ("c", TOTAL + 1)])
            await transfers.receive(tx, tenant_id, invoice_id, amount, reference=reference, actor="test")
        case 7:
            await transfers.reverse(tx, tenant_id, invoice_id, reference=rng.choice("abc"), actor="test")


@pytest.mark.parametrize("seed", range(60))
async def test_the_receivable_equals_the_open_amount_of_the_invoice(store: Database, seed: int) -> None:
    rng = random.Random(seed)
    found = await invoiced(store, rng.choice([0, 500 * CENT]))
    tenant_id, invoice_id, _ = found
    for _ in range(12):
        try:
            async with store.begin(tenant_id=tenant_id) as tx:
                await act(tx, rng, *found)
        except (Conflict, InvalidMessage):
            # Refused by a rule: nothing may have changed.
            pass
        async with store.begin(tenant_id=tenant_id) as tx:
            one = await invoices.get(tx, tenant_id, invoice_id)
            balances = await journal.balances(tx, tenant_id)
        asked = one.total_minor - one.applied_minor - one.credited_minor - one.paid_minor
        assert sum(balances.values()) == 0
        if one.status == "uncollectible":
            owed = min(0, asked)
            assert balances.get("receivable", 0) == owed * CENT, "an invoice that was written off asks for nothing"
        else:
            assert balances.get("receivable", 0) == asked * CENT
            assert one.due_minor == max(0, asked)


async def test_balances_are_kept_beside_the_lines(platform: Platform, store: Database) -> None:
    tenant_id, invoice_id, payment_id = await invoiced(store, 0)
    async with store.begin(tenant_id=tenant_id) as tx:
        paid = ProviderEvent(str(uuid7()), "succeeded", "pi_1", str(payment_id), TOTAL, "USD", "")
        await payments.handle(tx, "stripe", paid)
        await transfers.receive(tx, tenant_id, invoice_id, 1, reference="r", actor="test")
    admin = await asyncpg.connect(platform.database_url)
    async with admin.transaction():
        await admin.execute("LOCK TABLE billing.journal_line, billing.journal_entry IN ACCESS EXCLUSIVE MODE")
        async with store.begin(tenant_id=tenant_id) as tx:
            # A statement that reads the history fails at once.
            await tx.sql("SET LOCAL lock_timeout = 1")
            balances = await journal.balances(tx, tenant_id)
            found = await payments.reconcile(tx, tenant_id)
    await admin.close()
    assert balances == {"cash": (TOTAL + 1) * CENT, "receivable": -CENT, "revenue": -TOTAL * CENT}
    assert (found.journal_nanos, found.difference) == (TOTAL * CENT, 0)
    model = next(one for one in READ_MODELS if one.name == "journal_balances")
    for changed in (False, True):
        async with store.engine.begin() as connection:
            compared = await compare(connection, model, [tenant_id])
        assert [one.what for one in compared.differences] == (["nanos"] if changed else [])
        async with store.begin(tenant_id=tenant_id) as tx:
            await tx.sql(
                "UPDATE journal_balance SET nanos = nanos + 1 WHERE tenant_id = $1 AND account = 'revenue'", tenant_id
            )
