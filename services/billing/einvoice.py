"""An invoice as XML of the European standard EN 16931 in the syntax Cross Industry Invoice D22B, which is the XML of
Factur-X and ZUGFeRD. Pure: the same invoice gives the same bytes.

The standard rounds each line to minor units and wants the lines to add up to the total, so there is one line, the whole
of the services of the period. The PDF and the CSV have the exact lines.
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from lxml import etree  # type: ignore[import-untyped]

from infra.errors import Conflict
from services.billing.currencies import DIGITS, to_minor
from services.billing.invoice_files import in_minor
from services.billing.invoices import Invoice
from services.billing.tax import Buyer

_NAMESPACES = {
    "rsm": "urn:un:unece:uncefact:data:standard:CrossIndustryInvoice:100",
    "ram": "urn:un:unece:uncefact:data:standard:ReusableAggregateBusinessInformationEntity:100",
    "udt": "urn:un:unece:uncefact:data:standard:UnqualifiedDataType:100",
}
_PROFILE = "urn:cen.eu:en16931:2017"


class Seller(NamedTuple):
    """The company that sends the invoices."""

    name: str
    country: str
    vat_id: str


class _Tax(NamedTuple):
    category: str
    """UNTDID 5305: S standard, AE reverse charge, E exempt."""
    percent: str
    reason: str


def document(invoice: Invoice, seller: Seller) -> bytes:
    """Raises Conflict for an invoice that the standard cannot express, and names the missing part."""
    _check(invoice, seller)
    assert invoice.finalised_at
    assert invoice.due_at
    tax = _tax(invoice)
    net = to_minor(invoice.subtotal_nanos, invoice.currency)

    def money(minor: int) -> str:
        return in_minor(minor, invoice.currency)

    root = etree.Element(_name("rsm:CrossIndustryInvoice"), nsmap=_NAMESPACES)
    context = _add(root, "rsm:ExchangedDocumentContext")
    _add(_add(context, "ram:GuidelineSpecifiedDocumentContextParameter"), "ram:ID", _PROFILE)
    head = _add(root, "rsm:ExchangedDocument")
    _add(head, "ram:ID", invoice.number)
    _add(head, "ram:TypeCode", "380")
    _date(_add(head, "ram:IssueDateTime"), invoice.finalised_at)

    deal = _add(root, "rsm:SupplyChainTradeTransaction")
    line = _add(deal, "ram:IncludedSupplyChainTradeLineItem")
    _add(_add(line, "ram:AssociatedDocumentLineDocument"), "ram:LineID", "1")
    _add(_add(line, "ram:SpecifiedTradeProduct"), "ram:Name", _services(invoice))
    agreement = _add(line, "ram:SpecifiedLineTradeAgreement")
    _add(_add(agreement, "ram:NetPriceProductTradePrice"), "ram:ChargeAmount", money(net))
    _add(_add(line, "ram:SpecifiedLineTradeDelivery"), "ram:BilledQuantity", "1", unitCode="C62")
    settled = _add(line, "ram:SpecifiedLineTradeSettlement")
    rate = _add(settled, "ram:ApplicableTradeTax")
    _add(rate, "ram:TypeCode", "VAT")
    _add(rate, "ram:CategoryCode", tax.category)
    _add(rate, "ram:RateApplicablePercent", tax.percent)
    _add(_add(settled, "ram:SpecifiedTradeSettlementLineMonetarySummation"), "ram:LineTotalAmount", money(net))

    parties = _add(deal, "ram:ApplicableHeaderTradeAgreement")
    _party(_add(parties, "ram:SellerTradeParty"), seller)
    _party(_add(parties, "ram:BuyerTradeParty"), invoice.buyer)
    _add(deal, "ram:ApplicableHeaderTradeDelivery")

    settlement = _add(deal, "ram:ApplicableHeaderTradeSettlement")
    _add(settlement, "ram:InvoiceCurrencyCode", invoice.currency)
    total_tax = _add(settlement, "ram:ApplicableTradeTax")
    _add(total_tax, "ram:CalculatedAmount", money(invoice.total_minor - net))
    _add(total_tax, "ram:TypeCode", "VAT")
    if tax.reason:
        _add(total_tax, "ram:ExemptionReason", tax.reason)
    _add(total_tax, "ram:BasisAmount", money(net))
    _add(total_tax, "ram:CategoryCode", tax.category)
    _add(total_tax, "ram:RateApplicablePercent", tax.percent)
    period = _add(settlement, "ram:BillingSpecifiedPeriod")
    _date(_add(period, "ram:StartDateTime"), invoice.period.begins)
    _date(_add(period, "ram:EndDateTime"), invoice.period.ends)
    _date(_add(_add(settlement, "ram:SpecifiedTradePaymentTerms"), "ram:DueDateDateTime"), invoice.due_at)
    sums = _add(settlement, "ram:SpecifiedTradeSettlementHeaderMonetarySummation")
    _add(sums, "ram:LineTotalAmount", money(net))
    _add(sums, "ram:TaxBasisTotalAmount", money(net))
    _add(sums, "ram:TaxTotalAmount", money(invoice.total_minor - net), currencyID=invoice.currency)
    _add(sums, "ram:GrandTotalAmount", money(invoice.total_minor))
    _add(sums, "ram:TotalPrepaidAmount", money(invoice.applied_minor))
    _add(sums, "ram:DuePayableAmount", money(invoice.total_minor - invoice.applied_minor))
    return bytes(etree.tostring(root, xml_declaration=True, encoding="UTF-8", pretty_print=True))


def _check(invoice: Invoice, seller: Seller) -> None:
    if invoice.number is None:
        raise Conflict("the invoice is a draft; only a finalised one has an e-invoice")
    if missing := [f"CLAW_SELLER_{name.upper()}" for name, value in seller._asdict().items() if not value]:
        raise Conflict(f"{missing[0]} is not set; an e-invoice names the seller")
    for name in ("name", "country"):
        if not getattr(invoice.buyer, name):
            raise Conflict(f"the buyer had no {name} when the invoice was finalised; an e-invoice needs it")
    if DIGITS[invoice.currency] > 2:
        raise Conflict(f"{invoice.currency} has more than the two decimals of EN 16931")


def _tax(invoice: Invoice) -> _Tax:
    if invoice.tax_nanos:
        # The note of a rate is the rate and its country: ``19 % DE``.
        return _Tax("S", invoice.tax_note.partition(" ")[0], "")
    return _Tax("AE" if invoice.tax_note.startswith("reverse charge") else "E", "0", invoice.tax_note)


def _services(invoice: Invoice) -> str:
    return f"Services from {invoice.period.begins:%Y-%m-%d} to {invoice.period.ends:%Y-%m-%d} (UTC)"


def _party(element: etree._Element, party: Seller | Buyer) -> None:
    _add(element, "ram:Name", party.name)
    _add(_add(element, "ram:PostalTradeAddress"), "ram:CountryID", party.country)
    if party.vat_id:
        _add(_add(element, "ram:SpecifiedTaxRegistration"), "ram:ID", party.vat_id, schemeID="VA")


def _date(element: etree._Element, moment: datetime) -> None:
    _add(element, "udt:DateTimeString", f"{moment:%Y%m%d}", format="102")


def _name(name: str) -> str:
    prefix, _, local = name.partition(":")
    return f"{{{_NAMESPACES[prefix]}}}{local}"


def _add(parent: etree._Element, name: str, text: str | None = None, **attributes: str) -> etree._Element:
    made = etree.SubElement(parent, _name(name), **attributes)
    # XML 1.0 has no control characters.
    made.text = text and "".join(c for c in text if c.isprintable())
    return made
