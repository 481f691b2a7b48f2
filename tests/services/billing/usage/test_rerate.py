"""Re-rating books signed differences once, and the proof of a line goes down to one record."""

from __future__ import annotations

import csv
import io
import itertools
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from infra.clock import utcnow, uuid7
from services.billing.clock import Clock
from services.billing.invoices import store as invoices
from services.billing.invoices.tax import Seller
from tests.services.billing.conftest import Billing, Tenant, pdf_pages
from tests.services.billing.invoices.test_invoices import (
    MIDNIGHT,
    START,
    UNIT,
    balance,
    draft,
    expire,
    field_of,
    finalised,
    journal,
    left,
    limited,
    plan,
    post,
    subscribed,
)

AT = START + timedelta(days=2)
CENT = UNIT // 100


def credit_of(minor: int) -> dict[str, Any]:
    return {"amount_minor": minor, "reason": "r"}


async def price(billing: Billing, resource: str, nanos: str) -> None:
    body = {
        "resource": resource,
        "nanos_per_unit": {"input_tokens": nanos, "output_tokens": "0"},
        "valid_from": (START - timedelta(days=1)).isoformat(),
    }
    await post(billing, "prices", body)


async def rerate(billing: Billing, tenant: Tenant, **changes: Any) -> dict[str, Any]:
    body = {
        "from": START.isoformat(),
        "to": (utcnow() + timedelta(hours=1)).isoformat(),
        "tenant_id": tenant.id,
        "dry_run": False,
    }
    return dict(await post(billing, "billing/rerate", body | changes, status=200))


async def lines(tenant: Tenant, invoice_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await tenant.http.get(f"/api/v1/invoices/{invoice_id}/lines")).json()["items"]
    return found


async def test_the_proof_of_a_line_has_the_parts_that_are_taken_off(billing: Billing) -> None:
    tiers = [{"up_to": None, "unit_nanos": 10}]
    charges = [
        {"meter": "input_tokens", "by": "model", "scheme": "per_unit", "tiers": tiers},
        {"meter": "cached_tokens", "by": "model", "scheme": "per_unit", "tiers": tiers},
    ]
    tenant, _ = await subscribed(billing, base_nanos=0, charges=charges, included=[], usage_markup_percent=None)
    for usage_id, model, cached in (("a", "openai/gpt-4o-mini", 40), ("b", "openai/gpt-4o", 1)):
        await tenant.use(usage_id, model, occurred_at=AT, input_tokens=100, cached_tokens=cached, output_tokens=1)
        await tenant.verdict(usage_id)
    made = await draft(billing, tenant)
    [line] = [
        one
        for one in await lines(tenant, made["id"])
        if "without cached_tokens of model openai/gpt-4o-mini" in one["description"]
    ]
    proof = (await tenant.http.get(f"/api/v1/billing/lines/{line['id']}/explain")).json()
    assert (proof["buckets"]["sum"], proof["without"], proof["equal"]) == (100, {"cached_tokens": 40}, True)
    assert line["quantity"] == 100 - 40


async def test_a_corrected_price_is_booked_once_and_comes_with_the_next_invoice(billing: Billing) -> None:
    tenant, subscription = await subscribed(billing, base_nanos=0, charges=[], included=[])
    model = f"acme/{uuid7()}"
    await price(billing, model, "100")
    for n, tokens in enumerate((10, 20)):
        await tenant.use(f"a/{n}", model, occurred_at=AT, input_tokens=tokens, output_tokens=1)
        await tenant.verdict(f"a/{n}")
    first = await draft(billing, tenant)
    assert first["subtotal_nanos"] == 3300
    await price(billing, model, "90")

    dry = await rerate(billing, tenant, dry_run=True)
    assert (dry["records"], dry["changed"], dry["difference_nanos"]) == (2, 2, -300)
    assert (await tenant.get("balance"))["debited_nanos"] == 3000
    done = await rerate(billing, tenant)
    assert done["items"] == dry["items"]
    assert done["items"][0]["from_version"] == f"{model}@1"
    assert done["items"][0]["to_version"] == f"{model}@2"
    assert (await tenant.get("balance"))["debited_nanos"] == 2700
    assert (await rerate(billing, tenant))["changed"] == 0
    assert [e["amount_nanos"] for e in (await tenant.get("ledger"))["items"] if e["kind"] == "correction"] == [100, 200]

    # Back to the old price: the difference from the booked amount.
    await price(billing, model, "100")
    assert (await rerate(billing, tenant))["difference_nanos"] == 300
    await price(billing, model, "80")
    assert (await rerate(billing, tenant))["difference_nanos"] == -600
    rebuilt = await billing.operator.post("/api/v1/billing/usage/rebuild", params={"tenant_id": tenant.id})
    assert rebuilt.json()["equal"]

    await billing.operator.delete(f"/api/v1/subscriptions/{subscription['id']}", params={"when": "now"})
    second = await draft(billing, tenant)
    [line] = await lines(tenant, second["id"])
    assert line["amount_nanos"] == -600 * 110 // 100
    assert "corrections" in line["description"]
    proof = (await tenant.http.get(f"/api/v1/billing/lines/{line['id']}/explain")).json()
    assert (proof["buckets"]["sum"], proof["buckets"]["count"], proof["equal"]) == (-600, 6, True)
    # The record is in the line of its use, and in that of its corrections.
    found = {one["invoice_id"]: one["description"] for one in (await tenant.verdict("a/0"))["lines"]}
    assert found == {
        first["id"]: (await lines(tenant, first["id"]))[0]["description"],
        second["id"]: line["description"],
    }


@pytest.mark.parametrize("in_order", [True, False])
async def test_an_invoice_below_zero_is_a_credit_note_that_names_the_invoice_it_corrects(
    billing: Billing, in_order: bool
) -> None:
    tenant, subscription = await subscribed(billing, base_nanos=0, charges=[], included=[])
    model = f"acme/{uuid7()}"
    await price(billing, model, str(UNIT))
    await tenant.use("a", model, occurred_at=AT, input_tokens=10, output_tokens=1)
    await tenant.verdict("a")
    first = await draft(billing, tenant)
    await price(billing, model, str(UNIT // 2))
    assert (await rerate(billing, tenant))["difference_nanos"] == -5 * UNIT
    await billing.operator.delete(f"/api/v1/subscriptions/{subscription['id']}", params={"when": "now"})
    second = await draft(billing, tenant)
    for made in (first, second) if in_order else (second, first):
        await post(billing, f"invoices/{made['id']}/finalise", status=200)
        void = await billing.operator.post(f"/api/v1/invoices/{first['id']}/void")
        assert void.status_code == 409, "5.50 would be given back twice"
        if in_order and made is first:
            assert "corrections of its usage" in void.text
            await post(
                billing, f"invoices/{first['id']}/received", {"amount_minor": 1100, "reference": "r"}, status=200
            )
    [text] = pdf_pages((await tenant.http.get(f"/api/v1/invoices/{second['id']}/pdf")).content)
    assert text.startswith("Credit note INV-00000")
    refused = await billing.operator.post(f"/api/v1/invoices/{second['id']}/credit-notes", json=credit_of(1))
    assert (refused.status_code, "nothing to take back" in refused.text) == (409, True)
    async with billing.platform.database("billing").begin(tenant_id=tenant.id) as tx:
        stored = await invoices.get(tx, tenant.id, UUID(second["id"]))
    assert (stored.rest_minor, stored.owed_minor) == (0, 0), "it became a grant, and is not owed again"
    assert "Total 5.50 USD" in text
    # Finalised later, the other one had no number yet.
    assert ("Corrects invoice INV-000001" in text) == in_order
    await Clock(billing.platform.database("billing"), Seller(), {})._mail(tenant.id, UUID(second["id"]), first=True)
    found = await billing.platform.outbox("billing", "notification")
    [mail] = [
        body for headers, body in found if headers.get("tenant_id") == tenant.id and "Credit note" in body["subject"]
    ]
    assert ": 5.50 USD." in mail["text"]
    [other] = pdf_pages((await tenant.http.get(f"/api/v1/invoices/{first['id']}/pdf")).content)
    assert "Corrects" not in other


@pytest.mark.parametrize(
    ("new_price", "minimum", "is_paid", "corrected", "noted"),
    [
        ("0.5", 0, True, -5.5, 0),
        ("2", 0, True, 11, 0),
        ("2", 0, False, 11, 0),
        ("0.5", 0, False, 0, 660),
        ("0.5", 9, True, -2, 0),
    ],
)
async def test_a_correction_keeps_the_tax_of_the_usage_that_it_corrects(
    billing: Billing, new_price: str, minimum: int, is_paid: bool, corrected: float, noted: int
) -> None:
    """By hand: 10 tokens cost 11 and are taxed with 20 %, and 20 later ones cost 22 and are taxed with 22 %. The
    commitment of the first month fills up to 9 at the price of 0.5."""
    for percent, valid_from in (("20", START), ("22", MIDNIGHT)):
        rate = {"country": "EE", "percent": percent, "valid_from": valid_from.isoformat()}
        assert (await billing.operator.post("/api/v1/tax-rates", json=rate)).status_code in (201, 409)
    tenant, subscription = await subscribed(
        billing, base_nanos=0, charges=[], included=[], minimum_nanos=minimum * UNIT
    )
    assert (await tenant.http.put("/api/v1/billing/buyer", json={"country": "EE"})).status_code == 200
    model, later = f"acme/{uuid7()}", f"acme/{uuid7()}"
    for name in (model, later):
        await price(billing, name, str(UNIT))
    await tenant.use("a", model, occurred_at=AT, input_tokens=10, output_tokens=1)
    await tenant.use("b", later, occurred_at=MIDNIGHT, input_tokens=20, output_tokens=1)
    for usage_id in ("a", "b"):
        await tenant.verdict(usage_id)
    first = await draft(billing, tenant)
    await post(billing, f"invoices/{first['id']}/finalise", status=200)
    if is_paid:
        await post(billing, f"invoices/{first['id']}/received", {"amount_minor": 1320, "reference": "r"}, status=200)
    await price(billing, model, str(int(float(new_price) * UNIT)))
    await rerate(billing, tenant)
    await billing.operator.delete(f"/api/v1/subscriptions/{subscription['id']}", params={"when": "now"})
    shown = await draft(billing, tenant)
    path = f"invoices/{shown['id']}"
    drawn = await lines(tenant, shown["id"])
    csv_before = (await tenant.http.get(f"/api/v1/{path}/csv")).text
    done = await post(billing, f"{path}/finalise", status=200)
    assert [shown[name] for name in ("taxes", "tax_nanos", "total_minor")] == [
        done[name] for name in ("taxes", "tax_nanos", "total_minor")
    ]
    assert await lines(tenant, shown["id"]) == drawn
    csv_text = (await tenant.http.get(f"/api/v1/{path}/csv")).text
    assert csv_text == csv_before

    own = {"note": "22 % EE", "subtotal_nanos": 22 * UNIT, "tax_nanos": 4_840_000_000}
    nanos = int(corrected * UNIT)
    other = {"note": "20 % EE", "subtotal_nanos": nanos, "tax_nanos": nanos // 5}
    assert done["taxes"] == [own, other] if corrected else [own]
    assert done["tax_note"] == "22 % EE"
    assert done["tax_nanos"] == sum(part["tax_nanos"] for part in done["taxes"])
    by_note: dict[str, int] = {}
    for line in drawn:
        note = line["tax_note"] or done["tax_note"]
        by_note[note] = by_note.get(note, 0) + line["amount_nanos"]
    assert by_note == {part["note"]: part["subtotal_nanos"] for part in done["taxes"]}
    assert [row["tax"] for row in csv.DictReader(io.StringIO(csv_text))] == [
        line["tax_note"] or "22 % EE" for line in drawn
    ]
    [text] = pdf_pages((await tenant.http.get(f"/api/v1/{path}/pdf")).content)
    assert ("20 % EE on" in text) == bool(corrected)
    found = await journal(tenant)
    credit = noted * UNIT // 100
    assert found["tax"] == -(2 * UNIT + UNIT // 5) - done["tax_nanos"] + credit // 6
    assert (await tenant.http.get(f"/api/v1/invoices/{first['id']}")).json()["credited_minor"] == noted
    if not corrected:
        return
    # A credit note on an invoice with two taxes would take a part of both back.
    await price(billing, later, str(UNIT // 2))
    assert (await rerate(billing, tenant))["difference_nanos"] == -10 * UNIT
    third = await draft(billing, tenant)
    last = await post(billing, f"invoices/{third['id']}/finalise", status=200)
    assert last["taxes"] == [{"note": "22 % EE", "subtotal_nanos": -11 * UNIT, "tax_nanos": -2_420_000_000}]
    assert (await tenant.http.get(f"/api/v1/{path}")).json()["credited_minor"] == 0


async def invoiced(billing: Billing, **plan: Any) -> tuple[Tenant, dict[str, Any], str, dict[str, Any]]:
    """A tenant, its subscription, a model of its own, and the invoice of 10 of its tokens at 1.00."""
    tenant, subscription = await subscribed(billing, base_nanos=0, charges=[], included=[], **plan)
    model = f"acme/{uuid7()}"
    await price(billing, model, str(UNIT))
    await tenant.use("a", model, occurred_at=AT, input_tokens=10, output_tokens=0)
    await tenant.verdict("a")
    return tenant, subscription, model, await finalised(billing, tenant)


@pytest.mark.parametrize("is_closed", [True, False])
async def test_a_credit_note_cannot_take_back_what_corrections_on_another_invoice_give_back(
    billing: Billing, is_closed: bool
) -> None:
    """By hand: 10 tokens at 1.00 plus 10 % are 11.00. At 0.60 they are 6.60, and the next invoice gives 4.40 back."""
    tenant, subscription, model, first = await invoiced(billing)
    await post(billing, f"invoices/{first['id']}/received", {"amount_minor": 1100, "reference": "r"}, status=200)
    await price(billing, model, str(UNIT * 6 // 10))
    assert (await rerate(billing, tenant))["difference_nanos"] == -4 * UNIT
    if is_closed:
        await billing.operator.delete(f"/api/v1/subscriptions/{subscription['id']}", params={"when": "now"})
        second = await finalised(billing, tenant)
        assert (second["total_minor"], await left(tenant)) == (-440, 440 * UNIT // 100)
    path = f"invoices/{first['id']}/credit-notes"
    await post(billing, path, {"amount_minor": 100, "reason": "r"})
    for minor, most in ((1000, 560), (561, 560)):
        too_much = await billing.operator.post(f"/api/v1/{path}", json={"amount_minor": minor, "reason": "r"})
        assert too_much.status_code == 422, "4.40 would be given back twice"
        [error] = too_much.json()["errors"]
        assert (error["field"], f"at most {most}: corrections" in error["message"]) == ("amount_minor", True)
    await post(billing, path, {"amount_minor": 560, "reason": "r"})


async def test_what_a_correction_by_hand_gave_back_is_not_given_back_again(billing: Billing) -> None:
    """By hand: 11.00 are invoiced. 3.00 are given back on the next invoice, so 8.00 are left."""
    tenant, _, _, first = await invoiced(billing)
    by_hand = {"tenant_id": tenant.id, "amount_nanos": 3 * UNIT, "reason": "r", "usage_id": "a"}
    await post(billing, "billing/corrections", by_hand)
    void = await billing.operator.post(f"/api/v1/invoices/{first['id']}/void")
    assert (void.status_code, "corrections of its usage" in void.text) == (409, True)
    path = f"invoices/{first['id']}/credit-notes"
    too_much = await billing.operator.post(f"/api/v1/{path}", json=credit_of(801))
    assert (too_much.status_code, "at most 800: corrections" in too_much.text) == (422, True)
    await post(billing, path, credit_of(800))


async def test_usage_of_a_void_invoice_is_not_given_back_by_hand(billing: Billing) -> None:
    tenant, _, _, first = await invoiced(billing)
    await post(billing, f"invoices/{first['id']}/void", status=200)
    by_hand = {"tenant_id": tenant.id, "amount_nanos": 1, "reason": "r", "usage_id": "a"}
    refused = await billing.operator.post("/api/v1/billing/corrections", json=by_hand)
    assert (refused.status_code, f"invoice {first['number']} of the record is void" in refused.text) == (409, True)
    # Its use may be charged again, such as by another amount.
    await post(billing, "billing/corrections", by_hand | {"amount_nanos": -1})


@pytest.mark.parametrize("by_hand", [True, False])
async def test_what_a_void_invoice_would_have_given_back_is_left_for_a_credit_note(
    billing: Billing, by_hand: bool
) -> None:
    """By hand: 11.00 are paid. The next invoice has 22.00 and gives 4.40 back, and is made void."""
    tenant, subscription, model, first = await invoiced(billing)
    await post(billing, f"invoices/{first['id']}/received", {"amount_minor": 1100, "reference": "r"}, status=200)
    other = f"acme/{uuid7()}"
    await price(billing, other, str(UNIT))
    await tenant.use("b", other, occurred_at=MIDNIGHT, input_tokens=20, output_tokens=0)
    await tenant.verdict("b")
    if by_hand:
        body = {"tenant_id": tenant.id, "amount_nanos": 440 * CENT, "reason": "r", "usage_id": "a"}
        await post(billing, "billing/corrections", body)
    else:
        await price(billing, model, str(UNIT * 6 // 10))
        await rerate(billing, tenant)
    await billing.operator.delete(f"/api/v1/subscriptions/{subscription['id']}", params={"when": "now"})
    second = await finalised(billing, tenant)
    assert second["total_minor"] == 1760
    path = f"invoices/{first['id']}/credit-notes"
    too_much = await billing.operator.post(f"/api/v1/{path}", json=credit_of(661))
    assert field_of(too_much) == "amount_minor"
    await post(billing, f"invoices/{second['id']}/void", status=200)
    await post(billing, path, credit_of(1100))


async def test_what_credit_notes_gave_back_is_not_given_back_by_hand(billing: Billing) -> None:
    """By hand: 11.00 are invoiced, and 8.00 are given back by a note, so 3.00 are left."""
    tenant, _, _, first = await invoiced(billing)
    by_hand = {"tenant_id": tenant.id, "reason": "r", "usage_id": "a"}

    async def refused(nanos: int) -> str:
        body = by_hand | {"amount_nanos": nanos}
        answer = await billing.operator.post("/api/v1/billing/corrections", json=body)
        assert field_of(answer) == "amount_nanos"
        return str(answer.json()["errors"][0]["message"])

    path = f"invoices/{first['id']}/credit-notes"
    await post(billing, path, credit_of(800))
    assert f"at most {3 * UNIT}: credit notes of invoice {first['number']}" in await refused(3 * UNIT + 1)
    await post(billing, "billing/corrections", by_hand | {"amount_nanos": 2 * UNIT})
    await refused(UNIT + 1)
    await post(billing, path, credit_of(100))
    await refused(1)
    await post(billing, "billing/corrections", by_hand | {"amount_nanos": -UNIT})


@pytest.mark.parametrize(("granted", "totals"), [(0, (1100, 0)), (900, (1100, -240)), (1100, (1100, -440))])
async def test_a_draft_that_corrects_an_older_draft_shows_what_it_has_after_that_one(
    billing: Billing, granted: int, totals: tuple[int, int]
) -> None:
    """By hand: the first draft has 11.00. The second one has corrections of -4.40, which a credit note on the first one
    gives as far as grants do not pay that one: all of it, 2.00 or nothing."""
    tenant, subscription = await subscribed(billing, base_nanos=0, charges=[], included=[])
    model = f"acme/{uuid7()}"
    await price(billing, model, str(UNIT))
    await tenant.use("a", model, occurred_at=AT, input_tokens=10, output_tokens=0)
    await tenant.verdict("a")
    if granted:
        await post(billing, "grants", {"tenant_id": tenant.id, "nanos": granted * CENT, "reason": "r"})
    first = await draft(billing, tenant)
    await price(billing, model, str(UNIT * 6 // 10))
    await rerate(billing, tenant)
    await billing.operator.delete(f"/api/v1/subscriptions/{subscription['id']}", params={"when": "now"})
    second = await draft(billing, tenant)
    drawn = [await lines(tenant, made["id"]) for made in (first, second)]
    for made, shown in zip((first, second), drawn, strict=True):
        done = await post(billing, f"invoices/{made['id']}/finalise", status=200)
        assert (done["total_minor"], await lines(tenant, made["id"])) == (made["total_minor"], shown)
    assert (first["total_minor"], second["total_minor"]) == totals


async def test_credit_that_is_kept_for_an_invoice_pays_it_also_if_a_credit_note_gives_its_corrections(
    billing: Billing,
) -> None:
    """By hand: 10 tokens are invoiced and not paid. The next month has 20, for which the credit of 100 is kept that has
    expired since. At 0.60 a note gives 4.00 on the first invoice, and the second one has 12.00."""
    tenant, subscription, model, _ = await invoiced(billing, usage_markup_percent=0)
    await post(billing, "grants", {"tenant_id": tenant.id, "nanos": 100 * UNIT, "kind": "prepaid", "reason": "r"})
    await tenant.use("b", model, occurred_at=MIDNIGHT, input_tokens=20, output_tokens=0)
    await tenant.verdict("b")
    await expire(tenant, timedelta(0))
    assert (await left(tenant), await journal(tenant)) == (
        0,
        {"cash": 100 * UNIT, "prepaid": -20 * UNIT, "receivable": 10 * UNIT, "revenue": -90 * UNIT},
    )
    await price(billing, model, str(UNIT * 6 // 10))
    await rerate(billing, tenant)
    await billing.operator.delete(f"/api/v1/subscriptions/{subscription['id']}", params={"when": "now"})
    done = await finalised(billing, tenant)
    assert (done["total_minor"], done["applied_minor"], done["status"]) == (1200, 1200, "paid")
    await left(tenant)
    assert await journal(tenant) == {"cash": 100 * UNIT, "receivable": 6 * UNIT, "revenue": -106 * UNIT}


async def test_two_drafts_that_correct_one_unpaid_invoice_show_what_each_of_them_gives(billing: Billing) -> None:
    """By hand: 5.00 of 11.00 are paid. The first draft has -4.40, which a credit note gives. The second one has -5.50,
    and a note can give 1.60 of it, the rest of the unpaid amount."""
    tenant, subscription, model, first = await invoiced(billing)
    await post(billing, f"invoices/{first['id']}/received", {"amount_minor": 500, "reference": "r"}, status=200)
    await price(billing, model, str(UNIT * 6 // 10))
    await rerate(billing, tenant)
    await billing.operator.delete(f"/api/v1/subscriptions/{subscription['id']}", params={"when": "now"})
    second = await draft(billing, tenant)
    await price(billing, model, str(UNIT // 10))
    await rerate(billing, tenant)
    third = await draft(billing, tenant)
    for made in (second, third):
        shown = (await tenant.http.get(f"/api/v1/invoices/{made['id']}")).json()
        assert shown["total_minor"] == made["total_minor"] == (0 if made is second else -390)
    for made in (second, third):
        drawn = await lines(tenant, made["id"])
        done = await post(billing, f"invoices/{made['id']}/finalise", status=200)
        assert (done["total_minor"], await lines(tenant, made["id"])) == (made["total_minor"], drawn)
    notes = (await tenant.http.get(f"/api/v1/invoices/{first['id']}/credit-notes")).json()["items"]
    assert [note["amount_minor"] for note in notes] == [440, 160]


async def test_an_invoice_corrects_two_drafts_that_have_begun_in_one_second(billing: Billing) -> None:
    """By hand: each has 10 tokens at 1.00 plus 10 %, and at 2.00 it is 11.00 more. Both are of a time with 20 %, and
    the new invoice is of one with 22 %."""
    for percent, valid_from in (("20", START), ("22", MIDNIGHT)):
        rate = {"country": "EE", "percent": percent, "valid_from": valid_from.isoformat()}
        assert (await billing.operator.post("/api/v1/tax-rates", json=rate)).status_code in (201, 409)
    tenant, subscription = await subscribed(billing, base_nanos=0, charges=[], included=[])
    assert (await tenant.http.put("/api/v1/billing/buyer", json={"country": "EE"})).status_code == 200
    model = f"acme/{uuid7()}"
    await price(billing, model, str(UNIT))
    for usage_id, at in (("a", AT), ("b", MIDNIGHT)):
        await tenant.use(usage_id, model, occurred_at=at, input_tokens=10, output_tokens=0)
        await tenant.verdict(usage_id)
    await billing.operator.delete(f"/api/v1/subscriptions/{subscription['id']}", params={"when": "now"})
    assert len((await post(billing, "billing/periods/close", {"tenant_id": tenant.id}, status=200))["items"]) == 2
    await tenant.sql("UPDATE invoice SET begins = $2, ends = $3 WHERE tenant_id = $1", tenant.id, START, MIDNIGHT)
    await price(billing, model, str(2 * UNIT))
    assert (await rerate(billing, tenant))["difference_nanos"] == 20 * UNIT
    made = await finalised(billing, tenant)
    assert [(part["note"], part["subtotal_nanos"]) for part in made["taxes"]] == [
        ("22 % EE", 0),
        ("20 % EE", 22 * UNIT),
    ]
    ids = [line["id"] for line in await lines(tenant, made["id"])]
    assert len(ids) == len(set(ids))


async def test_a_credit_note_takes_back_what_a_commitment_has_charged_again(billing: Billing) -> None:
    """By hand: 20.00 are committed. 10 tokens at 1.00 plus 10 % are 11.00, and 9.00 are missing. At 0.60 they are 6.60:
    the next invoice has -4.40, and 4.40 more of the commitment. It gives nothing back."""
    tenant, _, model, first = await invoiced(billing, minimum_nanos=20 * UNIT)
    await price(billing, model, str(UNIT * 6 // 10))
    assert (await rerate(billing, tenant))["difference_nanos"] == -4 * UNIT
    note = await post(billing, f"invoices/{first['id']}/credit-notes", {"amount_minor": 2000, "reason": "r"})
    assert note["amount_minor"] == first["total_minor"]


@pytest.mark.parametrize("is_written_off", [False, True])
async def test_a_correction_of_an_unpaid_invoice_reduces_it_and_is_no_credit(
    billing: Billing, is_written_off: bool
) -> None:
    """By hand: 10 tokens at 1.00 plus 10 % are 11.00. At 0.60 they are 6.60, and at 0.50 5.50."""
    tenant, subscription, model, first = await invoiced(billing)
    await price(billing, model, str(UNIT * 6 // 10))
    await rerate(billing, tenant)
    if is_written_off:
        await post(billing, f"invoices/{first['id']}/uncollectible", status=200)
    await billing.operator.delete(f"/api/v1/subscriptions/{subscription['id']}", params={"when": "now"})
    shown = await draft(billing, tenant)
    assert [line["amount_nanos"] for line in await lines(tenant, shown["id"])] == [-440 * CENT, 440 * CENT]
    second = await post(billing, f"invoices/{shown['id']}/finalise", status=200)
    assert (shown["total_minor"], second["total_minor"], second["status"]) == (0, 0, "paid")
    assert await left(tenant) == 0, "credit for money that was never paid"
    [note] = (await tenant.http.get(f"/api/v1/invoices/{first['id']}/credit-notes")).json()["items"]
    assert note["amount_minor"] == 440
    found = (await tenant.http.get(f"/api/v1/invoices/{first['id']}")).json()
    assert (found["due_minor"], found["credited_minor"]) == (0 if is_written_off else 660, 440)
    lost = {"write_off": 660 * CENT} if is_written_off else {"receivable": 660 * CENT}
    assert await journal(tenant) == {"revenue": -660 * CENT} | lost
    # Another correction counts from there.
    await price(billing, model, str(UNIT // 2))
    again = await rerate(billing, tenant)
    if is_written_off:
        assert [one["reason"] for one in again["left_out"]] == ["the invoice was written off"]
        return
    assert again["difference_nanos"] == -1 * UNIT
    await post(billing, f"invoices/{(await draft(billing, tenant))['id']}/finalise", status=200)
    assert await journal(tenant) == {"revenue": -550 * CENT, "receivable": 550 * CENT}
    too_much = await billing.operator.post(f"/api/v1/invoices/{first['id']}/credit-notes", json=credit_of(551))
    assert too_much.status_code == 422
    await post(billing, f"invoices/{first['id']}/credit-notes", credit_of(550))
    assert await journal(tenant) == {}


@pytest.mark.parametrize(("granted", "status", "due"), [(500, "uncollectible", 600), (2000, "paid", 0)])
async def test_prepaid_credit_pays_before_a_write_off(billing: Billing, granted: int, status: str, due: int) -> None:
    tenant, _ = await subscribed(billing, base_nanos=11 * UNIT, charges=[], included=[])
    first = await finalised(billing, tenant)
    pdf = (await tenant.http.get(f"/api/v1/invoices/{first['id']}/pdf")).content
    body = {"tenant_id": tenant.id, "nanos": granted * CENT, "kind": "prepaid", "reason": "r"}
    await post(billing, "grants", body)
    ended = await post(billing, f"invoices/{first['id']}/uncollectible", status=200)
    assert (ended["status"], ended["paid_minor"]) == (status, min(granted, 1100))
    assert await left(tenant) == max(0, granted - 1100) * CENT
    assert (await journal(tenant)).get("write_off", 0) == due * CENT
    assert (await tenant.http.get(f"/api/v1/invoices/{first['id']}/pdf")).content == pdf


async def test_a_line_is_proved_down_to_one_record(billing: Billing) -> None:
    tenant, _ = await subscribed(billing, charges=[], included=[])
    run_id = uuid7()
    await tenant.use(
        f"{run_id}/3/1", occurred_at=AT, run_id=run_id, input_tokens=100, cached_tokens=40, output_tokens=7
    )
    await tenant.use("other", occurred_at=AT + timedelta(days=1), input_tokens=1, output_tokens=1)
    await tenant.use("elsewhere", "scripted/answer", occurred_at=AT, input_tokens=1, output_tokens=1)
    for usage_id in (f"{run_id}/3/1", "other", "elsewhere"):
        await tenant.verdict(usage_id)
    made = await draft(billing, tenant)
    base, ours, _ = await lines(tenant, made["id"])
    path = f"/api/v1/billing/lines/{ours['id']}/explain"
    proof = (await tenant.http.get(path, params={"usage_id": f"{run_id}/3/1"})).json()
    cost = 60 * 150 + 40 * 75 + 7 * 600
    assert proof["buckets"] == proof["records"]
    assert (proof["buckets"]["count"], proof["buckets"]["sum"], proof["equal"]) == (2, cost + 750, True)
    assert proof["price_versions"] == ["openai/gpt-4o-mini@1"]
    assert proof["runs"] == [str(run_id)]
    assert (proof["first"]["usage_id"], proof["last"]["usage_id"]) == (f"{run_id}/3/1", "other")
    record = proof["record"]
    assert {part["unit"]: (part["quantity"], part["nanos"]) for part in record["parts"]} == {
        "input_tokens": (60, "9000"),
        "cached_tokens": (40, "3000"),
        "output_tokens": (7, "4200"),
    }
    assert (record["step"], record["answer"]) == (3, f"/api/v1/runs/{run_id}")
    # And back, from the record to the line.
    [line] = (await tenant.verdict(f"{run_id}/3/1"))["lines"]
    assert (line["id"], line["invoice_id"], line["description"]) == (ours["id"], made["id"], ours["description"])
    assert record["usage"]["amount_nanos"] == cost
    assert (await tenant.http.get(path, params={"usage_id": "elsewhere"})).status_code == 404
    fee = (await tenant.http.get(f"/api/v1/billing/lines/{base['id']}/explain")).json()
    assert (fee["meter"], fee["amount_nanos"], fee["buckets"]["count"]) == (None, 30 * UNIT, 0)
    other = await billing.tenant()
    assert (await other.http.get(path)).status_code == 404
    # A record that was changed behind the service's back is found.
    await tenant.sql("UPDATE usage SET amount_nanos = amount_nanos + 1 WHERE tenant_id = $1", tenant.id)
    assert (await tenant.http.get(path)).json()["equal"] is False
    await tenant.sql("UPDATE usage SET amount_nanos = amount_nanos - 1 WHERE tenant_id = $1", tenant.id)


async def test_rerating_needs_the_operator_and_a_sound_time(billing: Billing) -> None:
    tenant = await billing.tenant(credit_nanos=10**6)
    body = {"from": "2026-01-02T00:00:00Z", "to": "2026-01-01T00:00:00Z", "dry_run": True}
    answer = await billing.operator.post("/api/v1/billing/rerate", json=body)
    assert answer.json()["errors"][0]["field"] == "to"
    assert (await tenant.http.post("/api/v1/billing/rerate", json=body)).status_code == 403
    body = {"from": START.isoformat(), "to": utcnow().isoformat(), "dry_run": True, "tenant_id": "unknown"}
    assert (await billing.operator.post("/api/v1/billing/rerate", json=body)).status_code == 404


async def test_budgets_follow_the_corrections_of_their_running_period(billing: Billing) -> None:
    """By hand: ten tokens cost 1,000 at 100, 600 at 60 and 1,300 at 130. The first record is of the day before."""
    tenant = await billing.tenant()
    model = f"acme/{uuid7()}"
    await price(billing, model, "100")

    async def spent(period: str) -> int:
        body = {"scope": "tenant", "period": period, "nanos": 1000}
        return int((await tenant.http.post("/api/v1/budgets", json=body)).json()["spent_nanos"])

    for usage_id in ("before", "today"):
        await tenant.use(usage_id, model, input_tokens=10, output_tokens=0)
        await tenant.verdict(usage_id)
    await tenant.sql(
        "UPDATE usage SET rated_at = rated_at - interval '1 day' WHERE tenant_id = $1 AND usage_id = 'before'",
        tenant.id,
    )
    assert (await spent("day"), await spent("total")) == (1000, 2000)
    for nanos, cost in (("60", 600), ("130", 1300)):
        await price(billing, model, nanos)
        await rerate(billing, tenant)
        assert (await spent("day"), await spent("total")) == (cost, 2 * cost)
    # The last one is of no record, and so of no budget.
    for record in ({"usage_id": "before"}, {"usage_id": "today"}, {}):
        body = {"tenant_id": tenant.id, "amount_nanos": -20, "reason": "r", **record}
        await post(billing, "billing/corrections", body)
    assert (await spent("day"), await spent("total")) == (1320, 2640)
    # One that is made now counts the same.
    assert await spent("month") in (1320, 2640)
    budgets = (await tenant.http.get("/api/v1/budgets")).json()["items"]
    await tenant.sql("DELETE FROM budget WHERE tenant_id = $1", tenant.id)
    assert (len(budgets), await spent("total")) == (3, 2640)


async def test_a_correction_of_prepaid_usage_gives_the_credit_back(billing: Billing) -> None:
    tenant = await billing.tenant(credit_nanos=10_000)
    model = f"acme/{uuid7()}"
    await price(billing, model, "100")
    await tenant.use("a", model, occurred_at=utcnow(), input_tokens=20, output_tokens=0)
    await tenant.verdict("a")
    await price(billing, model, "50")
    assert (await rerate(billing, tenant))["difference_nanos"] == -1000
    balance = await tenant.get("balance")
    assert (balance["balance_nanos"], balance["debited_nanos"]) == (9_000, 1_000)
    [grant] = (await tenant.http.get("/api/v1/grants")).json()["items"]
    assert grant["left_nanos"] == 9_000
    assert await journal(tenant) == {"promotional_cost": 10_000, "promotional_credit": -9_000, "revenue": -1_000}


async def test_a_correction_of_usage_that_promotional_credit_has_paid_gives_such_credit_back(billing: Billing) -> None:
    tenant = await billing.tenant(credit_nanos=1_000)
    await post(billing, "grants", {"tenant_id": tenant.id, "nanos": 500, "kind": "prepaid", "reason": "r"})
    model = f"acme/{uuid7()}"
    await price(billing, model, "100")
    await tenant.use("a", model, occurred_at=utcnow(), input_tokens=15, output_tokens=0)
    await tenant.verdict("a")
    owed = []
    for nanos in ("80", "50"):
        # A change of the grants burns the usage so far.
        await post(billing, "grants", {"tenant_id": tenant.id, "nanos": 1, "reason": "r"})
        await price(billing, model, nanos)
        await rerate(billing, tenant)
        await post(billing, "grants", {"tenant_id": tenant.id, "nanos": 1, "reason": "r"})
        found = await journal(tenant)
        owed.append((-found.get("prepaid", 0), -found["promotional_credit"]))
    # 300 and then 450 come back; 500 were prepaid.
    assert owed == [(300, 2), (500, 254)]


@pytest.mark.parametrize("prices", [("100", "60", "130"), ("100", "130", "60")])
async def test_a_commitment_counts_the_corrections_of_its_own_month_whenever_they_come(
    billing: Billing, prices: tuple[str, ...]
) -> None:
    """By hand: the commitment is 5,000, the markup 10 %. The first month has 40 tokens, the second one 10.

    At 100 the first month is 4,400 and 600 are missing. At 60 it is 2,640: the correction is -1,760, and 2,360 are
    missing, 1,760 more than before. At 130 it is 5,720: the correction from 60 is +3,080, and nothing is missing, 2,360
    less. The other way round: +1,320 and 600 less; then -3,080 and 2,360 more. The second month has 10 tokens at its
    own price 100, or 1,100, and 3,900 are missing in every case.
    """
    tenant, _ = await subscribed(billing, base_nanos=0, charges=[], included=[], minimum_nanos=5000)
    first_model, second_model = (f"acme/{uuid7()}" for _ in range(2))
    for model in (first_model, second_model):
        await price(billing, model, "100")
    await tenant.use("a", first_model, occurred_at=AT, input_tokens=40, output_tokens=0)
    await tenant.verdict("a")
    first = await draft(billing, tenant)
    assert sorted(line["amount_nanos"] for line in await lines(tenant, first["id"])) == [600, 4400]
    costs = {"100": 4400, "60": 2640, "130": 5720}
    missing = {name: max(0, 5000 - cost) for name, cost in costs.items()}
    for before, now in itertools.pairwise(prices):
        await price(billing, first_model, now)
        await rerate(billing, tenant)
        await tenant.use(f"b/{now}", second_model, input_tokens=10, output_tokens=0)
        await tenant.verdict(f"b/{now}")
        await tenant.sql(
            """
            UPDATE period
            SET full_begins = begins, full_ends = begins + interval '1 second', ends = begins + interval '1 second'
            WHERE tenant_id = $1 AND closed_at IS NULL
            """,
            tenant.id,
        )
        made = await draft(billing, tenant)
        expected = [1100, 3900, costs[now] - costs[before], missing[now] - missing[before]]
        assert sorted(line["amount_nanos"] for line in await lines(tenant, made["id"])) == sorted(expected)


async def test_a_line_about_a_commitment_has_the_day_on_which_its_period_began_in_its_time_zone(
    billing: Billing,
) -> None:
    tenant = await billing.tenant()
    made = await post(billing, "plans", plan(base_nanos=0, charges=[], included=[], minimum_nanos=UNIT))
    # In New York it is the evening of the day before.
    body = {"tenant_id": tenant.id, "plan_id": made["id"], "starts_at": START.isoformat()}
    subscription = await post(billing, "subscriptions", body | {"time_zone": "America/New_York"})
    model = f"acme/{uuid7()}"
    await price(billing, model, "100")
    await tenant.use("a", model, occurred_at=AT, input_tokens=40, output_tokens=0)
    await tenant.verdict("a")
    await draft(billing, tenant)
    await price(billing, model, "60")
    await rerate(billing, tenant)
    await billing.operator.delete(f"/api/v1/subscriptions/{subscription['id']}", params={"when": "now"})
    second = await draft(billing, tenant)
    [line] = [one for one in await lines(tenant, second["id"]) if "after corrections" in one["description"]]
    assert f"from {START - timedelta(days=1):%Y-%m-%d} on" in line["description"]


async def test_corrections_are_on_the_invoice_of_the_subscription_that_had_the_usage(billing: Billing) -> None:
    """Also after its end. Usage before a subscription was paid by grants, and so are its corrections."""
    tenant = await billing.tenant()
    model = f"acme/{uuid7()}"
    await price(billing, model, "100")
    await tenant.use("before", model, occurred_at=START, input_tokens=10, output_tokens=0)
    await tenant.verdict("before")
    made = await post(billing, "plans", plan(base_nanos=0, charges=[], included=[]))
    begins = START + timedelta(days=1)
    subscription = await post(
        billing, "subscriptions", {"tenant_id": tenant.id, "plan_id": made["id"], "starts_at": begins.isoformat()}
    )
    await tenant.use("during", model, occurred_at=AT, input_tokens=30, output_tokens=0)
    await tenant.verdict("during")
    await billing.operator.delete(f"/api/v1/subscriptions/{subscription['id']}", params={"when": "now"})
    closed = (await post(billing, "billing/periods/close", {"tenant_id": tenant.id}, status=200))["items"]
    assert sum(one["subtotal_nanos"] for one in closed) == 3300
    await price(billing, model, "150")
    assert (await rerate(billing, tenant))["difference_nanos"] == 500 + 1500
    supplement = await draft(billing, tenant)
    assert [line["amount_nanos"] for line in await lines(tenant, supplement["id"])] == [1650]


@pytest.mark.parametrize("act", ["cancelled", "another plan"])
async def test_corrections_of_usage_that_was_counted_before_its_period_was_cut_are_on_an_invoice(
    billing: Billing, act: str
) -> None:
    """The period ends at a full second, and so before the usage of that second. By hand: 10 tokens at 100 plus 10 %
    are 1,100, at 150 they are 1,650, and 40 are given back by hand."""
    tenant, subscription = await subscribed(billing, base_nanos=0, charges=[], included=[])
    model = f"acme/{uuid7()}"
    await price(billing, model, "100")
    # The clock of its service is a minute fast: at any time of day the period ends before the usage.
    await tenant.use("a", model, occurred_at=utcnow() + timedelta(minutes=1), input_tokens=10, output_tokens=0)
    await tenant.verdict("a")
    path = f"/api/v1/subscriptions/{subscription['id']}"
    if act == "cancelled":
        answer = await billing.operator.delete(path, params={"when": "now"})
    else:
        other = await post(billing, "plans", plan(base_nanos=0, charges=[], included=[], usage_markup_percent=20))
        answer = await billing.operator.patch(path, json={"plan_id": other["id"], "when": "now"})
    assert answer.status_code == 200, answer.text
    closed = (await post(billing, "billing/periods/close", {"tenant_id": tenant.id}, status=200))["items"]
    assert [one["subtotal_nanos"] for one in closed] == [0, 1100]
    body = {"tenant_id": tenant.id, "amount_nanos": 40, "reason": "r", "usage_id": "a"}
    await price(billing, model, "150")
    assert (await rerate(billing, tenant))["difference_nanos"] == 500
    await post(billing, "billing/corrections", body)
    supplement = await draft(billing, tenant)
    assert [line["amount_nanos"] for line in await lines(tenant, supplement["id"])] == [550, -40]


async def test_corrections_of_usage_in_the_second_before_its_subscription_are_paid_as_the_usage(
    billing: Billing,
) -> None:
    """A subscription begins at a full second, and so before usage of that second that grants have paid."""
    tenant = await billing.tenant(credit_nanos=10_000)
    model = f"acme/{uuid7()}"
    await price(billing, model, "100")
    await tenant.use("a", model, occurred_at=utcnow() + timedelta(minutes=1), input_tokens=10, output_tokens=0)
    await tenant.verdict("a")
    made = await post(billing, "plans", plan(base_nanos=0, charges=[], included=[]))
    await post(billing, "subscriptions", {"tenant_id": tenant.id, "plan_id": made["id"]})
    await price(billing, model, "60")
    body = {"tenant_id": tenant.id, "amount_nanos": 100, "reason": "r", "usage_id": "a"}
    assert (await rerate(billing, tenant))["difference_nanos"] == -400
    await post(billing, "billing/corrections", body)
    assert await left(tenant) == await balance(tenant) == 9_500


async def test_an_invoice_below_zero_raises_the_limit_once(billing: Billing) -> None:
    tenant, subscription, model = await limited(billing, 100 * UNIT, base_nanos=0)
    await tenant.use("a", model, occurred_at=AT, input_tokens=400)
    await tenant.verdict("a")
    await finalised(billing, tenant)
    await price(billing, model, str(UNIT // 20))
    assert (await rerate(billing, tenant))["difference_nanos"] == -20 * UNIT
    # 44 were paid. 20 come back at once, and with the invoice the markup on them.
    assert await balance(tenant) == 76 * UNIT
    await billing.operator.delete(f"/api/v1/subscriptions/{subscription['id']}", params={"when": "now"})
    assert (await finalised(billing, tenant))["total_minor"] == -2200
    assert await balance(tenant) == await left(tenant) == 78 * UNIT


async def test_late_usage_and_corrections_follow_the_plan_of_their_time(billing: Billing) -> None:
    tenant, subscription = await subscribed(billing, base_nanos=0, charges=[], included=[])
    model = f"acme/{uuid7()}"
    await price(billing, model, "100")
    await tenant.use("a", model, occurred_at=AT, input_tokens=10, output_tokens=0)
    await tenant.verdict("a")
    other = await post(billing, "plans", plan(base_nanos=0, charges=[], included=[], usage_markup_percent=None))
    change = {"plan_id": other["id"], "when": "now"}
    answer = await billing.operator.patch(f"/api/v1/subscriptions/{subscription['id']}", json=change)
    assert answer.status_code == 200, answer.text
    closed = (await post(billing, "billing/periods/close", {"tenant_id": tenant.id}, status=200))["items"]
    assert [one["subtotal_nanos"] for one in closed] == [1100, 0]
    await price(billing, model, "90")
    assert (await rerate(billing, tenant))["difference_nanos"] == -100
    await tenant.use("late", model, occurred_at=AT, input_tokens=5, output_tokens=0)
    await tenant.verdict("late")
    supplement = await draft(billing, tenant)
    assert [line["amount_nanos"] for line in await lines(tenant, supplement["id"])] == [495, -110]
    ends = datetime.fromisoformat(supplement["period"]["ends"])
    assert ends.microsecond == 0, "a subscription that is cancelled in this second would end later"


@pytest.mark.parametrize("nanos", ["80", "120"])
@pytest.mark.parametrize(
    ("act", "reason"),
    [
        ("void", "the invoice is void"),
        ("uncollectible", "the invoice was written off"),
        ("credit-notes", "the invoice has credit notes"),
        ("corrections", "a charge of it was corrected by hand"),
    ],
)
async def test_what_was_ended_or_given_back_is_left_to_the_operator(
    billing: Billing, act: str, reason: str, nanos: str
) -> None:
    tenant, _ = await subscribed(billing, charges=[], included=[])
    model = f"acme/{uuid7()}"
    await price(billing, model, "100")
    for usage_id, at in (("a", AT), ("b", utcnow())):
        await tenant.use(usage_id, model, occurred_at=at, input_tokens=10, output_tokens=0)
        await tenant.verdict(usage_id)
    made = await finalised(billing, tenant)
    if act == "corrections":
        body = {"tenant_id": tenant.id, "amount_nanos": 300, "reason": "r", "usage_id": "a"}
        await post(billing, "billing/corrections", body)
    elif act == "credit-notes":
        await post(billing, f"invoices/{made['id']}/credit-notes", {"amount_minor": 1, "reason": "r"})
    else:
        await post(billing, f"invoices/{made['id']}/{act}", status=200)
    await price(billing, model, nanos)
    debited = (await tenant.get("balance"))["debited_nanos"]
    difference = (int(nanos) - 100) * 10
    for dry_run in (True, False):
        found = await rerate(billing, tenant, dry_run=dry_run)
        assert (found["changed"], found["difference_nanos"]) == (1, difference), "the other record is rated again"
        [one] = found["left_out"]
        assert (one["records"], one["difference_nanos"], one["reason"]) == (1, difference, reason)
        assert one["invoice_number"] == (None if act == "corrections" else made["number"])
    assert (await tenant.get("balance"))["debited_nanos"] == debited + difference
    again = await rerate(billing, tenant)
    assert (again["changed"], again["left_out"]) == (0, [one])


async def test_records_without_a_cost_by_the_new_price_are_left_to_the_operator(billing: Billing) -> None:
    tenant = await billing.tenant()
    model = f"acme/{uuid7()}"
    body = {"resource": model, "valid_from": (START - timedelta(days=1)).isoformat()}
    await post(billing, "prices", body | {"nanos_per_unit": {"input_tokens": "1"}})
    for usage_id, tokens in (("a", 10), ("b", 10**10)):
        await tenant.use(usage_id, model, occurred_at=AT, input_tokens=tokens)
        await tenant.verdict(usage_id)
    reasons = {
        "output_tokens": "output_tokens was not reported, and the price needs it",
        "input_tokens": f"it would cost more than {10**15} nano-units",
    }
    for unit, reason in reasons.items():
        await post(billing, "prices", body | {"nanos_per_unit": {"input_tokens": "1"} | {unit: str(10**6)}})
        found = await rerate(billing, tenant, dry_run=True)
        assert [(one["difference_nanos"], one["reason"]) for one in found["left_out"]] == [(0, reason)]
        assert found["changed"] + found["left_out"][0]["records"] == 2


async def test_a_correction_whose_invoice_was_ended_is_left_to_the_operator(billing: Billing) -> None:
    tenant, subscription = await subscribed(billing, base_nanos=0, charges=[], included=[])
    model = f"acme/{uuid7()}"
    await price(billing, model, "10000000")
    await tenant.use("a", model, occurred_at=AT, input_tokens=10, output_tokens=0)
    await tenant.verdict("a")
    await finalised(billing, tenant)
    await price(billing, model, "20000000")
    assert (await rerate(billing, tenant))["left_out"] == []
    await billing.operator.delete(f"/api/v1/subscriptions/{subscription['id']}", params={"when": "now"})
    second = await finalised(billing, tenant)
    await post(billing, f"invoices/{second['id']}/void", status=200)
    await price(billing, model, "10000000")
    found = await rerate(billing, tenant)
    assert (found["changed"], [one["invoice_number"] for one in found["left_out"]]) == (0, [second["number"]])
