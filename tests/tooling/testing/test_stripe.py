"""The stand-in of Stripe, judged by Stripe's own client: it reads every answer and error, and verifies the events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import pytest
import requests
import stripe

from tooling.testing.stripe import DECLINED, StripeStandIn


@pytest.fixture
async def server() -> AsyncIterator[StripeStandIn]:
    async with StripeStandIn() as running:
        yield running


@pytest.fixture
def client(server: StripeStandIn) -> Iterator[stripe.StripeClient]:
    with requests.Session() as session:
        session.trust_env = False
        yield stripe.StripeClient(
            server.key,
            base_addresses={"api": server.url},
            http_client=stripe.RequestsClient(session=session),
            max_network_retries=0,
        )


async def test_the_client_saves_a_method_pays_and_refunds(server: StripeStandIn, client: stripe.StripeClient) -> None:
    def pay() -> None:
        customer = client.v1.customers.create({"metadata": {"tenant_id": "t"}})
        method = client.v1.payment_methods.attach("pm_card_visa", {"customer": customer.id})
        assert method.customer == customer.id
        params: stripe.params.PaymentIntentCreateParams = {
            "amount": 3000,
            "currency": "usd",
            "description": "invoice INV-000001",
            "metadata": {"payment_id": "p"},
            "customer": customer.id,
            "payment_method": method.id,
        }
        intents = client.v1.payment_intents
        made, again = (intents.create(params, {"idempotency_key": "p"}) for _ in range(2))
        assert (made.status, made.amount_received, again.id) == ("requires_confirmation", 0, made.id)
        off: stripe.params.PaymentIntentConfirmParams = {"off_session": True}
        paid, same = (intents.confirm(made.id, off, {"idempotency_key": "p confirm"}) for _ in range(2))
        assert (paid.status, paid.amount_received, same.amount_received) == ("succeeded", 3000, 3000)
        with pytest.raises(stripe.InvalidRequestError) as unexpected:
            intents.confirm(made.id, off)
        assert unexpected.value.code == "payment_intent_unexpected_state"
        with pytest.raises(stripe.InvalidRequestError, match="cannot cancel"):
            intents.cancel(made.id)
        assert intents.create(params, {"idempotency_key": "p"}).status == "requires_confirmation"
        with pytest.raises(stripe.IdempotencyError):
            client.v1.payment_intents.create(params | {"amount": 1}, {"idempotency_key": "p"})
        assert client.v1.payment_intents.retrieve(made.id).metadata["payment_id"] == "p"
        refund = client.v1.refunds.create({"payment_intent": made.id, "amount": 1000})
        assert (refund.status, refund.amount) == ("succeeded", 1000)
        listed = client.v1.refunds.list({"payment_intent": made.id, "limit": 100})
        assert [one.id for one in listed.data] == [refund.id]
        with pytest.raises(stripe.InvalidRequestError, match="greater than unrefunded"):
            client.v1.refunds.create({"payment_intent": made.id, "amount": 2001})

        client.v1.payment_methods.attach(DECLINED, {"customer": customer.id})
        other = intents.create(params | {"payment_method": DECLINED}, {"idempotency_key": "q"})
        with pytest.raises(stripe.CardError) as declined:
            intents.confirm(other.id, off)
        assert declined.value.code == "card_declined"
        assert intents.cancel(other.id).status == "canceled"
        with pytest.raises(stripe.InvalidRequestError, match="status of canceled"):
            intents.confirm(other.id, off)

    await asyncio.to_thread(pay)
    assert server.received == 3000


async def test_the_client_removes_a_method_and_a_customer(client: stripe.StripeClient) -> None:
    def remove() -> None:
        customer = client.v1.customers.create({"metadata": {"tenant_id": "t"}})
        for method in ("pm_1", "pm_2"):
            client.v1.payment_methods.attach(method, {"customer": customer.id})
        assert client.v1.payment_methods.detach("pm_1").customer is None
        with pytest.raises(stripe.InvalidRequestError, match="not attached"):
            client.v1.payment_methods.detach("pm_1")
        with pytest.raises(stripe.InvalidRequestError, match="may not be used again"):
            client.v1.payment_methods.attach("pm_1", {"customer": customer.id})
        assert client.v1.customers.delete(customer.id).deleted
        with pytest.raises(stripe.InvalidRequestError, match="No such customer"):
            client.v1.customers.delete(customer.id)
        with pytest.raises(stripe.InvalidRequestError, match="not attached"):
            client.v1.payment_methods.detach("pm_2")

    await asyncio.to_thread(remove)


async def test_the_client_gets_an_error_for_a_wrong_key_and_an_unknown_intent(
    server: StripeStandIn, client: stripe.StripeClient
) -> None:
    with pytest.raises(stripe.InvalidRequestError, match="No such payment_intent"):
        await asyncio.to_thread(client.v1.payment_intents.retrieve, "pi_unknown")
    server.key = "rk_test_other"
    with pytest.raises(stripe.AuthenticationError):
        await asyncio.to_thread(client.v1.payment_intents.retrieve, "pi_unknown")


async def test_the_client_verifies_the_events_and_refuses_forged_and_old_ones(server: StripeStandIn) -> None:
    server.intents["pi_1"] = {
        "id": "pi_1",
        "object": "payment_intent",
        "amount": 3000,
        "currency": "usd",
        "status": "requires_payment_method",
    }
    disputed, back = server.dispute_event("pi_1", "lost"), server.reinstated("pi_1")
    for event in (server.succeeded("pi_1"), server.refund_event("pi_1"), disputed, back):
        body, headers = server.signed(event)
        signature = headers["stripe-signature"]
        read = stripe.Webhook.construct_event(body, signature, server.webhook_secret)
        assert (read.id, read.type, read.data.object["object"]) == (
            event["id"],
            event["type"],
            event["data"]["object"]["object"],
        )
        with pytest.raises(stripe.SignatureVerificationError):
            stripe.Webhook.construct_event(body.replace(b"usd", b"eur"), signature, server.webhook_secret)
    assert [each.amount for each in read.data.object["balance_transactions"]] == [-3000, 3000]
    body, headers = server.signed(event, at=time.time() - 301)
    with pytest.raises(stripe.SignatureVerificationError, match="tolerance"):
        stripe.Webhook.construct_event(body, headers["stripe-signature"], server.webhook_secret)
