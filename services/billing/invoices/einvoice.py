"""An invoice as XML of the European standard EN 16931 in the syntax Cross Industry Invoice D22B, which is the XML of
Factur-X and ZUGFeRD. Pure: the same invoice gives the same bytes.

The standard rounds each line to minor units and wants the lines to add up to the total (rule BR-CO-10). So each line is
rounded up or down, and the price is exact: if the units of a line have different prices, it is the price of all of
them together (BT-149, the base quantity). The PDF and the CSV have the exact amounts.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from typing import NamedTuple

from lxml import etree  # type: ignore[import-untyped]

from infra.errors import Conflict
from services.billing.invoices import tax
from services.billing.invoices.countries import COUNTRIES
from services.billing.invoices.store import Invoice, InvoiceLine, TaxPart
from services.billing.invoices.tax import Buyer, Seller
from services.billing.rating.currencies import DIGITS, format_minor, nanos_per_minor, to_minor

_NAMESPACES = {
    "rsm": "urn:un:unece:uncefact:data:standard:CrossIndustryInvoice:100",
    "ram": "urn:un:unece:uncefact:data:standard:ReusableAggregateBusinessInformationEntity:100",
    "udt": "urn:un:unece:uncefact:data:standard:UnqualifiedDataType:100",
}
_QUALIFIED = "urn:un:unece:uncefact:data:standard:QualifiedDataType:100"
_PROFILE = "urn:cen.eu:en16931:2017"


class _Tax(NamedTuple):
    category: str
    """UNTDID 5305: S standard, Z zero rate, AE reverse charge, E exempt."""
    percent: str


class _TaxSums(NamedTuple):
    """One breakdown of the standard (BG-23): all lines of a category and rate, in minor units."""

    tax: _Tax
    basis: int
    due: int
    reason: str


class LinePrice(NamedTuple):
    """The price of a line: `amount` units of the currency for `base` units, and the billed quantity.

    A negative amount has a negative quantity, because the standard wants prices above zero (rule BR-27).
    """

    quantity: int
    amount: Decimal
    base: int = 1


def document(
    invoice: Invoice,
    lines: Sequence[InvoiceLine],
    corrected: Sequence[Invoice] = (),
    credited: Invoice | None = None,
) -> bytes:
    """Raises Conflict for an invoice that the standard cannot express, and names the missing part.

    `corrected`: the invoices whose usage lines of `invoice` correct. `credited`: the invoice that is credited by
    `invoice`, which is a credit note then. An invoice below zero is a credit note, too (type 381).
    """
    if fault := obstacle(invoice, lines):
        raise Conflict(fault)
    terms = f"It reduces the amount due of invoice {credited.number}." if credited else ""
    if invoice.total_minor < 0:
        invoice, lines = as_credit(invoice, lines)
        terms = "It becomes prepaid credit."
    assert invoice.finalised_at
    net = net_of(invoice)
    amounts = rounded(lines, net, invoice.currency)
    taxes = [_tax(invoice.tax_note if line.tax_note is None else line.tax_note) for line in lines]

    def money(minor: int) -> str:
        return format_minor(minor, invoice.currency)

    root = etree.Element(_name("rsm:CrossIndustryInvoice"), nsmap=_NAMESPACES)
    context = _add(root, "rsm:ExchangedDocumentContext")
    _add(_add(context, "ram:GuidelineSpecifiedDocumentContextParameter"), "ram:ID", _PROFILE)
    head = _add(root, "rsm:ExchangedDocument")
    _add(head, "ram:ID", invoice.number)
    _add(head, "ram:TypeCode", "381" if terms else "380")
    _date(_add(head, "ram:IssueDateTime"), invoice.local(invoice.finalised_at))

    deal = _add(root, "rsm:SupplyChainTradeTransaction")
    for number, (line, minor, of) in enumerate(zip(lines, amounts, taxes, strict=True), 1):
        _line(_add(deal, "ram:IncludedSupplyChainTradeLineItem"), number, line, money(minor), of)

    parties = _add(deal, "ram:ApplicableHeaderTradeAgreement")
    _party(_add(parties, "ram:SellerTradeParty"), invoice.seller)
    _party(_add(parties, "ram:BuyerTradeParty"), invoice.buyer)
    delivered = _add(_add(deal, "ram:ApplicableHeaderTradeDelivery"), "ram:ActualDeliverySupplyChainEvent")
    # The period ends before this moment, so the day of the end is not a part of it.
    span = invoice.local_period
    last = max(span.begins, span.ends - timedelta(seconds=1))
    _date(_add(delivered, "ram:OccurrenceDateTime"), last)

    settlement = _add(deal, "ram:ApplicableHeaderTradeSettlement")
    _add(settlement, "ram:InvoiceCurrencyCode", invoice.currency)
    for sums_of in _breakdowns(invoice, invoice.total_minor - net, amounts, taxes):
        breakdown = _add(settlement, "ram:ApplicableTradeTax")
        _add(breakdown, "ram:CalculatedAmount", money(sums_of.due))
        _add(breakdown, "ram:TypeCode", "VAT")
        if sums_of.reason:
            _add(breakdown, "ram:ExemptionReason", sums_of.reason)
        _add(breakdown, "ram:BasisAmount", money(sums_of.basis))
        _add(breakdown, "ram:CategoryCode", sums_of.tax.category)
        _add(breakdown, "ram:RateApplicablePercent", sums_of.tax.percent)
    period = _add(settlement, "ram:BillingSpecifiedPeriod")
    _date(_add(period, "ram:StartDateTime"), span.begins)
    _date(_add(period, "ram:EndDateTime"), last)
    due = invoice.total_minor - invoice.prepaid_minor
    if terms:
        _add(_add(settlement, "ram:SpecifiedTradePaymentTerms"), "ram:Description", terms)
    # BR-CO-25 wants a due date if the amount due is above zero.
    elif due > 0:
        assert invoice.due_at
        day = invoice.local(invoice.due_at)
        _date(_add(_add(settlement, "ram:SpecifiedTradePaymentTerms"), "ram:DueDateDateTime"), day)
    sums = _add(settlement, "ram:SpecifiedTradeSettlementHeaderMonetarySummation")
    _add(sums, "ram:LineTotalAmount", money(net))
    _add(sums, "ram:TaxBasisTotalAmount", money(net))
    _add(sums, "ram:TaxTotalAmount", money(invoice.total_minor - net), currencyID=invoice.currency)
    _add(sums, "ram:GrandTotalAmount", money(invoice.total_minor))
    _add(sums, "ram:TotalPrepaidAmount", money(invoice.prepaid_minor))
    _add(sums, "ram:DuePayableAmount", money(due))
    for other in [credited] if credited else corrected:
        assert other.finalised_at
        preceding = _add(settlement, "ram:InvoiceReferencedDocument")
        _add(preceding, "ram:IssuerAssignedID", other.number)
        # Its namespace stands here, because the bytes of invoices stay the same.
        date = etree.SubElement(
            _add(preceding, "ram:FormattedIssueDateTime"),
            f"{{{_QUALIFIED}}}DateTimeString",
            nsmap={"qdt": _QUALIFIED},
            format="102",
        )
        date.text = f"{other.local(other.finalised_at):%Y%m%d}"
    return bytes(etree.tostring(root, xml_declaration=True, encoding="UTF-8", pretty_print=True))


def as_credit(invoice: Invoice, lines: Sequence[InvoiceLine]) -> tuple[Invoice, list[InvoiceLine]]:
    """Returns an invoice below zero as a credit note: with amounts above zero, because the kind of the document says
    that they are given back."""
    changes = {
        "subtotal_nanos": -invoice.subtotal_nanos,
        "tax_nanos": -invoice.tax_nanos,
        "other_taxes": [
            TaxPart(note=part.note, subtotal_nanos=-part.subtotal_nanos, tax_nanos=-part.tax_nanos)
            for part in invoice.other_taxes
        ],
        "total_minor": -invoice.total_minor,
        "due_at": None,
    }
    negated = [line.model_copy(update={"amount_nanos": -line.amount_nanos}) for line in lines]
    return invoice.model_copy(update=changes), negated


def obstacle(invoice: Invoice, lines: Sequence[InvoiceLine]) -> str:
    """Returns why there can be no e-invoice, or an empty text."""
    if invoice.number is None:
        return "the invoice is a draft; only a finalised one has an e-invoice"
    for party, names in (("seller", ("name", "country", "vat_id")), ("buyer", ("name", "country"))):
        for name in names:
            if not _printable(getattr(getattr(invoice, party), name)).strip():
                return f"the {party} had no {name} when the invoice was finalised; an e-invoice needs it"
        # BR-CO-09. Greece has EL.
        if (vat_id := getattr(invoice, party).vat_id) and vat_id[:2] not in COUNTRIES | {"EL"}:
            return f"the vat_id of the {party} does not begin with the code of a country; an e-invoice needs it"
    # BR-AE-02.
    if not invoice.buyer.vat_id and any(_tax(part.note).category == "AE" for part in invoice.taxes):
        return "corrections have reverse charge, and the buyer had no vat_id when the invoice was finalised"
    if DIGITS[invoice.currency] > 2:
        return f"{invoice.currency} has more than the two decimals of EN 16931"
    if not lines:
        return "the invoice has no lines; EN 16931 wants one"
    return ""


def net_of(invoice: Invoice) -> int:
    """Returns the subtotal in minor units. The tax is the total minus this.

    BR-S-09 wants each tax to be off by less than one unit of the currency. If that is the minor unit, as of JPY, the
    subtotal is rounded up or down so that the tax is near its exact amount: 0.48 plus 19 % are 1 in total, and not 0
    plus a tax of 1.
    """
    nearest, unit = to_minor(invoice.subtotal_nanos, invoice.currency), nanos_per_minor(invoice.currency)
    if DIGITS[invoice.currency]:
        return nearest
    below, rest = divmod(invoice.subtotal_nanos, unit)
    found = (nearest, below, below + (rest > 0))
    return min(found, key=lambda net: abs((invoice.total_minor - net) * unit - invoice.tax_nanos))


def rounded(lines: Sequence[InvoiceLine], net: int, currency: str) -> list[int]:
    """The lines in minor units, which add up to `net`: all rounded down, then the ones with the largest rests up."""
    unit = nanos_per_minor(currency)
    found = [line.amount_nanos // unit for line in lines]
    by_rest = sorted(range(len(lines)), key=lambda n: -(lines[n].amount_nanos % unit))
    for n in by_rest[: net - sum(found)]:
        found[n] += 1
    return found


def price(line: InvoiceLine) -> LinePrice:
    """Quantity × amount / base is the exact amount of the line."""
    sign = -1 if line.amount_nanos < 0 else 1
    if not line.amount_nanos:
        return LinePrice(line.quantity, Decimal(0))
    quantity = line.quantity or 1
    if sign > 0 and line.unit_nanos is not None and Decimal(line.unit_nanos) * quantity == line.amount_nanos:
        return LinePrice(quantity, Decimal(line.unit_nanos).scaleb(-9))
    return LinePrice(sign * quantity, Decimal(abs(line.amount_nanos)).scaleb(-9), quantity)


def _line(element: etree._Element, number: int, line: InvoiceLine, net: str, of: _Tax) -> None:
    found = price(line)
    _add(_add(element, "ram:AssociatedDocumentLineDocument"), "ram:LineID", str(number))
    _add(_add(element, "ram:SpecifiedTradeProduct"), "ram:Name", line.description)
    agreement = _add(_add(element, "ram:SpecifiedLineTradeAgreement"), "ram:NetPriceProductTradePrice")
    _add(agreement, "ram:ChargeAmount", f"{found.amount.normalize():f}")
    _add(agreement, "ram:BasisQuantity", str(found.base), unitCode="C62")
    _add(_add(element, "ram:SpecifiedLineTradeDelivery"), "ram:BilledQuantity", str(found.quantity), unitCode="C62")
    settled = _add(element, "ram:SpecifiedLineTradeSettlement")
    rate = _add(settled, "ram:ApplicableTradeTax")
    _add(rate, "ram:TypeCode", "VAT")
    _add(rate, "ram:CategoryCode", of.category)
    _add(rate, "ram:RateApplicablePercent", of.percent)
    _add(_add(settled, "ram:SpecifiedTradeSettlementLineMonetarySummation"), "ram:LineTotalAmount", net)


def _tax(note: str) -> _Tax:
    if (rate := tax.rate(note)) is not None:
        return _Tax("S" if rate else "Z", f"{rate:f}")
    return _Tax("AE" if note.startswith("reverse charge") else "E", "0")


def _breakdowns(invoice: Invoice, due: int, amounts: Sequence[int], taxes: Sequence[_Tax]) -> list[_TaxSums]:
    """The breakdowns, whose taxes add up to `due`. `amounts`, `taxes`: of the lines, in minor units."""
    found: dict[_Tax, list[TaxPart]] = {}
    for part in invoice.taxes:
        if _tax(part.note) in taxes:
            found.setdefault(_tax(part.note), []).append(part)
    exact = {of: sum(part.tax_nanos for part in parts) for of, parts in found.items()}
    rounded_tax = {of: to_minor(nanos, invoice.currency) for of, nanos in exact.items()}
    # A category without tax has exactly 0 (BR-AE-09, BR-E-09), so the rest is on the one with the most.
    rounded_tax[max(exact, key=lambda of: abs(exact[of]))] += due - sum(rounded_tax.values())
    return [
        _TaxSums(
            of,
            sum(minor for minor, other in zip(amounts, taxes, strict=True) if other == of),
            rounded_tax[of],
            "; ".join(part.note for part in parts) if of.category in ("AE", "E") else "",
        )
        for of, parts in found.items()
    ]


def _party(element: etree._Element, party: Seller | Buyer) -> None:
    _add(element, "ram:Name", party.name)
    address = _add(element, "ram:PostalTradeAddress")
    # The rules want no empty elements.
    lines = [line for line in party.address.splitlines() if _printable(line).strip()]
    for name, line in zip(("ram:LineOne", "ram:LineTwo", "ram:LineThree"), lines, strict=False):
        _add(address, name, line)
    _add(address, "ram:CountryID", party.country)
    if party.vat_id:
        _add(_add(element, "ram:SpecifiedTaxRegistration"), "ram:ID", party.vat_id, schemeID="VA")


def _date(element: etree._Element, moment: datetime) -> None:
    _add(element, "udt:DateTimeString", f"{moment:%Y%m%d}", format="102")


def _name(name: str) -> str:
    prefix, _, local = name.partition(":")
    return f"{{{_NAMESPACES[prefix]}}}{local}"


def _add(parent: etree._Element, name: str, text: str | None = None, **attributes: str) -> etree._Element:
    made = etree.SubElement(parent, _name(name), **attributes)
    made.text = text and _printable(text)
    return made


def _printable(text: str) -> str:
    """XML 1.0 has no control characters."""
    return "".join(c for c in text if c.isprintable())
