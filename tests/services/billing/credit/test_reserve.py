"""Holds: they never exceed the credit, and none of them lasts forever."""

from __future__ import annotations

import asyncio

import pytest

from infra.clock import uuid7
from infra.errors import InvalidMessage, Transient
from infra.web import rpc
from protos.billing.v1 import billing_pb2
from tests.services.billing.conftest import Billing, Tenant

TOKEN = 150
"""The price of an input token."""


async def available(tenant: Tenant) -> int | None:
    found: int | None = (await tenant.get("balance"))["available_nanos"]
    return found


async def test_a_hold_takes_from_what_is_available_and_its_release_gives_it_back(billing: Billing) -> None:
    tenant = await billing.tenant(credit_nanos=100 * TOKEN)
    hold_id = uuid7()
    reply = await tenant.reserve(hold_id=hold_id, input_tokens=60)
    assert (reply.granted, reply.held_nanos, reply.available_nanos) == (True, 60 * TOKEN, 40 * TOKEN)
    assert reply.currency == "USD"
    refused = await tenant.reserve(input_tokens=41)
    assert (refused.granted, refused.held_nanos, refused.available_nanos) == (False, 0, 40 * TOKEN)
    await tenant.release(hold_id)
    await tenant.release(hold_id)
    await tenant.release(uuid7())
    assert await available(tenant) == 100 * TOKEN
    assert (await tenant.reserve(input_tokens=100)).granted


async def test_a_hundred_concurrent_holds_never_exceed_the_credit(billing: Billing) -> None:
    tenant = await billing.tenant(credit_nanos=37 * TOKEN)
    replies = await asyncio.gather(*(tenant.reserve(input_tokens=1) for _ in range(100)))
    assert sum(reply.granted for reply in replies) == 37
    assert sorted(reply.available_nanos for reply in replies if reply.granted) == [n * TOKEN for n in range(37)]
    assert await available(tenant) == 0


async def test_a_repeated_request_for_a_hold_gets_the_first_answer(billing: Billing) -> None:
    tenant = await billing.tenant(credit_nanos=100 * TOKEN)
    hold_id = uuid7()
    replies = await asyncio.gather(*(tenant.reserve(hold_id=hold_id, input_tokens=60) for _ in range(5)))
    assert {str(reply) for reply in replies} == {str(replies[0])}
    assert await available(tenant) == 40 * TOKEN
    refused = uuid7()
    assert not (await tenant.reserve(hold_id=refused, input_tokens=50)).granted
    with pytest.raises(InvalidMessage, match="used before with another request") as caught:
        await tenant.reserve(hold_id=hold_id, input_tokens=61)
    assert caught.value.field == "hold_id"


async def test_a_hold_that_holds_nothing_is_decided_again(billing: Billing) -> None:
    tenant = await billing.tenant(credit_nanos=100 * TOKEN)
    first, second = uuid7(), uuid7()
    assert (await tenant.reserve(hold_id=first, input_tokens=60)).granted
    assert not (await tenant.reserve(hold_id=second, input_tokens=50)).granted
    await tenant.release(first)
    assert (await tenant.reserve(hold_id=second, input_tokens=50)).granted, "refused once, and there is credit now"
    assert not (await tenant.reserve(hold_id=first, input_tokens=60)).granted, "given back, and used by another one"
    assert await available(tenant) == 50 * TOKEN


async def test_an_expired_hold_is_free_at_once(billing: Billing) -> None:
    tenant = await billing.tenant(credit_nanos=10 * TOKEN)
    assert (await tenant.reserve(input_tokens=10, expires_in_ms=1)).granted

    async def granted() -> bool:
        return (await tenant.reserve(input_tokens=10)).granted

    await tenant.platform.until(granted)
    assert await available(tenant) == 0


async def test_only_counted_usage_debits_and_it_closes_its_hold(billing: Billing) -> None:
    tenant = await billing.tenant(credit_nanos=1000 * TOKEN)
    hold_id, other = uuid7(), uuid7()
    await tenant.reserve(hold_id=hold_id, input_tokens=600)
    await tenant.reserve(hold_id=other, input_tokens=100)
    await tenant.use("unknown", "acme/unheard-of", hold_id=hold_id, input_tokens=1)
    await tenant.verdict("unknown")
    assert await available(tenant) == 300 * TOKEN, "a held record must not end its hold"
    await tenant.use("run/1/1", hold_id=hold_id, input_tokens=50, output_tokens=0)
    await tenant.verdict("run/1/1")
    assert await available(tenant) == 850 * TOKEN
    await tenant.release(hold_id)
    assert await available(tenant) == 850 * TOKEN
    ended = await tenant.sql("SELECT outcome FROM hold WHERE tenant_id = $1 AND hold_id = $2", tenant.id, hold_id)
    assert ended == [("charged",)]


async def test_unpriced_use_ends_with_the_credit_until_it_is_resolved(billing: Billing) -> None:
    tenant = await billing.tenant(credit_nanos=1_000_000)
    model = f"acme/{uuid7()}"
    hold_id = uuid7()
    assert (await tenant.reserve(hold_id=hold_id, resource=model, expires_in_ms=1, input_tokens=500)).granted

    async def expired() -> bool:
        return await available(tenant) == 1_000_000

    await tenant.platform.until(expired)
    await tenant.use("run/1/1", model, hold_id=hold_id, input_tokens=500, output_tokens=100)
    assert (await tenant.verdict("run/1/1"))["verdict"] == "held"
    assert await available(tenant) == 0, "the held record keeps its hold open after the expiry"
    assert not (await tenant.reserve(resource=model, input_tokens=500)).granted
    assert not (await tenant.reserve(input_tokens=1)).granted
    new = {"resource": model, "nanos_per_unit": {"input_tokens": "10", "output_tokens": "20"}}
    assert (await billing.operator.post("/api/v1/prices", json=new)).status_code == 201
    resolve = "/api/v1/billing/held/run/1/1/resolve"
    assert (await billing.operator.post(resolve, json={"tenant_id": tenant.id})).json()["amount_nanos"] == 7_000
    assert await available(tenant) == 993_000


async def test_a_rejected_record_gives_its_hold_back(billing: Billing) -> None:
    tenant = await billing.tenant(credit_nanos=10**6)
    hold_id = uuid7()
    await tenant.reserve(hold_id=hold_id, resource="acme/unheard-of", input_tokens=1)
    await tenant.use("run/1/1", "acme/unheard-of", hold_id=hold_id, input_tokens=1)
    await tenant.verdict("run/1/1")
    assert await available(tenant) == 800_000
    resolve = "/api/v1/billing/held/run/1/1/resolve"
    body = {"tenant_id": tenant.id, "reject": "a test run"}
    assert (await billing.operator.post(resolve, json=body)).json()["verdict"] == "rejected"
    assert await available(tenant) == 10**6


async def test_late_usage_of_an_expired_hold_still_debits_even_below_zero(billing: Billing) -> None:
    tenant = await billing.tenant(credit_nanos=10 * TOKEN)
    hold_id = uuid7()
    await tenant.reserve(hold_id=hold_id, input_tokens=10, expires_in_ms=1)

    async def expired() -> bool:
        return await available(tenant) == 10 * TOKEN

    await tenant.platform.until(expired)
    await tenant.use("run/1/1", hold_id=hold_id, input_tokens=25, output_tokens=0)
    assert (await tenant.verdict("run/1/1"))["verdict"] == "counted"
    assert await available(tenant) == -15 * TOKEN
    refused = await tenant.reserve(input_tokens=0)
    assert (refused.granted, refused.available_nanos) == (False, -15 * TOKEN)


async def test_a_hold_of_another_tenant_is_neither_seen_nor_closed(billing: Billing) -> None:
    ours, theirs = await billing.tenant(credit_nanos=10 * TOKEN), await billing.tenant(credit_nanos=10 * TOKEN)
    hold_id = uuid7()
    await ours.reserve(hold_id=hold_id, input_tokens=10)
    assert (await theirs.reserve(hold_id=hold_id, input_tokens=5)).granted
    await theirs.release(hold_id)
    await theirs.use("run/1/1", hold_id=hold_id, input_tokens=1, output_tokens=0)
    await theirs.verdict("run/1/1")
    assert await available(ours) == 0


async def test_without_a_limit_every_hold_is_granted_and_no_remaining_credit_is_reported(billing: Billing) -> None:
    tenant = await billing.tenant()
    reply = await tenant.reserve(input_tokens=10**12)
    assert reply.granted
    assert not reply.HasField("available_nanos")
    assert (await tenant.reserve(resource="acme/unheard-of", input_tokens=5)).granted


async def test_a_resource_without_a_price_holds_a_provisional_amount_and_at_most_the_credit(billing: Billing) -> None:
    tenant = await billing.tenant(credit_nanos=10**9)
    reply = await tenant.reserve(resource="acme/unheard-of", input_tokens=1000)
    assert (reply.granted, reply.held_nanos, reply.available_nanos) == (True, 200_000_000, 800_000_000)
    reply = await tenant.reserve(resource="acme/unheard-of", input_tokens=10**6)
    assert (reply.granted, reply.held_nanos, reply.available_nanos) == (True, 800_000_000, 0)
    assert not (await tenant.reserve(resource="acme/unheard-of", input_tokens=1)).granted
    spent = await billing.tenant(credit_nanos=0)
    assert not (await spent.reserve(resource="acme/unheard-of", input_tokens=1)).granted


async def test_holds_above_the_largest_number_of_the_database_refuse_no_other_use(billing: Billing) -> None:
    tenant = await billing.tenant(currency="VND")
    assert (await tenant.reserve(resource="acme/unheard-of", input_tokens=1)).held_nanos == 10**15
    await tenant.sql(
        """
        INSERT INTO hold (tenant_id, hold_id, request, granted, held_nanos, expires_at)
        SELECT tenant_id, gen_random_uuid(), request, granted, held_nanos, expires_at
        FROM hold, generate_series(1, 9300)
        WHERE tenant_id = $1
        """,
        tenant.id,
    )
    assert (await tenant.reserve(input_tokens=1)).granted
    assert await available(tenant) is None
    body = {"scope": "tenant", "nanos": 10**18, "period": "month"}
    assert (await tenant.http.post("/api/v1/budgets", json=body)).status_code == 201
    assert not (await tenant.reserve(input_tokens=1)).granted


async def test_a_tenant_without_an_account_is_neither_granted_nor_refused(billing: Billing) -> None:
    tenant = billing.known(str(uuid7()))
    with pytest.raises(Transient, match="has no account yet"):
        await tenant.reserve(input_tokens=1)


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("hold_id", {"hold_id": "x"}),
        ("resource", {"resource": ""}),
        ("expires_in_ms", {"expires_in_ms": 0}),
        ("expires_in_ms", {"expires_in_ms": 86_400_001}),
        ("quantities.frames", {"quantities": {"frames": 1}}),
        ("quantities", {"quantities": {"input_tokens": -1}}),
        ("quantities", {"quantities": {"cached_tokens": 1}}),
    ],
)
async def test_an_invalid_request_is_refused_with_its_field(
    billing: Billing, field: str, request_: dict[str, object]
) -> None:
    tenant = await billing.tenant(credit_nanos=1000)
    sound: dict[str, object] = {
        "hold_id": str(uuid7()),
        "resource": "openai/gpt-4o-mini",
        "quantities": {"input_tokens": 1},
        "expires_in_ms": 1000,
    }
    request = billing_pb2.ReserveRequest(**(sound | request_))  # type: ignore[arg-type]
    with pytest.raises(InvalidMessage) as caught:
        await tenant.stub().Reserve(request, metadata=rpc.tenant_metadata(tenant.id))
    assert caught.value.field == field


async def test_the_charges_of_a_run_come_in_the_order_of_their_arrival(billing: Billing) -> None:
    tenant = await billing.tenant()
    run_id = uuid7()
    await tenant.use("b", run_id=run_id, input_tokens=1, output_tokens=2)
    await tenant.use("a", "acme/unheard-of", run_id=run_id, calls=1)
    await tenant.use("b", run_id=run_id, input_tokens=1, output_tokens=2)
    await tenant.use("c", run_id=uuid7(), input_tokens=1, output_tokens=2)
    await tenant.verdict("c")
    reply = await tenant.stub().Charges(
        billing_pb2.ChargesRequest(run_id=str(run_id)), metadata=rpc.tenant_metadata(tenant.id)
    )
    assert [(charge.usage_id, charge.verdict) for charge in reply.charges] == [
        ("b", "counted"),
        ("a", "held"),
        ("b", "duplicate"),
    ]
    first, second, third = reply.charges
    assert (first.amount_nanos, dict(first.quantities)) == (1350, {"input_tokens": 1, "output_tokens": 2})
    assert not second.HasField("amount_nanos")
    assert third.amount_nanos == 0
    assert reply.currency == "USD"
    assert first.occurred_at.ToDatetime() <= first.rated_at.ToDatetime()


async def test_the_costs_of_many_runs_come_in_one_answer(billing: Billing) -> None:
    tenant, other = await billing.tenant(), await billing.tenant()
    runs = [uuid7() for _ in range(3)]
    for n, run_id in enumerate(runs[:2]):
        await tenant.use(f"{run_id}/1/1", run_id=run_id, input_tokens=1, output_tokens=2)
        await tenant.use(f"{run_id}/2/1", "acme/unheard-of", run_id=run_id, calls=1)
        await tenant.use(f"message/{n}", "channel/message", run_id=run_id, messages=1)
    for _ in range(2):
        await tenant.use(f"learning/{runs[0]}/1", run_id=runs[0], input_tokens=1, output_tokens=2)
    await other.use(f"{runs[2]}/1/1", run_id=runs[2], input_tokens=1, output_tokens=2)
    await tenant.verdict(f"learning/{runs[0]}/1")
    await other.verdict(f"{runs[2]}/1/1")
    asked = billing_pb2.ChargesRequest(run_ids=[str(run_id) for run_id in runs])
    reply = await tenant.stub().Charges(asked, metadata=rpc.tenant_metadata(tenant.id))
    # Without the held records, the duplicate, the records of other services, and the record of another tenant.
    found = [(cost.run_id, cost.records, cost.amount_nanos) for cost in reply.costs]
    assert found == [(str(runs[0]), 2, 2700), (str(runs[1]), 1, 1350)]
    assert (reply.currency, len(reply.charges)) == ("USD", 0)
    for many, field in ((["x"], r"run_ids\[0\]"), ([str(uuid7())] * 201, "at most 200")):
        with pytest.raises(InvalidMessage, match=field):
            wrong = billing_pb2.ChargesRequest(run_ids=many)
            await tenant.stub().Charges(wrong, metadata=rpc.tenant_metadata(tenant.id))


async def test_resources_without_a_price_in_the_tenants_currency_are_named(billing: Billing) -> None:
    async def unpriced(tenant: Tenant) -> list[str]:
        request = billing_pb2.UnpricedRequest(resources=["openai/gpt-4o-mini", "acme/unheard-of"])
        reply = await tenant.stub().Unpriced(request, metadata=rpc.tenant_metadata(tenant.id))
        return list(reply.resources)

    assert await unpriced(await billing.tenant()) == ["acme/unheard-of"]
    assert await unpriced(await billing.tenant(currency="JPY")) == ["openai/gpt-4o-mini", "acme/unheard-of"]
    assert await unpriced(billing.known(str(uuid7()))) == ["acme/unheard-of"]
    request = billing_pb2.UnpricedRequest(resources=["a/b"] * 101)
    with pytest.raises(InvalidMessage, match="at most 100"):
        await (await billing.tenant()).stub().Unpriced(request, metadata=rpc.tenant_metadata(str(uuid7())))
