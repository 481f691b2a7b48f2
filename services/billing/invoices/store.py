"""Invoices, their lines and credit notes as they are stored: the shapes and the queries.

`closing` makes drafts; `booking` finalises them and books payments and credit notes. A finalised invoice never changes;
a mistake is corrected by a credit note.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal
from uuid import UUID, uuid5
from zoneinfo import ZoneInfo

from pydantic import BaseModel, Field, TypeAdapter, computed_field

from infra.clock import utcnow
from infra.errors import NotFound
from infra.postgres.tx import Tx
from services.billing.invoices.tax import Buyer, Seller

Status = Literal["draft", "finalised", "paid", "void", "uncollectible"]
Purpose = Literal["usage", "credit"]


class InvoicePeriod(BaseModel):
    begins: datetime
    ends: datetime


class TaxPart(BaseModel):
    """The lines of an invoice that have one tax."""

    note: str
    subtotal_nanos: int
    tax_nanos: int


class Invoice(BaseModel):
    id: UUID
    number: str | None
    """Null: a draft."""
    status: Status
    purpose: Purpose
    """credit: prepaid credit that the tenant buys. Its payment finalises it."""
    currency: str
    period: InvoicePeriod
    time_zone: str = "UTC"
    """The subscription's, in which its periods begin at midnight. All days of documents are of it."""
    subtotal_nanos: int
    tax_nanos: int
    tax_note: str
    """Of the lines without a note of their own."""
    other_taxes: list[TaxPart] = Field([], exclude=True)
    """Of the lines with a note of their own, as parts of the subtotal and the tax."""
    total_minor: int
    """In minor units of the currency (cents), tax included, rounded once."""
    applied_minor: int
    """Covered by grants."""
    paid_minor: int
    """Received, less the parts that were given back: by a refund, a lost dispute, or as a grant with a credit note."""
    credited_minor: int
    """Taken back by credit notes."""
    due_at: datetime | None
    """Null for a draft."""
    overdue: bool
    """It is finalised and not paid, and the day of `due_at` is over in `time_zone`."""
    buyer: Buyer
    """As it was when the invoice was finalised, or when the payment of prepaid credit began. Empty for a draft of
    usage."""
    seller: Seller
    """As `buyer`."""
    made_at: datetime
    finalised_at: datetime | None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def taxes(self) -> list[TaxPart]:
        """The parts of the subtotal and of the tax, one for each tax."""
        own = TaxPart(
            note=self.tax_note,
            subtotal_nanos=self.subtotal_nanos - sum(part.subtotal_nanos for part in self.other_taxes),
            tax_nanos=self.tax_nanos - sum(part.tax_nanos for part in self.other_taxes),
        )
        return [own, *self.other_taxes]

    @property
    def kind(self) -> str:
        """Of its document. An invoice below zero is a credit note."""
        return "credit note" if self.total_minor < 0 else "invoice"

    @property
    def title(self) -> str:
        """Of its document."""
        if self.number is None:
            return f"Draft of {'a' if self.total_minor < 0 else 'an'} {self.kind}"
        return f"{self.kind.capitalize()} {self.number}"

    def local(self, moment: datetime) -> datetime:
        return moment.astimezone(ZoneInfo(self.time_zone))

    @property
    def local_period(self) -> InvoicePeriod:
        return InvoicePeriod(begins=self.local(self.period.begins), ends=self.local(self.period.ends))

    @property
    def is_order(self) -> bool:
        """Prepaid credit that is not paid yet."""
        return self.purpose == "credit" and self.status == "draft"

    @property
    def prepaid_minor(self) -> int:
        """Paid when it was finalised: by grants or, if it is of prepaid credit, by its payment."""
        return self.applied_minor if self.purpose == "usage" or self.is_order else self.total_minor

    @property
    def open_minor(self) -> int:
        """Not paid, also if it was written off."""
        return max(0, self.rest_minor)

    @property
    def owed_minor(self) -> int:
        """Above the total: owed to the tenant until payments are refunded."""
        return max(0, -self.rest_minor)

    @property
    def rest_minor(self) -> int:
        """Below zero: owed to the tenant. A total below zero became a grant, so nothing of it is owed."""
        return max(0, self.total_minor) - self.applied_minor - self.credited_minor - self.paid_minor

    @computed_field  # type: ignore[prop-decorator]
    @property
    def due_minor(self) -> int:
        return self.open_minor if self.status in ("draft", "finalised") else 0


class InvoiceLine(BaseModel):
    id: UUID
    description: str
    quantity: int
    unit_nanos: int | str | None
    """The price of one unit in nano-units, a decimal string if it has a fraction. Null: units have different prices."""
    amount_nanos: int
    from_: datetime = Field(serialization_alias="from")
    to: datetime
    tax_note: str | None = None
    """Null: that of the invoice. A correction of earlier usage keeps the tax of that time."""


class WholeInvoice(Invoice):
    lines: list[InvoiceLine]


class CreditNote(BaseModel):
    id: UUID
    number: str
    invoice_id: UUID
    amount_minor: int
    """In minor units of the invoice's currency (cents), tax included."""
    subtotal_nanos: int
    tax_nanos: int
    """Its part of the invoice's tax, as it was booked."""
    reason: str
    made_at: datetime


_INVOICE = (
    "invoice_id, number, status, purpose, currency, begins, ends, time_zone, subtotal_nanos, tax_nanos, tax_note, "
    "other_taxes, total_minor, applied_minor, paid_minor, credited_minor, due_at, buyer, seller, made_at, finalised_at"
)


_TAXES = TypeAdapter(list[TaxPart])


async def get(tx: Tx, tenant_id: str, invoice_id: UUID) -> Invoice:
    """Raises NotFound."""
    rows = await tx.sql(
        f"SELECT {_INVOICE} FROM invoice WHERE tenant_id = $1 AND invoice_id = $2", tenant_id, invoice_id
    )
    if not rows:
        raise NotFound(f"invoice {invoice_id}: not found")
    return _invoice(rows[0])


async def listed(tx: Tx, tenant_id: str | None, *, after: UUID | None, limit: int) -> list[Invoice]:
    rows = await tx.sql(
        f"""
        SELECT {_INVOICE}
        FROM invoice
        WHERE ($1::text IS NULL OR tenant_id = $1) AND ($2::uuid IS NULL OR invoice_id > $2)
        ORDER BY invoice_id
        LIMIT $3
        """,
        tenant_id,
        after,
        limit,
    )
    return [_invoice(row) for row in rows]


def _invoice(row: tuple[Any, ...]) -> Invoice:
    columns = dict(zip([name.strip() for name in _INVOICE.split(",")], row, strict=True))
    zone = ZoneInfo(columns["time_zone"])
    due = columns["due_at"]
    return Invoice(
        id=columns.pop("invoice_id"),
        buyer=Buyer.model_validate_json(columns.pop("buyer")),
        seller=Seller.model_validate_json(columns.pop("seller")),
        period=InvoicePeriod(begins=columns.pop("begins"), ends=columns.pop("ends")),
        other_taxes=_TAXES.validate_json(columns.pop("other_taxes")),
        overdue=columns["status"] == "finalised" and due.astimezone(zone).date() < utcnow().astimezone(zone).date(),
        **columns,
    )


async def lines(
    tx: Tx, tenant_id: str, invoice_id: UUID, *, after: int, limit: int | None
) -> list[tuple[int, InvoiceLine]]:
    """Returns (number, line) of the lines after number `after`. limit None: all."""
    rows = await tx.sql(
        """
        SELECT line, line_id, description, quantity::text, unit_nanos, amount_nanos, begins, ends, tax_note
        FROM invoice_line
        WHERE tenant_id = $1 AND invoice_id = $2 AND line > $3
        ORDER BY line
        LIMIT $4
        """,
        tenant_id,
        invoice_id,
        after,
        limit,
    )
    return [
        (
            number,
            InvoiceLine(
                id=line_id,
                description=description,
                quantity=int(quantity),
                unit_nanos=int(unit) if unit.lstrip("-").isdecimal() else unit or None,
                amount_nanos=amount,
                from_=begins,
                to=ends,
                tax_note=note,
            ),
        )
        for number, line_id, description, quantity, unit, amount, begins, ends, note in rows
    ]


async def last_line(tx: Tx, tenant_id: str, invoice_id: UUID) -> int:
    """Returns the number of the last line. 0: the invoice has none."""
    [(number,)] = await tx.sql(
        "SELECT coalesce(max(line), 0) FROM invoice_line WHERE tenant_id = $1 AND invoice_id = $2",
        tenant_id,
        invoice_id,
    )
    return int(number)


def line_of(
    invoice: Invoice, description: str, nanos: int, tax_note: str | None = None, *, about: str = ""
) -> InvoiceLine:
    """A line about an amount. Its id follows from the invoice, the description and `about`, so a line that is only
    shown yet has the id with which it is stored. `about`: names the subject if two lines may have one description."""
    return InvoiceLine(
        id=uuid5(invoice.id, about + description),
        description=description,
        quantity=1,
        unit_nanos=None,
        amount_nanos=nanos,
        from_=invoice.period.begins,
        to=invoice.period.ends,
        tax_note=tax_note,
    )


async def add_line(tx: Tx, tenant_id: str, invoice_id: UUID, line: InvoiceLine) -> None:
    """Adds a line about an amount to a draft, after its last one."""
    await tx.sql(
        """
        INSERT INTO invoice_line (tenant_id, invoice_id, line, line_id, description, quantity, unit_nanos, amount_nanos,
                                  begins, ends, source, tax_note)
        SELECT $1, $2, coalesce(max(line), 0) + 1, $3, $4, 1, '', $5, $6, $7, '{}', $8
        FROM invoice_line
        WHERE tenant_id = $1 AND invoice_id = $2
        """,
        tenant_id,
        invoice_id,
        line.id,
        line.description,
        line.amount_nanos,
        line.from_,
        line.to,
        line.tax_note,
    )


async def whole(tx: Tx, tenant_id: str, invoice_id: UUID) -> tuple[Invoice, list[InvoiceLine], list[Invoice]]:
    """Returns an invoice with all its lines, and the invoices that it corrects. Raises NotFound."""
    numbered = await lines(tx, tenant_id, invoice_id, after=0, limit=None)
    return (
        await get(tx, tenant_id, invoice_id),
        [line for _, line in numbered],
        await corrected(tx, tenant_id, invoice_id),
    )


async def corrected(tx: Tx, tenant_id: str, invoice_id: UUID) -> list[Invoice]:
    """Returns the invoices whose usage a finalised invoice corrects. One that was finalised after it had no number yet,
    and the documents of an invoice stay the same."""
    rows = await tx.sql(
        f"""
        SELECT {_INVOICE}
        FROM invoice AS old
        WHERE tenant_id = $1 AND EXISTS (
            SELECT
            FROM invoice AS new
            JOIN period_correction AS c USING (tenant_id, period)
            JOIN invoice_line AS l USING (tenant_id, invoice_id)
            WHERE new.tenant_id = $1 AND new.invoice_id = $2 AND old.finalised_at < new.finalised_at
              AND c.usage_period = old.period AND c.nanos <> 0
              -- A plan may charge by its own prices only.
              AND l.source::json ->> 'meter' = 'correction_nanos'
        )
        ORDER BY number
        """,
        tenant_id,
        invoice_id,
    )
    return [_invoice(row) for row in rows]


_CREDIT_NOTE = """
    SELECT n.credit_note_id, n.number, n.invoice_id, n.amount_minor, b.subtotal, b.tax, n.reason, n.made_at
    FROM credit_note AS n
    CROSS JOIN LATERAL (
        SELECT coalesce(sum(l.amount_nanos) FILTER (
                   WHERE l.account IN ('revenue', 'purchased')
               ), 0)::bigint AS subtotal,
               coalesce(sum(l.amount_nanos) FILTER (WHERE l.account = 'tax'), 0)::bigint AS tax
        FROM journal_entry AS e
        JOIN journal_line AS l USING (tenant_id, entry)
        WHERE e.tenant_id = n.tenant_id AND e.kind = 'credit_note' AND e.reference = n.credit_note_id::text
    ) AS b
"""


async def credit_notes(tx: Tx, tenant_id: str, invoice_id: UUID, number: str | None = None) -> list[CreditNote]:
    rows = await tx.sql(
        f"""
        {_CREDIT_NOTE}
        WHERE n.tenant_id = $1 AND n.invoice_id = $2 AND ($3::text IS NULL OR n.number = $3)
        ORDER BY n.number
        """,
        tenant_id,
        invoice_id,
        number,
    )
    return [_credit_note(row) for row in rows]


async def credit_note(tx: Tx, tenant_id: str, invoice_id: UUID, credit_note_id: UUID) -> tuple[CreditNote, Invoice]:
    """Returns a credit note and its invoice. Raises NotFound."""
    rows = await tx.sql(
        f"{_CREDIT_NOTE} WHERE n.tenant_id = $1 AND n.invoice_id = $2 AND n.credit_note_id = $3",
        tenant_id,
        invoice_id,
        credit_note_id,
    )
    if not rows:
        raise NotFound(f"credit note {credit_note_id}: not found")
    return _credit_note(rows[0]), await get(tx, tenant_id, invoice_id)


def _credit_note(row: tuple[Any, ...]) -> CreditNote:
    return CreditNote(**dict(zip(CreditNote.model_fields, row, strict=True)))
