"""Wrong requests about plans, subscriptions and invoices are refused with the field's name and change nothing."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from infra.clock import utcnow, uuid7
from tests.services.billing.conftest import Billing
from tests.services.billing.invoices.test_invoices import (
    START,
    draft,
    field_of,
    plan,
    post,
    subscribed,
    with_two_invoices,
)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"currency": "XXX"}, "currency"),
        ({"base_nanos": -1}, "base_nanos"),
        ({"charges": [{"meter": "colours", "scheme": "per_unit", "tiers": [{}]}]}, "charges[0].meter"),
        (
            {
                "charges": [
                    {
                        "meter": "input_tokens",
                        "scheme": "volume",
                        "tiers": [{"up_to": 10, "unit_nanos": 1}, {"up_to": 5, "unit_nanos": 1}, {}],
                    }
                ]
            },
            "charges[0].tiers[1].up_to",
        ),
        (
            {"charges": [{"meter": "input_tokens", "scheme": "volume", "tiers": [{"up_to": 10}]}]},
            "charges[0].tiers[0].up_to",
        ),
        ({"included": [{"meter": "messages", "quantity": 1}]}, "included[0].meter"),
        (
            {
                "charges": [
                    {"meter": "input_tokens", "by": by, "scheme": "per_unit", "tiers": [{"unit_nanos": 1}]}
                    for by in ("model", None)
                ]
            },
            "included[0].meter",
        ),
        ({"usage_markup_percent": "-9999"}, "usage_markup_percent"),
        ({"usage_markup_percent": "1000.000001"}, "usage_markup_percent"),
        ({"usage_markup_percent": 0.5}, "usage_markup_percent"),
        (
            {"charges": [{"meter": "input_tokens", "scheme": "per_unit", "tiers": [{"unit_nanos": "-1"}]}]},
            "charges[0].tiers[0].unit_nanos",
        ),
    ],
)
async def test_a_plan_that_cannot_work_is_refused_with_its_field(
    billing: Billing, changes: dict[str, Any], field: str
) -> None:
    answer = await billing.operator.post("/api/v1/plans", json=plan(**changes))
    assert field_of(answer) == field


async def test_a_subscription_that_cannot_work_is_refused(billing: Billing) -> None:
    tenant = await billing.tenant()
    made = await post(billing, "plans", plan())
    body = {"tenant_id": tenant.id, "plan_id": made["id"]}

    async def refused(**changes: Any) -> httpx.Response:
        return await billing.operator.post("/api/v1/subscriptions", json=body | changes)

    assert field_of(await refused(anchor_day=32)) == "anchor_day"
    assert field_of(await refused(time_zone="Mars/Olympus")) == "time_zone"
    assert field_of(await refused(starts_at="2020-01-01T00:00:00Z")) == "starts_at"
    assert field_of(await refused(starts_at="9999-12-31T00:00:00Z")) == "starts_at"
    assert (await refused(plan_id=str(uuid7()))).status_code == 404
    yen = await post(billing, "plans", plan(currency="JPY"))
    assert (await refused(plan_id=yen["id"])).status_code == 409
    await post(billing, "subscriptions", body | {"anchor_day": 31})
    assert (await refused()).status_code == 409, "two plans at once"
    await tenant.use("a", input_tokens=1, output_tokens=1)
    await tenant.verdict("a")
    other = await billing.tenant()
    await other.use("a", input_tokens=1, output_tokens=1)
    await other.verdict("a")
    assert field_of(await refused(ends_at="2020-01-01T00:00:00Z")) == "ends_at", "a subscription has no end of its own"
    late = (datetime.now(UTC) - timedelta(days=1)).isoformat()
    assert field_of(await refused(tenant_id=other.id, starts_at=late)) == "starts_at"


async def test_an_invoice_that_the_books_cannot_hold_is_refused_with_its_period(billing: Billing) -> None:
    charge = {"meter": "input_tokens", "scheme": "per_unit", "tiers": [{"unit_nanos": 10**15}]}
    tenant, _ = await subscribed(billing, charges=[charge], included=[])
    await tenant.use("a", occurred_at=START, input_tokens=10**9, output_tokens=0)
    await tenant.verdict("a")
    answer = await billing.operator.post("/api/v1/billing/periods/close", json={"tenant_id": tenant.id})
    assert (answer.status_code, START.isoformat() in answer.text) == (409, True), answer.text


@pytest.mark.parametrize("when", ["now", "period_end"])
async def test_a_subscription_that_is_cancelled_before_it_begins_is_never_invoiced(billing: Billing, when: str) -> None:
    tenant = await billing.tenant()
    made = await post(billing, "plans", plan())
    later = (utcnow() + timedelta(days=3)).isoformat()
    body = {"tenant_id": tenant.id, "plan_id": made["id"], "starts_at": later}
    first = await post(billing, "subscriptions", body)
    path = f"/api/v1/subscriptions/{first['id']}"
    ended = (await billing.operator.delete(path, params={"when": when})).json()
    assert ended["ends_at"] == ended["starts_at"]
    assert (await billing.operator.delete(path)).status_code == 409, "it has ended"
    assert await tenant.sql("SELECT FROM period WHERE tenant_id = $1 AND closed_at IS NULL", tenant.id) == []
    second = await post(billing, "subscriptions", body)
    assert second["starts_at"] == first["starts_at"], "another one may begin at the same time"
    [(period,)] = await tenant.sql(
        "SELECT subscription_id FROM period WHERE tenant_id = $1 AND closed_at IS NULL", tenant.id
    )
    assert str(period) == second["id"]


async def test_a_bank_reference_pays_one_invoice_and_is_not_taken_for_another(billing: Billing) -> None:
    tenant, first, second = await with_two_invoices(billing)
    body = {"amount_minor": 100, "reference": "SEPA 7"}
    for _ in range(2):
        paid = await post(billing, f"invoices/{first['id']}/received", body, status=200)
        assert paid["paid_minor"] == 100
    again = await billing.operator.post(f"/api/v1/invoices/{second['id']}/received", json=body)
    assert (again.status_code, again.json()["detail"]) == (
        409,
        "reference SEPA 7: was booked for another invoice or amount",
    )
    assert (await tenant.http.get(f"/api/v1/invoices/{second['id']}")).json()["paid_minor"] == 0


async def test_another_tenants_invoice_is_not_found_and_only_the_operator_finalises(billing: Billing) -> None:
    tenant, _ = await subscribed(billing)
    other = await billing.tenant()
    made = await draft(billing, tenant)
    for path in ("", "/lines", "/csv", "/pdf", "/credit-notes"):
        assert (await other.http.get(f"/api/v1/invoices/{made['id']}{path}")).status_code == 404
    assert (await other.http.get("/api/v1/invoices")).json()["items"] == []
    assert (await tenant.http.post(f"/api/v1/invoices/{made['id']}/finalise")).status_code == 403


@pytest.mark.parametrize("key", ["x", "9" * 20])
async def test_a_cursor_that_no_page_has_is_refused_by_every_list(billing: Billing, key: str) -> None:
    tenant, _ = await subscribed(billing, charges=[], included=[], usage_markup_percent=None)
    invoice = await draft(billing, tenant)
    own = ("invoices", f"invoices/{invoice['id']}/lines", "grants", "budgets", "payments", "subscriptions")
    paths = (*own, "prices", "plans", "billing/ledger", "billing/usage", "billing/held")
    cursor = base64.urlsafe_b64encode(key.encode()).decode()
    answers = {path: await tenant.http.get(f"/api/v1/{path}", params={"cursor": cursor}) for path in paths}
    assert {path: field_of(answer) for path, answer in answers.items()} == dict.fromkeys(paths, "cursor")
    sums = await tenant.http.get("/api/v1/billing/usage", params={"cursor": cursor, "group_by": "meter"})
    assert field_of(sums) == "cursor"
