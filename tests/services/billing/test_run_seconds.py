"""The seconds of runs, from the record to the invoice's line and its proof."""

from __future__ import annotations

from datetime import timedelta

from infra.clock import uuid7
from tests.services.billing.conftest import Billing
from tests.services.billing.test_invoices import MIDNIGHT, START, draft, subscribed


async def test_a_run_has_seconds_in_the_usage_in_a_line_and_in_its_proof(billing: Billing) -> None:
    seconds = {"meter": "run_seconds", "by": "agent", "scheme": "per_unit", "tiers": [{"unit_nanos": 2000}]}
    tenant, _ = await subscribed(billing, charges=[seconds], included=[], usage_markup_percent=None, base_nanos=0)
    run_id, at = uuid7(), START + timedelta(days=3)
    for _ in range(2):
        await tenant.use(f"{run_id}/seconds", "agent/run", occurred_at=at, run_id=run_id, run_seconds=7)
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
