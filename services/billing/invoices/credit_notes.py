"""Mails of credit notes: each note once. The transaction that sends the mail marks the note."""

from __future__ import annotations

from uuid import UUID

from infra.postgres.tx import Tx
from services.billing.credit import accounts
from services.billing.invoices import dunning
from services.billing.invoices import store as invoices


async def due(tx: Tx, limit: int) -> list[tuple[str, UUID, UUID]]:
    """Returns the notes that were not mailed yet: tenant, invoice, note.

    Mails of an erased tenant would have no reader.
    """
    rows = await tx.sql(
        """
        SELECT tenant_id, invoice_id, credit_note_id
        FROM credit_note AS n
        WHERE NOT mailed AND NOT EXISTS (SELECT FROM erased_tenant AS e WHERE e.tenant_id = n.tenant_id)
        ORDER BY made_at
        LIMIT $1
        """,
        limit,
    )
    return [(tenant_id, invoice_id, note_id) for tenant_id, invoice_id, note_id in rows]


async def send(tx: Tx, tenant_id: str, invoice_id: UUID, note_id: UUID, document: bytes) -> None:
    """Mails a note with its PDF, unless another process has."""
    if not await tx.sql(
        """
        UPDATE credit_note
        SET mailed = true
        WHERE tenant_id = $1 AND credit_note_id = $2 AND NOT mailed
        RETURNING credit_note_id
        """,
        tenant_id,
        note_id,
    ):
        return
    note, invoice = await invoices.credit_note(tx, tenant_id, invoice_id, note_id)
    where, attachment = dunning.attached(note.number, document, f"{invoice_id}/credit-notes/{note_id}")
    amount = dunning.amount(invoice, note.amount_minor)
    text = f"Credit note {note.number} for invoice {invoice.number}: {amount}. {where}\n\n{note.reason}\n"
    accounts.send_mail(tx, tenant_id, f"Credit note {note.number}", text, attachment)
