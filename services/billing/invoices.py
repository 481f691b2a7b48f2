"""Invoices: lines of a closed period, numbers without gaps, credit notes. In the tables ``invoice`` and others.

A period is closed once, under the lock of the tenant's account; its draft has all its lines at once. Finalising gives
the number in the transaction that books the invoice, so a number is used if and only if the invoice is booked. A
finalised invoice never changes; a mistake is corrected by a credit note.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, Literal
from uuid import UUID

import msgspec
from pydantic import BaseModel, Field

from infra.clock import utcnow, uuid7
from infra.errors import Conflict, InvalidMessage, NotFound
from infra.postgres.tx import Tx
from services.billing import accounts, grants, journal, plans, schemes, subscriptions, tax, terms
from services.billing.currencies import nanos_per_minor, to_minor
from services.billing.plans import Metered
from services.billing.subscriptions import Period
from services.billing.tax import Buyer

Status = Literal["draft", "finalised", "paid", "void", "uncollectible"]
SERIES, CREDIT_SERIES = "INV", "CN"
MAX_LINES = 10_000


class Span(BaseModel):
    begins: datetime
    ends: datetime


class Invoice(BaseModel):
    id: UUID
    number: str | None
    """Null: a draft."""
    status: Status
    currency: str
    period: Span
    subtotal_nanos: int
    tax_nanos: int
    tax_note: str
    total_minor: int
    """In minor units of the currency (cents), tax included, rounded once."""
    applied_minor: int
    """Covered by grants."""
    paid_minor: int
    credited_minor: int
    """Taken back by credit notes."""
    due_minor: int
    due_at: datetime | None
    """Null for a draft."""
    overdue: bool
    """It is finalised, not paid, and past `due_at`."""
    buyer: Buyer
    """As it was when the invoice was finalised. Empty for a draft."""
    made_at: datetime
    finalised_at: datetime | None


class InvoiceLine(BaseModel):
    id: UUID
    description: str
    quantity: int
    unit_nanos: int | str | None
    """The price of one unit in nano-units, a decimal string if it has a fraction. Null: units have different prices."""
    amount_nanos: int
    from_: datetime = Field(serialization_alias="from")
    to: datetime


class CreditNote(BaseModel):
    id: UUID
    number: str
    invoice_id: UUID
    amount_minor: int
    reason: str
    made_at: datetime


_INVOICE = (
    "invoice_id, number, status, currency, begins, ends, subtotal_nanos, tax_nanos, tax_note, total_minor, "
    "applied_minor, paid_minor, credited_minor, due_at, buyer, made_at, finalised_at"
)


async def close(tx: Tx, tenant_id: str, until: datetime, seller_country: str) -> list[Invoice]:
    """Closes the tenant's periods that have ended at or before `until` and makes their drafts."""
    currency, _ = await accounts.lock_one(tx, tenant_id)
    # While the tenant still has an open period: its debits are invoiced, so grants do not cover them as well.
    await grants.settle(tx, tenant_id)
    await subscriptions.extend(tx, tenant_id, utcnow())
    found = []
    for period in await subscriptions.due(tx, tenant_id, min(until, utcnow())):
        found.append(await _draft(tx, tenant_id, currency, period, seller_country))
    return found


async def _draft(tx: Tx, tenant_id: str, currency: str, period: Period, seller_country: str) -> Invoice:
    plan = await plans.version(tx, period.plan_id, period.plan_version)
    full = (period.full_ends - period.full_begins).total_seconds()
    lines = plans.lines(
        plan, await metered(tx, tenant_id, period.period), int((period.ends - period.begins).total_seconds()), int(full)
    )
    subtotal = sum(line.amount_nanos for line in lines)
    invoice_id = uuid7()
    taxed = await _tax(tx, tenant_id, subtotal, seller_country)
    await tx.sql(
        """
        INSERT INTO invoice (tenant_id, invoice_id, period, status, currency, begins, ends, subtotal_nanos, tax_nanos,
                             tax_note, total_minor)
        VALUES ($1, $2, $3, 'draft', $4, $5, $6, $7, $8, $9, $10)
        """,
        tenant_id,
        invoice_id,
        period.period,
        currency,
        period.begins,
        period.ends,
        subtotal,
        *taxed,
        to_minor(subtotal + taxed[0], currency),
    )
    await tx.sql(
        """
        INSERT INTO invoice_line (tenant_id, invoice_id, line, line_id, description, quantity, unit_nanos, amount_nanos,
                                  begins, ends, source)
        SELECT $1, $2, n.line, n.line_id, n.description, n.quantity::numeric, n.unit_nanos, n.amount_nanos, $3, $4,
               n.source
        FROM unnest($5::int[], $6::uuid[], $7::text[], $8::text[], $9::text[], $10::bigint[], $11::text[])
             AS n(line, line_id, description, quantity, unit_nanos, amount_nanos, source)
        """,
        tenant_id,
        invoice_id,
        period.begins,
        period.ends,
        list(range(1, len(lines) + 1)),
        [uuid7() for _ in lines],
        [line.description for line in lines],
        [str(line.quantity) for line in lines],
        [line.unit_nanos for line in lines],
        [line.amount_nanos for line in lines],
        [msgspec.json.encode(line.source).decode() for line in lines],
    )
    await tx.sql(
        "UPDATE period SET closed_at = clock_timestamp() WHERE tenant_id = $1 AND period = $2", tenant_id, period.period
    )
    return await get(tx, tenant_id, invoice_id)


async def metered(tx: Tx, tenant_id: str, period: int) -> list[Metered]:
    """Returns the sums of the period's usage. It reads buckets only, so its cost does not grow with the records."""
    rows = await tx.sql(
        """
        SELECT meter, resource, agent_id, channel_id, late, sum(quantity)::text, sum(records)::bigint
        FROM usage_bucket
        WHERE tenant_id = $1 AND period = $2
        GROUP BY 1, 2, 3, 4, 5
        ORDER BY 1, 2, 3, 4, 5
        """,
        tenant_id,
        period,
    )
    return [
        Metered(meter, model, agent, channel, late, int(quantity), records)
        for meter, model, agent, channel, late, quantity, records in rows
    ]


async def _tax(tx: Tx, tenant_id: str, subtotal: int, seller_country: str) -> tuple[int, str]:
    found = tax.tax_of(await tax.buyer(tx, tenant_id), seller_country, await tax.rates(tx))
    return plans.with_markup(subtotal, found.percent) - subtotal, found.note


async def finalise(tx: Tx, tenant_id: str, invoice_id: UUID, seller_country: str, actor: str) -> Invoice:
    """Numbers a draft, books it, and applies grants. A finalised invoice is answered as it is."""
    await accounts.lock_one(tx, tenant_id)
    draft = await get(tx, tenant_id, invoice_id)
    if draft.status != "draft":
        return draft
    taxed = await _tax(tx, tenant_id, draft.subtotal_nanos, seller_country)
    total = to_minor(draft.subtotal_nanos + taxed[0], draft.currency)
    unit = nanos_per_minor(draft.currency)
    now = utcnow()
    await grants.settle(tx, tenant_id)
    await journal.post(
        tx,
        tenant_id,
        "invoice",
        str(invoice_id),
        {
            "receivable": total * unit,
            "revenue": -draft.subtotal_nanos,
            "tax": -taxed[0],
            "rounding": draft.subtotal_nanos + taxed[0] - total * unit,
        },
        reason="invoice finalised",
        actor=actor,
    )
    # Only whole minor units of grants are applied; the rest of a grant stays.
    applied = min(total, await grants.left(tx, tenant_id) // unit) if total > 0 else 0
    await grants.burn(tx, tenant_id, applied * unit, for_="receivable", reference=str(invoice_id))
    await tx.sql(
        """
        UPDATE invoice
        SET status = $3, number = $4, tax_nanos = $5, tax_note = $6, total_minor = $7, applied_minor = $8,
            buyer = $9, finalised_at = $10, due_at = $11, dunning_at = $10
        WHERE tenant_id = $1 AND invoice_id = $2
        """,
        tenant_id,
        invoice_id,
        "paid" if applied >= total else "finalised",
        await _number(tx, tenant_id, SERIES),
        *taxed,
        total,
        applied,
        (await tax.buyer(tx, tenant_id)).model_dump_json(),
        now,
        now + timedelta(days=(await terms.get(tx, tenant_id)).due_days),
    )
    if total < 0:
        # Corrections are larger than the charges: the tenant is owed the rest.
        await accounts.add_credit(
            tx,
            tenant_id,
            -total * unit,
            kind="prepaid",
            reason=f"corrections until {draft.period.ends.date()}",
            actor=actor,
            source="receivable",
        )
    return await get(tx, tenant_id, invoice_id)


async def _number(tx: Tx, tenant_id: str, series: str) -> str:
    """Takes the next number. The row stays locked until the transaction ends, so a rollback leaves no gap."""
    [(number,)] = await tx.sql(
        """
        INSERT INTO invoice_series AS s (tenant_id, series, last)
        VALUES ($1, $2, 1)
        ON CONFLICT (tenant_id, series) DO UPDATE SET last = s.last + 1
        RETURNING last
        """,
        tenant_id,
        series,
    )
    return f"{series}-{number:06}"


async def receive(tx: Tx, tenant_id: str, invoice_id: UUID, minor: int, *, reference: str, actor: str) -> None:
    """Books money that was received for an invoice; below zero: given back. The caller has locked the account."""
    invoice = await get(tx, tenant_id, invoice_id)
    nanos = minor * nanos_per_minor(invoice.currency)
    await journal.post(
        tx,
        tenant_id,
        "payment" if minor > 0 else "refund",
        reference,
        {"cash": nanos, "receivable": -nanos},
        reason=f"invoice {invoice.number}",
        actor=actor,
    )
    await add_paid(tx, tenant_id, invoice_id, minor)


async def add_paid(tx: Tx, tenant_id: str, invoice_id: UUID, minor: int) -> None:
    """Adds a paid amount (below zero: taken back), and marks the invoice as paid or as open again."""
    await tx.sql(
        """
        UPDATE invoice
        SET paid_minor = paid_minor + $3,
            status = CASE
                WHEN status NOT IN ('finalised', 'paid') THEN status
                WHEN applied_minor + credited_minor + paid_minor + $3 >= total_minor THEN 'paid'
                ELSE 'finalised'
            END
        WHERE tenant_id = $1 AND invoice_id = $2
        """,
        tenant_id,
        invoice_id,
        minor,
    )


async def end(
    tx: Tx, tenant_id: str, invoice_id: UUID, status: Literal["void", "uncollectible"], actor: str
) -> Invoice:
    """Ends a finalised invoice that is not paid: `void` takes it back, `uncollectible` writes it off.

    Raises Conflict for any other status, and for a void of an invoice that is partly paid.
    """
    await accounts.lock_one(tx, tenant_id)
    invoice = await get(tx, tenant_id, invoice_id)
    if invoice.status == status:
        return invoice
    if invoice.status != "finalised":
        raise Conflict(f"the invoice is {invoice.status}; only a finalised one can become {status}")
    unit = nanos_per_minor(invoice.currency)
    due = invoice.due_minor * unit
    if status == "uncollectible":
        amounts: dict[journal.JournalAccount, int] = {"write_off": due, "receivable": -due}
    else:
        if invoice.paid_minor or invoice.applied_minor or invoice.credited_minor:
            raise Conflict("a part of the invoice is paid or credited; make a credit note")
        rounding = invoice.total_minor * unit - invoice.subtotal_nanos - invoice.tax_nanos
        amounts = {
            "receivable": -due,
            "revenue": invoice.subtotal_nanos,
            "tax": invoice.tax_nanos,
            "rounding": rounding,
        }
    await journal.post(tx, tenant_id, status, str(invoice_id), amounts, reason=f"invoice {invoice.number}", actor=actor)
    await tx.sql(
        "UPDATE invoice SET status = $3 WHERE tenant_id = $1 AND invoice_id = $2", tenant_id, invoice_id, status
    )
    return await get(tx, tenant_id, invoice_id)


async def credit(
    tx: Tx, tenant_id: str, invoice_id: UUID, minor: int, *, reason: str, actor: str, refund: bool
) -> CreditNote:
    """Takes a part of an invoice back, with its share of the tax. It reduces the amount that is due.

    Money that was paid already becomes a grant or, with `refund`, is owed until a payment is refunded. Raises Conflict
    for a draft or void invoice and InvalidMessage for more than the invoice has.
    """
    await accounts.lock_one(tx, tenant_id)
    invoice = await get(tx, tenant_id, invoice_id)
    if invoice.status not in ("finalised", "paid"):
        raise Conflict(f"the invoice is {invoice.status}; only a finalised or paid one gets a credit note")
    if minor > invoice.total_minor - invoice.credited_minor:
        raise InvalidMessage("amount_minor", f"must be at most {invoice.total_minor - invoice.credited_minor}")
    unit = nanos_per_minor(invoice.currency)
    gross = invoice.subtotal_nanos + invoice.tax_nanos
    taxed = schemes.part(minor * unit, invoice.tax_nanos, gross) if gross else 0
    credit_note_id, number = uuid7(), await _number(tx, tenant_id, CREDIT_SERIES)
    await tx.sql(
        """
        INSERT INTO credit_note (tenant_id, credit_note_id, invoice_id, number, amount_minor, reason, actor)
        VALUES ($1, $2, $3, $4, $5, $6, $7)
        """,
        tenant_id,
        credit_note_id,
        invoice_id,
        number,
        minor,
        reason,
        actor,
    )
    await journal.post(
        tx,
        tenant_id,
        "credit_note",
        str(credit_note_id),
        {"revenue": minor * unit - taxed, "tax": taxed, "receivable": -minor * unit},
        reason=reason,
        actor=actor,
    )
    await tx.sql(
        "UPDATE invoice SET credited_minor = credited_minor + $3 WHERE tenant_id = $1 AND invoice_id = $2",
        tenant_id,
        invoice_id,
        minor,
    )
    await add_paid(tx, tenant_id, invoice_id, 0)
    over = minor - invoice.due_minor
    if over > 0 and not refund:
        await accounts.add_credit(
            tx,
            tenant_id,
            over * unit,
            kind="prepaid",
            reason=f"credit note {number}",
            actor=actor,
            source="receivable",
        )
    [made] = await credit_notes(tx, tenant_id, invoice_id, number)
    return made


async def credit_notes(tx: Tx, tenant_id: str, invoice_id: UUID, number: str | None = None) -> list[CreditNote]:
    rows = await tx.sql(
        """
        SELECT credit_note_id, number, invoice_id, amount_minor, reason, made_at
        FROM credit_note
        WHERE tenant_id = $1 AND invoice_id = $2 AND ($3::text IS NULL OR number = $3)
        ORDER BY number
        """,
        tenant_id,
        invoice_id,
        number,
    )
    return [CreditNote(**dict(zip(CreditNote.model_fields, row, strict=True))) for row in rows]


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
    due = columns["total_minor"] - columns["applied_minor"] - columns["credited_minor"] - columns["paid_minor"]
    open_ = columns["status"] in ("draft", "finalised")
    return Invoice(
        id=columns.pop("invoice_id"),
        buyer=Buyer.model_validate_json(columns.pop("buyer")),
        period=Span(begins=columns.pop("begins"), ends=columns.pop("ends")),
        due_minor=max(0, due) if open_ else 0,
        overdue=columns["status"] == "finalised" and columns["due_at"] < utcnow(),
        **columns,
    )


async def lines(tx: Tx, tenant_id: str, invoice_id: UUID, *, after: int, limit: int) -> list[tuple[int, InvoiceLine]]:
    """Returns (number, line) of the lines after number `after`."""
    rows = await tx.sql(
        """
        SELECT line, line_id, description, quantity::text, unit_nanos, amount_nanos, begins, ends
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
            ),
        )
        for number, line_id, description, quantity, unit, amount, begins, ends in rows
    ]


async def whole(tx: Tx, tenant_id: str, invoice_id: UUID) -> tuple[Invoice, list[InvoiceLine]]:
    """Returns an invoice with all its lines. Raises NotFound."""
    invoice = await get(tx, tenant_id, invoice_id)
    return invoice, [line for _, line in await lines(tx, tenant_id, invoice_id, after=0, limit=MAX_LINES)]
