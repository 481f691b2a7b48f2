"""From a plan to a paid invoice: lines, periods, numbers, taxes, credit notes, grants, and a balanced journal."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from itertools import pairwise
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import httpx
import pytest
from sqlalchemy.exc import DBAPIError

from infra.clock import utcnow, uuid7
from services.billing.clock import CLOSE_AFTER, FINALISE_AFTER, Clock
from services.billing.credit import accounts
from services.billing.invoices import purchases
from services.billing.invoices.tax import Seller
from services.billing.plans.calendar import full_period
from tests.services.billing.conftest import Billing, Tenant, pdf_pages

UNIT = 10**9


def field_of(response: httpx.Response) -> str:
    assert response.status_code == 422, response.text
    return str(response.json()["errors"][0]["field"])


async def post(billing: Billing, path: str, body: Any = None, *, status: int = 201) -> Any:
    answer = await billing.operator.post(f"/api/v1/{path}", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def plan(**changes: Any) -> dict[str, Any]:
    return {
        "name": f"Team {uuid7()}",
        "currency": "USD",
        "interval": "month",
        "base_nanos": 30 * UNIT,
        "included": [{"meter": "input_tokens", "quantity": 1000}],
        "charges": [
            {
                "meter": "input_tokens",
                "scheme": "graduated",
                "tiers": [{"up_to": 500, "unit_nanos": UNIT // 100}, {"up_to": None, "unit_nanos": UNIT // 200}],
            },
            {"meter": "output_tokens", "by": "model", "scheme": "per_unit", "tiers": [{"unit_nanos": 1000}]},
        ],
        "usage_markup_percent": 10,
    } | changes


# The first whole period ended at the last midnight (UTC).
MIDNIGHT = utcnow().replace(hour=0, minute=0, second=0, microsecond=0)
ANCHOR = {"anchor_day": MIDNIGHT.day}
START = full_period(MIDNIGHT - timedelta(seconds=1), MIDNIGHT.day, "month", ZoneInfo("UTC")).begins


async def subscribed(billing: Billing, **changes: Any) -> tuple[Tenant, dict[str, Any]]:
    """A tenant whose first whole period has ended."""
    tenant = await billing.tenant()
    made = await post(billing, "plans", plan(**changes))
    body = {"tenant_id": tenant.id, "plan_id": made["id"], "starts_at": START.isoformat(), **ANCHOR}
    return tenant, await post(billing, "subscriptions", body)


async def with_two_invoices(billing: Billing) -> tuple[Tenant, dict[str, Any], dict[str, Any]]:
    """A tenant, and the drafts of its two unpaid invoices."""
    tenant, subscription = await subscribed(billing, charges=[], included=[], usage_markup_percent=None)
    first = await draft(billing, tenant)
    ended = await billing.operator.delete(f"/api/v1/subscriptions/{subscription['id']}", params={"when": "now"})
    assert ended.status_code == 200, ended.text
    second = await draft(billing, tenant)
    for made in (first, second):
        await post(billing, f"invoices/{made['id']}/finalise", status=200)
    return tenant, first, second


async def draft(billing: Billing, tenant: Tenant) -> dict[str, Any]:
    [made] = (await post(billing, "billing/periods/close", {"tenant_id": tenant.id}, status=200))["items"]
    return dict(made)


async def journal(tenant: Tenant) -> dict[str, int]:
    found = await tenant.get("journal")
    assert found["difference"] == 0
    return {account: nanos for account, nanos in found["balances"].items() if nanos}


async def test_a_month_of_usage_becomes_lines_that_were_computed_by_hand(billing: Billing) -> None:
    tenant, _ = await subscribed(billing)
    at = START + timedelta(days=3)
    await tenant.use("a/1", occurred_at=at, input_tokens=1400, output_tokens=10)
    await tenant.use("a/2", occurred_at=at, input_tokens=200, output_tokens=5)
    await tenant.use("a/3", occurred_at=utcnow(), input_tokens=77, output_tokens=7)
    for n in (1, 2, 3):
        await tenant.verdict(f"a/{n}")

    made = await draft(billing, tenant)
    assert (made["status"], made["number"], made["currency"]) == ("draft", None, "USD")
    lines = (await tenant.http.get(f"/api/v1/invoices/{made['id']}/lines")).json()["items"]
    assert (await tenant.http.get(f"/api/v1/invoices/{made['id']}")).json() == made | {"lines": lines}
    # 1600 tokens, 1000 included: 600 = 500 × 0.01 + 100 × 0.005. The model's list price: 150 and 600 per token, + 10 %.
    cost = 1600 * 150 + 15 * 600
    assert [line["amount_nanos"] for line in lines] == [
        30 * UNIT,
        500 * (UNIT // 100) + 100 * (UNIT // 200),
        15 * 1000,
        cost * 110 // 100,
    ]
    assert [line["quantity"] for line in lines] == [1, 1600, 15, 2]
    assert [line["unit_nanos"] for line in lines] == [30 * UNIT, None, 1000, None]
    assert "1000 included" in lines[1]["description"]
    assert lines[0]["from"] == START.isoformat().replace("+00:00", "Z")
    assert made["subtotal_nanos"] == sum(line["amount_nanos"] for line in lines)
    assert made["total_minor"] == 3550

    done = await post(billing, f"invoices/{made['id']}/finalise", status=200)
    assert (done["number"], done["status"], done["due_minor"]) == ("INV-000001", "finalised", 3550)
    assert await post(billing, f"invoices/{made['id']}/finalise", status=200) == done
    found = await journal(tenant)
    assert found["receivable"] == 3550 * UNIT // 100
    assert -found["revenue"] == made["subtotal_nanos"]
    text = (await tenant.http.get(f"/api/v1/invoices/{made['id']}/csv")).text.splitlines()
    assert len(text) == 5
    assert text[1].split(",")[0:2] == ["1", lines[0]["description"]]
    answers = [await tenant.http.get(f"/api/v1/invoices/{made['id']}/pdf") for _ in range(2)]
    assert answers[0].content == answers[1].content
    shown = pdf_pages(answers[0].content)[0]
    assert shown.startswith("Invoice INV-000001")
    assert "Total 35.50 USD" in shown
    # Long descriptions are wrapped.
    assert "".join(lines[2]["description"].split()) in "".join(shown.split())


async def test_an_invoice_has_the_time_zone_of_its_subscription(billing: Billing) -> None:
    tenant = await billing.tenant()
    made = await post(billing, "plans", plan())
    body = {"tenant_id": tenant.id, "plan_id": made["id"], "starts_at": START.isoformat(), **ANCHOR}
    await post(billing, "subscriptions", body | {"time_zone": "Asia/Kolkata"})
    found = await draft(billing, tenant)
    assert (found["time_zone"], found["period"]["ends"][11:]) == ("Asia/Kolkata", "18:30:00Z")
    assert (await tenant.http.post("/api/v1/grants", json={"nanos": UNIT})).json()["time_zone"] == "Asia/Kolkata"


async def test_a_closed_period_is_invoiced_once_and_late_usage_goes_into_the_next_invoice(billing: Billing) -> None:
    tenant, subscription = await subscribed(billing, base_nanos=0, charges=[], included=[])
    await tenant.use("a/1", occurred_at=START, input_tokens=1, output_tokens=1)
    await tenant.verdict("a/1")
    first = await draft(billing, tenant)
    again = await post(billing, "billing/periods/close", {"tenant_id": tenant.id}, status=200)
    assert again["items"] == []
    await tenant.use("a/2", occurred_at=START + timedelta(days=1), input_tokens=3, output_tokens=0)
    await tenant.verdict("a/2")
    ended = await billing.operator.delete(f"/api/v1/subscriptions/{subscription['id']}", params={"when": "now"})
    assert ended.status_code == 200, ended.text
    second = await draft(billing, tenant)
    lines = (await tenant.http.get(f"/api/v1/invoices/{second['id']}/lines")).json()["items"]
    assert [line["amount_nanos"] for line in lines] == [3 * 150 * 110 // 100]
    assert "1 records of an earlier period" in lines[0]["description"]
    assert first["subtotal_nanos"] == 750 * 110 // 100


async def test_a_change_of_plan_now_splits_the_period_to_the_second(billing: Billing) -> None:
    tenant = await billing.tenant()
    small = await post(billing, "plans", plan(base_nanos=30 * UNIT, charges=[], included=[], usage_markup_percent=None))
    large = await post(billing, "plans", plan(base_nanos=90 * UNIT, charges=[], included=[], usage_markup_percent=None))
    start = utcnow().replace(microsecond=0) - timedelta(days=1)
    body = {"tenant_id": tenant.id, "plan_id": small["id"], "starts_at": start.isoformat(), "anchor_day": 31}
    made = await post(billing, "subscriptions", body)
    change = {"plan_id": large["id"], "when": "now"}
    answer = await billing.operator.patch(f"/api/v1/subscriptions/{made['id']}", json=change)
    assert answer.status_code == 200, answer.text
    rows = await tenant.sql(
        "SELECT begins, ends, full_begins, full_ends, plan_id::text FROM period WHERE tenant_id = $1 ORDER BY begins",
        tenant.id,
    )
    assert rows[0][0] == start
    assert rows[0][4] == small["id"]
    assert rows[-1][4] == large["id"]
    assert all(before[1] == after[0] for before, after in pairwise(rows))
    closed = (await post(billing, "billing/periods/close", {"tenant_id": tenant.id}, status=200))["items"]
    for made, (begins, ends, full_begins, full_ends, _) in zip(closed, rows, strict=False):
        share = (ends - begins) / (full_ends - full_begins)
        assert abs(made["subtotal_nanos"] - 30 * UNIT * share) <= 1


async def test_the_plan_of_a_cancelled_subscription_is_changed_only_until_its_end(billing: Billing) -> None:
    """A change at its end was answered as done, and no period had the other plan."""
    tenant, subscription = await subscribed(billing)
    path = f"/api/v1/subscriptions/{subscription['id']}"
    ended = (await billing.operator.delete(path)).json()
    assert ended["ends_at"]
    other = await post(billing, "plans", plan())
    late = await billing.operator.patch(path, json={"plan_id": other["id"], "when": "period_end"})
    assert (late.status_code, ended["ends_at"][:10] in late.text) == (409, True)
    changed = await billing.operator.patch(path, json={"plan_id": other["id"], "when": "now"})
    assert (changed.json()["plan_id"], changed.json()["ends_at"]) == (other["id"], ended["ends_at"])
    # From then on it is another subscription.
    body = {"tenant_id": tenant.id, "plan_id": other["id"], "starts_at": ended["ends_at"]}
    await post(billing, "subscriptions", body)


async def test_32_concurrent_finalisations_with_a_kill_leave_no_gap_and_book_none_twice(billing: Billing) -> None:
    platform = billing.platform
    tenant, _ = await subscribed(billing)
    # Drafts of many periods, as a long-standing tenant has them.
    first = await draft(billing, tenant)
    ids = [first["id"]]
    for n in range(31):
        [(id_,)] = await tenant.sql(
            """
            INSERT INTO invoice (tenant_id, invoice_id, period, status, currency, begins, ends, subtotal_nanos,
                                 tax_nanos, tax_note, total_minor)
            SELECT tenant_id, gen_random_uuid(), -$2::bigint, 'draft', currency, begins, ends, 1000000000, 0, '', 100
            FROM invoice
            WHERE tenant_id = $1
            LIMIT 1
            RETURNING invoice_id::text
            """,
            tenant.id,
            n + 1,
        )
        ids.append(id_)

    async def finalise(id_: str) -> None:
        for _ in range(2):
            try:
                answer = await billing.operator.post(f"/api/v1/invoices/{id_}/finalise")
            except httpx.HTTPError:
                continue  # The service was killed. Whether it has committed is not known.
            assert answer.status_code in (200, 503), answer.text

    async def some() -> bool:
        [(count,)] = await tenant.sql("SELECT count(*) FROM invoice WHERE tenant_id = $1 AND number <> ''", tenant.id)
        return bool(count >= 5)

    tasks = [asyncio.create_task(finalise(id_)) for id_ in ids]
    await platform.until(some)
    platform.kill("billing")
    await asyncio.gather(*tasks)
    await platform.start("billing")
    await asyncio.gather(*(finalise(id_) for id_ in ids))
    numbers = [(await post(billing, f"invoices/{id_}/finalise", status=200))["number"] for id_ in ids]
    assert sorted(numbers) == [f"INV-{n:06}" for n in range(1, 33)]
    booked = await tenant.sql(
        "SELECT count(*), count(DISTINCT reference) FROM journal_entry WHERE tenant_id = $1 AND kind = 'invoice'",
        tenant.id,
    )
    assert booked == [(32, 32)]
    assert (await journal(tenant))["receivable"] > 0


async def test_a_finalised_invoice_and_a_journal_line_never_change(billing: Billing) -> None:
    tenant, _ = await subscribed(billing)
    made = await draft(billing, tenant)
    await post(billing, f"invoices/{made['id']}/finalise", status=200)
    with pytest.raises(DBAPIError, match="never changes"):
        await tenant.sql("UPDATE invoice SET total_minor = 1 WHERE tenant_id = $1", tenant.id)
    for statement in (
        "UPDATE invoice_line SET amount_nanos = 0 WHERE tenant_id = $1",
        "DELETE FROM invoice WHERE tenant_id = $1",
        "DELETE FROM journal_line WHERE tenant_id = $1",
    ):
        with pytest.raises(DBAPIError, match="permission denied"):
            await tenant.sql(statement, tenant.id)


async def test_the_database_refuses_an_entry_that_is_not_balanced(billing: Billing) -> None:
    tenant = await billing.tenant()
    with pytest.raises(DBAPIError, match="is not balanced"):
        await tenant.sql(
            """
            WITH made AS (
                INSERT INTO journal_entry (tenant_id, kind, reference, reason, actor)
                VALUES ($1, 'test', '', '', '')
                RETURNING tenant_id, entry
            )
            INSERT INTO journal_line
            SELECT tenant_id, entry, account, nanos
            FROM made, (VALUES ('cash', 5), ('revenue', -4)) AS n(account, nanos)
            """,
            tenant.id,
        )


async def test_tax_follows_the_country_and_a_credit_note_takes_its_share_back(billing: Billing) -> None:
    tenant, _ = await subscribed(billing, base_nanos=100 * UNIT, charges=[], included=[], usage_markup_percent=None)
    country = "DE"
    rate = {"country": country, "percent": "19", "valid_from": "2020-01-01T00:00:00Z"}
    await billing.operator.post("/api/v1/tax-rates", json=rate)
    bad = await tenant.http.put("/api/v1/billing/buyer", json={"country": "DE", "vat_id": "FR123"})
    assert field_of(bad) == "vat_id"
    for path, body in (("billing/buyer", {"country": "UK"}), ("tax-rates", {"country": "UK", "percent": "19"})):
        call = billing.operator.post if path == "tax-rates" else tenant.http.put
        assert field_of(await call(f"/api/v1/{path}", json=body)) == "country"
    assert (await tenant.http.put("/api/v1/billing/buyer", json={"country": country})).status_code == 200
    made = await draft(billing, tenant)
    done = await post(billing, f"invoices/{made['id']}/finalise", status=200)
    assert (done["tax_nanos"], done["total_minor"], done["tax_note"]) == (19 * UNIT, 11900, "19 % DE")

    path = f"invoices/{made['id']}"
    too_much = await billing.operator.post(f"/api/v1/{path}/credit-notes", json={"amount_minor": 11901, "reason": "x"})
    assert field_of(too_much) == "amount_minor"
    note = await post(billing, f"{path}/credit-notes", {"amount_minor": 1190, "reason": "a day without service"})
    assert note["number"] == "CN-000001"
    assert (note["subtotal_nanos"], note["tax_nanos"]) == (10 * UNIT, 1_900_000_000)
    assert (await tenant.http.get(f"/api/v1/{path}/credit-notes")).json()["items"] == [note]
    files = {
        kind: await tenant.http.get(f"/api/v1/{path}/credit-notes/{note['id']}/{kind}")
        for kind in ("pdf", "csv", "xml")
    }
    [shown] = pdf_pages(files["pdf"].content)
    for text in ("Credit note CN-000001", "For invoice INV-000001", "Tax: 19 % DE", "1.900000000", "Total 11.90 USD"):
        assert text in shown
    assert (
        files["csv"]
        .text.splitlines()[1]
        .startswith("1,Credit for invoice INV-000001: a day without service,1,-10.000000000,USD,")
    )
    assert files["csv"].headers["content-disposition"] == "attachment; filename=CN-000001.csv"
    assert (files["xml"].status_code, "the seller had no name" in files["xml"].text) == (409, True)
    assert await journal(tenant) == {
        "receivable": 119 * UNIT - 119 * UNIT // 10,
        "revenue": -90 * UNIT,
        "tax": -17_100_000_000,
    }
    for _ in range(2):
        paid = await post(billing, f"{path}/received", {"amount_minor": 10710, "reference": "SEPA 1"}, status=200)
    assert (paid["status"], paid["due_minor"]) == ("paid", 0)
    other = await billing.operator.post(f"/api/v1/{path}/received", json={"amount_minor": 1, "reference": "SEPA 1"})
    assert (other.status_code, "SEPA 1" in other.text) == (409, True), "the reference was booked with another amount"
    # The paid amount comes back as a grant.
    await post(billing, f"{path}/credit-notes", {"amount_minor": 1190, "reason": "another day"})
    [grant] = (await tenant.http.get("/api/v1/grants")).json()["items"]
    assert (grant["kind"], grant["left_nanos"]) == ("prepaid", 1190 * UNIT // 100)
    found = await journal(tenant)
    assert found["cash"] == 10710 * UNIT // 100
    assert found["prepaid"] == -1190 * UNIT // 100
    assert "receivable" not in found


async def test_credit_notes_of_a_whole_invoice_take_back_what_it_has_booked(billing: Billing) -> None:
    """To the nano-unit: each note's share was rounded by itself, and revenue and tax kept a rest."""
    tenant, _ = await subscribed(billing, base_nanos=10_004_000_001, charges=[], included=[], usage_markup_percent=None)
    await billing.operator.post(
        "/api/v1/tax-rates", json={"country": "FR", "percent": "20", "valid_from": "2020-01-01T00:00:00Z"}
    )
    assert (await tenant.http.put("/api/v1/billing/buyer", json={"country": "FR"})).status_code == 200
    made = await draft(billing, tenant)
    done = await post(billing, f"invoices/{made['id']}/finalise", status=200)
    for minor in (333, 333, done["total_minor"] - 666):
        await post(billing, f"invoices/{made['id']}/credit-notes", {"amount_minor": minor, "reason": "r"})
    assert await journal(tenant) == {}


async def test_a_credit_note_gives_promotional_credit_back_as_such(billing: Billing) -> None:
    """It became prepaid credit, as if the tenant had paid for it."""
    tenant, _ = await subscribed(billing, charges=[], included=[], usage_markup_percent=None)
    for kind, nanos in (("promotional", 20 * UNIT), ("prepaid", 4 * UNIT)):
        await post(billing, "grants", {"tenant_id": tenant.id, "nanos": nanos, "kind": kind, "reason": "r"})
    made = await draft(billing, tenant)
    path = f"invoices/{made['id']}"
    assert (await post(billing, f"{path}/finalise", status=200))["due_minor"] == 600
    await post(billing, f"{path}/received", {"amount_minor": 600, "reference": f"bank {made['id']}"}, status=200)
    owed = []
    for _ in range(3):
        # The balance of the account cannot become larger than a grant can hold.
        await tenant.sql("UPDATE account SET credit_nanos = debited_nanos + $2 WHERE tenant_id = $1", tenant.id, 10**18)
        over = await billing.operator.post(f"/api/v1/{path}/credit-notes", json={"amount_minor": 700, "reason": "r"})
        assert field_of(over) == "amount_minor"
        await tenant.sql("UPDATE account SET credit_nanos = NULL WHERE tenant_id = $1", tenant.id)
        await post(billing, f"{path}/credit-notes", {"amount_minor": 700, "reason": "r"})
        found = await journal(tenant)
        owed.append((found.get("prepaid", 0), found.get("promotional_credit", 0)))
    # 6 were paid and 4 were prepaid; they come back first.
    assert owed == [(-7 * UNIT, 0), (-10 * UNIT, -4 * UNIT), (-10 * UNIT, -11 * UNIT)]


async def test_the_rate_at_the_end_of_the_period_is_used_also_after_it_has_changed(billing: Billing) -> None:
    for percent, valid_from in (("16", START), ("17", MIDNIGHT)):
        rate = {"country": "LU", "percent": percent, "valid_from": valid_from.isoformat()}
        await post(billing, "tax-rates", rate)
    tenant, _ = await subscribed(billing)
    assert (await tenant.http.put("/api/v1/billing/buyer", json={"country": "LU"})).status_code == 200
    made = await draft(billing, tenant)
    done = await post(billing, f"invoices/{made['id']}/finalise", status=200)
    assert [one["tax_note"] for one in (made, done)] == ["16 % LU"] * 2


async def test_void_and_write_off_book_the_receivable_back(billing: Billing) -> None:
    for status in ("void", "uncollectible"):
        tenant, _ = await subscribed(billing)
        made = await draft(billing, tenant)
        early = await billing.operator.post(f"/api/v1/invoices/{made['id']}/{status}")
        assert early.status_code == 409
        await post(billing, f"invoices/{made['id']}/finalise", status=200)
        ended = await post(billing, f"invoices/{made['id']}/{status}", status=200)
        assert (ended["status"], ended["due_minor"]) == (status, 0)
        found = await journal(tenant)
        assert "receivable" not in found
        assert found == ({} if status == "void" else {"revenue": -30 * UNIT, "write_off": 30 * UNIT})
        # Money that comes after the write-off takes it back.
        late = {"amount_minor": 3000, "reference": f"bank {made['id']}"}
        answer = await billing.operator.post(f"/api/v1/invoices/{made['id']}/received", json=late)
        assert answer.status_code == (409 if status == "void" else 200)
        assert await journal(tenant) == ({} if status == "void" else {"cash": 30 * UNIT, "revenue": -30 * UNIT})
        if status == "uncollectible":
            more = {"reference": f"bank {made['id']} 2", "amount_minor": 1}
            await post(billing, f"invoices/{made['id']}/received", more, status=200)
            assert await journal(tenant) == {
                "cash": 30 * UNIT + UNIT // 100,
                "receivable": -UNIT // 100,
                "revenue": -30 * UNIT,
            }


async def test_a_transfer_of_any_amount_is_booked_and_what_is_above_the_amount_due_is_owed(billing: Billing) -> None:
    tenant, _ = await subscribed(billing, charges=[], included=[], usage_markup_percent=None)
    made = await draft(billing, tenant)
    path = f"invoices/{made['id']}/received"
    early = await billing.operator.post(f"/api/v1/{path}", json={"amount_minor": 1, "reference": "a"})
    assert early.status_code == 409
    await post(billing, f"invoices/{made['id']}/finalise", status=200)
    states = []
    for reference, minor in (("a", 2000), ("b", 1500), ("c", 3000)):
        shown = await post(billing, path, {"amount_minor": minor, "reference": reference}, status=200)
        states.append((shown["status"], shown["due_minor"], shown["paid_minor"]))
    assert states == [("finalised", 1000, 2000), ("paid", 0, 3500), ("paid", 0, 6500)]
    assert await journal(tenant) == {"cash": 65 * UNIT, "receivable": -35 * UNIT, "revenue": -30 * UNIT}
    for minor in (0, -1, 10**11 + 1, 10**30):
        answer = await billing.operator.post(f"/api/v1/{path}", json={"amount_minor": minor, "reference": "d"})
        assert field_of(answer) == "amount_minor"


async def test_a_transfer_that_came_back_is_reversed_once_and_its_reference_is_free_for_another_invoice(
    billing: Billing,
) -> None:
    tenant, first, second = await with_two_invoices(billing)
    before = await journal(tenant)
    body = {"amount_minor": 3500, "reference": "SEPA 9"}
    paid = await post(billing, f"invoices/{first['id']}/received", body, status=200)
    assert (paid["status"], paid["paid_minor"]) == ("paid", 3500)

    async def reverse(invoice: dict[str, Any], reference: str = "SEPA 9") -> httpx.Response:
        path = f"/api/v1/invoices/{invoice['id']}/received/reverse"
        return await billing.operator.post(path, json={"reference": reference})

    assert field_of(await reverse(second)) == "reference"
    assert field_of(await reverse(first, "SEPA 8")) == "reference"
    for _ in range(2):
        open_again = (await reverse(first)).json()
        assert (open_again["status"], open_again["due_minor"], open_again["paid_minor"]) == ("finalised", 3000, 0)
        assert await journal(tenant) == before
    again = await billing.operator.post(f"/api/v1/invoices/{first['id']}/received", json=body)
    assert (again.status_code, "was reversed" in again.text) == (409, True), "a late repeat of the request"
    await post(billing, f"invoices/{second['id']}/received", body, status=200)
    found = await journal(tenant)
    assert found["cash"] == 35 * UNIT
    assert (await reverse(first)).json()["paid_minor"] == 0
    assert await journal(tenant) == found
    assert (await reverse(second)).json()["paid_minor"] == 0
    assert await journal(tenant) == before
    # The right amount.
    paid = await post(billing, f"invoices/{first['id']}/received", body | {"amount_minor": 3000}, status=200)
    assert (paid["status"], paid["paid_minor"]) == ("paid", 3000)
    acts = [b for _, b in await billing.platform.outbox("billing", "audit.logs") if b["tenant_id"] == tenant.id]
    moved = [(act["action"], act["details"]["minor"]) for act in acts if act["action"].startswith("billing.re")]
    assert moved == [
        ("billing.receive", "3500"),
        ("billing.reverse", "3500"),
        ("billing.receive", "3500"),
        ("billing.reverse", "3500"),
        ("billing.receive", "3000"),
    ]


async def test_grants_are_burned_by_priority_then_expiry_then_age_and_the_rest_is_booked(billing: Billing) -> None:
    tenant = await billing.tenant(credit_nanos=0)
    soon = (utcnow() + timedelta(hours=1)).isoformat()

    async def grant(nanos: int, **more: Any) -> str:
        body = {"tenant_id": tenant.id, "nanos": nanos, "reason": "test", **more}
        return str((await post(billing, "grants", body))["id"])

    oldest = await grant(1000)
    first = await grant(1000, priority=1)
    expiring = await grant(1000, expires_at=soon, kind="prepaid")
    youngest = await grant(1000)

    async def left() -> dict[str, int]:
        items = (await tenant.http.get("/api/v1/grants")).json()["items"]
        return {item["id"]: item["left_nanos"] for item in items}

    async def use(usage_id: str, tokens: int) -> None:
        await tenant.use(usage_id, input_tokens=tokens, output_tokens=0)
        await tenant.verdict(usage_id)

    await use("a", 8)
    assert await left() == {oldest: 1000, first: 0, expiring: 800, youngest: 1000}
    await use("b", 2)
    assert await left() == {oldest: 1000, first: 0, expiring: 500, youngest: 1000}
    assert (await tenant.get("balance"))["balance_nanos"] == 2500
    await tenant.sql(
        "UPDATE credit_grant SET expires_at = now() - interval '1 s' WHERE tenant_id = $1 AND grant_id::text = $2",
        tenant.id,
        expiring,
    )
    await tenant.sql("UPDATE account SET next_expiry = now() WHERE tenant_id = $1", tenant.id)
    assert (await tenant.get("balance"))["balance_nanos"] == 2000
    assert await left() == {oldest: 1000, first: 0, expiring: 0, youngest: 1000}
    await use("c", 8)
    assert await left() == {oldest: 0, first: 0, expiring: 0, youngest: 800}
    entries = (await tenant.get("ledger"))["items"]
    assert [e["amount_nanos"] for e in entries if e["kind"] == "expiry"] == [-500]
    assert sum(e["amount_nanos"] for e in entries) == (await tenant.get("balance"))["balance_nanos"] == 800
    found = await journal(tenant)
    assert found == {"cash": 1000, "promotional_cost": 3000, "promotional_credit": -800, "revenue": -3200}


async def test_the_rest_of_a_grant_rolls_over_once_up_to_a_limit(billing: Billing) -> None:
    tenant = await billing.tenant(credit_nanos=0)
    soon, later = ((utcnow() + timedelta(hours=n)).isoformat() for n in (1, 2))
    body = {"tenant_id": tenant.id, "nanos": 1000, "reason": "test", "kind": "prepaid", "expires_at": soon}
    await post(billing, "grants", body | {"rollover_until": later, "rollover_nanos": 300})
    for left, expired in ((300, 0), (0, 300)):
        await tenant.sql("UPDATE credit_grant SET expires_at = now() - interval '1 s' WHERE tenant_id = $1", tenant.id)
        await tenant.sql("UPDATE account SET next_expiry = now() WHERE tenant_id = $1", tenant.id)
        assert (await tenant.get("balance"))["balance_nanos"] == left
        [old, new] = (await tenant.http.get("/api/v1/grants")).json()["items"]
        assert (old["left_nanos"], old["expired_nanos"], old["rollover_until"]) == (0, 700, None)
        assert (new["left_nanos"], new["expired_nanos"], new["reason"]) == (left, expired, f"rest of grant {old['id']}")
    entries = (await tenant.get("ledger"))["items"]
    assert sorted(e["amount_nanos"] for e in entries if e["kind"] == "expiry") == [-700, -300]
    assert await journal(tenant) == {"cash": 1000, "revenue": -1000}
    for changes, field in (
        ({"rollover_until": soon}, "rollover_until"),
        ({"rollover_nanos": 1}, "rollover_nanos"),
    ):
        assert field_of(await billing.operator.post("/api/v1/grants", json=body | changes)) == field


async def test_grants_pay_an_invoice_in_whole_minor_units(billing: Billing) -> None:
    tenant, _ = await subscribed(billing, charges=[], included=[], usage_markup_percent=None)
    body = {"tenant_id": tenant.id, "nanos": 12 * UNIT + 1, "kind": "prepaid", "reason": "paid in advance"}
    await post(billing, "grants", body)
    made = await draft(billing, tenant)
    done = await post(billing, f"invoices/{made['id']}/finalise", status=200)
    assert (done["applied_minor"], done["due_minor"], done["status"]) == (1200, 1800, "finalised")
    found = await journal(tenant)
    assert found == {"cash": 12 * UNIT + 1, "prepaid": -1, "receivable": 18 * UNIT, "revenue": -30 * UNIT}


async def limited(billing: Billing, nanos: int, **changes: Any) -> tuple[Tenant, dict[str, Any], str]:
    """A tenant that has paid `nanos` in advance and has a subscription, with a model whose input costs 0.1 a token."""
    tenant = await billing.tenant(credit_nanos=0)
    await post(billing, "grants", {"tenant_id": tenant.id, "nanos": nanos, "kind": "prepaid", "reason": "r"})
    made = await post(billing, "plans", plan(charges=[], included=[], **changes))
    body = {"tenant_id": tenant.id, "plan_id": made["id"], "starts_at": START.isoformat(), **ANCHOR}
    subscription = await post(billing, "subscriptions", body)
    price = {"resource": (model := f"acme/{uuid7()}"), "nanos_per_unit": {"input_tokens": str(UNIT // 10)}}
    await post(billing, "prices", price | {"valid_from": (START - timedelta(days=1)).isoformat()})
    return tenant, subscription, model


async def finalised(billing: Billing, tenant: Tenant) -> dict[str, Any]:
    made = await draft(billing, tenant)
    return dict(await post(billing, f"invoices/{made['id']}/finalise", status=200))


async def left(tenant: Tenant) -> int:
    return sum(item["left_nanos"] for item in (await tenant.http.get("/api/v1/grants")).json()["items"])


async def balance(tenant: Tenant) -> int:
    found = (await tenant.get("balance"))["balance_nanos"]
    assert sum(entry["amount_nanos"] for entry in (await tenant.get("ledger"))["items"]) == found
    return int(found)


@pytest.mark.parametrize(
    ("changes", "total", "derivation"),
    [
        ({"base_nanos": 50 * UNIT}, 94, "the fee and 40 + 10 %"),
        ({"base_nanos": 0}, 44, "40 + 10 %"),
        ({"base_nanos": 0, "minimum_nanos": 60 * UNIT}, 60, "the commitment"),
        ({"base_nanos": 0, "usage_markup_percent": -50}, 20, "40 - 50 %"),
        ({"base_nanos": 0, "usage_markup_percent": None}, 0, "usage costs nothing"),
    ],
)
async def test_what_grants_have_paid_for_an_invoice_cannot_be_used_again(
    billing: Billing, changes: dict[str, Any], total: int, derivation: str
) -> None:
    tenant, _, model = await limited(billing, 100 * UNIT, **changes)
    await tenant.use("a", model, occurred_at=START, input_tokens=400)
    await tenant.verdict("a")
    assert await balance(tenant) == 60 * UNIT
    done = await finalised(billing, tenant)
    assert (done["applied_minor"], done["due_minor"]) == (total * 100, 0), derivation
    assert await balance(tenant) == await left(tenant) == (100 - total) * UNIT


@pytest.mark.parametrize("cause", ["a fee", "its expiry", "its expiry before usage"])
async def test_credit_that_ends_without_usage_is_notified_once(billing: Billing, cause: str) -> None:
    tenant, _, model = await limited(billing, 50 * UNIT, base_nanos=50 * UNIT)
    if cause == "a fee":
        await finalised(billing, tenant)
    else:
        await tenant.sql(
            "UPDATE credit_grant SET expires_at = now() - interval '1 minute' WHERE tenant_id = $1", tenant.id
        )
        await tenant.sql("UPDATE account SET next_expiry = '-infinity' WHERE tenant_id = $1", tenant.id)
    if cause == "its expiry before usage":
        await tenant.use("a", model, input_tokens=1)
        await tenant.verdict("a")
    for _ in range(2):
        await balance(tenant)
    outbox = tenant.platform.outbox
    mails = [body for headers, body in await outbox("billing", "notification") if headers["tenant_id"] == tenant.id]
    assert [mail["subject"] for mail in mails if "budget" in mail["subject"]] == ["Your budget is nearly spent"]
    events = [body for _, body in await outbox("billing", "platform.events") if body["tenant_id"] == tenant.id]
    assert events == [{"tenant_id": tenant.id, "currency": "USD", "balance_nanos": 0}]


async def test_usage_whose_invoice_is_still_due_cannot_be_used_again(billing: Billing) -> None:
    tenant, _, model = await limited(billing, 10 * UNIT, base_nanos=0)
    await tenant.use("a", model, occurred_at=START, input_tokens=400)
    await tenant.verdict("a")
    done = await finalised(billing, tenant)
    assert (done["applied_minor"], done["due_minor"]) == (1000, 3400)
    assert (await balance(tenant), await left(tenant)) == (-30 * UNIT, 0)


async def expire(tenant: Tenant, ago: timedelta) -> None:
    """Moves the expiry of all grants into the past."""
    await tenant.sql("UPDATE credit_grant SET expires_at = $2 WHERE tenant_id = $1", tenant.id, utcnow() - ago)
    await tenant.sql("UPDATE account SET next_expiry = now() WHERE tenant_id = $1", tenant.id)


@pytest.mark.parametrize(("markup", "total", "rolled"), [(0, 40, 0), (-50, 20, 10)])
async def test_credit_that_expires_before_the_invoice_still_pays_the_usage_until_then(
    billing: Billing, markup: int, total: int, rolled: int
) -> None:
    tenant, _, model = await limited(billing, 100 * UNIT, base_nanos=0, usage_markup_percent=markup)
    await tenant.use("before", model, occurred_at=START, input_tokens=400)
    # This was used after the expiry: the credit is not kept for it.
    await tenant.use("after", model, input_tokens=10)
    for usage_id in ("before", "after"):
        await tenant.verdict(usage_id)
    if rolled:
        await tenant.sql(
            """
            UPDATE credit_grant
            SET rollover_until = now() + interval '1 day', rollover_nanos = $2, expires_at = now()
            WHERE tenant_id = $1
            """,
            tenant.id,
            rolled * UNIT,
        )
    await expire(tenant, timedelta(hours=2))
    assert (await balance(tenant), await left(tenant)) == ((rolled - 1) * UNIT, rolled * UNIT)
    owed = {"cash": 100 * UNIT, "prepaid": -(40 + rolled) * UNIT, "revenue": (rolled - 60) * UNIT}
    assert await journal(tenant) == owed
    done = await finalised(billing, tenant)
    assert (done["applied_minor"], done["due_minor"], done["status"]) == (total * 100, 0, "paid")
    # The part that the invoice did not need has expired, too.
    assert (await balance(tenant), await left(tenant)) == ((rolled - 1) * UNIT, rolled * UNIT)
    owed = {"cash": 100 * UNIT, "prepaid": -rolled * UNIT, "revenue": (rolled - 100) * UNIT}
    assert await journal(tenant) == {account: nanos for account, nanos in owed.items() if nanos}
    grant = (await tenant.http.get("/api/v1/grants")).json()["items"][0]
    assert grant["expired_nanos"] == (100 - total - rolled) * UNIT


@pytest.mark.parametrize("rolled", [0, 100])
async def test_credit_that_a_hold_reserves_expires_when_the_hold_has_ended(billing: Billing, rolled: int) -> None:
    tenant = await billing.tenant(credit_nanos=0)
    body = {"tenant_id": tenant.id, "nanos": 1000, "kind": "prepaid", "reason": "r"}
    soon, later = ((utcnow() + timedelta(hours=n)).isoformat() for n in (1, 2))
    rollover = {"expires_at": soon, "rollover_until": later, "rollover_nanos": rolled}
    await post(billing, "grants", body | (rollover if rolled else {}))
    hold_id = uuid7()
    assert (await tenant.reserve(hold_id=hold_id, input_tokens=4)).granted
    await expire(tenant, timedelta(seconds=1))
    assert (await balance(tenant), await left(tenant)) == (600 + rolled, 600 + rolled)
    [(soon,)] = await tenant.sql("SELECT next_expiry > now() FROM account WHERE tenant_id = $1", tenant.id)
    assert soon, "each request would look at the grants again"
    await tenant.use("a", hold_id=hold_id, input_tokens=3, output_tokens=0)
    await tenant.verdict("a")
    await tenant.sql("UPDATE account SET next_expiry = now() WHERE tenant_id = $1", tenant.id)
    assert (await balance(tenant), await left(tenant)) == (rolled, rolled)
    assert (await journal(tenant))["revenue"] == rolled - 1000
    grant = (await tenant.http.get("/api/v1/grants")).json()["items"][0]
    assert grant["expired_nanos"] == 550 - rolled


async def test_a_hold_keeps_expired_credit_for_a_day_at_most(billing: Billing) -> None:
    tenant = await billing.tenant(credit_nanos=1000)
    assert (await tenant.reserve(input_tokens=4)).granted
    await expire(tenant, timedelta(days=1))
    assert await left(tenant) == 0


async def test_totals_use_the_minor_unit_of_the_currency(billing: Billing) -> None:
    for currency, total in (("JPY", 12), ("KWD", 12346)):
        tenant = await billing.tenant(currency=currency)
        made = await post(
            billing,
            "plans",
            plan(currency=currency, base_nanos=12_345_600_000, charges=[], included=[], usage_markup_percent=None),
        )
        body = {"tenant_id": tenant.id, "plan_id": made["id"], "starts_at": START.isoformat(), **ANCHOR}
        await post(billing, "subscriptions", body)
        made = await draft(billing, tenant)
        assert made["total_minor"] == total
        await post(billing, f"invoices/{made['id']}/finalise", status=200)
        await journal(tenant)


async def test_the_clock_closes_and_finalises_what_is_due(billing: Billing) -> None:
    tenant, _ = await subscribed(billing)
    clock = Clock(billing.platform.database("billing"), Seller(), {})
    start = utcnow() - CLOSE_AFTER - timedelta(hours=1)
    await tenant.sql("UPDATE period SET ends = $2 WHERE tenant_id = $1 AND begins = $3", tenant.id, start, START)

    async def status() -> str:
        items = (await tenant.http.get("/api/v1/invoices")).json()["items"]
        return str(items[0]["status"]) if items else "none"

    await clock.close()
    assert await status() == "draft"
    await tenant.sql("UPDATE invoice SET made_at = $2 WHERE tenant_id = $1", tenant.id, utcnow() - FINALISE_AFTER)
    await clock.close()
    assert await status() == "finalised"


@pytest.mark.parametrize("when", ["before", "after"])
async def test_usage_outside_of_the_time_of_a_subscription_is_paid_from_grants(billing: Billing, when: str) -> None:
    tenant = await billing.tenant()
    made = await post(billing, "plans", plan())
    begins = utcnow() + timedelta(days=3 if when == "before" else -3)
    body = {"tenant_id": tenant.id, "plan_id": made["id"], "starts_at": begins.isoformat()}
    subscription = await post(billing, "subscriptions", body)
    await post(billing, "grants", {"tenant_id": tenant.id, "nanos": UNIT, "reason": "welcome"})
    spent = 0
    if when == "after":
        await tenant.use("during", input_tokens=1_000_000, output_tokens=1)
        await tenant.verdict("during")
        await billing.operator.delete(f"/api/v1/subscriptions/{subscription['id']}", params={"when": "now"})
    await tenant.use("outside", input_tokens=1_000_000, output_tokens=1)
    spent = (await tenant.verdict("outside"))["amount_nanos"]
    assert spent > 0
    # A change of the grants burns the usage since the last one.
    await post(billing, "grants", {"tenant_id": tenant.id, "nanos": UNIT, "reason": "more"})
    items = (await tenant.http.get("/api/v1/grants")).json()["items"]
    assert sum(grant["left_nanos"] for grant in items) == 2 * UNIT - spent
    journal = (await tenant.http.get("/api/v1/billing/journal")).json()
    assert journal["balances"]["revenue"] == -spent


async def test_usage_that_is_late_for_the_last_invoice_of_a_subscription_gets_another_one(billing: Billing) -> None:
    """It was free: no period of the subscription was open any more."""
    tenant, subscription = await subscribed(billing, charges=[], included=[], usage_markup_percent=0)
    await billing.operator.delete(f"/api/v1/subscriptions/{subscription['id']}", params={"when": "now"})
    whole = await post(billing, "billing/periods/close", {"tenant_id": tenant.id}, status=200)
    assert len(whole["items"]) == 2
    for round_ in range(2):
        # The next late records need an invoice of their own again.
        due = 0
        for n in range(2):
            usage_id = f"late/{round_}/{n}"
            await tenant.use(usage_id, occurred_at=START + timedelta(days=n), input_tokens=1_000_000, output_tokens=0)
            due += (await tenant.verdict(usage_id))["amount_nanos"]
        made = await draft(billing, tenant)
        [line] = (await tenant.http.get(f"/api/v1/invoices/{made['id']}/lines")).json()["items"]
        assert (line["amount_nanos"], made["subtotal_nanos"]) == (due, due)
        assert "(2 records of an earlier period)" in line["description"]
    # Usage after the end does not belong to the subscription.
    await tenant.use("after", input_tokens=1_000_000, output_tokens=0)
    await tenant.verdict("after")
    assert (await post(billing, "billing/periods/close", {"tenant_id": tenant.id}, status=200))["items"] == []


async def test_a_record_that_waited_long_for_its_price_is_invoiced_by_the_plan_of_its_time(billing: Billing) -> None:
    tenant, subscription = await subscribed(billing, base_nanos=0, charges=[], included=[])
    model = f"acme/{uuid7()}"
    await tenant.use("held", model, occurred_at=START + timedelta(days=1), input_tokens=1000, output_tokens=0)
    assert (await tenant.verdict("held"))["verdict"] == "held"
    await draft(billing, tenant)
    # Two months pass.
    for table, columns in (("period", ("begins", "ends")), ("usage", ("occurred_at", "rated_at"))):
        earlier = ", ".join(f"{column} = {column} - interval '61 days'" for column in columns)
        closed = "AND closed_at IS NOT NULL" if table == "period" else ""
        await tenant.sql(f"UPDATE {table} SET {earlier} WHERE tenant_id = $1 {closed}", tenant.id)
    await post(billing, "prices", {"resource": model, "nanos_per_unit": {"input_tokens": "100", "output_tokens": "0"}})
    await post(billing, "billing/held/held/resolve", {"tenant_id": tenant.id}, status=200)
    assert (await tenant.verdict("held"))["amount_nanos"] == 100_000
    await billing.operator.delete(f"/api/v1/subscriptions/{subscription['id']}", params={"when": "now"})
    assert (await draft(billing, tenant))["subtotal_nanos"] == 110_000


@pytest.mark.parametrize(
    ("fee", "subtotal", "tax", "due", "rest"),
    [(60, 0, 0, 0, 40), (100, 0, 0, 0, 0), (150, 50, 10, 6000, 0)],
)
async def test_credit_that_was_bought_pays_before_tax_because_the_tax_on_it_is_paid(
    billing: Billing, fee: int, subtotal: int, tax: int, due: int, rest: int
) -> None:
    tenant = await billing.tenant(credit_nanos=0)
    rate = {"country": "FR", "percent": "20", "valid_from": "2020-01-01T00:00:00Z"}
    assert (await billing.operator.post("/api/v1/tax-rates", json=rate)).status_code in (201, 409)
    assert (await tenant.http.put("/api/v1/billing/buyer", json={"country": "FR"})).status_code == 200
    order = (await tenant.http.post("/api/v1/grants", json={"nanos": 100 * UNIT})).json()
    async with billing.platform.database("billing").begin(tenant_id=tenant.id) as tx:
        await accounts.lock_one(tx, tenant.id)
        await purchases.issue(tx, tenant.id, UUID(order["id"]), "test")
    await post(billing, f"invoices/{order['id']}/received", {"amount_minor": 12000, "reference": "SEPA"}, status=200)
    # Of a lower priority number, and still after the credit that was bought.
    await post(billing, "grants", {"tenant_id": tenant.id, "nanos": 1, "priority": 0, "reason": "r"})
    made = await post(billing, "plans", plan(base_nanos=fee * UNIT, charges=[], included=[], usage_markup_percent=None))
    body = {"tenant_id": tenant.id, "plan_id": made["id"], "starts_at": START.isoformat(), **ANCHOR}
    await post(billing, "subscriptions", body)
    closed = await draft(billing, tenant)
    path = f"/api/v1/invoices/{closed['id']}"
    amounts = ("subtotal_nanos", "tax_nanos", "total_minor")

    async def views() -> list[Any]:
        """The amounts and the lines in each view of the invoice."""
        listed = (await tenant.http.get("/api/v1/invoices")).json()["items"][-1]
        shown = (await tenant.http.get(path)).json()
        pages = [(await tenant.http.get(f"{path}/lines", params={"limit": 1})).json()]
        while pages[-1]["next"]:
            more = {"limit": 1, "cursor": pages[-1]["next"]}
            pages.append((await tenant.http.get(f"{path}/lines", params=more)).json())
        paged = [line for one in pages for line in one["items"]]
        csv = (await tenant.http.get(f"{path}/csv")).text
        return [[one[name] for one in (listed, shown) for name in amounts], shown["lines"], paged, csv]

    before = await views()
    done = await post(billing, f"invoices/{closed['id']}/finalise", status=200)
    assert await views() == before
    assert [closed[name] for name in amounts] == [done[name] for name in amounts]
    found = (done["subtotal_nanos"], done["tax_nanos"], done["due_minor"], done["applied_minor"])
    assert found == (subtotal * UNIT, tax * UNIT, due, 0)
    lines = (await tenant.http.get(f"/api/v1/invoices/{done['id']}/lines")).json()["items"]
    assert [line["amount_nanos"] for line in lines] == [fee * UNIT, (subtotal - fee) * UNIT]
    assert "paid and taxed before" in lines[1]["description"]
    assert await left(tenant) == await balance(tenant) == rest * UNIT + 1
    assert await journal(tenant) == nonzero(
        cash=120 * UNIT,
        promotional_cost=1,
        promotional_credit=-1,
        purchased=-rest * UNIT,
        receivable=due * UNIT // 100,
        revenue=-fee * UNIT,
        tax=-(20 + tax) * UNIT,
    )
    if due:
        answer = await billing.operator.post(f"/api/v1/invoices/{done['id']}/void")
        assert (answer.status_code, "is paid" in answer.text) == (409, True)


async def credited(billing: Billing, nanos: int) -> Tenant:
    """A tenant that has bought credit. Its country is not known, so there is no tax."""
    tenant = await billing.tenant(credit_nanos=0)
    order = (await tenant.http.post("/api/v1/grants", json={"nanos": nanos})).json()
    async with billing.platform.database("billing").begin(tenant_id=tenant.id) as tx:
        await accounts.lock_one(tx, tenant.id)
        await purchases.issue(tx, tenant.id, UUID(order["id"]), "test")
    return tenant


async def test_a_tenant_without_a_limit_may_order_up_to_the_largest_sum_of_its_grants(billing: Billing) -> None:
    tenant = await billing.tenant()
    await post(billing, "grants", {"tenant_id": tenant.id, "nanos": accounts.MAX_CREDIT_NANOS - UNIT, "reason": "r"})
    too_much = await tenant.http.post("/api/v1/grants", json={"nanos": 2 * UNIT})
    assert (field_of(too_much), f"at most {UNIT}" in too_much.text) == ("nanos", True)
    assert (await tenant.http.post("/api/v1/grants", json={"nanos": UNIT})).status_code == 201


async def test_credit_that_was_bought_is_shown_by_one_draft_only(billing: Billing) -> None:
    tenant = await credited(billing, 40 * UNIT)
    made = await post(billing, "plans", plan(charges=[], included=[], usage_markup_percent=None))
    body = {"tenant_id": tenant.id, "plan_id": made["id"], "starts_at": START.isoformat(), **ANCHOR}
    await post(billing, "subscriptions", body)
    await draft(billing, tenant)
    # The fee of the next period is for the whole of it.
    await tenant.sql(
        """
        UPDATE period
        SET begins = begins - interval '1 day', ends = now() - interval '1 hour',
            full_begins = begins - interval '1 day', full_ends = now() - interval '1 hour'
        WHERE tenant_id = $1 AND closed_at IS NULL
        """,
        tenant.id,
    )
    await draft(billing, tenant)
    [_, *drafts] = (await tenant.http.get("/api/v1/invoices")).json()["items"]
    ids = [one["id"] for one in drafts]

    async def views() -> list[Any]:
        listed = (await tenant.http.get("/api/v1/invoices")).json()["items"]
        shown = [(await tenant.http.get(f"/api/v1/invoices/{id_}")).json() for id_ in ids]
        assert [one["subtotal_nanos"] for one in listed[1:]] == [one["subtotal_nanos"] for one in shown]
        return [[line["amount_nanos"] // UNIT for line in one["lines"]] for one in shown]

    assert await views() == [[30, -30], [30, -10]]
    # The other one takes the credit if it is finalised first.
    await post(billing, f"invoices/{ids[1]}/finalise", status=200)
    assert await views() == [[30, -10], [30, -30]]
    await post(billing, f"invoices/{ids[0]}/finalise", status=200)
    assert await views() == [[30, -10], [30, -30]]
    assert await left(tenant) == 0


async def test_a_page_of_lines_before_the_last_waits_for_no_other_work_on_the_account(billing: Billing) -> None:
    tenant, _ = await subscribed(billing)
    await tenant.use("a", occurred_at=START, input_tokens=1, output_tokens=1)
    await tenant.verdict("a")
    path = f"/api/v1/invoices/{(await draft(billing, tenant))['id']}/lines"
    async with billing.platform.database("billing").begin(tenant_id=tenant.id) as tx:
        await accounts.lock_one(tx, tenant.id)
        first = (await tenant.http.get(path, params={"limit": 1})).json()
    rest = (await tenant.http.get(path, params={"cursor": first["next"]})).json()
    assert [line["quantity"] for line in first["items"] + rest["items"]] == [1, 1, 1, 1]


async def test_a_correction_gives_credit_that_was_bought_back_as_such(billing: Billing) -> None:
    tenant = await credited(billing, UNIT)
    await tenant.use("a", input_tokens=1000, output_tokens=0)
    assert (await tenant.verdict("a"))["amount_nanos"] == 150_000
    assert await left(tenant) == UNIT - 150_000
    body = {"tenant_id": tenant.id, "amount_nanos": 50_000, "reason": "r", "usage_id": "a"}
    await post(billing, "billing/corrections", body)
    items = (await tenant.http.get("/api/v1/grants")).json()["items"]
    assert {(item["kind"], item["left_nanos"]) for item in items} == {
        ("purchased", UNIT - 150_000),
        ("purchased", 50_000),
    }


async def test_a_correction_by_hand_is_a_line_at_face_value_on_the_next_invoice(billing: Billing) -> None:
    tenant, subscription, model = await limited(billing, 2 * UNIT, base_nanos=0, minimum_nanos=1)
    await tenant.use("a", model, occurred_at=START, input_tokens=1, output_tokens=0)
    await tenant.use("b", model, occurred_at=utcnow(), input_tokens=1, output_tokens=0)
    await tenant.verdict("a")
    await tenant.verdict("b")
    await finalised(billing, tenant)
    before = await balance(tenant)

    async def correct(nanos: int, **changes: str) -> None:
        body = {"tenant_id": tenant.id, "amount_nanos": nanos, "reason": f"of {nanos}"}
        await post(billing, "billing/corrections", body | changes)

    await correct(UNIT, usage_id="a")
    await correct(-UNIT // 4)
    assert await left(tenant) == 2 * UNIT - UNIT // 10 * 110 // 100, "no grant is changed before the invoice"
    assert await balance(tenant) == before + UNIT * 3 // 4

    await billing.operator.delete(f"/api/v1/subscriptions/{subscription['id']}", params={"when": "now"})
    made = await draft(billing, tenant)
    lines = (await tenant.http.get(f"/api/v1/invoices/{made['id']}/lines")).json()["items"]
    assert [(line["description"], line["amount_nanos"]) for line in lines[-2:]] == [
        ("Correction: of 1000000000", -UNIT),
        ("Correction: of -250000000", UNIT // 4),
    ]
    assert made["subtotal_nanos"] == -UNIT * 3 // 4 + UNIT // 10 * 110 // 100
    await post(billing, f"invoices/{made['id']}/finalise", status=200)
    assert await balance(tenant) == await left(tenant), "as much can be used as is paid"
    # The subscription has ended: grants cover the correction.
    await correct(-UNIT // 4)
    await post(billing, "grants", {"tenant_id": tenant.id, "nanos": 1, "reason": "r"})
    assert await balance(tenant) == await left(tenant)


def nonzero(**amounts: int) -> dict[str, int]:
    return {name: nanos for name, nanos in amounts.items() if nanos}
