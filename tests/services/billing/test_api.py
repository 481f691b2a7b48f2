"""HTTP of billing: access rights, pages of lists, and the acts of an operator."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy.exc import ProgrammingError

from infra.clock import utcnow, uuid7
from tests.services.billing.conftest import Billing, Tenant


def field_of(response: httpx.Response) -> str:
    assert response.status_code == 422, response.text
    return str(response.json()["errors"][0]["field"])


async def page_by_page(tenant: Tenant, path: str) -> list[dict[str, Any]]:
    """All items of the list, two at a time."""
    seen: list[dict[str, Any]] = []
    params: dict[str, Any] = {"limit": 2}
    while True:
        page = await tenant.get(path, **params)
        seen += page["items"]
        if page["next"] is None:
            return seen
        params["cursor"] = page["next"]


async def test_credit_is_added_by_the_operator_once_per_key_and_audited(billing: Billing) -> None:
    tenant = await billing.tenant(credit_nanos=100)
    body = {"tenant_id": tenant.id, "amount_nanos": 50, "reason": "invoice 7"}
    for _ in range(2):
        answer = await billing.operator.post(
            "/api/v1/billing/credit", json=body, headers={"Idempotency-Key": tenant.id}
        )
        assert answer.status_code == 201, answer.text
        assert answer.json()["credit_nanos"] == 150
    assert [(e["kind"], e["amount_nanos"], e["actor"]) for e in (await tenant.get("ledger"))["items"]] == [
        ("credit", 100, "billing"),
        ("credit", 50, "operator"),
    ]
    acts = [
        body for _, body in await billing.platform.outbox("billing", "audit.logs") if body["tenant_id"] == tenant.id
    ]
    assert [(act["action"], act["actor"], act["object_id"]) for act in acts] == [
        ("billing.credit", "operator", tenant.id)
    ]


async def test_credit_for_an_unknown_tenant_or_of_zero_or_above_the_limit_is_refused(billing: Billing) -> None:
    tenant = await billing.tenant(credit_nanos=100)
    post = billing.operator.post
    unlimited = await billing.tenant()

    def body(tenant_id: str, amount: Any) -> dict[str, Any]:
        return {"tenant_id": tenant_id, "amount_nanos": amount}

    assert field_of(await post("/api/v1/billing/credit", json=body(tenant.id, 0))) == "amount_nanos"
    assert field_of(await post("/api/v1/billing/credit", json=body(tenant.id, 0.5))) == "amount_nanos"
    assert field_of(await post("/api/v1/billing/credit", json=body(tenant.id, 10**18))) == "amount_nanos"
    grant = {"tenant_id": tenant.id, "nanos": 10**18, "reason": "r"}
    assert field_of(await post("/api/v1/grants", json=grant)) == "nanos"
    assert (await post("/api/v1/grants", json=grant | {"tenant_id": unlimited.id})).status_code == 201
    assert field_of(await post("/api/v1/grants", json=grant | {"tenant_id": unlimited.id, "nanos": 1})) == "nanos"
    assert (await post("/api/v1/billing/credit", json=body(str(uuid7()), 1))).status_code == 404
    assert (await post("/api/v1/billing/credit", json=body(unlimited.id, 1))).status_code == 409
    assert (await tenant.http.post("/api/v1/billing/credit", json=body(tenant.id, 1))).status_code == 403
    assert (await tenant.get("balance"))["credit_nanos"] == 100


async def test_an_account_may_spend_more_in_its_life_than_the_largest_integer_of_the_database(billing: Billing) -> None:
    tenant = await billing.tenant(credit_nanos=1000)
    budget = {"scope": "tenant", "nanos": 10**18, "period": "total"}
    assert (await tenant.http.post("/api/v1/budgets", json=budget)).status_code == 201
    await tenant.use("first", input_tokens=1, output_tokens=0)
    first = await tenant.verdict("first")
    cost, life = first["amount_nanos"], 2**63 - 1
    await tenant.sql(
        """
        UPDATE account
        SET credit_nanos = credit_nanos + $2::bigint, debited_nanos = debited_nanos + $2::bigint,
            burned_nanos = burned_nanos + $2::bigint
        WHERE tenant_id = $1
        """,
        tenant.id,
        life - cost,
    )
    await tenant.sql("UPDATE budget SET spent_nanos = $2 WHERE tenant_id = $1", tenant.id, life)
    await tenant.use("second", input_tokens=1, output_tokens=0)
    await tenant.verdict("second")
    credit = {"tenant_id": tenant.id, "amount_nanos": 10**18 - 1000}
    assert (await billing.operator.post("/api/v1/billing/credit", json=credit)).status_code == 201
    left = 10**18 - 2 * cost
    found = await tenant.get("balance")
    assert (found["credit_nanos"], found["debited_nanos"]) == (life + left + cost, life + cost)
    assert (found["balance_nanos"], found["available_nanos"]) == (left, left)
    [limit] = (await tenant.http.get("/api/v1/budgets")).json()["items"]
    assert limit["spent_nanos"] == life + cost
    refused = await tenant.reserve(input_tokens=1)
    assert not refused.granted
    assert refused.available_nanos < 0


async def test_a_wrong_charge_is_corrected_by_a_new_entry(billing: Billing) -> None:
    tenant = await billing.tenant(credit_nanos=1000)
    await tenant.use("run/1/1", input_tokens=2, output_tokens=0)
    await tenant.verdict("run/1/1")
    body = {"tenant_id": tenant.id, "amount_nanos": 200, "reason": "counted twice by us", "usage_id": "run/1/1"}
    answer = await billing.operator.post("/api/v1/billing/corrections", json=body)
    assert answer.status_code == 201, answer.text
    assert answer.json()["balance_nanos"] == 900
    entries = (await tenant.get("ledger"))["items"]
    assert [(e["kind"], e["amount_nanos"], e["reason"]) for e in entries] == [
        ("credit", 1000, "first credit"),
        ("charge", -300, ""),
        ("correction", 200, "counted twice by us"),
    ]
    assert (await tenant.verdict("run/1/1"))["amount_nanos"] == 300
    unknown = await billing.operator.post("/api/v1/billing/corrections", json=body | {"usage_id": "nobody"})
    assert unknown.status_code == 404


async def test_neither_an_entry_nor_a_price_can_be_changed_even_by_the_service_itself(billing: Billing) -> None:
    tenant = await billing.tenant(credit_nanos=1000)
    for statement in (
        "UPDATE ledger_entry SET amount_nanos = 0",
        "DELETE FROM ledger_entry",
        "UPDATE price SET prices = '{}'",
        "DELETE FROM price",
    ):
        with pytest.raises(ProgrammingError, match="permission denied"):
            await tenant.sql(statement)


async def test_the_ledger_comes_in_pages_whose_sum_is_the_balance(billing: Billing) -> None:
    tenant = await billing.tenant(credit_nanos=10**6)
    for n in range(5):
        await tenant.use(f"run/{n}", input_tokens=n, output_tokens=1)
    await tenant.verdict("run/4")
    seen = await page_by_page(tenant, "ledger")
    assert len(seen) == len({entry["id"] for entry in seen}) == 6
    assert sum(entry["amount_nanos"] for entry in seen) == (await tenant.get("balance"))["balance_nanos"]
    bad = await tenant.http.get("/api/v1/billing/ledger", params={"cursor": "bm9uZQ=="})
    assert field_of(bad) == "cursor"


async def test_usage_is_summed_by_resource_day_or_run_within_the_requested_period(billing: Billing) -> None:
    tenant = await billing.tenant()
    run_id, now = uuid7(), utcnow()
    yesterday = now - timedelta(days=1)
    await tenant.use("1", run_id=run_id, occurred_at=yesterday, input_tokens=10, output_tokens=1)
    await tenant.use("2", run_id=run_id, occurred_at=now, input_tokens=5, cached_tokens=5, output_tokens=1)
    await tenant.use("3", "scripted/answer", occurred_at=now, input_tokens=1, output_tokens=1)
    await tenant.use("4", occurred_at=now, input_tokens=7)
    await tenant.verdict("4")
    by_day = await tenant.get("usage/summary", group="day")
    gpt = {"resource": "openai/gpt-4o-mini"}
    assert by_day["items"] == [
        gpt
        | {"group": yesterday.date().isoformat(), "records": 1, "held": 0, "amount_nanos": 2100}
        | {"units": {"input_tokens": 10, "output_tokens": 1}},
        gpt
        | {"group": now.date().isoformat(), "records": 2, "held": 1, "amount_nanos": 975}
        | {"units": {"input_tokens": 5, "cached_tokens": 5, "output_tokens": 1}},
        {"resource": "scripted/answer", "group": now.date().isoformat(), "records": 1, "held": 0}
        | {"units": {"input_tokens": 1, "output_tokens": 1}, "amount_nanos": 40},
    ]
    assert by_day["amount_nanos"] == 2100 + 975 + 40
    by_run = await tenant.get("usage/summary", group="run", resource="openai/gpt-4o-mini")
    assert {item["group"]: item["amount_nanos"] for item in by_run["items"]} == {str(run_id): 3075, None: 0}
    recent = await tenant.get("usage/summary", since=(now - timedelta(hours=1)).isoformat(), until=utcnow().isoformat())
    assert recent["amount_nanos"] == 1015
    for field, bad in ("since", "2026-01-01T00:00:00"), ("group", "week"):
        assert field_of(await tenant.http.get("/api/v1/billing/usage/summary", params={field: bad})) == field


async def test_usage_is_listed_record_by_record(billing: Billing) -> None:
    tenant = await billing.tenant()
    run_id, now = uuid7(), utcnow()
    for n in range(5):
        at = now - timedelta(hours=n)
        await tenant.use(f"{n}", run_id=run_id if n < 2 else None, occurred_at=at, input_tokens=1, output_tokens=1)
    await tenant.use("0", occurred_at=now, input_tokens=1, output_tokens=1)
    await tenant.use("9", "acme/unheard-of", occurred_at=now, input_tokens=1)
    assert (await tenant.verdict("9"))["verdict"] == "held"
    seen = await page_by_page(tenant, "usage")
    assert [item["usage_id"] for item in seen] == ["4", "3", "2", "1", "0", "9"]
    assert seen[-1] | {"lines": []} == await tenant.verdict("9")
    assert [item["usage_id"] for item in (await tenant.get("usage", run_id=str(run_id)))["items"]] == ["1", "0"]
    since = (now - timedelta(minutes=1)).isoformat()
    assert [item["usage_id"] for item in (await tenant.get("usage", since=since))["items"]] == ["0", "9"]
    for field, bad in ("since", "2026-01-01T00:00:00"), ("run_id", "x"), ("cursor", "bm9uZQ=="):
        assert field_of(await tenant.http.get("/api/v1/billing/usage", params={field: bad})) == field


async def test_no_tenant_sees_the_records_of_another_tenant(billing: Billing) -> None:
    ours, theirs = await billing.tenant(credit_nanos=1000), await billing.tenant(credit_nanos=5)
    await ours.use("run/1/1", input_tokens=1, output_tokens=0)
    await ours.use("run/1/2", "acme/unheard-of", input_tokens=1)
    await ours.verdict("run/1/1")
    await ours.verdict("run/1/2")
    assert (await theirs.http.get("/api/v1/billing/verdicts/run/1/1")).status_code == 404
    assert (await theirs.get("usage"))["items"] == []
    assert (await theirs.get("held", tenant_id=ours.id))["items"] == []
    assert len((await theirs.get("ledger"))["items"]) == 1
    reader = billing.platform.client("billing", ours.id, scopes=("run",))
    for path in ("balance", "usage", "usage/summary", "ledger", "verdicts/run/1/1", "held", "reconciliation"):
        assert (await reader.get(f"/api/v1/billing/{path}")).status_code == 403, path
    assert (await reader.get("/api/v1/prices")).status_code == 403
    await reader.aclose()
    held = (await billing.operator.get("/api/v1/billing/held", params={"tenant_id": ours.id})).json()["items"]
    assert [(item["tenant_id"], item["usage_id"]) for item in held] == [(ours.id, "run/1/2")]


async def test_prices_are_read_by_any_name_of_a_model_and_added_as_versions(billing: Billing) -> None:
    tenant = await billing.tenant()
    found = await tenant.http.get("/api/v1/prices", params={"resource": "openai/gpt-4o-mini-2024-07-18"})
    [price] = found.json()["items"]
    assert price["price_version"] == "openai/gpt-4o-mini@1"
    assert price["nanos_per_unit"] == {"input_tokens": "150", "cached_tokens": "75", "output_tokens": "600"}

    model = f"acme/{uuid7()}"
    new = {
        "resource": model,
        "nanos_per_unit": {"input_tokens": "0.125"},
        "tiers": [{"above_input_tokens": 1000, "nanos_per_unit": {"input_tokens": "0.25"}}],
    }
    post = billing.operator.post
    first, second = [(await post("/api/v1/prices", json=new)).json() for _ in range(2)]
    assert (first["version"], first["valid_from"]) == (1, "1970-01-01T00:00:00Z")
    assert (second["version"], second["valid_from"] > "2026") == (2, True)
    assert (await tenant.http.get("/api/v1/prices", params={"resource": model})).json()["items"] == [first, second]
    await tenant.use("small", model, input_tokens=1000)
    await tenant.use("large", model, input_tokens=1004)
    assert (await tenant.verdict("small"))["amount_nanos"] == 125
    assert (await tenant.verdict("large"))["amount_nanos"] == 251

    # Calls that find facts about people cost the same, until they have a price of their own.
    learning = f"learning/{model}"
    await tenant.use("learning/1", learning, input_tokens=1000)
    assert (await tenant.verdict("learning/1"))["price_version"] == f"{model}@2"
    await post("/api/v1/prices", json={"resource": learning, "nanos_per_unit": {"input_tokens": "2"}})
    await tenant.use("learning/2", learning, input_tokens=1000)
    assert (await tenant.verdict("learning/2"))["amount_nanos"] == 2000
    await tenant.use("learning/3", f"learning/acme/{uuid7()}", input_tokens=1)
    assert (await tenant.verdict("learning/3"))["verdict"] == "held"

    def broken(**more: Any) -> dict[str, Any]:
        return new | more

    for field, body in {
        "resource": broken(resource="no slash"),
        "currency": broken(currency="XYZ"),
        "tiers[1].above_input_tokens": broken(tiers=[{"above_input_tokens": 5, "nanos_per_unit": {}}] * 2),
        "nanos_per_unit.input_tokens": broken(nanos_per_unit={"input_tokens": 0.1}),
        "nanos_per_unit.frames": broken(nanos_per_unit={"frames": "1"}),
        "valid_from": broken(valid_from="2026-01-01T00:00:00"),
    }.items():
        assert field_of(await post("/api/v1/prices", json=body)) == field
    assert field_of(await post("/api/v1/prices", json=broken(nanos_per_unit={"input_tokens": "-1"})))
    assert (await tenant.http.post("/api/v1/prices", json=new)).status_code == 403
    # A price that begins in the past counts for usage that is rated from now on; the ledger stays as it is.
    before = await tenant.get("balance")
    await post(
        "/api/v1/prices", json=new | {"valid_from": "2020-01-01T00:00:00Z", "nanos_per_unit": {"input_tokens": "9"}}
    )
    assert await tenant.get("balance") == before
    assert (await tenant.verdict("small"))["amount_nanos"] == 125


async def test_the_price_book_is_read_to_its_end_page_by_page(billing: Billing) -> None:
    seen, params = 0, {"limit": 200}
    while True:
        page = (await billing.operator.get("/api/v1/prices", params=params)).json()
        seen += len(page["items"])
        if page["next"] is None:
            break
        params["cursor"] = page["next"]
    [(there,)] = await billing.known("").sql("SELECT count(*) FROM price")
    assert seen == there > 2000


async def test_reconciliation_does_not_answer_while_a_producer_is_silent(billing: Billing) -> None:
    tenant = await billing.tenant()
    answer = await tenant.http.get("/api/v1/billing/reconciliation")
    assert answer.status_code == 503
    assert "could not read the number of produced records" in answer.json()["detail"]
