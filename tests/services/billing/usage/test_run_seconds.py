"""The seconds of runs, from the record to the invoice's line and its proof."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

from infra.clock import utcnow, uuid7
from infra.web import rpc
from protos.billing.v1 import billing_pb2
from tests.services.billing.conftest import Billing, Tenant
from tests.services.billing.invoices.test_invoices import MIDNIGHT, START, draft, post, subscribed

TOKEN, SECOND = 150, 1000


async def test_a_run_has_seconds_in_the_usage_in_a_line_and_in_its_proof(billing: Billing) -> None:
    seconds = {"meter": "run_seconds", "by": "agent", "scheme": "per_unit", "tiers": [{"unit_nanos": 2000}]}
    tenant, _ = await subscribed(billing, charges=[seconds], included=[], usage_markup_percent=None, base_nanos=0)
    run_id, at = uuid7(), START + timedelta(days=3)
    # A name of its own: a price of agent/run that another test adds is for all tenants.
    resource = f"agent/{uuid7()}"
    for _ in range(2):
        await tenant.use(f"{run_id}/seconds", resource, occurred_at=at, run_id=run_id, run_seconds=7)
    found = await tenant.verdict(f"{run_id}/seconds")
    # It is free by the price book until the operator adds a price.
    assert (found["verdict"], found["amount_nanos"], found["price_version"]) == ("counted", 0, "agent/*@1")
    usage = await tenant.get("usage", group_by="meter", **{"from": START.isoformat(), "to": MIDNIGHT.isoformat()})
    assert [item["quantity"] for item in usage["items"] if item["group"]["meter"] == "run_seconds"] == [7]
    made = await draft(billing, tenant)
    [line] = (await tenant.http.get(f"/api/v1/invoices/{made['id']}/lines")).json()["items"]
    assert (line["quantity"], line["amount_nanos"]) == (7, 14_000)
    path = f"/api/v1/billing/lines/{line['id']}/explain"
    proof = (await tenant.http.get(path, params={"usage_id": f"{run_id}/seconds"})).json()
    assert (proof["meter"], proof["records"]["sum"], proof["equal"]) == ("run_seconds", 7, True)
    assert (proof["runs"], proof["record"]["answer"]) == ([str(run_id)], f"/api/v1/runs/{run_id}")


async def reserve(
    tenant: Tenant, run_hold: UUID, *, hold: UUID | None = None, expires_in_ms: int = 60_000
) -> billing_pb2.ReserveReply:
    """Asks for 10 tokens, and for 60 seconds of the run."""
    request = billing_pb2.ReserveRequest(
        hold_id=str(hold or uuid7()),
        resource="openai/gpt-4o-mini",
        quantities={"input_tokens": 10},
        expires_in_ms=expires_in_ms,
        run_hold_id=str(run_hold),
        run_seconds=60,
    )
    return await tenant.stub().Reserve(request, metadata=rpc.tenant_metadata(tenant.id), timeout=30)


async def held(tenant: Tenant) -> int:
    return int((await tenant.get("balance"))["held_nanos"])


async def test_the_seconds_of_a_run_are_held_with_its_first_call_until_their_record(billing: Billing) -> None:
    free = await billing.tenant(credit_nanos=10 * TOKEN, currency="EUR")
    free_of = await reserve(free, uuid7())
    assert free_of.run_held_nanos == 0, "a price of zero holds in every currency"
    price = {"resource": "agent/run", "currency": "USD", "valid_from": utcnow().isoformat()}
    await post(billing, "prices", {**price, "nanos_per_unit": {"run_seconds": str(SECOND)}})

    tenant, run, call = await billing.tenant(credit_nanos=60 * SECOND + 10 * TOKEN), uuid7(), uuid7()
    for _ in range(2):
        reply = await reserve(tenant, run, hold=call)
        assert (reply.granted, reply.held_nanos, reply.run_held_nanos) == (True, 10 * TOKEN, 60 * SECOND)
    assert await held(tenant) == 60 * SECOND + 10 * TOKEN
    assert not (await reserve(tenant, uuid7())).granted
    await tenant.use("call", hold_id=call, input_tokens=10, output_tokens=0)
    await tenant.verdict("call")
    assert await held(tenant) == 60 * SECOND, "the seconds stay reserved after the call"
    await tenant.use("seconds", "agent/run", hold_id=run, run_seconds=7)
    await tenant.verdict("seconds")
    assert await held(tenant) == 0
    assert (await tenant.get("balance"))["balance_nanos"] == 53 * SECOND

    # The tokens fit and the seconds do not: neither is held.
    assert not (await reserve(tenant, uuid7())).granted
    assert await held(tenant) == 0


async def test_a_hold_that_has_expired_is_decided_again_when_it_is_asked_for_again(billing: Billing) -> None:
    tenant, hold = await billing.tenant(credit_nanos=10 * TOKEN), uuid7()
    assert (await tenant.reserve(hold_id=hold, input_tokens=10)).granted
    await tenant.sql("UPDATE hold SET expires_at = now() WHERE tenant_id = $1", tenant.id)
    assert (await tenant.reserve(input_tokens=10)).granted, "another one takes the credit"
    assert not (await tenant.reserve(hold_id=hold, input_tokens=10)).granted


async def test_the_first_price_of_a_free_resource_holds_from_its_date_on(billing: Billing) -> None:
    """It replaced the free price of the more general name also for usage before it, also when that was rated again."""
    tenant = await billing.tenant()
    resource, before = f"agent/{uuid7()}", utcnow() - timedelta(hours=1)
    await tenant.use("a", resource, occurred_at=before, run_seconds=7)
    assert (await tenant.verdict("a"))["price_version"] == "agent/*@1"
    made = await post(billing, "prices", {"resource": resource, "nanos_per_unit": {"run_seconds": "1000"}})
    assert made["valid_from"] > before.isoformat()
    await tenant.use("late", resource, occurred_at=before, run_seconds=7)
    await tenant.use("now", resource, run_seconds=7)
    verdicts = [await tenant.verdict(usage_id) for usage_id in ("late", "now")]
    assert [(v["price_version"], v["amount_nanos"]) for v in verdicts] == [("agent/*@1", 0), (f"{resource}@1", 7000)]
    body = {"from": before.isoformat(), "to": (utcnow() + timedelta(hours=1)).isoformat(), "tenant_id": tenant.id}
    assert (await post(billing, "billing/rerate", body | {"dry_run": True}, status=200))["changed"] == 0


async def test_a_price_that_begins_later_leaves_the_general_one_until_then(billing: Billing) -> None:
    tenant = await billing.tenant()
    resource = f"agent/{uuid7()}"
    price = {"resource": resource, "nanos_per_unit": {"run_seconds": "1000"}}
    await post(billing, "prices", price | {"valid_from": (utcnow() + timedelta(minutes=30)).isoformat()})
    await tenant.use("now", resource, run_seconds=7)
    await tenant.use("then", resource, occurred_at=utcnow() + timedelta(minutes=40), run_seconds=7)
    assert (await tenant.verdict("now"))["price_version"] == "agent/*@1"
    assert (await tenant.verdict("then"))["amount_nanos"] == 7000


async def test_a_price_in_another_currency_does_not_leave_the_general_one_in_force(billing: Billing) -> None:
    dollars, euros = await billing.tenant(), await billing.tenant(currency="EUR")
    resource = f"agent/{uuid7()}"
    price = {"resource": resource, "currency": "EUR", "nanos_per_unit": {"run_seconds": "1000"}}
    await post(billing, "prices", price)
    for tenant in (dollars, euros):
        await tenant.use("a", resource, run_seconds=7)
    assert (await euros.verdict("a"))["amount_nanos"] == 7000
    found = await dollars.verdict("a")
    assert (found["verdict"], found["reason"].split(":")[0]) == ("held", "no exchange rate"), "it would be free"
