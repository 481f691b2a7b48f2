"""Mails of invoices: each step once, at its time, until the invoice is paid or written off."""

from __future__ import annotations

import asyncio
import base64
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest

from infra.clock import utcnow
from infra.security import subjects
from services.billing.clock import Clock
from services.billing.invoices import booking, credit_notes, dunning, invoice_files, pdf
from services.billing.invoices import store as invoices
from services.billing.invoices.tax import Seller
from tests.services.billing.conftest import Billing, Tenant, pdf_pages
from tests.services.billing.invoices.test_invoices import UNIT, draft, field_of, journal, post, subscribed


async def finalised(billing: Billing, zone: str = "UTC", **terms: Any) -> tuple[Tenant, dict[str, Any]]:
    tenant, _ = await subscribed(billing, charges=[], included=[], usage_markup_percent=None)
    await tenant.sql("UPDATE subscription SET time_zone = $2 WHERE tenant_id = $1", tenant.id, zone)
    if terms:
        await put_terms(billing, tenant, **terms)
    made = await draft(billing, tenant)
    return tenant, await post(billing, f"invoices/{made['id']}/finalise", status=200)


async def finalised_before(billing: Billing, monkeypatch: pytest.MonkeyPatch) -> tuple[Tenant, dict[str, Any]]:
    """A tenant and its invoice that is due for months."""
    tenant, _ = await subscribed(billing, charges=[], included=[], usage_markup_percent=None)
    made = await draft(billing, tenant)
    with monkeypatch.context() as patch:
        patch.setattr(booking, "utcnow", lambda: utcnow() - timedelta(days=90))
        async with tenant.platform.database("billing").begin(tenant_id=tenant.id) as tx:
            await booking.finalise(tx, tenant.id, UUID(made["id"]), Seller(), "test")
    return tenant, made


async def put_terms(billing: Billing, tenant: Tenant, **terms: Any) -> None:
    answer = await billing.operator.put("/api/v1/billing/payment-terms", json={"tenant_id": tenant.id, **terms})
    assert answer.status_code == 200, answer.text


async def step(tenant: Tenant, invoice: dict[str, Any], days: int = 0) -> None:
    """Makes the step that is due in so many days, as two processes do at the same time."""
    database, id_ = tenant.platform.database("billing"), UUID(invoice["id"])
    async with database.begin(tenant_id=tenant.id) as tx:
        document = await pdf.document(invoice_files.page(*await invoices.whole(tx, tenant.id, id_)))

    async def once() -> None:
        async with database.begin(tenant_id=tenant.id) as tx:
            await dunning.step(tx, tenant.id, id_, document, utcnow() + timedelta(days=days))

    await asyncio.gather(once(), once())


async def mails(tenant: Tenant) -> list[dict[str, Any]]:
    found = await tenant.platform.outbox("billing", "notification")
    return [body for headers, body in found if headers.get("tenant_id") == tenant.id]


async def shown(tenant: Tenant, invoice: dict[str, Any]) -> dict[str, Any]:
    return dict((await tenant.http.get(f"/api/v1/invoices/{invoice['id']}")).json())


async def test_an_invoice_is_sent_and_reminded_of_once_at_each_step(billing: Billing) -> None:
    # A day ahead of UTC most of the time.
    zone = "Pacific/Kiritimati"
    tenant, invoice = await finalised(billing, zone, due_days=10, reminder_days=[5, 9, 20])
    due = datetime.fromisoformat(invoice["due_at"]).astimezone(ZoneInfo(zone)).date()
    await step(tenant, invoice)
    [mail] = await mails(tenant)
    assert (mail["to"], mail["subject"]) == ("", "Invoice INV-000001")
    assert f"30.00 USD is due by {due} ({zone})." in mail["text"]
    [page] = pdf_pages(base64.b64decode(mail["attachment"]["content"]))
    assert "Total 30.00 USD" in page
    assert f"Due: {due}" in page

    await step(tenant, invoice, days=14)
    assert len(await mails(tenant)) == 1
    await step(tenant, invoice, days=16)
    # Two reminders were missed together, so the later one stands for both.
    await step(tenant, invoice, days=31)
    await step(tenant, invoice, days=300)
    found = [mail["subject"] for mail in await mails(tenant)]
    assert found == ["Invoice INV-000001", *(f"Reminder {n}: invoice INV-000001" for n in (1, 3))]
    assert (await shown(tenant, invoice))["status"] == "finalised"


async def test_a_credit_note_is_mailed_once_with_its_document(billing: Billing) -> None:
    tenant, invoice = await finalised(billing)
    await step(tenant, invoice)
    note = await post(billing, f"invoices/{invoice['id']}/credit-notes", {"amount_minor": 1000, "reason": "an outage"})
    database = tenant.platform.database("billing")
    await asyncio.gather(*(Clock(database, Seller(), {}).mail() for _ in range(2)))
    [mail] = (await mails(tenant))[1:]
    assert (mail["to"], mail["subject"]) == ("", "Credit note CN-000001")
    assert mail["text"].startswith("Credit note CN-000001 for invoice INV-000001: 10.00 USD. The document is attached.")
    assert mail["text"].endswith("an outage\n")
    [page] = pdf_pages(base64.b64decode(mail["attachment"]["content"]))
    assert "Total 10.00 USD" in page
    # A large one is not attached.
    await tenant.sql("UPDATE credit_note SET mailed = false WHERE tenant_id = $1", tenant.id)
    async with database.begin(tenant_id=tenant.id) as tx:
        content = b"x" * (dunning.MAX_ATTACHMENT_BYTES + 1)
        await credit_notes.send(tx, tenant.id, UUID(invoice["id"]), UUID(note["id"]), content)
    large = (await mails(tenant))[2]
    assert large["attachment"] is None
    assert f"GET /api/v1/invoices/{invoice['id']}/credit-notes/{note['id']}/pdf has" in large["text"]


async def test_a_paid_invoice_is_not_reminded_of(billing: Billing) -> None:
    tenant, invoice = await finalised(billing, due_days=0, reminder_days=[1])
    await step(tenant, invoice)
    await post(billing, f"invoices/{invoice['id']}/received", {"amount_minor": 3000, "reference": "SEPA 1"}, status=200)
    assert (await shown(tenant, invoice))["overdue"] is False
    await step(tenant, invoice, days=2)
    assert len(await mails(tenant)) == 1


@pytest.mark.parametrize("zone", ["America/New_York", "UTC", "Pacific/Kiritimati"])
async def test_an_invoice_is_overdue_after_its_due_day_in_its_time_zone(
    billing: Billing, monkeypatch: pytest.MonkeyPatch, zone: str
) -> None:
    tenant, invoice = await finalised(billing, zone, due_days=3)
    due = datetime.fromisoformat(invoice["due_at"]).astimezone(ZoneInfo(zone))
    over = (due + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
    found = []
    for now in (over - timedelta(microseconds=1), over):
        monkeypatch.setattr(invoices, "utcnow", lambda now=now: now.astimezone(UTC))
        async with tenant.platform.database("billing").begin(tenant_id=tenant.id) as tx:
            found.append((await invoices.get(tx, tenant.id, UUID(invoice["id"]))).overdue)
    assert found == [False, True]


async def test_an_invoice_is_not_written_off_on_its_due_day(billing: Billing) -> None:
    tenant, invoice = await finalised(billing, due_days=0, reminder_days=[], write_off_days=0)
    for days, status in ((0, "finalised"), (0, "finalised"), (1, "uncollectible")):
        await step(tenant, invoice, days=days)
        assert (await shown(tenant, invoice))["status"] == status


@pytest.mark.parametrize("during", ["a payment", "an abandoned payment", "a dispute"])
async def test_an_invoice_that_is_not_paid_in_time_is_written_off_and_not_during_a_payment_or_dispute(
    billing: Billing, during: str
) -> None:
    tenant, invoice = await finalised(billing, due_days=0, reminder_days=[1], write_off_days=30)
    for days in (0, 2):
        await step(tenant, invoice, days=days)
    await tenant.sql(
        """
        INSERT INTO payment (tenant_id, payment_id, invoice_id, provider, amount_minor, currency)
        VALUES ($1, gen_random_uuid(), $2, 'test', 3000, 'USD')
        """,
        tenant.id,
        UUID(invoice["id"]),
    )
    days = 43
    if during == "a dispute":
        # It may take longer than a payment.
        days = 60
        await tenant.sql(
            """
            INSERT INTO dispute (tenant_id, payment_id, reference, minor, movements, state)
            SELECT tenant_id, payment_id, 'dp_1', 3000, 1, 'open' FROM payment WHERE tenant_id = $1
            """,
            tenant.id,
        )
    await step(tenant, invoice, days=days)
    assert (await shown(tenant, invoice))["status"] == "finalised"
    match during:
        case "a payment":
            await tenant.sql("UPDATE payment SET status = 'failed' WHERE tenant_id = $1", tenant.id)
        case "a dispute":
            await tenant.sql("UPDATE dispute SET minor = 0 WHERE tenant_id = $1", tenant.id)
    await step(tenant, invoice, days=45 if during == "an abandoned payment" else days)
    assert (await shown(tenant, invoice))["status"] == "uncollectible"
    assert await journal(tenant) == {"revenue": -30 * UNIT, "write_off": 30 * UNIT}


async def test_a_paid_invoice_that_is_open_again_is_reminded_of_before_it_is_written_off(
    billing: Billing, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant, invoice = await finalised_before(billing, monkeypatch)
    await put_terms(billing, tenant, reminder_days=[1], write_off_days=30)
    await step(tenant, invoice)
    before = len(await mails(tenant))
    path, transfer = f"invoices/{invoice['id']}/received", {"amount_minor": 3000, "reference": "SEPA 1"}
    await post(billing, path, transfer, status=200)
    await tenant.sql("UPDATE invoice SET dunning_step = 2, dunning_at = 'infinity' WHERE tenant_id = $1", tenant.id)
    await post(billing, f"{path}/reverse", {"reference": "SEPA 1"}, status=200)
    async with tenant.platform.database("billing").begin() as tx:
        assert UUID(invoice["id"]) in {id_ for _, id_, _ in await dunning.due(tx, utcnow(), 10_000)}
    for days, status, reminders in (
        (0, "finalised", 0),
        (2, "finalised", 1),
        (29, "finalised", 1),
        (31, "uncollectible", 1),
    ):
        await step(tenant, invoice, days=days)
        assert (await shown(tenant, invoice))["status"] == status
        assert len(await mails(tenant)) == before + reminders


async def test_an_erased_tenant_gets_no_mails(billing: Billing) -> None:
    tenant, invoice = await finalised(billing, due_days=10)

    async def is_due() -> bool:
        async with tenant.platform.database("billing").begin() as tx:
            found = await dunning.due(tx, utcnow() + timedelta(days=300), 10_000)
        return UUID(invoice["id"]) in {id_ for _, id_, _ in found}

    async def note_is_due() -> bool:
        async with tenant.platform.database("billing").begin() as tx:
            return tenant.id in {tenant_id for tenant_id, _, _ in await credit_notes.due(tx, 10_000)}

    await post(billing, f"invoices/{invoice['id']}/credit-notes", {"amount_minor": 1000, "reason": "an outage"})
    assert await is_due()
    assert await note_is_due()
    async with tenant.platform.database("billing").begin() as tx:
        await subjects.destroy_all(tx, tenant.id)
    assert not await is_due()
    assert not await note_is_due()


async def test_new_terms_move_the_next_step(billing: Billing) -> None:
    tenant, invoice = await finalised(billing)
    await step(tenant, invoice)
    await step(tenant, invoice, days=16)
    assert len(await mails(tenant)) == 1
    body = {"tenant_id": tenant.id, "reminder_days": [1]}
    assert (await billing.operator.put("/api/v1/billing/payment-terms", json=body)).status_code == 200
    assert (await tenant.http.get("/api/v1/billing/payment-terms")).json()["reminder_days"] == [1]
    await step(tenant, invoice, days=16)
    assert [mail["subject"] for mail in await mails(tenant)][1:] == ["Reminder 1: invoice INV-000001"]


async def test_new_terms_with_fewer_reminders_than_were_sent_still_write_off(billing: Billing) -> None:
    tenant, invoice = await finalised(billing, due_days=0, reminder_days=[1, 2, 3])
    for days in (0, 1, 2, 3):
        await step(tenant, invoice, days=days)
    subjects = [mail["subject"] for mail in await mails(tenant)]
    assert subjects == ["Invoice INV-000001", *(f"Reminder {n}: invoice INV-000001" for n in (1, 2, 3))]
    await put_terms(billing, tenant, due_days=0, reminder_days=[1], write_off_days=10)
    for days, status in ((9, "finalised"), (10, "uncollectible")):
        await step(tenant, invoice, days=days)
        assert (await shown(tenant, invoice))["status"] == status
    assert len(await mails(tenant)) == len(subjects)


async def test_terms_that_cannot_work_are_refused(billing: Billing) -> None:
    tenant = await billing.tenant()
    for terms, field in (
        ({"due_days": -1}, "due_days"),
        ({"reminder_days": [3, 3]}, "reminder_days"),
        ({"reminder_days": [3], "write_off_days": 3}, "write_off_days"),
        ({"colour": 1}, "colour"),
    ):
        answer = await billing.operator.put("/api/v1/billing/payment-terms", json={"tenant_id": tenant.id, **terms})
        assert field_of(answer) == field
    assert (await tenant.http.put("/api/v1/billing/payment-terms", json={"tenant_id": tenant.id})).status_code == 403
