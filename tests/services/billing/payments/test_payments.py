"""Payments: each provider event counts once, in any order, and the money reconciles with the journal to zero."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID, uuid4

import httpx
import pytest
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from infra.clock import utcnow, uuid7
from infra.errors import Conflict
from infra.lanes.effects import Effects
from infra.observe.metrics import Metrics
from infra.outgoing.client import Outgoing
from infra.postgres.tx import Tx
from infra.security import subjects
from infra.service.service import Runtime
from infra.service.tenant_erasure import EraseTenant
from protos.catalog import PLATFORM_EVENTS
from protos.messages.user import TenantErased
from services.billing import tenants
from services.billing.clock import Clock
from services.billing.credit import accounts
from services.billing.invoices import booking, purchases, tax
from services.billing.invoices import store as invoices
from services.billing.invoices.tax import Seller
from services.billing.payments import store
from services.billing.payments.stripe import Stripe, amount_of, minor_of
from services.billing.payments.watch import PaymentWatch
from tests.services.billing.conftest import Billing, Tenant
from tests.services.billing.invoices.test_dunning import finalised_before, put_terms
from tests.services.billing.invoices.test_invoices import (
    ANCHOR,
    START,
    UNIT,
    draft,
    field_of,
    journal,
    plan,
    post,
    subscribed,
)
from tooling.testing.platform import Platform
from tooling.testing.stripe import DECLINED, StripeStandIn
from tooling.testing.vendors.server import Fault, Reply, cut, hold

WEBHOOK = "/webhooks/payments/stripe"


@pytest.fixture(scope="module")
async def stripe() -> AsyncIterator[StripeStandIn]:
    async with StripeStandIn() as server:
        yield server


@pytest.fixture(scope="module")
async def billing(platform: Platform, stripe: StripeStandIn) -> AsyncIterator[Billing]:
    await platform.prepare("billing")
    await start(platform, stripe)
    found = Billing(platform)
    yield found
    await found.close()


async def start(platform: Platform, stripe: StripeStandIn) -> None:
    await platform.start(
        "billing",
        CLAW_STRIPE_API_BASE=stripe.url,
        CLAW_STRIPE_API_KEY=stripe.key,
        CLAW_STRIPE_WEBHOOK_SECRET=stripe.webhook_secret,
        CLAW_SELLER_NAME="Clawbus",
        CLAW_SELLER_COUNTRY="DE",
        CLAW_SELLER_VAT_ID="DE123456789",
        CLAW_SELLER_ADDRESS="Hafen 1; 20457 Hamburg",
    )


async def invoiced(billing: Billing) -> tuple[Tenant, str]:
    """A tenant with a finalised invoice of 30 USD."""
    tenant, _ = await subscribed(billing, charges=[], included=[], usage_markup_percent=None)
    made = await draft(billing, tenant)
    await post(billing, f"invoices/{made['id']}/finalise", status=200)
    return tenant, made["id"]


async def test_an_e_invoice_names_the_seller_and_the_buyer(billing: Billing) -> None:
    tenant, _ = await subscribed(billing, charges=[], included=[], usage_markup_percent=None)
    made = await draft(billing, tenant)
    path = f"/api/v1/invoices/{made['id']}/xml"
    early = await tenant.http.get(path)
    assert (early.status_code, "draft" in early.text) == (409, True)
    buyer = {"name": "Acme", "country": "AT", "vat_id": "ATU33864707", "address": "Gasse 3\n1010 Wien"}
    assert (await tenant.http.put("/api/v1/billing/buyer", json=buyer)).json() == buyer
    await post(billing, f"invoices/{made['id']}/finalise", status=200)
    answers = [await tenant.http.get(path) for _ in range(2)]
    assert (answers[0].status_code, answers[0].headers["content-type"]) == (200, "application/xml")
    assert answers[0].content == answers[1].content
    for text in (
        "INV-000001",
        "Clawbus",
        "DE123456789",
        "Acme",
        "ATU33864707",
        ">AE<",
        ">30.00<",
        "Hafen 1",
        "1010 Wien",
    ):
        assert text in answers[0].text
    path = f"invoices/{made['id']}/credit-notes"
    note = await post(billing, path, {"amount_minor": 1000, "reason": "an outage"})
    answer = await tenant.http.get(f"/api/v1/{path}/{note['id']}/xml")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/xml")
    for text in ("CN-000001", ">381<", "INV-000001", "an outage", "DE123456789", "ATU33864707", ">AE<", ">10.00<"):
        assert text in answer.text


async def pay(tenant: Tenant, invoice_id: str, **body: Any) -> httpx.Response:
    return await tenant.http.post(f"/api/v1/invoices/{invoice_id}/pay", json=body)


async def saved(tenant: Tenant, token: str = "") -> str:
    """A saved method."""
    answer = await tenant.http.post("/api/v1/payment-methods", json={"token": token or f"pm_{uuid4().hex}"})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def payments(tenant: Tenant) -> list[dict[str, Any]]:
    return list((await tenant.http.get("/api/v1/payments")).json()["items"])


async def send(billing: Billing, stripe: StripeStandIn, event: dict[str, Any], **more: Any) -> str:
    body, headers = stripe.signed(event, **more)
    async with httpx.AsyncClient(base_url=billing.platform.url("billing"), trust_env=False, timeout=30) as client:
        answer = await client.post(WEBHOOK, content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["outcome"])


async def status(tenant: Tenant, invoice_id: str) -> tuple[str, int]:
    invoice = (await tenant.http.get(f"/api/v1/invoices/{invoice_id}")).json()
    return invoice["status"], invoice["due_minor"]


async def reconciled(billing: Billing) -> dict[str, int]:
    found: dict[str, int] = (await billing.operator.get("/api/v1/payments/reconciliation")).json()
    assert found["difference"] == 0
    return found


async def test_a_saved_method_pays_an_invoice_once_however_often_it_is_asked(
    billing: Billing, stripe: StripeStandIn
) -> None:
    tenant, invoice_id = await invoiced(billing)
    method = await saved(tenant)
    before = stripe.received
    answers = await asyncio.gather(*(pay(tenant, invoice_id, payment_method_id=method) for _ in range(5)))
    assert {answer.status_code for answer in answers} <= {200, 409}
    assert stripe.received == before + 3000
    assert await status(tenant, invoice_id) == ("paid", 0)
    [payment] = await payments(tenant)
    assert (payment["status"], payment["received_minor"]) == ("succeeded", 3000)
    assert await send(billing, stripe, stripe.event("payment_intent.succeeded", stripe.intents[payment["reference"]]))
    assert await journal(tenant) == {"cash": 30 * UNIT, "revenue": -30 * UNIT}
    await reconciled(billing)


async def test_a_reconciliation_reads_as_many_rows_for_one_payment_as_for_many(
    billing: Billing, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant, invoice_id = await invoiced(billing)
    read: list[int] = []
    sql = Tx.sql

    async def counted(tx: Tx, statement: str, *arguments: Any) -> Sequence[tuple[Any, ...]]:
        rows = await sql(tx, statement, *arguments)
        read.append(len(rows))
        return rows

    # Received and given back; never received.
    for minor, payments_made in ((1, 1), (0, 50)):
        await tenant.sql(
            """
            INSERT INTO payment (tenant_id, payment_id, invoice_id, provider, amount_minor, currency, status,
                                 received_minor, refunded_minor)
            SELECT $1, gen_random_uuid(), $2, 'stripe', 1, 'USD', 'failed', $4, $4
            FROM generate_series(1, $3)
            """,
            tenant.id,
            UUID(invoice_id),
            payments_made,
            minor,
        )
    async with billing.platform.database("billing").begin() as tx:
        with monkeypatch.context() as patch:
            patch.setattr(Tx, "sql", counted)
            found = await store.reconcile(tx, tenant.id)
    assert (found.payments_nanos, found.difference) == (0, 0)
    assert sum(read) == 1, "one currency; the journal has no entry of these payments"


@pytest.mark.parametrize(
    ("currency", "minor", "amount"),
    [
        ("USD", 1234, 1234),
        ("JPY", 500, 500),
        ("KWD", 5120, 5120),
        # docs.stripe.com/currencies: 5 ISK are the amount 500, and MGA has no digits there.
        ("ISK", 5, 500),
        ("UGX", 5, 500),
        ("MGA", 500, 5),
    ],
)
def test_amounts_are_in_the_units_of_stripe(currency: str, minor: int, amount: int) -> None:
    assert amount_of(minor, currency) == amount
    assert minor_of(amount, currency) == minor


@pytest.mark.parametrize(("currency", "minor", "least"), [("MGA", 501, "1.00"), ("KWD", 5124, "0.010")])
def test_an_amount_that_stripe_cannot_express_is_refused(currency: str, minor: int, least: str) -> None:
    with pytest.raises(Conflict, match=f"only multiples of {least} {currency}"):
        amount_of(minor, currency)


async def test_kronur_are_charged_and_given_back_in_hundredths(billing: Billing, stripe: StripeStandIn) -> None:
    tenant = await billing.tenant(currency="ISK")
    one = plan(currency="ISK", base_nanos=5000 * UNIT, charges=[], included=[], usage_markup_percent=None)
    made = await post(billing, "plans", one)
    body = {"tenant_id": tenant.id, "plan_id": made["id"], "starts_at": START.isoformat(), **ANCHOR}
    await post(billing, "subscriptions", body)
    invoice = await post(billing, f"invoices/{(await draft(billing, tenant))['id']}/finalise", status=200)
    assert invoice["total_minor"] == 5000
    payment = (await pay(tenant, invoice["id"])).json()["payment"]
    assert stripe.intents[payment["reference"]]["amount"] == 500_000
    assert await send(billing, stripe, stripe.succeeded(payment["reference"])) == "applied"
    assert await status(tenant, invoice["id"]) == ("paid", 0)
    await post(billing, f"payments/{payment['id']}/refunds", {"amount_minor": 1000, "reason": "r"})
    assert stripe.refunded[payment["reference"]] == 100_000
    await send(billing, stripe, stripe.refund_event(payment["reference"]))
    assert await status(tenant, invoice["id"]) == ("finalised", 1000)
    await reconciled(billing)


# The first call of a payment makes it, the second one charges it.
LOST = {"made": [cut(accept=True)], "charged": [Fault(late=True), cut(accept=True)]}


async def unanswered(
    billing: Billing, stripe: StripeStandIn, lost: str = "charged", token: str = ""
) -> tuple[Tenant, str, str]:
    """A tenant, its invoice, and the saved method of a payment whose answer was lost."""
    tenant, invoice_id = await invoiced(billing)
    method = await saved(tenant, token)
    stripe.faults.extend(LOST[lost])
    assert (await pay(tenant, invoice_id, payment_method_id=method)).status_code >= 500
    return tenant, invoice_id, method


@pytest.mark.parametrize("lost", LOST)
async def test_an_answer_that_is_lost_does_not_charge_twice(billing: Billing, stripe: StripeStandIn, lost: str) -> None:
    before = stripe.received
    tenant, invoice_id, method = await unanswered(billing, stripe, lost)
    assert (await pay(tenant, invoice_id, payment_method_id=method)).status_code == 200
    assert stripe.received == before + 3000
    assert await status(tenant, invoice_id) == ("paid", 0)


async def look_up(billing: Billing, stripe: StripeStandIn, tenant: Tenant) -> None:
    """Lets the clock ask about the payments of a tenant: the one of the service, or this one."""
    await tenant.sql("UPDATE payment SET look_at = now() WHERE tenant_id = $1", tenant.id)
    outgoing = Outgoing(allow_private=True)
    provider = Stripe(outgoing, stripe.url, SecretStr(stripe.key), SecretStr(stripe.webhook_secret))
    await Clock(billing.platform.database("billing"), Seller(), {"stripe": provider}).look_up()
    await outgoing.close()


@pytest.mark.parametrize("at", ["an hour", "the write-off"])
async def test_a_payment_whose_event_was_lost_is_looked_up(
    billing: Billing, stripe: StripeStandIn, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    tenant, invoice = await finalised_before(billing, monkeypatch)
    payment = (await pay(tenant, invoice["id"])).json()["payment"]
    stripe.succeeded(payment["reference"])
    outgoing = Outgoing(allow_private=True)
    provider = Stripe(outgoing, stripe.url, SecretStr(stripe.key), SecretStr(stripe.webhook_secret))
    clock = Clock(tenant.platform.database("billing"), Seller(), {"stripe": provider})
    await clock.look_up()
    assert await status(tenant, invoice["id"]) == ("finalised", 3000)
    if at == "an hour":
        await tenant.sql("UPDATE payment SET look_at = look_at - interval '1 hour' WHERE tenant_id = $1", tenant.id)
        await clock.look_up()
    else:
        await put_terms(billing, tenant, reminder_days=[], write_off_days=60)
        await tenant.sql("UPDATE invoice SET dunning_step = 1 WHERE tenant_id = $1", tenant.id)
        await clock._mail(tenant.id, UUID(invoice["id"]), first=False)
    await outgoing.close()
    assert await status(tenant, invoice["id"]) == ("paid", 0)


@pytest.mark.parametrize("change", ["void", "received", "credit-notes"])
async def test_a_payment_whose_answer_was_lost_takes_no_more_than_is_due_by_now(
    billing: Billing, stripe: StripeStandIn, change: str
) -> None:
    tenant, invoice_id = await invoiced(billing)
    method = await saved(tenant)
    before = stripe.received
    stripe.faults.append(cut(accept=True))
    assert (await pay(tenant, invoice_id, payment_method_id=method)).status_code >= 500
    body: dict[str, Any] = {
        "void": {},
        "received": {"amount_minor": 3000, "reference": f"bank {invoice_id}"},
        "credit-notes": {"amount_minor": 2000, "reason": "r"},
    }[change]
    await post(billing, f"invoices/{invoice_id}/{change}", body, status=201 if change == "credit-notes" else 200)
    answer = await pay(tenant, invoice_id, payment_method_id=method)
    left = 1000 if change == "credit-notes" else 0
    assert answer.status_code == (200 if left else 409), answer.text
    assert stripe.received == before + left
    assert [payment["status"] for payment in await payments(tenant)] == ["failed"] + ["succeeded"] * bool(left)
    await reconciled(billing)


@pytest.mark.parametrize("change", ["void", "received"])
async def test_a_payment_that_the_payer_could_still_complete_is_cancelled_when_its_amount_is_not_due_any_more(
    billing: Billing, stripe: StripeStandIn, change: str
) -> None:
    tenant, invoice_id = await invoiced(billing)
    payment = (await pay(tenant, invoice_id)).json()["payment"]
    await look_up(billing, stripe, tenant)
    assert [each["status"] for each in await payments(tenant)] == ["pending"]
    body = {} if change == "void" else {"amount_minor": 1000, "reference": "a part"}
    await post(billing, f"invoices/{invoice_id}/{change}", body, status=200)
    await look_up(billing, stripe, tenant)

    async def failed() -> bool:
        # The clock of the service may have been faster.
        return [each["status"] for each in await payments(tenant)] == ["failed"]

    await billing.platform.until(failed)
    assert stripe.intents[payment["reference"]]["status"] == "canceled"


async def test_a_charge_whose_answer_was_lost_is_booked_although_the_invoice_was_voided(
    billing: Billing, stripe: StripeStandIn
) -> None:
    tenant, invoice_id, method = await unanswered(billing, stripe)
    await post(billing, f"invoices/{invoice_id}/void", status=200)
    before = stripe.received
    assert (await pay(tenant, invoice_id, payment_method_id=method)).status_code == 409
    assert stripe.received == before
    # The tenant is owed the money until it is refunded.
    assert await journal(tenant) == {"cash": 30 * UNIT, "receivable": -30 * UNIT}
    await reconciled(billing)


async def test_a_payment_for_another_amount_or_by_another_method_is_replaced(
    billing: Billing, stripe: StripeStandIn
) -> None:
    tenant, invoice_id = await invoiced(billing)
    first = (await pay(tenant, invoice_id)).json()
    await post(billing, f"invoices/{invoice_id}/credit-notes", {"amount_minor": 2000, "reason": "r"})
    second = (await pay(tenant, invoice_id)).json()
    assert second["payment"]["amount_minor"] == 1000
    references = [each["payment"]["reference"] for each in (first, second)]
    assert [stripe.intents[each]["status"] for each in references] == ["canceled", "requires_payment_method"]

    method = await saved(tenant)
    # A debit of a bank account takes days, and nothing can stop it.
    stripe.intents[references[1]]["status"] = "processing"
    assert (await pay(tenant, invoice_id, payment_method_id=method)).status_code == 409
    stripe.intents[references[1]]["status"] = "requires_payment_method"
    third = (await pay(tenant, invoice_id, payment_method_id=method)).json()
    assert (third["payment"]["status"], third["payment"]["received_minor"]) == ("succeeded", 1000)
    assert stripe.intents[references[1]]["status"] == "canceled"
    assert await status(tenant, invoice_id) == ("paid", 0)
    assert [payment["status"] for payment in await payments(tenant)] == ["failed", "failed", "succeeded"]


async def test_a_card_that_is_declined_in_the_browser_leaves_the_payment_open_for_another_card(
    billing: Billing, stripe: StripeStandIn
) -> None:
    tenant, invoice_id = await invoiced(billing)
    first = (await pay(tenant, invoice_id)).json()
    intent = stripe.intents[first["payment"]["reference"]]
    declined = intent | {"last_payment_error": {"message": "Your card was declined."}}
    assert await send(billing, stripe, stripe.event("payment_intent.payment_failed", declined)) == "applied"
    second = (await pay(tenant, invoice_id)).json()
    assert second["client_secret"] == first["client_secret"]
    assert (second["payment"]["status"], second["payment"]["failure"]) == ("pending", "Your card was declined.")
    await send(billing, stripe, stripe.succeeded(intent["id"]))
    [payment] = await payments(tenant)
    assert (payment["status"], payment["failure"]) == ("succeeded", "")


async def test_a_saved_card_that_is_declined_ends_its_payment(billing: Billing, stripe: StripeStandIn) -> None:
    tenant, _, _ = await unanswered(billing, stripe, token=DECLINED)
    intent = list(stripe.intents.values())[-1]
    assert await send(billing, stripe, stripe.event("payment_intent.payment_failed", intent)) == "applied"
    [payment] = await payments(tenant)
    assert (payment["status"], payment["failure"]) == ("failed", "Your card was declined.")


@pytest.mark.parametrize("held", ["made", "charged"])
async def test_a_payment_that_is_replaced_during_its_request_takes_no_money(
    billing: Billing, stripe: StripeStandIn, held: str
) -> None:
    tenant, invoice_id = await invoiced(billing)
    methods = [await saved(tenant) for _ in range(2)]
    before, calls = stripe.received, stripe.calls + (held == "charged")
    released = asyncio.Event()
    stripe.faults.extend([Fault(late=True)] * (held == "charged") + [hold(released)])
    slow = asyncio.create_task(pay(tenant, invoice_id, payment_method_id=methods[0]))

    async def called() -> bool:
        return stripe.calls > calls

    await billing.platform.until(called)
    fast = await pay(tenant, invoice_id, payment_method_id=methods[1])
    released.set()
    answers = [(await slow).json(), fast.json()]
    assert [answer["payment"]["status"] for answer in answers] == ["failed", "succeeded"]
    assert answers[0]["client_secret"] == ""
    assert stripe.received == before + 3000
    await reconciled(billing)


@pytest.mark.parametrize("told", [True, False])
async def test_a_payment_that_was_cancelled_at_the_provider_is_failed(
    billing: Billing, stripe: StripeStandIn, told: bool
) -> None:
    tenant, invoice_id = await invoiced(billing)
    first = (await pay(tenant, invoice_id)).json()
    intent = stripe.intents[first["payment"]["reference"]]
    intent["status"] = "canceled"
    if told:
        assert await send(billing, stripe, stripe.event("payment_intent.canceled", intent)) == "applied"
    else:
        assert (await pay(tenant, invoice_id)).json()["client_secret"] == ""
    [payment] = await payments(tenant)
    assert (payment["status"], payment["failure"]) == ("failed", "it was cancelled")
    assert (await pay(tenant, invoice_id)).json()["client_secret"] not in ("", first["client_secret"])


@pytest.mark.parametrize("asked", ["by the clock", "by the payer"])
async def test_a_declined_charge_whose_answer_and_event_were_lost_is_failed(
    billing: Billing, stripe: StripeStandIn, asked: str
) -> None:
    tenant, invoice_id, method = await unanswered(billing, stripe, token=DECLINED)
    if asked == "by the clock":
        await look_up(billing, stripe, tenant)
    else:
        assert (await pay(tenant, invoice_id, payment_method_id=method)).status_code == 200
    [payment] = await payments(tenant)
    assert (payment["status"], payment["failure"]) == ("failed", "Your card was declined.")


async def test_a_payment_by_a_saved_method_that_was_deleted_meanwhile_is_failed_and_cancelled(
    billing: Billing, stripe: StripeStandIn
) -> None:
    tenant, invoice_id, method = await unanswered(billing, stripe, "made")
    intent = list(stripe.intents.values())[-1]
    # At the provider's own page.
    stripe.detached.add(intent["payment_method"])
    payment = (await pay(tenant, invoice_id, payment_method_id=method)).json()["payment"]
    assert (payment["status"], "was detached" in payment["failure"]) == ("failed", True)
    assert intent["status"] == "canceled"


async def test_a_debit_that_is_under_way_stays_open_when_the_provider_has_forgotten_its_key(
    billing: Billing, stripe: StripeStandIn
) -> None:
    """The provider forgets the key of a charge after a day."""
    tenant, invoice_id, method = await unanswered(billing, stripe)
    intent = list(stripe.intents.values())[-1]
    intent |= {"status": "processing", "amount_received": 0}
    stripe.forget_keys()
    assert (await pay(tenant, invoice_id, payment_method_id=method)).json()["payment"]["status"] == "pending"


@pytest.mark.parametrize("asked", ["by the clock", "by the payer"])
async def test_a_payment_that_the_provider_does_not_have_any_more_leaves_the_invoice_open_for_another_one(
    billing: Billing, stripe: StripeStandIn, asked: str
) -> None:
    """The operator has changed the account at the provider, from a test to a live one for example."""
    tenant, invoice_id = await invoiced(billing)
    first = (await pay(tenant, invoice_id)).json()["payment"]
    del stripe.intents[first["reference"]]
    if asked == "by the clock":
        await look_up(billing, stripe, tenant)
    else:
        await pay(tenant, invoice_id)
    [payment] = await payments(tenant)
    assert (payment["status"], payment["failure"]) == ("failed", "refused by stripe: No such payment_intent")
    assert (await pay(tenant, invoice_id)).json()["client_secret"]


async def test_a_card_that_is_declined_in_the_browser_stays_open_when_its_payment_is_looked_up(
    billing: Billing, stripe: StripeStandIn
) -> None:
    tenant, invoice_id = await invoiced(billing)
    first = (await pay(tenant, invoice_id)).json()
    await look_up(billing, stripe, tenant)
    [payment] = await payments(tenant)
    assert (payment["status"], payment["failure"]) == ("pending", ""), "nothing was tried yet"
    error = {"message": "Your card was declined."}
    stripe.intents[payment["reference"]]["last_payment_error"] = error
    await look_up(billing, stripe, tenant)
    again = (await pay(tenant, invoice_id)).json()
    assert again["client_secret"] == first["client_secret"]
    assert (again["payment"]["status"], again["payment"]["failure"]) == ("pending", error["message"])


async def test_a_declined_card_leaves_the_invoice_open_for_another_payment(
    billing: Billing, stripe: StripeStandIn
) -> None:
    tenant, invoice_id = await invoiced(billing)
    bad = await saved(tenant, DECLINED)
    answer = (await pay(tenant, invoice_id, payment_method_id=bad)).json()
    assert (answer["payment"]["status"], answer["payment"]["failure"]) == ("failed", "Your card was declined.")
    assert await status(tenant, invoice_id) == ("finalised", 3000)
    again = (await pay(tenant, invoice_id)).json()
    assert again["client_secret"]
    count = len(stripe.intents)
    assert (await pay(tenant, invoice_id)).json() == again
    assert len(stripe.intents) == count
    assert await send(billing, stripe, stripe.succeeded(again["payment"]["reference"])) == "applied"
    assert await status(tenant, invoice_id) == ("paid", 0)


async def test_events_in_any_order_and_number_end_in_the_same_books(billing: Billing, stripe: StripeStandIn) -> None:
    rng = random.Random(1)
    for order in (rng.sample(range(10), 10) for _ in range(4)):
        tenant, invoice_id = await invoiced(billing)
        reference = (await pay(tenant, invoice_id)).json()["payment"]["reference"]
        succeeded = stripe.succeeded(reference)
        # The order in which Stripe sends them; 100 of 400 come back, and the dispute is lost.
        disputed = [stripe.dispute_event(reference, "needs_response", 400), stripe.reinstated(reference, 100)]
        events = [succeeded, *disputed, stripe.dispute_event(reference, "lost")]
        refunds = [stripe.give_back(reference, minor) for minor in (500, 700)]
        events += [stripe.event("refund.created", dict(refund)) for refund in refunds]
        # The sum with the refund that fails and, later, without it.
        events += [stripe.refund_event(reference), stripe.fail_refund(refunds[0]), stripe.refund_event(reference)]
        events.append(stripe.event("refund.updated", dict(refunds[0])))
        for n in order:
            assert await send(billing, stripe, events[n]) == "applied"
            assert await send(billing, stripe, events[n]) == "repeated"
        assert await status(tenant, invoice_id) == ("finalised", 1000)
        assert await journal(tenant) == {
            "cash": 20 * UNIT,
            "receivable": 10 * UNIT,
            "revenue": -30 * UNIT,
        }
    await reconciled(billing)


async def test_a_refund_that_fails_later_is_taken_back_by_a_new_entry_and_may_be_made_again(
    billing: Billing, stripe: StripeStandIn
) -> None:
    tenant, invoice_id = await invoiced(billing)
    payment = (await pay(tenant, invoice_id)).json()["payment"]
    reference = payment["reference"]
    await send(billing, stripe, stripe.succeeded(reference))
    path, key = f"/api/v1/payments/{payment['id']}", {"Idempotency-Key": "k"}
    body = {"amount_minor": 3000, "reason": "r"}
    made = await tenant.operator.post(f"{path}/refunds", json=body, headers=key)
    assert made.status_code == 201, made.text
    refund = list(stripe.refunds.values())[-1]
    await send(billing, stripe, stripe.event("refund.created", dict(refund)))
    await send(billing, stripe, stripe.refund_event(reference))
    assert await status(tenant, invoice_id) == ("finalised", 3000)
    [(entries,)] = await tenant.sql("SELECT count(*) FROM journal_entry WHERE tenant_id = $1", tenant.id)
    await send(billing, stripe, stripe.fail_refund(refund))
    assert await status(tenant, invoice_id) == ("paid", 0)
    shown = (await tenant.http.get(path)).json()
    assert (shown["refunded_minor"], shown["failed_refund_minor"]) == (0, 3000)
    assert await tenant.sql("SELECT count(*) FROM journal_entry WHERE tenant_id = $1", tenant.id) == [(entries + 1,)]
    assert (await tenant.operator.post(f"{path}/refunds", json=body, headers=key)).status_code == 409
    again = await tenant.operator.post(f"{path}/refunds", json=body)
    assert again.status_code == 201, again.text
    await send(billing, stripe, stripe.event("refund.created", list(stripe.refunds.values())[-1]))
    assert await status(tenant, invoice_id) == ("finalised", 3000)
    await reconciled(billing)


@pytest.mark.parametrize("order", ["paid, then disputed", "disputed, then paid", "disputed, then asked again"])
async def test_events_about_a_payment_whose_answer_was_lost_are_applied(
    billing: Billing, stripe: StripeStandIn, order: str
) -> None:
    """The provider's id of the payment was not known, so the dispute changed nothing."""
    tenant, invoice_id = await invoiced(billing)
    stripe.faults.append(cut(accept=True))
    assert (await pay(tenant, invoice_id)).status_code >= 500
    reference = list(stripe.intents)[-1]
    paid = stripe.succeeded(reference)
    events = [paid, stripe.dispute_event(reference, "needs_response"), stripe.dispute_event(reference, "lost")]
    events.append(stripe.reinstated(reference, 1000))
    if order == "paid, then disputed":
        assert [await send(billing, stripe, event) for event in events] == ["applied"] * 4
    else:
        before = (await reconciled(billing))["unmatched"]
        assert [await send(billing, stripe, event) for event in events[1:]] == ["unmatched"] * 3
        if order == "disputed, then paid":
            assert await send(billing, stripe, paid) == "applied"
        else:
            for _ in range(2):
                assert (await pay(tenant, invoice_id)).status_code == 200
        assert (await reconciled(billing))["unmatched"] == before
    assert await status(tenant, invoice_id) == ("finalised", 2000)
    assert await journal(tenant) == {"cash": 10 * UNIT, "receivable": 20 * UNIT, "revenue": -30 * UNIT}
    await reconciled(billing)


async def test_an_amount_that_the_provider_refuses_leaves_no_payment_open(
    billing: Billing, stripe: StripeStandIn
) -> None:
    """An open one keeps an invoice from being written off."""
    for currency, base, least in (("KWD", 5_123_000_000, "0.010 KWD"), ("MGA", 5 * 10**7, "1.00 MGA")):
        tenant = await billing.tenant(currency=currency)
        one = plan(currency=currency, base_nanos=base, charges=[], included=[], usage_markup_percent=None)
        made = await post(billing, "plans", one)
        body = {"tenant_id": tenant.id, "plan_id": made["id"], "starts_at": START.isoformat(), **ANCHOR}
        await post(billing, "subscriptions", body)
        invoice = await post(billing, f"invoices/{(await draft(billing, tenant))['id']}/finalise", status=200)
        payment = (await pay(tenant, invoice["id"])).json()["payment"]
        assert payment["status"] == "failed", payment
        assert f"takes only multiples of {least};" in payment["failure"]


async def test_an_inquiry_takes_no_money_until_it_is_a_dispute(billing: Billing, stripe: StripeStandIn) -> None:
    tenant, invoice_id = await invoiced(billing)
    reference = (await pay(tenant, invoice_id)).json()["payment"]["reference"]
    await send(billing, stripe, stripe.succeeded(reference))
    dispute = stripe.dispute_event(reference, "needs_response")["data"]["object"]
    for kind, state in (("created", "warning_needs_response"), ("closed", "warning_closed")):
        inquiry = dispute | {"status": state, "balance_transactions": []}
        event = stripe.event(f"charge.dispute.{kind}", inquiry)
        assert await send(billing, stripe, event) == "ignored"
    assert await journal(tenant) == {"cash": 30 * UNIT, "revenue": -30 * UNIT}
    assert await send(billing, stripe, stripe.event("charge.dispute.updated", dispute)) == "applied"
    assert await journal(tenant) == {"disputed": 30 * UNIT, "revenue": -30 * UNIT}


async def test_a_dispute_takes_the_money_away_until_it_is_won(billing: Billing, stripe: StripeStandIn) -> None:
    tenant, invoice_id = await invoiced(billing)
    reference = (await pay(tenant, invoice_id)).json()["payment"]["reference"]
    await send(billing, stripe, stripe.succeeded(reference))
    await send(billing, stripe, stripe.dispute_event(reference, "needs_response"))
    assert await journal(tenant) == {"disputed": 30 * UNIT, "revenue": -30 * UNIT}
    assert await status(tenant, invoice_id) == ("paid", 0)
    await reconciled(billing)
    await send(billing, stripe, stripe.dispute_event(reference, "won"))
    assert await journal(tenant) == {"disputed": 30 * UNIT, "revenue": -30 * UNIT}
    note = {"amount_minor": 1000, "reason": "r", "refund": True}
    early = await billing.operator.post(f"/api/v1/invoices/{invoice_id}/credit-notes", json=note)
    assert field_of(early) == "refund", "the money is not back yet"
    await send(billing, stripe, stripe.reinstated(reference))
    assert await journal(tenant) == {"cash": 30 * UNIT, "revenue": -30 * UNIT}


@pytest.mark.parametrize("state", ["lost", "prevented"])
async def test_money_of_a_dispute_that_was_not_won_is_due_again_until_it_is_reinstated(
    billing: Billing, stripe: StripeStandIn, state: str
) -> None:
    tenant, invoice_id = await invoiced(billing)
    reference = (await pay(tenant, invoice_id)).json()["payment"]["reference"]
    await send(billing, stripe, stripe.succeeded(reference))
    await send(billing, stripe, stripe.dispute_event(reference, state, 1000))
    assert await journal(tenant) == {"cash": 20 * UNIT, "receivable": 10 * UNIT, "revenue": -30 * UNIT}
    back = stripe.reinstated(reference, 400)
    assert await send(billing, stripe, back) == "applied"
    assert await status(tenant, invoice_id) == ("finalised", 600)
    assert await journal(tenant) == {"cash": 24 * UNIT, "receivable": 6 * UNIT, "revenue": -30 * UNIT}
    await reconciled(billing)


async def test_a_dispute_in_an_account_of_another_currency_counts_in_the_currency_of_the_payment(
    billing: Billing, stripe: StripeStandIn
) -> None:
    """Each movement was converted by the rate of its day."""
    tenant, invoice_id = await invoiced(billing)
    reference = (await pay(tenant, invoice_id)).json()["payment"]["reference"]
    await send(billing, stripe, stripe.succeeded(reference))
    events = [stripe.dispute_event(reference, "needs_response", 1000), stripe.reinstated(reference)]
    for event in events:
        for movement, cents in zip(event["data"]["object"]["balance_transactions"], (-930, 941), strict=False):
            movement |= {"currency": "eur", "amount": cents}
    await send(billing, stripe, events[0])
    assert await journal(tenant) == {"cash": 20 * UNIT, "disputed": 10 * UNIT, "revenue": -30 * UNIT}
    await send(billing, stripe, events[1])
    assert await journal(tenant) == {"cash": 30 * UNIT, "revenue": -30 * UNIT}


async def test_a_removed_method_takes_no_money_and_an_erased_tenant_has_no_customer(
    billing: Billing, stripe: StripeStandIn
) -> None:
    tenant, invoice_id = await invoiced(billing)
    method, token = await saved(tenant), f"pm_{uuid4().hex}"
    kept = await saved(tenant, token)
    # It is removed at the provider, and the answer is lost.
    stripe.faults.append(cut(accept=True))
    path = f"/api/v1/payment-methods/{method}"
    assert (await tenant.http.delete(path)).status_code >= 500
    assert (await tenant.http.delete(path)).status_code == 204
    assert (await tenant.http.delete(path)).status_code == 404
    listed = (await tenant.http.get("/api/v1/payment-methods")).json()["items"]
    assert [one["id"] for one in listed] == [kept]
    assert (await pay(tenant, invoice_id, payment_method_id=method)).status_code == 404
    customer = stripe.methods[token]
    assert list(stripe.methods.values()).count(customer) == 1
    event = TenantErased(tenant_id=tenant.id)
    await billing.platform.produce(PLATFORM_EVENTS, event, key=tenant.id, tenant_id=tenant.id)

    async def erased() -> bool:
        return not await tenant.sql("SELECT FROM payment_method WHERE tenant_id = $1", tenant.id)

    await billing.platform.until(erased)
    assert customer not in stripe.customers


async def test_a_tenant_whose_customer_was_deleted_at_the_provider_saves_methods_with_another_one(
    billing: Billing, stripe: StripeStandIn
) -> None:
    tenant, invoice_id = await invoiced(billing)
    await saved(tenant)
    stripe.customers.clear()
    await saved(tenant)
    method = await saved(tenant)
    assert len(stripe.customers) == 1
    assert (await pay(tenant, invoice_id, payment_method_id=method)).json()["payment"]["status"] == "succeeded"


async def test_a_refund_is_made_once_and_never_above_the_payment(billing: Billing, stripe: StripeStandIn) -> None:
    tenant, invoice_id = await invoiced(billing)
    payment = (await pay(tenant, invoice_id)).json()["payment"]
    await send(billing, stripe, stripe.succeeded(payment["reference"]))
    path = f"/api/v1/payments/{payment['id']}/refunds"

    async def refund(minor: int) -> int:
        return (await billing.operator.post(path, json={"amount_minor": minor, "reason": "test"})).status_code

    assert await refund(3001) == 422
    codes = await asyncio.gather(*(refund(1000) for _ in range(5)))
    assert sorted(codes) == [201, 201, 201, 422, 422]
    assert stripe.refunded[payment["reference"]] == 3000
    assert (await tenant.http.post(path, json={"amount_minor": 1, "reason": "x"})).status_code == 403
    await send(billing, stripe, stripe.refund_event(payment["reference"]))
    assert await status(tenant, invoice_id) == ("finalised", 3000)
    await reconciled(billing)


async def test_a_refund_with_a_key_is_made_once_however_often_it_is_asked(
    billing: Billing, stripe: StripeStandIn
) -> None:
    tenant, invoice_id = await invoiced(billing)
    payment = (await pay(tenant, invoice_id)).json()["payment"]
    await send(billing, stripe, stripe.succeeded(payment["reference"]))

    async def refund(minor: int) -> httpx.Response:
        path = f"/api/v1/payments/{payment['id']}/refunds"
        body = {"amount_minor": minor, "reason": "test"}
        return await billing.operator.post(path, json=body, headers={"Idempotency-Key": "k"})

    stripe.faults.append(cut(accept=True))
    assert (await refund(1000)).status_code >= 500
    answers = [await refund(1000) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [201, 201]
    assert answers[0].json() == answers[1].json()
    assert field_of(await refund(999)) == "Idempotency-Key"
    stripe.forget_keys()
    assert (await refund(1000)).json() == answers[0].json()
    assert stripe.refunded[payment["reference"]] == 1000


async def test_a_refund_whose_answer_was_lost_is_not_made_again_when_the_provider_has_forgotten_its_key(
    billing: Billing, stripe: StripeStandIn
) -> None:
    tenant, invoice_id = await invoiced(billing)
    payment = (await pay(tenant, invoice_id)).json()["payment"]
    await send(billing, stripe, stripe.succeeded(payment["reference"]))
    path = f"/api/v1/payments/{payment['id']}/refunds"
    for accept in (False, True):
        stripe.faults.append(cut(accept=accept))
        body = {"amount_minor": 1000, "reason": f"accept {accept}"}
        key = {"Idempotency-Key": str(accept)}
        assert (await billing.operator.post(path, json=body, headers=key)).status_code >= 500
        stripe.forget_keys()
        assert (await billing.operator.post(path, json=body, headers=key)).status_code == 201
    assert stripe.refunded[payment["reference"]] == 2000


async def test_a_refund_is_promised_only_up_to_what_payments_can_give_back(
    billing: Billing, stripe: StripeStandIn
) -> None:
    tenant, invoice_id = await invoiced(billing)
    path = f"/api/v1/invoices/{invoice_id}"
    bank = {"amount_minor": 1000, "reference": f"bank {invoice_id}"}
    await post(billing, f"invoices/{invoice_id}/received", bank, status=200)
    payment = (await pay(tenant, invoice_id)).json()["payment"]
    await send(billing, stripe, stripe.succeeded(payment["reference"]))

    async def credit(minor: int) -> httpx.Response:
        body = {"amount_minor": minor, "reason": "r", "refund": True}
        return await billing.operator.post(f"{path}/credit-notes", json=body)

    assert (await credit(1500)).status_code == 201
    assert field_of(await credit(501)) == "refund"
    assert (await credit(500)).status_code == 201
    await post(billing, f"payments/{payment['id']}/refunds", {"amount_minor": 2000, "reason": "r"})
    await send(billing, stripe, stripe.refund_event(payment["reference"]))
    assert await journal(tenant) == {"cash": 10 * UNIT, "revenue": -10 * UNIT}


async def test_money_that_a_credit_note_promised_is_not_given_back_by_the_next_one(
    billing: Billing, stripe: StripeStandIn
) -> None:
    """30 USD: 20 by promotional credit, 10 by a card. The first note promises the 10 to the card; the second one gives
    the promotional credit back, and not prepaid credit, whether the refund was made or not."""
    for refunded in (False, True):
        tenant, _ = await subscribed(billing, charges=[], included=[], usage_markup_percent=None)
        await post(billing, "grants", {"tenant_id": tenant.id, "nanos": 20 * UNIT, "reason": "r"})
        invoice_id = (await draft(billing, tenant))["id"]
        await post(billing, f"invoices/{invoice_id}/finalise", status=200)
        payment = (await pay(tenant, invoice_id)).json()["payment"]
        await send(billing, stripe, stripe.succeeded(payment["reference"]))
        path = f"invoices/{invoice_id}/credit-notes"
        await post(billing, path, {"amount_minor": 1000, "reason": "r", "refund": True})
        if refunded:
            await post(billing, f"payments/{payment['id']}/refunds", {"amount_minor": 1000, "reason": "r"})
            await send(billing, stripe, stripe.refund_event(payment["reference"]))
        await post(billing, path, {"amount_minor": 2000, "reason": "r"})
        found = await journal(tenant)
        assert (found.get("prepaid", 0), found["promotional_credit"]) == (0, -20 * UNIT)


async def test_a_forged_stale_or_unknown_event_changes_nothing(
    billing: Billing, stripe: StripeStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant, invoice_id = await invoiced(billing)
    reference = (await pay(tenant, invoice_id)).json()["payment"]["reference"]
    event = stripe.succeeded(reference)
    body, headers = stripe.signed(event)
    stale = stripe.signed(event, at=time.time() - 301)
    forged = [
        (body, {**headers, "stripe-signature": headers["stripe-signature"][:-1] + "x"}),
        (body + b" ", headers),
        (body, {"content-type": "application/json"}),
        (body, {**headers, "stripe-signature": "t=x,v1=y"}),
        stale,
    ]
    async with httpx.AsyncClient(base_url=billing.platform.url("billing"), trust_env=False, timeout=30) as client:
        for content, sent in forged:
            assert (await client.post(WEBHOOK, content=content, headers=sent)).status_code == 401
        assert (await client.post("/webhooks/payments/acme", content=body, headers=headers)).status_code == 404
    assert await status(tenant, invoice_id) == ("finalised", 3000)
    assert await send(billing, stripe, stripe.event("customer.created", {"id": "cus_1"})) == "ignored"
    before = (await reconciled(billing))["unmatched"]
    stranger = {**event["data"]["object"], "id": "pi_unknown", "metadata": {}}
    assert await send(billing, stripe, stripe.event("payment_intent.succeeded", stranger)) == "unmatched"
    assert (await reconciled(billing))["unmatched"] == before + 1
    watch = PaymentWatch(billing.platform.database("billing"), metrics := Metrics(CollectorRegistry()))

    async def counted() -> float | None:
        await watch.tick()
        return metrics.registry.get_sample_value("claw_payment_cases", {"reason": "unmatched"})

    assert await counted() == before + 1
    # It may be one of another system with the same account.
    monkeypatch.setattr("services.billing.payments.watch.utcnow", lambda: utcnow() + timedelta(days=8))
    assert await counted() == 0
    other = await billing.tenant()
    assert (await pay(other, invoice_id)).status_code == 404


async def test_killed_between_the_answer_and_the_books_a_repeated_call_pays_once(
    billing: Billing, stripe: StripeStandIn
) -> None:
    tenant, invoice_id = await invoiced(billing)
    before = stripe.received
    method = await saved(tenant)
    released = asyncio.Event()
    calls = stripe.calls + 1
    # The answer to the charge is held.
    stripe.faults.extend([Fault(late=True), Fault(Reply(200, {}), accept=True, wait=released)])
    asking = asyncio.create_task(pay(tenant, invoice_id, payment_method_id=method))

    async def called() -> bool:
        return stripe.calls > calls

    await billing.platform.until(called)
    billing.platform.kill("billing")
    released.set()
    with pytest.raises(httpx.HTTPError):
        await asking
    await start(billing.platform, stripe)
    assert (await pay(tenant, invoice_id, payment_method_id=method)).status_code == 200
    assert stripe.received == before + 3000
    assert await status(tenant, invoice_id) == ("paid", 0)
    await reconciled(billing)


# The seller is in DE. Tenants of this module without a country pay no tax, because DE has no rate here.
SELLER = Seller(name="Clawbus GmbH", country="DE", vat_id="DE123456789")
FRENCH, AUSTRIAN = {"country": "FR"}, {"name": "Acme", "country": "AT", "vat_id": "ATU33864707"}


async def buyer(billing: Billing, currency: str = "USD") -> Tenant:
    """A tenant that pays 20 % tax, and has no credit yet."""
    rate = {"country": "FR", "percent": "20", "valid_from": "2020-01-01T00:00:00Z"}
    assert (await billing.operator.post("/api/v1/tax-rates", json=rate)).status_code in (201, 409)
    tenant = await billing.tenant(credit_nanos=0, currency=currency)
    assert (await tenant.http.put("/api/v1/billing/buyer", json=FRENCH)).status_code == 200
    return tenant


async def ordered(tenant: Tenant, nanos: int = 100 * UNIT, **more: Any) -> dict[str, Any]:
    answer = await tenant.http.post("/api/v1/grants", json={"nanos": nanos, **more})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


async def bought(billing: Billing, stripe: StripeStandIn, used: int = 0) -> tuple[Tenant, str, dict[str, Any]]:
    """A tenant that has bought credit of 100 for 120 and used a part of it, the invoice, and the payment."""
    tenant = await buyer(billing)
    order = await ordered(tenant)
    payment = (await pay(tenant, order["id"])).json()["payment"]
    assert await send(billing, stripe, stripe.succeeded(payment["reference"])) == "applied"
    if used:
        await spend(billing, tenant, used)
    return tenant, order["id"], payment


async def spend(billing: Billing, tenant: Tenant, units: int) -> None:
    price = {"resource": (model := f"acme/{uuid4()}"), "nanos_per_unit": {"input_tokens": str(UNIT)}}
    await post(billing, "prices", price | {"valid_from": (START - timedelta(days=1)).isoformat()})
    await tenant.use("a", model, input_tokens=units)
    await tenant.verdict("a")


async def credit_of(tenant: Tenant) -> tuple[int, int, int]:
    """The rest of the only grant, its frozen part, and the balance of the account, in whole units."""
    [grant] = (await tenant.http.get("/api/v1/grants")).json()["items"]
    assert grant["kind"] == "purchased"
    balance = (await tenant.get("balance"))["balance_nanos"]
    return grant["left_nanos"] // UNIT, grant["frozen_nanos"] // UNIT, balance // UNIT


async def test_credit_that_a_tenant_orders_is_granted_when_its_money_arrives(
    billing: Billing, stripe: StripeStandIn
) -> None:
    tenant = await buyer(billing)
    order = await ordered(tenant, reason="for the demo")
    assert (order["status"], order["number"], order["purpose"]) == ("draft", None, "credit")
    assert (order["subtotal_nanos"], order["tax_nanos"], order["total_minor"]) == (100 * UNIT, 20 * UNIT, 12000)
    assert (await tenant.http.get("/api/v1/grants")).json()["items"] == []
    assert (await tenant.get("balance"))["balance_nanos"] == 0
    paying = (await pay(tenant, order["id"])).json()
    assert paying["client_secret"]
    event = stripe.succeeded(paying["payment"]["reference"])
    assert await send(billing, stripe, event) == "applied"
    assert await send(billing, stripe, event) == "repeated"
    invoice = (await tenant.http.get(f"/api/v1/invoices/{order['id']}")).json()
    assert (invoice["status"], invoice["number"], invoice["due_minor"]) == ("paid", "INV-000001", 0)
    assert (invoice["buyer"]["country"], invoice["tax_note"]) == ("FR", "20 % FR")
    assert [line["description"] for line in invoice["lines"]] == ["Prepaid credit: for the demo"]
    [grant] = (await tenant.http.get("/api/v1/grants")).json()["items"]
    assert (grant["invoice_id"], grant["nanos"]) == (order["id"], 100 * UNIT)
    assert await credit_of(tenant) == (100, 0, 100)
    assert await journal(tenant) == {"cash": 120 * UNIT, "purchased": -100 * UNIT, "tax": -20 * UNIT}
    await reconciled(billing)
    # The invoice is the receipt.
    clock = Clock(billing.platform.database("billing"), Seller(), {})
    for _ in range(2):
        await clock.mail()
    found = await billing.platform.outbox("billing", "notification")
    mails = [body for headers, body in found if headers.get("tenant_id") == tenant.id]
    assert [mail["subject"] for mail in mails] == ["Invoice INV-000001"]
    assert mails[0]["text"].startswith("Invoice INV-000001 for prepaid credit: 120.00 USD.")
    assert "Nothing is to be paid." in mails[0]["text"]


async def test_a_bank_transfer_pays_an_order_and_its_reversal_takes_the_unspent_credit_back(billing: Billing) -> None:
    tenant = await buyer(billing)
    order = await ordered(tenant)
    path, body = f"invoices/{order['id']}/received", {"amount_minor": 12000, "reference": "SEPA 7"}
    for minor in (11999, 12001):
        answer = await billing.operator.post(f"/api/v1/{path}", json=body | {"amount_minor": minor})
        assert field_of(answer) == "amount_minor"
    assert (await tenant.http.get("/api/v1/grants")).json()["items"] == []
    for _ in range(2):
        paid = await post(billing, path, body, status=200)
        assert (paid["status"], paid["number"], paid["due_minor"]) == ("paid", "INV-000001", 0)
    assert await credit_of(tenant) == (100, 0, 100)
    assert await journal(tenant) == {"cash": 120 * UNIT, "purchased": -100 * UNIT, "tax": -20 * UNIT}
    await spend(billing, tenant, 25)
    for _ in range(2):
        back = await post(billing, f"{path}/reverse", {"reference": "SEPA 7"}, status=200)
        assert (back["status"], back["credited_minor"], back["due_minor"]) == ("finalised", 9000, 3000)
    assert await credit_of(tenant) == (0, 0, 0)
    assert await journal(tenant) == {"receivable": 30 * UNIT, "revenue": -25 * UNIT, "tax": -5 * UNIT}
    # The bank has kept the money for the spent part.
    paid = await post(billing, path, body | {"amount_minor": 3000}, status=200)
    assert (paid["status"], paid["due_minor"]) == ("paid", 0)


async def test_credit_is_charged_and_granted_once_however_often_its_payment_is_asked(
    billing: Billing, stripe: StripeStandIn
) -> None:
    tenant = await buyer(billing)
    key = {"Idempotency-Key": "k"}
    orders = [await tenant.http.post("/api/v1/grants", json={"nanos": 100 * UNIT}, headers=key) for _ in range(2)]
    assert orders[0].json() == orders[1].json()
    invoice_id, method, before = orders[0].json()["id"], await saved(tenant), stripe.received
    stripe.faults.extend(LOST["charged"])
    assert (await pay(tenant, invoice_id, payment_method_id=method)).status_code >= 500
    answers = await asyncio.gather(*(pay(tenant, invoice_id, payment_method_id=method) for _ in range(5)))
    assert {answer.status_code for answer in answers} <= {200, 409}
    assert stripe.received == before + 12000
    assert await credit_of(tenant) == (100, 0, 100)
    assert await status(tenant, invoice_id) == ("paid", 0)
    await reconciled(billing)


async def test_credit_is_granted_by_the_event_if_the_answer_about_its_payment_is_lost(
    billing: Billing, stripe: StripeStandIn
) -> None:
    tenant = await buyer(billing)
    order = await ordered(tenant)
    stripe.faults.append(cut(accept=True))
    assert (await pay(tenant, order["id"])).status_code >= 500
    assert await send(billing, stripe, stripe.succeeded(list(stripe.intents)[-1])) == "applied"
    assert (await pay(tenant, order["id"])).status_code == 409
    assert await credit_of(tenant) == (100, 0, 100)
    await reconciled(billing)


async def test_an_order_that_is_not_paid_uses_no_number_and_nothing_else_finalises_it(billing: Billing) -> None:
    tenant = await buyer(billing)
    order = await ordered(tenant)
    path = f"/api/v1/invoices/{order['id']}"
    note = {"amount_minor": 1, "reason": "r"}
    for act, body in (("finalise", {}), ("void", {}), ("uncollectible", {}), ("credit-notes", note)):
        assert (await billing.operator.post(f"{path}/{act}", json=body)).status_code == 409, act
    await tenant.sql("UPDATE invoice SET made_at = made_at - interval '9 days' WHERE tenant_id = $1", tenant.id)
    await Clock(billing.platform.database("billing"), Seller(), {}).close()
    assert (await post(billing, "billing/periods/close", {"tenant_id": tenant.id}, status=200))["items"] == []
    await end_billing(billing, tenant, 2)
    found = (await tenant.http.get(path)).json()
    assert (found["status"], found["number"], found["buyer"]["country"]) == ("draft", None, "")
    assert await journal(tenant) == {}


async def test_orders_that_are_never_paid_take_no_place_of_the_drafts_that_the_clock_finalises(
    billing: Billing, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant, _ = await subscribed(billing)
    order, made = await ordered(tenant), await draft(billing, tenant)
    # Older than any draft of another test.
    for invoice, at in ((order, "2001-01-01"), (made, "2001-01-02")):
        await tenant.sql(f"UPDATE invoice SET made_at = '{at}' WHERE invoice_id = $1", UUID(invoice["id"]))
    monkeypatch.setattr("services.billing.clock.MOST", 1)
    await Clock(billing.platform.database("billing"), Seller(), {}).close()
    assert [(await status(tenant, invoice["id"]))[0] for invoice in (order, made)] == ["draft", "finalised"]


async def end_billing(billing: Billing, tenant: Tenant, number: int) -> None:
    """A pass of the tenant's erasure."""
    runtime = cast(Runtime, SimpleNamespace(settings=SimpleNamespace(seller=Seller(), stripe_api_key=None)))
    effects = cast(Effects, billing.platform.database("billing"))
    await tenants.end_billing(runtime)(EraseTenant(tenant.id, number), effects)


async def test_money_for_an_order_that_arrives_after_the_erasure_of_its_tenant_is_booked_and_shown_to_the_operator(
    billing: Billing, stripe: StripeStandIn
) -> None:
    tenant = await buyer(billing)
    order = await ordered(tenant)
    payment = (await pay(tenant, order["id"])).json()["payment"]
    before = (await reconciled(billing))["after_erasure"]
    # A debit of a bank account: the clock cannot cancel it.
    stripe.intents[payment["reference"]]["status"] = "processing"
    async with billing.platform.database("billing").begin() as tx:
        await subjects.destroy_all(tx, tenant.id)
    await end_billing(billing, tenant, 2)
    await tenant.sql("UPDATE payment SET made_at = made_at - interval '3 days' WHERE tenant_id = $1", tenant.id)
    await look_up(billing, stripe, tenant)
    assert [each["status"] for each in await payments(tenant)] == ["pending"]
    event = stripe.succeeded(payment["reference"])
    assert await send(billing, stripe, event) == "applied"
    invoice = (await tenant.http.get(f"/api/v1/invoices/{order['id']}")).json()
    assert (invoice["status"], invoice["buyer"]["country"]) == ("paid", "FR")
    assert await journal(tenant) == {"cash": 120 * UNIT, "purchased": -100 * UNIT, "tax": -20 * UNIT}
    assert (await reconciled(billing))["after_erasure"] == before + 1
    body = {"amount_minor": 12000, "reason": "the tenant was erased"}
    await post(billing, f"invoices/{order['id']}/credit-notes", body)
    await post(billing, f"payments/{payment['id']}/refunds", body)
    await send(billing, stripe, stripe.refund_event(payment["reference"]))
    assert await journal(tenant) == {}
    assert (await reconciled(billing))["after_erasure"] == before


async def test_the_buyer_of_an_order_whose_payment_is_never_decided_is_erased_by_the_last_pass(
    billing: Billing,
) -> None:
    tenant = await buyer(billing)
    order = await ordered(tenant)
    assert (await pay(tenant, order["id"])).status_code == 200
    for number, country in ((2, "FR"), (3, "")):
        await end_billing(billing, tenant, number)
        found = (await tenant.http.get(f"/api/v1/invoices/{order['id']}")).json()
        assert found["buyer"]["country"] == country


async def test_the_payment_of_an_order_is_cancelled_after_a_day(billing: Billing, stripe: StripeStandIn) -> None:
    tenant = await buyer(billing)
    references = [(await pay(tenant, (await ordered(tenant))["id"])).json()["payment"]["reference"] for _ in range(2)]
    await tenant.sql(
        """
        UPDATE payment
        SET made_at = made_at - interval '2 days'
        WHERE tenant_id = $1 AND reference = $2
        """,
        tenant.id,
        references[0],
    )
    await look_up(billing, stripe, tenant)

    async def cancelled() -> bool:
        # The clock of the service may have been faster.
        return sorted(payment["status"] for payment in await payments(tenant)) == ["failed", "pending"]

    await billing.platform.until(cancelled)
    assert [stripe.intents[each]["status"] for each in references] == ["canceled", "requires_payment_method"]


async def test_the_tax_of_an_order_follows_the_buyer_until_another_payment_begins(
    billing: Billing, stripe: StripeStandIn
) -> None:
    tenant = await buyer(billing)
    order = await ordered(tenant)
    unnamed = (await pay(tenant, order["id"])).json()["payment"]
    assert (await tenant.http.put("/api/v1/billing/buyer", json=FRENCH | {"name": "Acme"})).status_code == 200
    first = (await pay(tenant, order["id"])).json()["payment"]
    assert first["id"] != unnamed["id"], "the receipt would not name the buyer"
    assert (await tenant.http.put("/api/v1/billing/buyer", json=AUSTRIAN)).status_code == 200
    # The tax of the payment that the payer may complete stays until then.
    assert (await tenant.http.get(f"/api/v1/invoices/{order['id']}")).json()["total_minor"] == 12000
    second = (await pay(tenant, order["id"])).json()["payment"]
    assert (first["amount_minor"], second["amount_minor"]) == (12000, 10000)
    assert stripe.intents[first["reference"]]["status"] == "canceled"
    assert await send(billing, stripe, stripe.succeeded(second["reference"])) == "applied"
    invoice = (await tenant.http.get(f"/api/v1/invoices/{order['id']}")).json()
    assert (invoice["total_minor"], invoice["tax_note"].split(":")[0]) == (10000, "reverse charge")
    assert (invoice["buyer"]["vat_id"], invoice["seller"]["vat_id"]) == ("ATU33864707", "DE123456789")
    assert await journal(tenant) == {"cash": 100 * UNIT, "purchased": -100 * UNIT}
    xml = (await tenant.http.get(f"/api/v1/invoices/{order['id']}/xml")).text
    for text in (">AE<", "<ram:TotalPrepaidAmount>100.00<", "<ram:DuePayableAmount>0.00<"):
        assert text in xml


@pytest.mark.parametrize("kind", ["usage", "order"])
async def test_an_invoice_names_the_buyer_by_whom_it_is_taxed_although_the_buyer_changes_meanwhile(
    billing: Billing, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    await buyer(billing)  # stores the rate
    tenant, _ = await subscribed(billing)
    assert (await tenant.http.put("/api/v1/billing/buyer", json=FRENCH)).status_code == 200
    made = await (draft(billing, tenant) if kind == "usage" else ordered(tenant))
    read = tax.buyer

    async def read_then_changed(tx: Tx, tenant_id: str) -> tax.Buyer:
        found = await read(tx, tenant_id)
        assert (await tenant.http.put("/api/v1/billing/buyer", json=AUSTRIAN)).status_code == 200
        return found

    monkeypatch.setattr(tax, "buyer", read_then_changed)
    async with billing.platform.database("billing").begin(tenant_id=tenant.id) as tx:
        await accounts.lock_one(tx, tenant.id)
        if kind == "usage":
            done = await booking.finalise(tx, tenant.id, UUID(made["id"]), SELLER, "test")
        else:
            order = await invoices.get(tx, tenant.id, UUID(made["id"]))
            done = await purchases.priced(tx, tenant.id, order, SELLER)
    assert (done.buyer.country, done.tax_note.split(":")[0]) in (("FR", "20 % FR"), ("AT", "reverse charge"))


@pytest.mark.parametrize(("currency", "units", "total"), [("JPY", 101, 121), ("KWD", 7, 8400)])
async def test_credit_is_bought_in_whole_minor_units_of_the_currency(
    billing: Billing, stripe: StripeStandIn, currency: str, units: int, total: int
) -> None:
    tenant = await buyer(billing, currency)
    part = await tenant.http.post("/api/v1/grants", json={"nanos": units * UNIT + 10**5})
    assert field_of(part) == "nanos"
    order = await ordered(tenant, units * UNIT)
    assert order["total_minor"] == total
    payment = (await pay(tenant, order["id"])).json()["payment"]
    assert await send(billing, stripe, stripe.succeeded(payment["reference"])) == "applied"
    assert await credit_of(tenant) == (units, 0, units)
    assert sum((await journal(tenant)).values()) == 0


async def test_a_tenant_orders_for_itself_and_by_the_amount_only(billing: Billing) -> None:
    tenant, other = await buyer(billing), await billing.tenant()
    for more, field in (
        ({"tenant_id": other.id}, "tenant_id"),
        ({"kind": "prepaid"}, "kind"),
        ({"priority": 1}, "priority"),
        ({"expires_at": None}, "expires_at"),
        ({"rollover_until": None}, "rollover_until"),
        ({"rollover_nanos": 1}, "rollover_nanos"),
        ({"nanos": 10**15 + UNIT}, "nanos"),
        ({"nanos": 0}, "nanos"),
    ):
        body: dict[str, Any] = {"nanos": UNIT, **more}
        assert field_of(await tenant.http.post("/api/v1/grants", json=body)) == field
    await ordered(tenant, tenant_id=tenant.id)
    await post(billing, "grants", {"tenant_id": tenant.id, "nanos": 10**18 - UNIT, "reason": "r"})
    assert field_of(await tenant.http.post("/api/v1/grants", json={"nanos": 2 * UNIT})) == "nanos"
    for field in ("tenant_id", "reason"):
        body = {"tenant_id": tenant.id, "nanos": UNIT, "reason": "r"}
        del body[field]
        assert field_of(await billing.operator.post("/api/v1/grants", json=body)) == field
    async with billing.platform.client("billing", tenant.id, scopes=("read",)) as viewer:
        assert (await viewer.post("/api/v1/grants", json={"nanos": UNIT})).status_code == 403


async def test_a_tenant_has_a_bounded_number_of_unpaid_orders(billing: Billing) -> None:
    tenant = await buyer(billing)
    for _ in range(purchases.MAX_UNPAID):
        await ordered(tenant)
    refused = await tenant.http.post("/api/v1/grants", json={"nanos": UNIT})
    assert (refused.status_code, "not paid" in refused.json()["detail"]) == (409, True)
    await tenant.sql("UPDATE invoice SET made_at = made_at - interval '1 day' WHERE tenant_id = $1", tenant.id)
    await ordered(tenant)


@pytest.mark.parametrize("end", ["won", "lost"])
async def test_credit_whose_money_is_disputed_is_frozen_until_the_dispute_ends(
    billing: Billing, stripe: StripeStandIn, end: str
) -> None:
    tenant, invoice_id, payment = await bought(billing, stripe, used=30)
    assert await credit_of(tenant) == (70, 0, 70)
    reference = payment["reference"]
    await send(billing, stripe, stripe.dispute_event(reference, "needs_response"))
    assert await credit_of(tenant) == (0, 70, 0)
    assert not (await tenant.reserve(input_tokens=1)).granted
    if end == "won":
        await send(billing, stripe, stripe.dispute_event(reference, "won"))
        await send(billing, stripe, stripe.reinstated(reference))
        assert await credit_of(tenant) == (70, 0, 70)
        assert (await tenant.reserve(input_tokens=1)).granted
        assert await status(tenant, invoice_id) == ("paid", 0)
        assert (await journal(tenant))["purchased"] == -70 * UNIT
        return
    lost = stripe.dispute_event(reference, "lost")
    for outcome in ("applied", "repeated"):
        assert await send(billing, stripe, lost) == outcome
    assert await credit_of(tenant) == (0, 0, 0)
    [note] = (await tenant.http.get(f"/api/v1/invoices/{invoice_id}/credit-notes")).json()["items"]
    assert (note["amount_minor"], note["subtotal_nanos"], note["tax_nanos"]) == (8400, 70 * UNIT, 14 * UNIT)
    # The spent part is due.
    assert await status(tenant, invoice_id) == ("finalised", 3600)
    assert await journal(tenant) == {"receivable": 36 * UNIT, "revenue": -30 * UNIT, "tax": -6 * UNIT}
    assert (await billing.operator.post(f"/api/v1/invoices/{invoice_id}/void")).status_code == 409
    await reconciled(billing)


async def test_credit_that_was_spent_is_due_after_a_lost_dispute(billing: Billing, stripe: StripeStandIn) -> None:
    tenant, invoice_id, payment = await bought(billing, stripe, used=100)
    await send(billing, stripe, stripe.dispute_event(payment["reference"], "lost"))
    assert await status(tenant, invoice_id) == ("finalised", 12000)
    assert (await billing.operator.post(f"/api/v1/invoices/{invoice_id}/void")).status_code == 409
    again = (await pay(tenant, invoice_id)).json()["payment"]
    assert await send(billing, stripe, stripe.succeeded(again["reference"])) == "applied"
    assert await status(tenant, invoice_id) == ("paid", 0)
    assert await journal(tenant) == {"cash": 120 * UNIT, "revenue": -100 * UNIT, "tax": -20 * UNIT}


async def test_an_order_whose_money_was_lost_before_it_was_reported_stays_a_draft(
    billing: Billing, stripe: StripeStandIn
) -> None:
    tenant = await buyer(billing)
    order = await ordered(tenant)
    reference = (await pay(tenant, order["id"])).json()["payment"]["reference"]
    paid = stripe.succeeded(reference)
    for event in (stripe.dispute_event(reference, "lost"), paid):
        assert await send(billing, stripe, event) == "applied"
    assert (await status(tenant, order["id"]))[0] == "draft"
    assert await journal(tenant) == {}
    assert await send(billing, stripe, stripe.reinstated(reference)) == "applied"
    assert await credit_of(tenant) == (100, 0, 100)


async def test_a_dispute_about_a_part_freezes_that_part(billing: Billing, stripe: StripeStandIn) -> None:
    tenant, _, payment = await bought(billing, stripe)
    await send(billing, stripe, stripe.dispute_event(payment["reference"], "needs_response", 3000))
    assert await credit_of(tenant) == (75, 25, 75)


async def test_unspent_credit_is_given_back_by_a_credit_note_and_a_refund(
    billing: Billing, stripe: StripeStandIn
) -> None:
    tenant, invoice_id, payment = await bought(billing, stripe, used=30)

    async def credit(minor: int) -> httpx.Response:
        body = {"amount_minor": minor, "reason": "r"}
        return await billing.operator.post(f"/api/v1/invoices/{invoice_id}/credit-notes", json=body)

    async def refund(minor: int) -> httpx.Response:
        body = {"amount_minor": minor, "reason": "r"}
        return await billing.operator.post(f"/api/v1/payments/{payment['id']}/refunds", json=body)

    refused = await credit(8401)
    assert (field_of(refused), "at most 8400" in refused.text) == ("amount_minor", True)
    early = await refund(8400)
    assert (early.status_code, "make a credit note first" in early.text) == (409, True)
    # Work in progress has reserved 0.6.
    hold_id = uuid7()
    assert (await tenant.reserve(hold_id=hold_id, output_tokens=1_000_000)).granted
    refused = await credit(8400)
    assert (field_of(refused), "at most 8328" in refused.text) == ("amount_minor", True)
    await tenant.release(hold_id)

    assert (await credit(8400)).status_code == 201
    assert await credit_of(tenant) == (0, 0, 0)
    assert (await refund(8401)).status_code == 409
    assert [(await refund(minor)).status_code for minor in (8000, 401, 400)] == [201, 409, 201]
    await send(billing, stripe, stripe.refund_event(payment["reference"]))
    assert await status(tenant, invoice_id) == ("paid", 0)
    assert await journal(tenant) == {"cash": 36 * UNIT, "revenue": -30 * UNIT, "tax": -6 * UNIT}
    await reconciled(billing)


async def test_a_refund_that_was_made_at_the_provider_takes_the_unspent_credit_back(
    billing: Billing, stripe: StripeStandIn
) -> None:
    tenant, invoice_id, payment = await bought(billing, stripe, used=30)
    for minor, left, due in ((2400, 50, 0), (9600, 0, 3600)):
        refund = stripe.give_back(payment["reference"], minor)
        await send(billing, stripe, stripe.event("refund.created", dict(refund)))
        await send(billing, stripe, stripe.refund_event(payment["reference"]))
        assert await credit_of(tenant) == (left, 0, left)
        assert (await status(tenant, invoice_id))[1] == due
    notes = (await tenant.http.get(f"/api/v1/invoices/{invoice_id}/credit-notes")).json()["items"]
    assert [note["amount_minor"] for note in notes] == [2400, 6000]
    assert await journal(tenant) == {"receivable": 36 * UNIT, "revenue": -30 * UNIT, "tax": -6 * UNIT}
    await reconciled(billing)
