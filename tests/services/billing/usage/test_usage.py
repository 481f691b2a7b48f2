"""Each use is charged exactly once, for any content, order and number of repeats of its records."""

from __future__ import annotations

import random
from datetime import timedelta
from uuid import UUID

from infra.clock import utcnow, uuid7
from protos.catalog import CHANNEL_EVENTS
from protos.messages.channel import MessageDelivered
from tests.services.billing.conftest import Billing, received


async def test_a_record_is_counted_debited_and_written_into_the_ledger(billing: Billing) -> None:
    tenant = await billing.tenant(credit_nanos=10**9)
    await tenant.use("run/1/1", input_tokens=1000, cached_tokens=400, output_tokens=10)

    verdict = await tenant.verdict("run/1/1")
    amount = 600 * 150 + 400 * 75 + 10 * 600
    assert verdict["verdict"] == "counted"
    assert verdict["amount_nanos"] == amount
    assert verdict["price_version"] == "openai/gpt-4o-mini@1"
    balance = await tenant.get("balance")
    assert balance["debited_nanos"] == amount
    assert balance["available_nanos"] == 10**9 - amount
    entries = (await tenant.get("ledger"))["items"]
    assert [(entry["kind"], entry["amount_nanos"]) for entry in entries] == [("credit", 10**9), ("charge", -amount)]
    assert entries[1]["usage_id"] == "run/1/1"


async def test_the_cost_of_a_record_is_shown_once_in_the_metrics(billing: Billing) -> None:
    tenant = await billing.tenant(credit_nanos=10**9)

    async def shown(sample: str) -> float:
        text = (await billing.operator.get("/metrics")).text
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(sample))

    cost, repeats = 'claw_cost_nanos_total{currency="USD"}', 'claw_usage_records_total{verdict="duplicate"}'
    cost_before, repeats_before = await shown(cost), await shown(repeats)
    for _ in range(2):
        await tenant.use("run/1/1", input_tokens=1000, cached_tokens=0, output_tokens=10)

    async def repeat_is_shown() -> bool:
        return await shown(repeats) == repeats_before + 1

    await tenant.platform.until(repeat_is_shown)
    assert await shown(cost) == cost_before + 1000 * 150 + 10 * 600


async def test_a_thousand_records_with_repeats_over_many_batches_and_a_rewind_add_up_exactly(billing: Billing) -> None:
    tenant = await billing.tenant(credit_nanos=10**12)
    rng = random.Random(4)
    sent: list[tuple[str, UUID, int]] = []
    for n in range(1000):
        # One in ten is reported again: in a new message, or in the same message a second time.
        if n % 10 == 9:
            usage_id, message_id, tokens = rng.choice(sent)
            sent.append((usage_id, message_id if n % 20 == 9 else uuid7(), tokens))
        else:
            sent.append((f"run/{n}/1", uuid7(), rng.randrange(1, 5000)))
    for usage_id, message_id, tokens in sent:
        await tenant.use(usage_id, message_id=message_id, input_tokens=tokens, output_tokens=7)
    firsts = {usage_id: tokens for usage_id, _, tokens in sent}
    messages = {message_id for _, message_id, _ in sent}
    due = sum(tokens * 150 + 7 * 600 for tokens in firsts.values())

    async def told() -> bool:
        [(count,)] = await tenant.sql(
            "SELECT (SELECT count(*) FROM usage WHERE tenant_id = $1) + "
            "(SELECT count(*) FROM duplicate WHERE tenant_id = $1)",
            tenant.id,
        )
        return bool(count == len(messages))

    await tenant.platform.until(told)
    before = await tenant.get("balance")

    # After a rewind to the beginning of the topic everything is read again, and nothing is counted again.
    async def position() -> int:
        [(read,)] = await tenant.sql(
            "SELECT sum(next_offset)::bigint FROM consumer_offset WHERE topic = 'usage.records'"
        )
        return int(read)

    billing.platform.stop("billing")
    end = await position()
    await tenant.sql("UPDATE consumer_offset SET next_offset = 0 WHERE topic = 'usage.records'")
    await tenant.sql("DELETE FROM inbox WHERE message_id = $1", sent[0][1])
    await billing.platform.start("billing")

    async def read_again() -> bool:
        return await position() == end

    await tenant.platform.until(read_again)
    assert before["debited_nanos"] == due
    assert await tenant.get("balance") == before
    entries = await tenant.sql(
        "SELECT sum(amount_nanos)::bigint, count(*) FROM ledger_entry WHERE tenant_id = $1", tenant.id
    )
    assert entries == [(10**12 - due, 1 + len(firsts))]
    used = await tenant.get("usage/summary")
    [item] = used["items"]
    assert item["records"] == len(firsts)
    assert item["units"] == {"input_tokens": sum(firsts.values()), "output_tokens": 7 * len(firsts)}
    assert used["amount_nanos"] == item["amount_nanos"] == due
    # The message that was deleted from the inbox was recognised by its usage_id.
    assert (await tenant.verdict(sent[0][0]))["duplicates"] >= 1


async def test_another_record_under_a_known_usage_id_does_not_change_the_first(billing: Billing) -> None:
    tenant = await billing.tenant()
    await tenant.use("run/1/1", input_tokens=1, output_tokens=0)
    await tenant.verdict("run/1/1")
    await tenant.use("run/1/1", input_tokens=999_999, output_tokens=0)

    async def repeated() -> bool:
        return bool((await tenant.verdict("run/1/1"))["duplicates"])

    await tenant.platform.until(repeated)
    verdict = await tenant.verdict("run/1/1")
    assert (verdict["verdict"], verdict["amount_nanos"], verdict["conflicts"]) == ("counted", 150, 1)
    shown = (await billing.operator.get("/metrics")).text
    assert 'claw_usage_records_total{verdict="conflict"} 1.0' in shown


async def test_an_unknown_model_waits_for_its_price_and_is_charged_once_it_has_one(billing: Billing) -> None:
    tenant = await billing.tenant(credit_nanos=1000)
    model = f"acme/{uuid7()}"
    await tenant.use("run/1/1", model, input_tokens=3, output_tokens=4)
    held = await tenant.verdict("run/1/1")
    assert (held["verdict"], held["amount_nanos"]) == ("held", None)
    assert held["reason"] == f"the price book does not know {model}"
    assert (await tenant.get("balance"))["debited_nanos"] == 0
    assert [item["usage_id"] for item in (await tenant.get("held"))["items"]] == ["run/1/1"]

    new = {"resource": model, "nanos_per_unit": {"input_tokens": "10", "output_tokens": "0.5"}}
    assert (await billing.operator.post("/api/v1/prices", json=new)).status_code == 201
    resolve = "/api/v1/billing/held/run/1/1/resolve"
    answer = await billing.operator.post(resolve, json={"tenant_id": tenant.id})
    assert answer.status_code == 200, answer.text
    assert answer.json()["verdict"] == "counted"
    assert answer.json()["amount_nanos"] == 32
    assert (await tenant.get("balance"))["debited_nanos"] == 32
    assert (await tenant.get("held"))["items"] == []
    again = await billing.operator.post(resolve, json={"tenant_id": tenant.id})
    assert again.status_code == 409
    assert (await tenant.get("balance"))["debited_nanos"] == 32


async def test_an_incomplete_record_is_held_until_an_operator_completes_or_rejects_it(billing: Billing) -> None:
    tenant = await billing.tenant()
    await tenant.use("run/1/1", input_tokens=10)
    await tenant.use("run/1/2", input_tokens=10)
    assert (await tenant.verdict("run/1/1"))["reason"].startswith("output_tokens was not reported")
    await tenant.verdict("run/1/2")

    def body(**more: object) -> dict[str, object]:
        return {"tenant_id": tenant.id, **more}

    resolve = "/api/v1/billing/held/run/1/{}/resolve"
    other = await billing.operator.post(resolve.format(1), json=body(quantities={"input_tokens": 1}))
    assert other.status_code == 422
    assert other.json()["errors"][0]["field"] == "quantities.input_tokens"
    done = (await billing.operator.post(resolve.format(1), json=body(quantities={"output_tokens": 5}))).json()
    assert (done["verdict"], done["amount_nanos"], done["estimated"]) == ("counted", 10 * 150 + 5 * 600, True)
    rejected = (await billing.operator.post(resolve.format(2), json=body(reject="a test run"))).json()
    assert (rejected["verdict"], rejected["reason"], rejected["amount_nanos"]) == ("rejected", "a test run", 0)


async def test_an_implausible_record_is_held_and_an_operator_may_replace_its_values(billing: Billing) -> None:
    tenant = await billing.tenant(credit_nanos=10**9)
    await tenant.use("cached", input_tokens=100, cached_tokens=190, output_tokens=5)
    await tenant.use("zero", input_tokens=0, output_tokens=0)
    await tenant.use("old", occurred_at=utcnow() - timedelta(days=365), input_tokens=1, output_tokens=1)
    await tenant.use("ahead", occurred_at=utcnow() + timedelta(hours=2), input_tokens=1, output_tokens=1)
    reasons = {id_: (await tenant.verdict(id_))["reason"] for id_ in ("cached", "zero", "old", "ahead")}
    assert reasons == {
        "cached": "implausible: quantities.input_tokens is less than its cached_tokens",
        "zero": "no use was reported: all quantities are 0, and openai/gpt-4o-mini@1 has a price",
        "old": "implausible: occurred_at is more than 45 days ago",
        "ahead": "implausible: occurred_at is in the future",
    }
    assert (await tenant.get("balance"))["debited_nanos"] == 0
    assert {item["usage_id"] for item in (await tenant.get("held"))["items"]} == reasons.keys()

    async def resolve(usage_id: str, **values: object) -> dict[str, object]:
        path = f"/api/v1/billing/held/{usage_id}/resolve"
        answer = await billing.operator.post(path, json={"tenant_id": tenant.id, **values})
        found: dict[str, object] = answer.json()
        return found

    assert (await resolve("cached", quantities={"cached_tokens": 90}))["amount_nanos"] == 10 * 150 + 90 * 75 + 5 * 600
    assert (await resolve("zero", quantities={"input_tokens": 3}))["amount_nanos"] == 450
    assert (await resolve("old"))["verdict"] == "held"
    assert (await resolve("old", occurred_at=utcnow().isoformat()))["amount_nanos"] == 750
    assert (await resolve("ahead", occurred_at=utcnow().isoformat()))["amount_nanos"] == 750
    assert (await tenant.get("held"))["items"] == []


async def test_usage_that_overtakes_its_tenant_is_charged_when_the_tenant_is_known(billing: Billing) -> None:
    tenant = billing.known(str(uuid7()))
    await tenant.use("run/1/1", input_tokens=1, output_tokens=1)
    assert (await tenant.verdict("run/1/1"))["reason"] == "the tenant has no account yet"
    await billing.publish_created(tenant, 1000)

    async def counted() -> bool:
        return bool((await tenant.verdict("run/1/1"))["verdict"] == "counted")

    await tenant.platform.until(counted)
    assert (await tenant.get("balance"))["balance_nanos"] == 250


async def test_an_account_is_opened_once_if_the_creation_of_its_tenant_is_repeated(billing: Billing) -> None:
    tenant = await billing.tenant(credit_nanos=1000)
    await billing.publish_created(tenant, 5000)
    await tenant.use("run/1/1", input_tokens=1, output_tokens=0)
    await tenant.verdict("run/1/1")
    await billing.tenant()
    assert (await tenant.get("balance"))["credit_nanos"] == 1000
    assert [entry["kind"] for entry in (await tenant.get("ledger"))["items"]] == ["credit", "charge"]


async def test_a_record_that_no_database_can_hold_does_not_stop_the_others(billing: Billing) -> None:
    tenant = await billing.tenant()
    await tenant.use("bad\x00id", input_tokens=1, output_tokens=1)
    await tenant.use("", input_tokens=1, output_tokens=1)
    await tenant.use("run/huge", input_tokens=10**30, output_tokens=1)
    await tenant.use("run/1/1", input_tokens=1, output_tokens=1)
    assert (await tenant.verdict("run/1/1"))["verdict"] == "counted"
    huge = await tenant.verdict("run/huge")
    assert (huge["verdict"], huge["reason"]) == ("held", f"implausible: quantities.input_tokens is {10**30}")
    dead = await tenant.sql("SELECT error FROM dead_letter WHERE key = $1", tenant.id)
    assert len(dead) == 2
    assert all("usage_id" in error for (error,) in dead)


async def test_late_usage_goes_by_the_price_of_its_time(billing: Billing) -> None:
    tenant = await billing.tenant()
    model = f"acme/{uuid7()}"
    for nanos in ("1", "100"):
        new = {"resource": model, "nanos_per_unit": {"calls": nanos}}
        assert (await billing.operator.post("/api/v1/prices", json=new)).status_code == 201
    await tenant.use("late", model, occurred_at=utcnow() - timedelta(days=40), calls=1)
    await tenant.use("now", model, occurred_at=utcnow(), calls=1)
    assert (await tenant.verdict("late"))["amount_nanos"] == 1
    assert (await tenant.verdict("now"))["amount_nanos"] == 100


async def test_each_threshold_of_the_credit_is_notified_once(billing: Billing) -> None:
    tenant = await billing.tenant(credit_nanos=100 * 150)
    platform = tenant.platform
    for n, tokens in enumerate([89, 1, 9, 1, 50]):
        await tenant.use(f"run/{n}", input_tokens=tokens, output_tokens=0)
        await tenant.verdict(f"run/{n}")
    mails = [
        body for headers, body in await platform.outbox("billing", "notification") if headers["tenant_id"] == tenant.id
    ]
    assert [(mail["to"], mail["subject"]) for mail in mails] == [("", "Your budget is nearly spent")]
    assert "0.0000015 USD" in mails[0]["text"]
    events = [body for _, body in await platform.outbox("billing", "platform.events") if body["tenant_id"] == tenant.id]
    assert events == [{"tenant_id": tenant.id, "currency": "USD", "balance_nanos": 0}]
    assert (await tenant.get("balance"))["balance_nanos"] == -50 * 150


async def test_delivered_messages_are_counted_per_type_of_channel_and_cost_nothing(billing: Billing) -> None:
    tenant = await billing.tenant(credit_nanos=10)
    channel_id = uuid7()
    produce = tenant.platform.produce
    await produce(CHANNEL_EVENTS, received(channel_id), key="s", tenant_id=tenant.id)
    for channel in (channel_id, channel_id, uuid7()):
        delivered = MessageDelivered(
            delivery_id=uuid7(), channel_id=channel, session_key="s", run_id=None, vendor_message_id=None
        )
        await produce(CHANNEL_EVENTS, delivered, key="s", tenant_id=tenant.id)

    async def messages() -> bool:
        found = (await tenant.get("usage/summary"))["messages"]
        return bool(sum(item["delivered"] for item in found) == 3)

    await tenant.platform.until(messages)
    assert (await tenant.get("usage/summary"))["messages"] == [
        {"channel_type": "telegram", "delivered": 2},
        {"channel_type": "unknown", "delivered": 1},
    ]
    since_tomorrow = await tenant.get("usage/summary", since=(utcnow() + timedelta(days=1)).isoformat())
    assert since_tomorrow["messages"] == []
    assert (await tenant.get("balance"))["debited_nanos"] == 0
