"""Books invoices: numbers without gaps, payments, ends, credit notes.

Finalising gives the number in the transaction that books the invoice, so a number is used if and only if the invoice
is booked.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Literal, NamedTuple
from uuid import UUID

from infra.clock import utcnow, uuid7
from infra.errors import Conflict, InvalidMessage
from infra.postgres.tx import Tx
from services.billing.credit import accounts, grants, holds, journal
from services.billing.credit.grants import PurchasedCredit
from services.billing.invoices import store as invoices
from services.billing.invoices import tax
from services.billing.invoices.store import CreditNote, Invoice, InvoiceLine
from services.billing.invoices.tax import Buyer, Seller
from services.billing.plans import plans, terms
from services.billing.rating import schemes
from services.billing.rating.currencies import nanos_per_minor, to_minor

SERIES, CREDIT_SERIES = "INV", "CN"


async def preview(tx: Tx, tenant_id: str, invoice_id: UUID, seller: Seller) -> tuple[Invoice, list[InvoiceLine]]:
    """Returns the draft of an invoice of usage with the amounts that `finalise` would give it now, after the older
    drafts, and the line that it would add, if any. Any other invoice is returned as it is. A draft stays one until
    the transaction ends.

    Raises NotFound.
    """
    invoice = await invoices.get(tx, tenant_id, invoice_id)
    if invoice.status == "draft":
        await accounts.lock_one(tx, tenant_id)
        # It may have been finalised meanwhile.
        invoice = await invoices.get(tx, tenant_id, invoice_id)
    if invoice.status != "draft" or invoice.is_order:
        return invoice, []
    await grants.settle(tx, tenant_id)
    free = await grants.left(tx, tenant_id, only="purchased") - await _taken_before(tx, tenant_id, invoice)
    purchased = max(0, min(invoice.subtotal_nanos, free))
    lines = [_taxed_before(invoice, purchased)] if purchased else []
    return await _priced(tx, invoice, purchased, await tax.buyer(tx, tenant_id), seller), lines


async def _taken_before(tx: Tx, tenant_id: str, draft: Invoice) -> int:
    """Returns the purchased credit that the tenant's drafts which were made before this one will take, if there is so
    much."""
    [(nanos,)] = await tx.sql(
        """
        SELECT coalesce(sum(subtotal_nanos), 0)::text
        FROM invoice
        WHERE tenant_id = $1 AND status = 'draft' AND purpose = 'usage' AND subtotal_nanos > 0
          AND (made_at, invoice_id) < ($2, $3)
        """,
        tenant_id,
        draft.made_at,
        draft.id,
    )
    return int(nanos)


def _taxed_before(draft: Invoice, purchased: int) -> InvoiceLine:
    return invoices.line_of(draft, "Credit that was paid and taxed before", -purchased)


async def _priced(tx: Tx, draft: Invoice, purchased: int, buyer: Buyer, seller: Seller) -> Invoice:
    """Returns a draft with purchased credit taken off before tax, and the tax of now."""
    reduced = draft.model_copy(update={"subtotal_nanos": draft.subtotal_nanos - purchased})
    return await taxed(tx, reduced, buyer, seller, draft.period.ends)


async def taxed(tx: Tx, invoice: Invoice, buyer: Buyer, seller: Seller, at: datetime) -> Invoice:
    """Returns an invoice with the tax on its subtotal at a time, and its total."""
    tax_nanos, note = await tax.due(tx, buyer, invoice.subtotal_nanos, seller.country, at)
    total = to_minor(invoice.subtotal_nanos + tax_nanos, invoice.currency)
    return invoice.model_copy(update={"tax_nanos": tax_nanos, "tax_note": note, "total_minor": total})


async def finalise(tx: Tx, tenant_id: str, invoice_id: UUID, seller: Seller, actor: str) -> Invoice:
    """Numbers a draft, books it, and applies grants. A finalised invoice is answered as it is. Raises Conflict for the
    order of prepaid credit.

    Purchased credit is a line below zero, because the tax on it is paid; the other grants pay the total. The limit of
    the account has counted the period's usage at the price book's prices, and the grants have paid fees, markup and tax
    as well. If they have paid more than the usage, the limit is lowered by the difference; if they have paid less and
    nothing is due, it is raised by it. So the tenant may use the rest of its grants.
    """
    await accounts.lock_one(tx, tenant_id)
    draft = await invoices.get(tx, tenant_id, invoice_id)
    if draft.status != "draft":
        return draft
    if draft.is_order:
        raise Conflict("the invoice is of prepaid credit; its payment finalises it")
    unit = nanos_per_minor(draft.currency)
    now = utcnow()
    await grants.settle(tx, tenant_id)
    await grants.give_kept_back(tx, tenant_id, invoice_id)
    purchased = await grants.burn(
        tx,
        tenant_id,
        draft.subtotal_nanos,
        for_="revenue",
        reference=str(invoice_id),
        only="purchased",
    )
    if purchased:
        await invoices.add_line(tx, tenant_id, invoice_id, _taxed_before(draft, purchased))
    buyer = await tax.buyer(tx, tenant_id)
    priced = await _priced(tx, draft, purchased, buyer, seller)
    total = priced.total_minor
    await journal.post(
        tx,
        tenant_id,
        "invoice",
        str(invoice_id),
        {
            "receivable": total * unit,
            "revenue": -priced.subtotal_nanos,
            "tax": -priced.tax_nanos,
            "rounding": priced.subtotal_nanos + priced.tax_nanos - total * unit,
        },
        reason="invoice finalised",
        actor=actor,
    )
    # Only whole minor units of grants are applied; the rest of a grant stays.
    applied = min(total, await grants.left(tx, tenant_id) // unit) if total > 0 else 0
    await grants.burn(tx, tenant_id, applied * unit, for_="receivable", reference=str(invoice_id))
    number = await next_number(tx, tenant_id, SERIES)
    await tx.sql(
        """
        UPDATE invoice
        SET status = $3, number = $4, subtotal_nanos = $13, tax_nanos = $5, tax_note = $6, total_minor = $7,
            applied_minor = $8, buyer = $9, seller = $10, finalised_at = $11, due_at = $12, dunning_at = $11
        WHERE tenant_id = $1 AND invoice_id = $2
        """,
        tenant_id,
        invoice_id,
        "paid" if applied >= total else "finalised",
        number,
        priced.tax_nanos,
        priced.tax_note,
        total,
        applied,
        buyer.model_dump_json(),
        seller.model_dump_json(),
        now,
        now + timedelta(days=(await terms.get(tx, tenant_id)).due_days),
        priced.subtotal_nanos,
    )
    if total < 0:
        # Corrections are larger than the charges: the tenant is owed the rest.
        await grants.add(
            tx,
            tenant_id,
            -total * unit,
            kind="prepaid",
            reason=f"corrections until {draft.period.ends.date()}",
            actor=actor,
            source="receivable",
        )
    unpaid = await _usage_nanos(tx, tenant_id, invoice_id) - purchased - min(applied, total) * unit
    if unpaid < 0 or applied >= total:
        reason = f"difference between invoice {number} and its usage"
        await accounts.change_limit(tx, tenant_id, unpaid, reason=reason, actor=actor)
    return await invoices.get(tx, tenant_id, invoice_id)


async def _usage_nanos(tx: Tx, tenant_id: str, invoice_id: UUID) -> int:
    """Returns the usage and the corrections of an invoice's period at the price book's prices."""
    [(nanos,)] = await tx.sql(
        """
        SELECT coalesce(sum(b.quantity), 0)::bigint
        FROM invoice AS i
        JOIN usage_bucket AS b USING (tenant_id, period)
        WHERE i.tenant_id = $1 AND i.invoice_id = $2 AND b.meter IN ('cost_nanos', 'correction_nanos')
        """,
        tenant_id,
        invoice_id,
    )
    return int(nanos)


async def next_number(tx: Tx, tenant_id: str, series: str) -> str:
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
    invoice = await invoices.get(tx, tenant_id, invoice_id)
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
    """Adds a paid amount (below zero: taken back), and marks the invoice as paid or as open again.

    One that is open again is reminded of from the first reminder on. Money for an invoice that was written off takes
    the write-off back; money above it is owed as elsewhere.
    """
    [(before, status, currency, rest)] = await tx.sql(
        """
        UPDATE invoice AS i
        SET paid_minor = i.paid_minor + $3,
            status = CASE
                WHEN i.status NOT IN ('finalised', 'paid') THEN i.status
                WHEN i.applied_minor + i.credited_minor + i.paid_minor + $3 >= i.total_minor THEN 'paid'
                ELSE 'finalised'
            END
        FROM invoice AS old
        WHERE i.tenant_id = $1 AND i.invoice_id = $2 AND old.tenant_id = $1 AND old.invoice_id = $2
        RETURNING old.status, i.status, i.currency, i.total_minor - i.applied_minor - i.credited_minor - i.paid_minor
        """,
        tenant_id,
        invoice_id,
        minor,
    )
    if (before, status) == ("paid", "finalised"):
        await tx.sql(
            """
            UPDATE invoice
            SET reopened_at = clock_timestamp(), dunning_step = least(dunning_step, 1), dunning_at = clock_timestamp()
            WHERE tenant_id = $1 AND invoice_id = $2
            """,
            tenant_id,
            invoice_id,
        )
    if status == "uncollectible":
        nanos = (max(0, rest + minor) - max(0, rest)) * nanos_per_minor(currency)
        await journal.post(
            tx,
            tenant_id,
            "recovery",
            str(invoice_id),
            {"receivable": nanos, "write_off": -nanos},
            reason="paid after the write-off",
            actor="billing",
        )


async def end(
    tx: Tx, tenant_id: str, invoice_id: UUID, status: Literal["void", "uncollectible"], actor: str
) -> Invoice:
    """Ends a finalised invoice that is not paid: `void` takes it back, `uncollectible` writes it off.

    Raises Conflict for any other status, and for a void of prepaid credit, of an invoice that is partly paid, or of one
    whose usage was corrected on another invoice: that part would be given back twice.
    """
    await accounts.lock_one(tx, tenant_id)
    invoice = await invoices.get(tx, tenant_id, invoice_id)
    if invoice.status == status:
        return invoice
    if invoice.status != "finalised":
        raise Conflict(f"the invoice is {invoice.status}; only a finalised one can become {status}")
    unit = nanos_per_minor(invoice.currency)
    due = invoice.due_minor * unit
    if status == "uncollectible":
        amounts: dict[journal.JournalAccount, int] = {"write_off": due, "receivable": -due}
    else:
        if invoice.purpose == "credit":
            raise Conflict("the invoice is of prepaid credit; make a credit note")
        used = await grants.burned(tx, tenant_id, str(invoice_id))
        if invoice.paid_minor or any(used) or invoice.credited_minor:
            raise Conflict("a part of the invoice is paid or credited; make a credit note")
        if await _corrected_elsewhere(tx, tenant_id, invoice_id):
            raise Conflict("corrections of its usage are on another invoice; make a credit note about the rest")
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
    return await invoices.get(tx, tenant_id, invoice_id)


async def _corrected_elsewhere(tx: Tx, tenant_id: str, invoice_id: UUID) -> int:
    """Returns the nano-units before tax that other invoices have, or will have, as corrections of the usage that this
    one charges. Below zero: given back."""
    rows = await tx.sql(
        """
        SELECT p.plan_id, p.plan_version, sum(c.nanos)::bigint
        FROM invoice AS i
        JOIN period AS p USING (tenant_id, period)
        JOIN period_correction AS c ON c.tenant_id = i.tenant_id AND c.usage_period = i.period
        WHERE i.tenant_id = $1 AND i.invoice_id = $2 AND c.period <> i.period
        GROUP BY p.plan_id, p.plan_version
        """,
        tenant_id,
        invoice_id,
    )
    if not rows:
        return 0
    [(plan_id, plan_version, nanos)] = rows
    markup = (await plans.version(tx, plan_id, plan_version)).usage_markup_percent
    # Without a markup the plan charges by its own prices only, and corrections of the price book do not concern it.
    return 0 if markup is None else plans.with_markup(nanos, markup)


async def credit(
    tx: Tx,
    tenant_id: str,
    invoice_id: UUID,
    minor: int,
    *,
    reason: str,
    actor: str,
    refund: bool,
    money_is_gone: bool = False,
) -> CreditNote:
    """Takes a part of an invoice back, with its share of the tax. It reduces the amount that is due.

    Money that was paid already becomes a grant or, with `refund`, is owed until a payment is refunded. A note about
    prepaid credit always has `refund`. It takes unspent credit back that no work in progress has reserved or, with
    `money_is_gone`, any unspent credit. Raises Conflict for a draft or void invoice, and InvalidMessage for more than
    the invoice has, less the corrections of its usage on other invoices, than is unspent or than its payments can give
    back.
    """
    await accounts.lock_one(tx, tenant_id)
    invoice = await invoices.get(tx, tenant_id, invoice_id)
    if invoice.status not in ("finalised", "paid"):
        raise Conflict(f"the invoice is {invoice.status}; only a finalised or paid one gets a credit note")
    if minor > invoice.total_minor - invoice.credited_minor:
        raise InvalidMessage("amount_minor", f"must be at most {invoice.total_minor - invoice.credited_minor}")
    net = share(invoice, invoice.subtotal_nanos, minor)
    burned = await grants.burned(tx, tenant_id, str(invoice_id))
    if (corrected := await _corrected_elsewhere(tx, tenant_id, invoice_id)) < 0:
        credited = schemes.part(invoice.subtotal_nanos, invoice.credited_minor, invoice.total_minor)
        free = max(0, invoice.subtotal_nanos + burned.purchased + corrected - credited)
        if net > free:
            most = most_creditable(invoice, free)
            raise InvalidMessage("amount_minor", f"must be at most {most}: corrections of its usage gave the rest back")
    if invoice.purpose == "credit":
        refund = True
        await _take_back(tx, tenant_id, invoice, net, actor=actor, money_is_gone=money_is_gone)
    over = max(0, minor - invoice.due_minor)
    if refund and over > (refundable := await _refundable(tx, tenant_id, invoice)):
        raise InvalidMessage("refund", f"payments can give back {refundable} of the {over} that were paid")
    unit = nanos_per_minor(invoice.currency)
    taxed = share(invoice, invoice.tax_nanos, minor)
    credit_note_id, number = uuid7(), await next_number(tx, tenant_id, CREDIT_SERIES)
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
        {
            "purchased" if invoice.purpose == "credit" else "revenue": net,
            "tax": taxed,
            "receivable": -minor * unit,
            "rounding": minor * unit - net - taxed,
        },
        reason=reason,
        actor=actor,
    )
    await tx.sql(
        "UPDATE invoice SET credited_minor = credited_minor + $3 WHERE tenant_id = $1 AND invoice_id = $2",
        tenant_id,
        invoice_id,
        minor,
    )
    if refund:
        over = 0
    await add_paid(tx, tenant_id, invoice_id, -over)
    # Money that is owed already was promised by another note or paid twice: this note cannot give it back.
    paid = (invoice.paid_minor - invoice.owed_minor) * unit + burned.prepaid
    for kind, nanos in grants.given_back(over * unit, 0, paid, burned.promotional):
        await accounts.add_credit(
            tx,
            tenant_id,
            nanos,
            kind=kind,
            reason=f"credit note {number}",
            actor=actor,
            source="receivable",
            field="amount_minor",
        )
    [made] = await invoices.credit_notes(tx, tenant_id, invoice_id, number)
    return made


def share(invoice: Invoice, nanos: int, minor: int) -> int:
    """Returns the part of an amount of an invoice that its next credit note takes back, if that is of `minor`.

    It is the difference of two shares: the notes of a whole invoice take back exactly the amounts that it booked.
    """
    before, after = invoice.credited_minor, invoice.credited_minor + minor
    whole = invoice.total_minor
    return schemes.part(nanos, after, whole) - schemes.part(nanos, before, whole)


def most_creditable(invoice: Invoice, nanos: int) -> int:
    """Returns the largest amount of the next credit note whose part before tax is at most `nanos`."""
    before = schemes.part(invoice.subtotal_nanos, invoice.credited_minor, invoice.total_minor)
    # At most one too much, because the shares are rounded.
    after = min(invoice.total_minor, (before + nanos) * invoice.total_minor // invoice.subtotal_nanos + 1)
    minor = after - invoice.credited_minor
    while minor > 0 and share(invoice, invoice.subtotal_nanos, minor) > nanos:
        minor -= 1
    return max(0, minor)


async def _take_back(tx: Tx, tenant_id: str, invoice: Invoice, nanos: int, *, actor: str, money_is_gone: bool) -> None:
    """Takes purchased credit back, and lowers the limit of the account by it."""
    if not money_is_gone:
        await grants.settle(tx, tenant_id)
    left, frozen = await grants.purchased(tx, tenant_id, invoice.id)
    free = left
    if not money_is_gone:
        _, account = await accounts.lock_one(tx, tenant_id)
        if account.balance_nanos is not None:
            free = min(left, account.balance_nanos - await holds.open_nanos(tx, tenant_id))
    if nanos > free:
        most = most_creditable(invoice, max(0, free))
        raise InvalidMessage("amount_minor", f"must be at most {most}: the rest of the credit is spent or in use")
    await grants.set_purchased(tx, tenant_id, invoice.id, PurchasedCredit(left - nanos, frozen))
    await accounts.change_limit(
        tx, tenant_id, -nanos, reason=f"credit of invoice {invoice.number} was taken back", actor=actor
    )


async def _refundable(tx: Tx, tenant_id: str, invoice: Invoice) -> int:
    """Returns the minor units that payments of an invoice can give back and that no credit note has promised yet."""
    return max(0, (await received(tx, tenant_id, invoice.id)).left - invoice.owed_minor)


class PaymentMoney(NamedTuple):
    """Money of payments by a provider, in minor units."""

    left: int
    """Received, less the parts that were given back, are disputed or lost."""
    going: int
    """The part of it whose refund is under way: the provider has not reported it yet."""


async def received(tx: Tx, tenant_id: str, invoice_id: UUID, payment_id: UUID | None = None) -> PaymentMoney:
    """Returns the money of the payments of an invoice, or of one of them."""
    [row] = await tx.sql(
        """
        SELECT coalesce(sum(received_minor - refunded_minor - coalesce((
                   SELECT sum(minor) FROM dispute AS d
                   WHERE d.tenant_id = p.tenant_id AND d.payment_id = p.payment_id
               ), 0)), 0)::bigint,
               coalesce(sum(greatest(0, coalesce((
                   SELECT sum(minor) FROM refund AS r
                   WHERE r.tenant_id = p.tenant_id AND r.payment_id = p.payment_id AND r.status <> 'failed'
               ), 0) - refunded_minor)), 0)::bigint
        FROM payment AS p
        WHERE tenant_id = $1 AND invoice_id = $2 AND ($3::uuid IS NULL OR payment_id = $3)
        """,
        tenant_id,
        invoice_id,
        payment_id,
    )
    return PaymentMoney(*row)
