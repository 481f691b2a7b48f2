"""Old usage records are deleted. The sums, lines and budgets that they were part of stay the same."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import Any

from infra.clock import utcnow, uuid7
from infra.service import verification
from protos.catalog import CHANNEL_EVENTS, USAGE_RECORDS
from protos.messages.billing import UsageRecorded
from protos.messages.channel import MessageDelivered
from services.billing.clock import Clock
from services.billing.credit import accounts
from services.billing.invoices.tax import Seller
from services.billing.rating.domain import MAX_AGE
from services.billing.usage import aggregates, retention
from services.billing.usage.read_models import READ_MODELS
from tests.services.billing.conftest import Billing, Tenant
from tests.services.billing.credit.test_budgets import limit
from tests.services.billing.credit.test_races import waits_for_a_lock
from tests.services.billing.invoices.test_invoices import draft, post, subscribed
from tests.services.billing.usage.test_rerate import AT, lines, price, rerate


async def delete(tenant: Tenant, before: datetime) -> int:
    async with tenant.platform.database("billing").begin(tenant_id=tenant.id) as tx:
        return await retention.delete(tx, tenant.id, before)


async def explain(tenant: Tenant, *invoices: dict[str, Any]) -> list[dict[str, Any]]:
    found = [line for invoice in invoices for line in await lines(tenant, invoice["id"])]
    paths = [f"/api/v1/billing/lines/{line['id']}/explain" for line in found]
    return [(await tenant.http.get(path)).json() for path in paths]


async def rebuilt(billing: Billing, tenant: Tenant) -> dict[str, Any]:
    answer = await billing.operator.post("/api/v1/billing/usage/rebuild", params={"tenant_id": tenant.id})
    return dict(answer.json())


async def age(tenant: Tenant, by: timedelta) -> None:
    """Lets the tenant's records be older than they are."""
    await tenant.sql(
        """
        UPDATE usage
        SET occurred_at = occurred_at - $2::interval, rated_at = rated_at - $2::interval
        WHERE tenant_id = $1
        """,
        tenant.id,
        by,
    )


async def test_lines_stay_provable_and_sums_can_be_rebuilt(billing: Billing) -> None:
    tenant, subscription = await subscribed(billing, charges=[], included=[])
    model = f"acme/{uuid7()}"
    await price(billing, model, "100")
    for n in range(4):
        await tenant.use(f"a/{n}", model, occurred_at=AT + timedelta(hours=n // 2), input_tokens=10, output_tokens=n)
        await tenant.verdict(f"a/{n}")
    first = await draft(billing, tenant)
    await price(billing, model, "90")
    assert (await rerate(billing, tenant))["changed"] == 4
    await billing.operator.delete(f"/api/v1/subscriptions/{subscription['id']}", params={"when": "now"})
    second = await draft(billing, tenant)
    before = await explain(tenant, first, second)
    sums = await rebuilt(billing, tenant)

    for hours, deleted in ((1, 2), (2, 2), (3, 0)):
        assert await delete(tenant, AT + timedelta(hours=hours)) == 0, "they were decided later than that"
        await tenant.sql("UPDATE usage SET rated_at = occurred_at WHERE tenant_id = $1", tenant.id)
        assert await delete(tenant, AT + timedelta(hours=hours)) == deleted
        assert await rebuilt(billing, tenant) == sums | {"equal": True}
        await tenant.sql("UPDATE usage SET rated_at = now() WHERE tenant_id = $1", tenant.id)
    after = await explain(tenant, first, second)
    for old, new in zip(before, after, strict=True):
        assert new["equal"] is True
        assert new["records"] == old["records"]
        assert new["deleted_records"] == new["buckets"]["count"]
    assert [proof["meter"] for proof in after if proof["meter"]] == ["cost_nanos", "correction_nanos"]
    summary = await tenant.get("usage/summary")
    assert (summary["items"], summary["deleted_records"]) == ([], 4)

    # A sum that was changed behind the service's back is found, with and without its records.
    await tenant.sql("UPDATE deleted_usage SET quantity = quantity + 1 WHERE tenant_id = $1", tenant.id)
    assert [proof["equal"] for proof in await explain(tenant, first) if proof["meter"]] == [False]
    assert (await rebuilt(billing, tenant))["equal"] is False


async def test_the_clock_deletes_old_records_and_a_repeat_is_never_charged_again(billing: Billing) -> None:
    tenant = await billing.tenant(credit_nanos=10**9)
    clock = Clock(billing.platform.database("billing"), Seller(), {})
    records = {
        usage_id: UsageRecorded(
            tenant_id=tenant.id,
            usage_id=usage_id,
            resource="openai/gpt-4o-mini",
            quantities={"input_tokens": 10, "output_tokens": 0},
            occurred_at=utcnow(),
        )
        for usage_id in ("young", "old")
    }

    async def repeat(usage_id: str, by: timedelta) -> None:
        """Reports the record once more, with the time that `age` has given it."""
        record = records[usage_id]
        again = UsageRecorded(
            tenant_id=tenant.id,
            usage_id=usage_id,
            resource=record.resource,
            quantities=record.quantities,
            occurred_at=record.occurred_at - by,
        )
        await tenant.platform.produce(USAGE_RECORDS, again, key=tenant.id)

    await tenant.platform.produce(USAGE_RECORDS, records["young"], key=tenant.id)
    charged = (await tenant.verdict("young"))["amount_nanos"]
    young = MAX_AGE - timedelta(hours=1)
    await age(tenant, young)
    await clock.forget()
    await repeat("young", young)

    async def is_duplicate() -> bool:
        return bool((await tenant.verdict("young"))["duplicates"])

    await tenant.platform.until(is_duplicate)
    assert (await tenant.get("balance"))["debited_nanos"] == charged

    await tenant.platform.produce(USAGE_RECORDS, records["old"], key=tenant.id)
    await tenant.verdict("old")
    old = retention.KEPT + timedelta(days=1)
    await tenant.sql("UPDATE usage SET occurred_at = now() WHERE tenant_id = $1", tenant.id)
    await age(tenant, old)

    async def deleted() -> bool:
        return (await tenant.http.get("/api/v1/billing/verdicts/old")).status_code == 404

    running = asyncio.create_task(clock.run())
    await tenant.platform.until(deleted)
    await clock.stop()
    await running
    await repeat("old", old)
    assert (await tenant.verdict("old"))["verdict"] == "held"
    assert (await tenant.get("balance"))["debited_nanos"] == 2 * charged


async def test_what_is_still_needed_is_kept(billing: Billing) -> None:
    tenant = await billing.tenant()
    await tenant.use("held", "acme/unheard-of", input_tokens=1)
    await tenant.use("rejected", "acme/unheard-of", input_tokens=1)
    await tenant.verdict("rejected")
    body = {"tenant_id": tenant.id, "reject": "a mistake"}
    answer = await billing.operator.post("/api/v1/billing/held/rejected/resolve", json=body)
    assert answer.status_code == 200, answer.text
    await tenant.use("repeated", input_tokens=1, output_tokens=1)
    await tenant.use("repeated", input_tokens=1, output_tokens=1)
    messages = [
        MessageDelivered(delivery_id=uuid7(), channel_id=uuid7(), session_key="s", run_id=None, vendor_message_id=None)
        for _ in range(2)
    ]
    for message in (*messages, messages[0]):
        await tenant.platform.produce(CHANNEL_EVENTS, message, key="s", tenant_id=tenant.id)
    repeated = f"message/{messages[0].delivery_id}"
    await tenant.verdict(f"message/{messages[1].delivery_id}")

    async def both() -> bool:
        found = [await tenant.verdict(usage_id) for usage_id in ("repeated", repeated)]
        return all(one["duplicates"] == 1 for one in found)

    await tenant.platform.until(both)
    await age(tenant, timedelta(days=60))
    before = utcnow() - timedelta(days=1)
    await delete(tenant, before)
    left = await tenant.sql("SELECT usage_id FROM usage WHERE tenant_id = $1 ORDER BY 1", tenant.id)
    assert [usage_id for (usage_id,) in left] == ["held", repeated, "repeated"], "the repeats are young"
    await tenant.sql("UPDATE duplicate SET rated_at = rated_at - interval '60 days' WHERE tenant_id = $1", tenant.id)
    await delete(tenant, before)
    left = await tenant.sql("SELECT usage_id FROM usage WHERE tenant_id = $1 ORDER BY 1", tenant.id)
    assert [usage_id for (usage_id,) in left] == ["held", repeated]
    assert (await tenant.sql("SELECT count(*) FROM duplicate WHERE tenant_id = $1", tenant.id))[0][0] == 1


async def test_read_models_equal_their_source_after_a_deletion(billing: Billing) -> None:
    tenant = await billing.tenant()
    for _ in range(3):
        message = MessageDelivered(
            delivery_id=uuid7(), channel_id=uuid7(), session_key="s", run_id=None, vendor_message_id=None
        )
        await tenant.platform.produce(CHANNEL_EVENTS, message, key="s", tenant_id=tenant.id)
        await tenant.verdict(f"message/{message.delivery_id}")
    await tenant.use("a", input_tokens=1, output_tokens=1)
    await tenant.verdict("a")
    assert await delete(tenant, utcnow() + timedelta(days=1)) == 4
    for model in READ_MODELS:
        found = await verification.verify(billing.platform.database("billing").engine, "billing", model, restart=True)
        assert not [one for one in found.differences if tenant.id in str(one)], model.name


async def test_a_deletion_waits_for_a_correction_that_is_being_booked(billing: Billing) -> None:
    tenant, store = await billing.tenant(), billing.platform.database("billing")
    await tenant.use("a", input_tokens=1, output_tokens=0)
    await tenant.verdict("a")
    async with store.begin(tenant_id=tenant.id) as tx:
        await accounts.lock_one(tx, tenant.id)
        deletion = asyncio.create_task(delete(tenant, utcnow() + timedelta(days=1)))
        await waits_for_a_lock(store)
        await tx.sql(
            """
            INSERT INTO usage_correction (tenant_id, usage_id, price_version, nanos, period)
            VALUES ($1, 'a', 'v', 5, 0)
            """,
            tenant.id,
        )
        await aggregates.add_corrections(tx, tenant.id, [("a", "v")])
    assert await deletion == 1
    assert (await rebuilt(billing, tenant))["equal"]


async def test_a_new_budget_in_total_counts_deleted_usage(billing: Billing) -> None:
    tenant = await billing.tenant()
    await tenant.use("a", input_tokens=7, output_tokens=0)
    cost = (await tenant.verdict("a"))["amount_nanos"]
    await delete(tenant, utcnow() + timedelta(days=1))
    assert (await limit(tenant, "tenant", "", 10**9, period="total"))["spent_nanos"] == cost


async def test_deleted_records_are_not_rated_again(billing: Billing) -> None:
    tenant = await billing.tenant()
    body = {"tenant_id": tenant.id, "dry_run": True, "to": utcnow().isoformat()}
    kept = retention.kept_since(utcnow())
    for since, status in ((kept - timedelta(seconds=1), 422), (kept + timedelta(days=1), 200)):
        answer = await billing.operator.post("/api/v1/billing/rerate", json=body | {"from": since.isoformat()})
        assert answer.status_code == status, answer.text
    refused = await billing.operator.post("/api/v1/billing/rerate", json=body | {"from": "2020-01-01T00:00:00Z"})
    assert refused.json()["errors"][0]["field"] == "from"


async def test_a_correction_of_the_oldest_record_is_on_an_invoice_of_its_subscription(billing: Billing) -> None:
    tenant, _ = await subscribed(billing, base_nanos=0, charges=[], included=[])
    model = f"acme/{uuid7()}"
    oldest = retention.kept_since(utcnow()) + timedelta(hours=1)
    body = {"resource": model, "valid_from": (oldest - timedelta(days=1)).isoformat()}
    await post(billing, "prices", body | {"nanos_per_unit": {"input_tokens": "100"}})
    await tenant.use("a", model, occurred_at=AT, input_tokens=10)
    await tenant.verdict("a")
    await draft(billing, tenant)
    await tenant.sql("UPDATE usage SET occurred_at = $2 WHERE tenant_id = $1", tenant.id, oldest)
    await tenant.sql(
        """
        UPDATE period
        SET begins = $2::timestamptz, ends = $2::timestamptz + interval '1 hour'
        WHERE tenant_id = $1 AND closed_at IS NOT NULL
        """,
        tenant.id,
        oldest,
    )
    await post(billing, "prices", body | {"nanos_per_unit": {"input_tokens": "90"}})
    assert (await rerate(billing, tenant, **{"from": oldest.isoformat()}))["difference_nanos"] == -100
    [(invoiced,)] = await tenant.sql("SELECT period > 0 FROM usage_correction WHERE tenant_id = $1", tenant.id)
    assert invoiced


async def test_old_holds_are_deleted_and_those_that_still_hold_are_not(billing: Billing) -> None:
    tenant = await billing.tenant()
    await tenant.sql(
        """
        INSERT INTO hold (tenant_id, hold_id, request, granted, held_nanos, expires_at, ended_at, outcome)
        SELECT $1, uuidv7(), name, true, 1, now() + expires::interval, now() + ended::interval,
            CASE WHEN ended IS NOT NULL THEN 'charged' END
        FROM (VALUES
            ('charged', '-60 days', '-60 days'), ('expired', '-60 days', NULL),
            ('resolved long ago', 'infinity', '-60 days'), ('resolved late', 'infinity', '-1 day'),
            ('held for review', 'infinity', NULL), ('of today', '-1 hour', '-1 hour'), ('open', '1 hour', NULL)
        ) AS hold (name, expires, ended)
        """,
        tenant.id,
    )
    clock = Clock(billing.platform.database("billing"), Seller(), {})
    await clock.forget()
    left = await tenant.sql("SELECT request FROM hold WHERE tenant_id = $1", tenant.id)
    assert {name for (name,) in left} == {"resolved late", "held for review", "of today", "open"}
