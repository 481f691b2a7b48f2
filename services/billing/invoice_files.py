"""The contents of an invoice's files: the page of the PDF, and the CSV. Pure."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from services.billing import pdf
from services.billing.currencies import DIGITS
from services.billing.invoices import Invoice, InvoiceLine


def exact(nanos: int) -> str:
    """All nine digits of an amount in units: ``12.500000000``."""
    whole, rest = divmod(abs(nanos), 10**9)
    return f"{'-' if nanos < 0 else ''}{whole}.{rest:09}"


def in_minor(minor: int, currency: str) -> str:
    """Formats minor units as units of the currency: ``12.50``, ``1200`` for JPY."""
    digits = DIGITS[currency]
    whole, rest = divmod(abs(minor), 10**digits)
    return f"{'-' if minor < 0 else ''}{whole}" + (f".{rest:0{digits}}" if digits else "")


def page(invoice: Invoice, lines: Sequence[InvoiceLine]) -> pdf.Page:
    """The texts of an invoice. Its state is left out, because a payment must not change the document."""
    buyer, period = invoice.buyer, invoice.period
    return pdf.Page(
        f"Invoice {invoice.number}" if invoice.number else "Draft of an invoice",
        [
            f"To: {buyer.name} {buyer.country} {buyer.vat_id}".rstrip(),
            f"Date: {(invoice.finalised_at or invoice.made_at):%Y-%m-%d}",
            f"Period: {period.begins:%Y-%m-%d %H:%M} to {period.ends:%Y-%m-%d %H:%M} UTC",
            f"Amounts in {invoice.currency}",
            *([f"Due: {invoice.due_at:%Y-%m-%d}"] if invoice.due_at else []),
        ],
        [
            (str(number), line.description, f"{line.quantity:,}", exact(line.amount_nanos))
            for number, line in enumerate(lines, 1)
        ],
        [
            ("Subtotal", exact(invoice.subtotal_nanos)),
            (f"Tax: {invoice.tax_note}" if invoice.tax_note else "Tax", exact(invoice.tax_nanos)),
        ],
        f"Total {in_minor(invoice.total_minor, invoice.currency)} {invoice.currency}",
    )


def as_csv(invoice: Invoice, lines: Sequence[InvoiceLine]) -> str:
    """The lines as comma-separated values (RFC 4180), amounts in units of the currency."""
    out = io.StringIO()
    write = csv.writer(out).writerow
    write(("line", "description", "quantity", "amount", "currency", "from", "to"))
    for number, line in enumerate(lines, 1):
        write(
            (
                number,
                _plain(line.description),
                line.quantity,
                exact(line.amount_nanos),
                invoice.currency,
                line.from_.isoformat(),
                line.to.isoformat(),
            )
        )
    return out.getvalue()


def _plain(text: str) -> str:
    """A text that a spreadsheet does not run as a formula. Names of agents and models come from tenants."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
