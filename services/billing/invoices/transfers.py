"""Bank transfers for invoices: money that arrived outside of a payment provider.

The journal has the bank's reference and the invoice. A transfer that the bank took back, or that was booked wrongly, is
reversed; then its reference may be booked for another invoice or amount.
"""

from __future__ import annotations

from uuid import UUID

from infra.errors import Conflict, InvalidMessage
from infra.postgres.tx import Tx
from services.billing.credit import accounts, journal
from services.billing.invoices import booking, purchases
from services.billing.invoices import store as invoices
from services.billing.rating.currencies import nanos_per_minor


async def receive(tx: Tx, tenant_id: str, invoice_id: UUID, minor: int, *, reference: str, actor: str) -> bool:
    """Books a transfer. Money above the amount that is due is owed to the tenant. An order of prepaid credit is paid
    as a whole, with the tax that it has, and its credit is granted.

    Returns False and changes nothing if it is booked already. Raises Conflict for a draft of usage or a void invoice,
    for a reference that is booked for another invoice or amount, and for a transfer that was reversed; InvalidMessage
    for another amount than the total of an order.
    """
    await accounts.lock_one(tx, tenant_id)
    invoice = await invoices.get(tx, tenant_id, invoice_id)
    unit = nanos_per_minor(invoice.currency)
    if minor * unit > accounts.MAX_CREDIT_NANOS:
        raise InvalidMessage("amount_minor", f"must be at most {accounts.MAX_CREDIT_NANOS // unit}")
    booked = await journal.cash_entries(tx, tenant_id, _reference(reference))
    own = _of(invoice, booked)
    if sum(own) == minor * unit:
        return False
    if sum(nanos for _, nanos in booked):
        raise Conflict(f"reference {reference}: was booked for another invoice or amount")
    if minor * unit in own:
        raise Conflict(f"reference {reference}: this transfer was reversed")
    if invoice.is_order:
        # Money above it could not be given back later: a reversal takes the credit back.
        if minor != invoice.total_minor:
            raise InvalidMessage("amount_minor", f"must be {invoice.total_minor}, the total of the order")
        await purchases.issue(tx, tenant_id, invoice_id, actor)
    elif invoice.status in ("draft", "void"):
        raise Conflict(f"the invoice is {invoice.status}; only a finalised one takes a payment")
    await _book(tx, tenant_id, invoice_id, minor, reference=reference, actor=actor)
    return True


async def reverse(tx: Tx, tenant_id: str, invoice_id: UUID, *, reference: str, actor: str) -> int:
    """Takes the transfer with a reference back, once. The invoice is due again as far as it is not paid otherwise. A
    credit note takes unspent credit back that the transfer has paid.

    Returns the minor units; 0: it was reversed before. Raises InvalidMessage if the invoice never had the transfer.
    """
    await accounts.lock_one(tx, tenant_id)
    invoice = await invoices.get(tx, tenant_id, invoice_id)
    own = _of(invoice, await journal.cash_entries(tx, tenant_id, _reference(reference)))
    if not own:
        raise InvalidMessage("reference", "is not of a transfer that was booked for this invoice")
    minor = sum(own) // nanos_per_minor(invoice.currency)
    await _book(tx, tenant_id, invoice_id, -minor, reference=reference, actor=actor)
    return minor


async def _book(tx: Tx, tenant_id: str, invoice_id: UUID, minor: int, *, reference: str, actor: str) -> None:
    await booking.receive(tx, tenant_id, invoice_id, minor, reference=_reference(reference), actor=actor)
    await purchases.follow_money(tx, tenant_id, invoice_id, actor)


def _reference(reference: str) -> str:
    return f"bank {reference}"


def _of(invoice: invoices.Invoice, booked: list[tuple[str, int]]) -> list[int]:
    """The entries of this invoice in nano-units; a reversal is below zero."""
    return [nanos for reason, nanos in booked if reason == f"invoice {invoice.number}"]
