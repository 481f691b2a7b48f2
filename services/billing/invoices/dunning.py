"""Mails of invoices: the invoice itself, reminders of an unpaid one, and its write-off. Each step is made once.

The number of the next step and its time stand in the invoice. The transaction that sends a mail moves them on, under
the lock of the account, so neither a crash nor a second process sends a mail again.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from uuid import UUID

from infra.postgres.tx import Tx
from protos.messages.notification import Attachment
from services.billing.credit import accounts
from services.billing.invoices import booking
from services.billing.invoices import store as invoices
from services.billing.invoices.store import Invoice
from services.billing.plans import terms
from services.billing.rating.currencies import format_minor

# A message may have a megabyte, and base64 makes four bytes of three.
MAX_ATTACHMENT_BYTES = 700_000
PAYMENT_DAYS = timedelta(days=14)
"""So long a payment that is not decided delays the write-off. Payers abandon payments in their browsers, and the
provider reports nothing then. Debits of bank accounts are decided within it."""
_OPEN = "(status = 'finalised' OR (status = 'paid' AND dunning_step = 0))"


async def due(tx: Tx, now: datetime, limit: int) -> list[tuple[str, UUID, bool]]:
    """Returns the invoices with a step that is due: tenant, invoice, whether the step is to send the invoice.

    The mails of an erased tenant would have no reader; the operator ends its unpaid invoices.
    """
    rows = await tx.sql(
        f"""
        SELECT tenant_id, invoice_id, dunning_step = 0
        FROM invoice
        WHERE {_OPEN} AND dunning_at <= $1
          AND NOT EXISTS (SELECT FROM erased_tenant AS e WHERE e.tenant_id = invoice.tenant_id)
        ORDER BY dunning_at
        LIMIT $2
        """,
        now,
        limit,
    )
    return [(tenant_id, invoice_id, first) for tenant_id, invoice_id, first in rows]


async def step(tx: Tx, tenant_id: str, invoice_id: UUID, document: bytes | None, now: datetime) -> None:
    """Makes the step of an invoice that is due. `document`: the invoice as PDF, for the first step."""
    await accounts.lock_one(tx, tenant_id)
    rows = await tx.sql(
        f"""
        SELECT dunning_step, greatest(due_at, reopened_at)
        FROM invoice
        WHERE tenant_id = $1 AND invoice_id = $2 AND {_OPEN}
        """,
        tenant_id,
        invoice_id,
    )
    if not rows:
        # It was paid or ended meanwhile.
        return
    [(number, since)] = rows
    invoice = await invoices.get(tx, tenant_id, invoice_id)
    agreed = await terms.get(tx, tenant_id)
    times = agreed.steps(since)
    reminders = len(agreed.reminder_days)
    if number == 0:
        assert document is not None
        _send_invoice(tx, tenant_id, invoice, document)
        number = 1
    # Another process may have been faster; the next step is not due then.
    elif (at := _index(number, reminders)) < len(times) and times[at] <= now:
        if number <= reminders:
            # After an outage of days, one mail stands for the reminders that were missed.
            number = max(n for n in range(number, reminders + 1) if times[n - 1] <= now)
            _remind(tx, tenant_id, invoice, number)
            number += 1
        elif await _is_being_paid(tx, tenant_id, invoice_id, pending=now < times[at] + PAYMENT_DAYS):
            times[at] = now + timedelta(days=1)
        else:
            await booking.end(tx, tenant_id, invoice_id, "uncollectible", "billing")
    at = _index(number, reminders)
    next_at: datetime | None = times[at] if at < len(times) else None
    await tx.sql(
        """
        UPDATE invoice
        SET dunning_step = $3, dunning_at = coalesce($4, 'infinity'::timestamptz)
        WHERE tenant_id = $1 AND invoice_id = $2
        """,
        tenant_id,
        invoice_id,
        number,
        next_at,
    )


def _index(number: int, reminders: int) -> int:
    """Returns the index of a step among the times of the terms. After more reminders than the terms have by now, the
    write-off is next."""
    return min(number - 1, reminders)


async def _is_being_paid(tx: Tx, tenant_id: str, invoice_id: UUID, *, pending: bool) -> bool:
    """Whether a bank has money of a dispute that is not lost or, with `pending`, a payment is not decided."""
    [(found,)] = await tx.sql(
        """
        SELECT EXISTS (
            SELECT FROM payment WHERE tenant_id = $1 AND invoice_id = $2 AND status = 'pending' AND $3
            UNION ALL
            SELECT FROM dispute JOIN payment USING (tenant_id, payment_id)
            WHERE tenant_id = $1 AND invoice_id = $2 AND state <> 'lost' AND minor <> 0
        )
        """,
        tenant_id,
        invoice_id,
        pending,
    )
    return bool(found)


def _send_invoice(tx: Tx, tenant_id: str, invoice: Invoice, document: bytes) -> None:
    where, attachment = attached(str(invoice.number), document, str(invoice.id))
    about = "prepaid credit"
    if invoice.purpose == "usage":
        period = invoice.local_period
        about = f"{period.begins:%Y-%m-%d} to {period.ends:%Y-%m-%d}"
    text = f"{invoice.title} for {about}: {amount(invoice, abs(invoice.total_minor))}. {where}\n\n{_due(invoice)}"
    accounts.send_mail(tx, tenant_id, invoice.title, text, attachment)


def attached(number: str, document: bytes, path: str) -> tuple[str, Attachment | None]:
    """A sentence about the place of the document, and the attachment unless the document is too large for a mail.
    `path`: of the document, below the invoices."""
    if len(document) > MAX_ATTACHMENT_BYTES:
        return f"GET /api/v1/invoices/{path}/pdf has the document.", None
    return "The document is attached.", Attachment(f"{number}.pdf", "application/pdf", document)


def _remind(tx: Tx, tenant_id: str, invoice: Invoice, number: int) -> None:
    text = f"Invoice {invoice.number} is not paid yet. {_due(invoice)}"
    accounts.send_mail(tx, tenant_id, f"Reminder {number}: invoice {invoice.number}", text)


def _due(invoice: Invoice) -> str:
    if invoice.due_minor == 0:
        return "Nothing is to be paid.\n"
    assert invoice.due_at
    day = f"{invoice.local(invoice.due_at):%Y-%m-%d} ({invoice.time_zone})"
    return f"{amount(invoice, invoice.due_minor)} is due by {day}.\n"


def amount(invoice: Invoice, minor: int) -> str:
    return f"{format_minor(minor, invoice.currency)} {invoice.currency}"
