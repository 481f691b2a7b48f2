"""The contents of the files of invoices and credit notes: the page of the PDF, and the CSV. Pure."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from decimal import Decimal

from services.billing.invoices import einvoice, pdf
from services.billing.invoices.store import CreditNote, Invoice, InvoiceLine, TaxPart
from services.billing.invoices.tax import Buyer, Seller
from services.billing.rating import schemes
from services.billing.rating.currencies import format_minor


def exact(nanos: int) -> str:
    """All nine digits of an amount in units: ``12.500000000``."""
    whole, rest = divmod(abs(nanos), 10**9)
    return f"{'-' if nanos < 0 else ''}{whole}.{rest:09}"


# A longer table would take more memory than a process may have. The CSV and the e-invoice have all lines.
MOST_PRINTED = 10_000
# The first character of a formula.
_FORMULA = frozenset("=+-@\t\r\n＝＋－＠")
# Tenants name the models that their lines are about.
MOST_CHARACTERS = 120


def page(invoice: Invoice, lines: Sequence[InvoiceLine], corrected: Sequence[Invoice] = ()) -> pdf.Page:
    """The texts of an invoice, and its e-invoice if there can be one. Its state is left out, because a payment must not
    change the document. An invoice below zero is a credit note, as in its e-invoice."""
    xml = _xml(invoice, lines, corrected)
    title = invoice.title
    if invoice.total_minor < 0:
        invoice, lines = einvoice.as_credit(invoice, lines)
    return _page(title, invoice, lines, [f"Corrects {_named(other)}" for other in corrected], xml)


def note_page(note: CreditNote, invoice: Invoice) -> pdf.Page:
    """The texts of a credit note, and its e-invoice if there can be one."""
    shown, lines = as_invoice(note, invoice)
    xml = _xml(shown, lines, credited=invoice)
    return _page(f"Credit note {note.number}", shown, lines, [f"For {_named(invoice)}"], xml)


def _named(invoice: Invoice) -> str:
    assert invoice.finalised_at
    return f"invoice {invoice.number} of {invoice.local(invoice.finalised_at):%Y-%m-%d}"


def _xml(
    invoice: Invoice,
    lines: Sequence[InvoiceLine],
    corrected: Sequence[Invoice] = (),
    credited: Invoice | None = None,
) -> str:
    if einvoice.obstacle(invoice, lines):
        return ""
    return einvoice.document(invoice, lines, corrected, credited).decode()


def _page(title: str, invoice: Invoice, lines: Sequence[InvoiceLine], others: Sequence[str], xml: str) -> pdf.Page:
    period, day = invoice.local_period, invoice.local(invoice.finalised_at or invoice.made_at)
    due = invoice.total_minor - invoice.prepaid_minor
    due_name = "Amount due" if invoice.prepaid_minor else "Total"
    prepaid = [
        ("Total", format_minor(invoice.total_minor, invoice.currency)),
        (
            "Paid by credit" if invoice.purpose == "usage" else "Paid",
            format_minor(-invoice.prepaid_minor, invoice.currency),
        ),
    ]
    return pdf.Page(
        title,
        [
            *_party("From", invoice.seller),
            *_party("To", invoice.buyer),
            f"Date: {day:%Y-%m-%d}",
            *others,
            *(
                [f"Period: {period.begins:%Y-%m-%d %H:%M} to {period.ends:%Y-%m-%d %H:%M} {invoice.time_zone}"]
                if period.begins < period.ends
                else []
            ),
            f"Amounts in {invoice.currency}",
            *([f"Due: {invoice.local(invoice.due_at):%Y-%m-%d}"] if invoice.due_at and due > 0 else []),
        ],
        [
            (
                str(number),
                _short(line.description),
                f"{line.quantity:,}",
                "" if line.unit_nanos is None else f"{Decimal(line.unit_nanos).scaleb(-9).normalize():f}",
                exact(line.amount_nanos),
            )
            for number, line in enumerate(lines[:MOST_PRINTED], 1)
        ],
        [
            *_more(lines[MOST_PRINTED:]),
            ("Subtotal", exact(invoice.subtotal_nanos)),
            *(
                (
                    f"Tax: {part.note}{f' on {exact(part.subtotal_nanos)}' if invoice.other_taxes else ''}"
                    if part.note
                    else "Tax",
                    exact(part.tax_nanos),
                )
                for part in invoice.taxes
            ),
            *(prepaid if invoice.prepaid_minor else []),
        ],
        f"{due_name} {format_minor(due, invoice.currency)} {invoice.currency}",
        day.strftime("%Y-%m-%d"),
        xml,
    )


def as_invoice(note: CreditNote, invoice: Invoice) -> tuple[Invoice, list[InvoiceLine]]:
    """Returns a credit note in the shape of an invoice: with one line for each tax, and the parties and the period of
    its invoice. Its amounts are above zero, because the kind of the document says that they are taken back."""

    def taken(nanos: int) -> int:
        return schemes.part(nanos, note.amount_minor, invoice.total_minor)

    others = [
        TaxPart(note=part.note, subtotal_nanos=taken(part.subtotal_nanos), tax_nanos=taken(part.tax_nanos))
        for part in invoice.other_taxes
    ]
    changes = {
        "number": note.number,
        "subtotal_nanos": note.subtotal_nanos,
        "tax_nanos": note.tax_nanos,
        "other_taxes": others,
        "total_minor": note.amount_minor,
        "purpose": "usage",
        "applied_minor": 0,
        "due_at": None,
        "finalised_at": note.made_at,
    }
    made = invoice.model_copy(update=changes)
    lines = [
        InvoiceLine(
            id=note.id,
            description=f"Credit for invoice {invoice.number}: {note.reason}",
            quantity=1,
            unit_nanos=part.subtotal_nanos,
            amount_nanos=part.subtotal_nanos,
            from_=invoice.period.begins,
            to=invoice.period.ends,
            tax_note=part.note,
        )
        for part in made.taxes
    ]
    return made, lines


def _more(lines: Sequence[InvoiceLine]) -> list[tuple[str, str]]:
    return (
        [(f"{len(lines):,} more lines, in the CSV", exact(sum(line.amount_nanos for line in lines)))] if lines else []
    )


def _party(role: str, party: Seller | Buyer) -> list[str]:
    text = " ".join(filter(None, (party.name, party.country, party.vat_id)))
    return [f"{role}: {text}", *party.address.splitlines()] if text else []


def note_csv(note: CreditNote, invoice: Invoice) -> str:
    return as_csv(*einvoice.as_credit(*as_invoice(note, invoice)))


def as_csv(invoice: Invoice, lines: Sequence[InvoiceLine]) -> str:
    """The lines as comma-separated values (RFC 4180), amounts before tax in units of the currency. All that is given
    back is below zero, also in a credit note, so that the sum of all documents is the revenue."""
    out = io.StringIO()
    write = csv.writer(out).writerow
    write(("line", "description", "quantity", "amount", "currency", "from", "to", "tax", "document"))
    for number, line in enumerate(lines, 1):
        write(
            (
                number,
                _plain(line.description),
                line.quantity,
                exact(line.amount_nanos),
                invoice.currency,
                invoice.local(line.from_).isoformat(),
                invoice.local(line.to).isoformat(),
                invoice.tax_note if line.tax_note is None else line.tax_note,
                invoice.kind,
            )
        )
    return out.getvalue()


def _short(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 1]}…"


def _plain(text: str) -> str:
    """A text that a spreadsheet does not run as a formula, also a Japanese one, which takes wide signs. Names of agents
    and models come from tenants."""
    return f"'{text}" if text[:1] in _FORMULA else text
