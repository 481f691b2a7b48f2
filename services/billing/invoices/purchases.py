"""Credit that a tenant buys: an order, its payment, and what happens if the money goes back.

An order is a draft of an invoice with the purpose `credit`. Services and tax rate are known at the sale, so the tax is
due when the money arrives: the payment's event, or the operator's entry of a bank transfer, numbers the invoice, books
it and grants the credit, in one transaction. An order that is never paid stays a draft, without a number. The credit
itself is before tax, and its use is not taxed again.
"""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

from infra.clock import utcnow, uuid7
from infra.errors import Conflict, InvalidMessage
from infra.postgres.tx import Tx
from services.billing.credit import accounts, grants, journal
from services.billing.credit.grants import PurchasedCredit
from services.billing.invoices import booking, tax
from services.billing.invoices import store as invoices
from services.billing.invoices.store import Invoice
from services.billing.invoices.tax import Seller
from services.billing.plans import terms
from services.billing.rating.currencies import nanos_per_minor

# One million currency units.
MAX_ORDER_NANOS = 10**15
# Orders of a tenant in a day that are not paid. They are kept, so a program that orders in a loop must not make more.
MAX_UNPAID = 20


async def order(tx: Tx, tenant_id: str, nanos: int, reason: str, seller: Seller) -> Invoice:
    """Makes the draft of an invoice about `nanos` of credit, before tax.

    Raises InvalidMessage (field ``nanos``) for a part of a minor unit, and for more than a tenant may have; Conflict if
    too many orders are not paid.
    """
    currency, account = await accounts.lock_one(tx, tenant_id)
    unit = nanos_per_minor(currency)
    if nanos % unit:
        raise InvalidMessage("nanos", f"must be a multiple of {unit}, a minor unit of {currency}")
    await grants.settle(tx, tenant_id)
    most = min(MAX_ORDER_NANOS, await accounts.room(tx, tenant_id, account))
    if nanos > most:
        raise InvalidMessage("nanos", f"must be at most {most}")
    [(unpaid,)] = await tx.sql(
        """
        SELECT count(*) FROM invoice
        WHERE tenant_id = $1 AND status = 'draft' AND purpose = 'credit' AND made_at > now() - interval '1 day'
        """,
        tenant_id,
    )
    if unpaid >= MAX_UNPAID:
        raise Conflict(f"{MAX_UNPAID} orders of the last day are not paid; pay one of them")
    invoice_id = uuid7()
    await tx.sql(
        """
        INSERT INTO invoice (tenant_id, invoice_id, purpose, status, currency, begins, ends, subtotal_nanos, tax_nanos,
                             tax_note, total_minor, time_zone)
        VALUES ($1, $2, 'credit', 'draft', $3, $4, $4, $5, 0, '', $6, coalesce((
            SELECT time_zone FROM subscription WHERE tenant_id = $1 ORDER BY starts_at DESC LIMIT 1
        ), 'UTC'))
        """,
        tenant_id,
        invoice_id,
        currency,
        utcnow(),
        nanos,
        nanos // unit,
    )
    made = await invoices.get(tx, tenant_id, invoice_id)
    text = f"Prepaid credit: {reason}" if reason else "Prepaid credit"
    await invoices.add_line(tx, tenant_id, invoice_id, invoices.line_of(made, text, nanos))
    made = await priced(tx, tenant_id, made, seller)
    await keep_price(tx, tenant_id, made)
    return made


async def priced(tx: Tx, tenant_id: str, invoice: Invoice, seller: Seller) -> Invoice:
    """Returns an order with the tax and the parties of now, and any other invoice as it is."""
    if not invoice.is_order:
        return invoice
    buyer = await tax.buyer(tx, tenant_id)
    taxed = await booking.taxed(tx, invoice, buyer, seller, utcnow())
    return taxed.model_copy(update={"buyer": buyer, "seller": seller})


async def keep_price(tx: Tx, tenant_id: str, order: Invoice) -> None:
    """Stores the tax and the parties of an order. They stay until another payment begins: the payer pays this tax."""
    await tx.sql(
        """
        UPDATE invoice
        SET tax_nanos = $3, tax_note = $4, total_minor = $5, buyer = $6, seller = $7
        WHERE tenant_id = $1 AND invoice_id = $2
        """,
        tenant_id,
        order.id,
        order.tax_nanos,
        order.tax_note,
        order.total_minor,
        order.buyer.model_dump_json(),
        order.seller.model_dump_json(),
    )


async def issue(tx: Tx, tenant_id: str, invoice_id: UUID, actor: str) -> None:
    """Numbers and books an order whose money has arrived, and grants the credit. Changes nothing if it is not an order.

    The caller has locked the account, and adds the payment.
    """
    found = await invoices.get(tx, tenant_id, invoice_id)
    if not found.is_order:
        return
    nanos, total = found.subtotal_nanos, found.total_minor * nanos_per_minor(found.currency)
    number, now = await booking.next_number(tx, tenant_id, booking.SERIES), utcnow()
    await journal.post(
        tx,
        tenant_id,
        "invoice",
        str(invoice_id),
        {
            "receivable": total - nanos,
            "tax": -found.tax_nanos,
            "rounding": nanos + found.tax_nanos - total,
        },
        reason="invoice of prepaid credit",
        actor=actor,
    )
    await tx.sql(
        """
        UPDATE invoice
        SET status = 'finalised', number = $3, finalised_at = $4, due_at = $5, dunning_at = $4
        WHERE tenant_id = $1 AND invoice_id = $2
        """,
        tenant_id,
        invoice_id,
        number,
        now,
        now + timedelta(days=(await terms.get(tx, tenant_id)).due_days),
    )
    await grants.settle(tx, tenant_id)
    reason = f"invoice {number}"
    # Not refused above `accounts.room`: the money is here.
    await accounts.change_limit(tx, tenant_id, nanos, reason=reason, actor=actor)
    await grants.add(
        tx,
        tenant_id,
        nanos,
        kind="purchased",
        reason=reason,
        actor=actor,
        source="receivable",
        invoice_id=invoice_id,
    )


async def follow_money(tx: Tx, tenant_id: str, invoice_id: UUID, actor: str) -> None:
    """Makes purchased credit follow its money: a credit note takes unspent credit back whose money was given back or
    lost, and unspent credit whose money is disputed is frozen. Spent credit stays due. Changes nothing for any other
    invoice. The caller has locked the account."""
    invoice = await invoices.get(tx, tenant_id, invoice_id)
    if invoice.purpose != "credit" or invoice.is_order:
        return
    await grants.settle(tx, tenant_id)
    unspent = sum(await grants.purchased(tx, tenant_id, invoice_id))
    gone = min(invoice.open_minor, booking.most_creditable(invoice, unspent))
    if gone and invoice.status == "finalised":
        await _freeze(tx, tenant_id, invoice, 0, actor)
        await booking.credit(
            tx,
            tenant_id,
            invoice_id,
            gone,
            reason="the payment was given back or lost",
            actor=actor,
            refund=True,
            money_is_gone=True,
        )
        invoice = await invoices.get(tx, tenant_id, invoice_id)
    at_risk = max(0, invoice.rest_minor + await _disputed(tx, tenant_id, invoice_id))
    at_risk = min(at_risk, invoice.total_minor - invoice.credited_minor)
    await _freeze(tx, tenant_id, invoice, booking.share(invoice, invoice.subtotal_nanos, at_risk), actor)


async def _freeze(tx: Tx, tenant_id: str, invoice: Invoice, nanos: int, actor: str) -> None:
    """Freezes up to `nanos` of the unspent credit, and thaws the rest."""
    before = await grants.purchased(tx, tenant_id, invoice.id)
    unspent = sum(before)
    frozen = min(nanos, unspent)
    await grants.set_purchased(tx, tenant_id, invoice.id, PurchasedCredit(unspent - frozen, frozen))
    reason = f"dispute about invoice {invoice.number}"
    await accounts.change_limit(tx, tenant_id, before.frozen - frozen, reason=reason, actor=actor)


async def _disputed(tx: Tx, tenant_id: str, invoice_id: UUID) -> int:
    """Returns the received money of an invoice that is withdrawn until banks decide, in minor units."""
    [(minor,)] = await tx.sql(
        """
        SELECT coalesce(sum(d.minor), 0)::bigint
        FROM dispute AS d
        JOIN payment AS p USING (tenant_id, payment_id)
        WHERE p.tenant_id = $1 AND p.invoice_id = $2 AND p.received_minor > 0 AND d.state <> 'lost'
        """,
        tenant_id,
        invoice_id,
    )
    return int(minor)
