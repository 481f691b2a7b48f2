"""Taxes: a buyer without a known rate is taxed as at home, and reverse charge needs a VAT id with a known rule."""

from __future__ import annotations

from contextlib import nullcontext
from decimal import Decimal

import pytest

from infra.errors import InvalidMessage
from services.billing.invoices import tax
from services.billing.invoices.tax import Buyer
from services.billing.settings import BillingSettings

RATES = {country: Decimal(percent) for country, percent in (("DE", "19"), ("AT", "20"), ("GB", "20"), ("CH", "8.1"))}
AUSTRIAN, BRITISH, GERMAN = "ATU33864707", "GB980780684", "DE129273398"


@pytest.mark.parametrize(
    ("country", "vat_id", "seller", "note"),
    [
        ("DE", "", "DE", "19 % DE"),
        ("DE", GERMAN, "DE", "19 % DE"),
        ("AT", "", "DE", "20 % AT"),
        ("CH", "", "DE", "8.1 % CH"),
        # Not known: as at home.
        ("", "", "DE", "19 % DE"),
        ("FR", "", "DE", "19 % DE"),
        ("MC", "", "DE", "19 % DE"),
        # Monaco, the Isle of Man and Northern Ireland are taxed as a part of another country.
        ("MC", "", "AT", "20 % AT"),
        ("AT", "", "MC", "20 % AT"),
        ("IM", "", "DE", "20 % GB"),
        ("XI", "", "GB", "20 % GB"),
        ("GB", "", "IM", "20 % GB"),
        ("IM", "GB569953277", "GB", "20 % GB"),
        ("XI", "XI980780684", "GB", "20 % GB"),
        ("IM", "GB569953277", "DE", "reverse charge"),
        ("MC", "FR40303265045", "DE", "reverse charge"),
        # Outside of the tax union of the seller.
        ("AQ", "", "DE", "no rate is known for AQ"),
        ("US", "", "DE", "no rate is known for US"),
        ("FR", "", "GB", "no rate is known for FR"),
        ("", "", "", "not known"),
        # A business in another country.
        ("AT", AUSTRIAN, "DE", "reverse charge"),
        ("GB", BRITISH, "DE", "reverse charge"),
        ("AT", AUSTRIAN, "", "20 % AT"),
        ("DE", GERMAN, "", "19 % DE"),
        # Ids that were stored before they were checked.
        ("GB", "GBXX", "DE", "20 % GB"),
        ("CH", "CH00", "DE", "8.1 % CH"),
        ("US", "US123456789", "DE", "no rate is known for US"),
        ("", AUSTRIAN, "DE", "19 % DE"),
    ],
)
def test_the_tax_follows_the_countries_and_the_vat_id(country: str, vat_id: str, seller: str, note: str) -> None:
    found = tax.tax_of(Buyer(country=country, vat_id=vat_id), seller, RATES)
    assert note in found.note
    assert found.percent == (Decimal(note.partition(" %")[0]) if "%" in note else 0)


@pytest.mark.parametrize(
    ("country", "vat_id", "seller"),
    [("MC", "FR40303265045", "FR"), ("FR", "FR40303265045", "MC"), ("MC", "", "FR"), ("MC", "", "DE")],
)
def test_monaco_has_the_tax_of_france(country: str, vat_id: str, seller: str) -> None:
    rates = {"DE": Decimal(19), "FR": Decimal(20)}
    assert tax.tax_of(Buyer(country=country, vat_id=vat_id), seller, rates) == tax.Tax(Decimal(20), "20 % FR")
    # A rate of its own.
    assert tax.tax_of(Buyer(country="MC"), seller, rates | {"MC": Decimal(21)}).note == "21 % MC"


@pytest.mark.parametrize(("country", "vat_id"), [("", ""), ("DE", ""), ("FR", ""), ("AT", AUSTRIAN), ("US", "")])
def test_without_any_stored_rate_there_is_no_tax(country: str, vat_id: str) -> None:
    assert tax.tax_of(Buyer(country=country, vat_id=vat_id), "DE", {}).percent == 0


@pytest.mark.parametrize(("country", "vat_id"), [("GB", "GBXX"), ("CH", "CH00"), ("US", "US123456789"), ("AQ", "AQ12")])
def test_a_vat_id_without_a_rule_or_against_it_is_refused(country: str, vat_id: str) -> None:
    with pytest.raises(InvalidMessage) as refused:
        tax.check(Buyer(country=country, vat_id=vat_id))
    assert refused.value.field == "vat_id"


def test_an_address_has_at_most_three_lines() -> None:
    tax.check(Buyer(country="DE", address="1\n2\n3"))
    with pytest.raises(InvalidMessage, match="address: must have at most 3 lines"):
        tax.check(Buyer(country="DE", address="1\n2\n3\n4"))


@pytest.mark.parametrize("address", ["1;2;3", "1;2;3;4"])
def test_the_address_of_the_seller_has_at_most_three_lines(address: str) -> None:
    settings = BillingSettings.model_construct(seller_address=address)
    with nullcontext() if address == "1;2;3" else pytest.raises(ValueError, match="must have at most 3 lines"):
        settings._whole()  # type: ignore[operator]
