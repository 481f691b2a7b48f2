"""Books invoices: numbers without gaps, payments, ends, credit notes.

Finalising gives the number in the transaction that books the invoice, so a number is used if and only if the invoice
is booked.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Literal, NamedTuple
from uuid import UUID

import msgspec

from infra.clock import utcnow, uuid7
from infra.errors import Conflict, InvalidMessage
from infra.postgres.tx import Tx
from services.billing.credit import accounts, grants, holds, journal
from services.billing.credit.grants import PurchasedCredit
from services.billing.invoices import store as invoices
from services.billing.invoices import tax
from services.billing.invoices.store import CreditNote, Invoice, InvoiceLine, TaxPart
from services.billing.invoices.tax import Buyer, Seller
from services.billing.plans import plans, subscriptions, terms
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
    buyer = await tax.buyer(tx, tenant_id)
    async with tx.undone():
        for older in await _drafts_before(tx, tenant_id, invoice):
            await finalise(tx, tenant_id, older, seller, "billing")
        invoice, lines, _ = await _corrected(tx, tenant_id, invoice, buyer, seller)
        free = await grants.left(tx, tenant_id, only="purchased")
    purchased = max(0, min(_payable_before_tax(invoice), free))
    if purchased:
        lines.append(_taxed_before(invoice, purchased))
    return await _priced(tx, invoice, purchased, buyer, seller), lines


async def _drafts_before(tx: Tx, tenant_id: str, draft: Invoice) -> list[UUID]:
    """Returns the tenant's drafts of usage that were made before this one, in the order in which they are finalised.
    None if this one does not depend on them: it corrects no other usage, and no credit that was bought is left."""
    rows = await tx.sql(
        """
        SELECT older.invoice_id
        FROM invoice AS draft
        JOIN invoice AS older USING (tenant_id)
        WHERE tenant_id = $1 AND draft.invoice_id = $2 AND older.status = 'draft' AND older.purpose = 'usage'
          AND (older.made_at, older.invoice_id) < (draft.made_at, draft.invoice_id) AND (EXISTS (
            SELECT FROM period_correction AS c
            WHERE c.tenant_id = $1 AND c.period = draft.period AND c.usage_period <> draft.period
        ) OR EXISTS (
            SELECT FROM credit_grant AS g
            WHERE g.tenant_id = $1 AND g.kind = 'purchased' AND g.left_nanos > 0
        ))
        ORDER BY older.made_at, older.invoice_id
        """,
        tenant_id,
        draft.id,
    )
    return [invoice_id for (invoice_id,) in rows]


async def _corrected(
    tx: Tx, tenant_id: str, draft: Invoice, buyer: Buyer, seller: Seller
) -> tuple[Invoice, list[InvoiceLine], list[_Given]]:
    """Returns a draft with the lines that its corrections add, these lines, and the corrections that credit notes give
    instead."""
    corrections = await _corrections(tx, tenant_id, draft.id)
    given = await _given_by_notes(tx, tenant_id, corrections)
    lines = [_given_elsewhere(draft, one) for one in given]
    draft, more = await _with_taxes(tx, _with_lines(draft, lines), corrections, given, buyer, seller)
    return draft, lines + more, given


class _Correction(NamedTuple):
    """The corrections on a draft of the usage that another invoice has."""

    invoice: Invoice
    usage_nanos: int
    """At the price book's prices."""
    nanos: int
    """Before tax, with the markup."""
    committed_nanos: int
    """The change of the commitment."""


async def _corrections(tx: Tx, tenant_id: str, draft_id: UUID) -> list[_Correction]:
    rows = await tx.sql(
        """
        SELECT old.invoice_id, c.nanos, p.plan_id, p.plan_version, (
            SELECT coalesce(sum(l.amount_nanos), 0)::bigint
            FROM invoice_line AS l
            WHERE l.tenant_id = $1 AND l.invoice_id = $2
              AND l.source::json ->> 'usage_period' = c.usage_period::text
        )
        FROM invoice AS new
        JOIN period AS p USING (tenant_id, period)
        JOIN period_correction AS c USING (tenant_id, period)
        JOIN invoice AS old ON old.tenant_id = c.tenant_id AND old.period = c.usage_period
        WHERE new.tenant_id = $1 AND new.invoice_id = $2 AND old.invoice_id <> $2
        ORDER BY old.invoice_id
        """,
        tenant_id,
        draft_id,
    )
    found = []
    for invoice_id, nanos, plan_id, plan_version, committed in rows:
        markup = (await plans.version(tx, plan_id, plan_version)).usage_markup_percent
        if markup is not None:
            invoice = await invoices.get(tx, tenant_id, invoice_id)
            found.append(_Correction(invoice, nanos, plans.with_markup(nanos, markup), committed))
    return found


class _Given(NamedTuple):
    """A part of a correction that a credit note on the invoice of the corrected usage gives instead."""

    invoice: Invoice
    minor: int
    """With tax."""
    nanos: int
    """Before tax."""
    usage_nanos: int
    """At the price book's prices."""


async def _given_by_notes(tx: Tx, tenant_id: str, corrections: Sequence[_Correction]) -> list[_Given]:
    """Returns the corrections that `finalise` gives by credit notes on invoices that are not paid. On this draft they
    would be credit for money that may never come. A note on an invoice with several taxes would take a part of each
    back, so corrections of its usage stay on this draft."""
    found = []
    for invoice, usage_nanos, nanos, _ in corrections:
        if nanos >= 0 or invoice.status not in ("finalised", "uncollectible") or invoice.other_taxes:
            continue
        # Other corrections of that usage, or its commitment, may have charged a part of it again.
        most = -max(nanos, await _corrected_elsewhere(tx, tenant_id, invoice.id))
        minor = min(invoice.open_minor, most_creditable(invoice, most)) if most > 0 and invoice.open_minor else 0
        if minor:
            net = share(invoice, invoice.subtotal_nanos, minor)
            found.append(_Given(invoice, minor, net, usage_nanos * net // nanos))
    return found


def _given_elsewhere(draft: Invoice, given: _Given) -> InvoiceLine:
    text = f"Corrections that a credit note for invoice {given.invoice.number} gives"
    return invoices.line_of(draft, text, given.nanos)


async def _with_taxes(
    tx: Tx, draft: Invoice, corrections: Sequence[_Correction], given: Sequence[_Given], buyer: Buyer, seller: Seller
) -> tuple[Invoice, list[InvoiceLine]]:
    """Returns a draft with the taxes of the times whose usage it corrects, if they are not its own, and pairs of lines
    which take these corrections from its tax to those."""
    own = await tax.at(tx, buyer, seller.country, draft.period.ends)
    by_notes = {one.invoice.id: one.nanos for one in given}
    sums: dict[tax.Tax, int] = {}
    lines = []
    for correction in corrections:
        old = correction.invoice
        nanos = correction.nanos + correction.committed_nanos + by_notes.get(old.id, 0)
        if old.number:
            found = tax.Tax(tax.rate(old.tax_note) or Decimal(0), old.tax_note)
        else:
            found = await tax.at(tx, buyer, seller.country, old.period.ends)
        if not nanos or found == own:
            continue
        sums[found] = sums.get(found, 0) + nanos
        name = f"invoice {old.number}" if old.number else f"the period from {old.local_period.begins.isoformat()} on"
        # Two drafts without a number may have begun in one second.
        about = str(old.id)
        lines.append(invoices.line_of(draft, f"Corrections of {name}, which keep its tax", -nanos, about=about))
        lines.append(invoices.line_of(draft, f"Corrections of {name}: {found.note}", nanos, found.note, about=about))
    parts = [
        TaxPart(note=found.note, subtotal_nanos=nanos, tax_nanos=tax.on(nanos, found.percent))
        for found, nanos in sums.items()
    ]
    return draft.model_copy(update={"other_taxes": parts}), lines


def _payable_before_tax(draft: Invoice) -> int:
    """Returns how much purchased credit can take off before tax: no corrections with another tax."""
    return min(draft.subtotal_nanos, draft.taxes[0].subtotal_nanos)


def _with_lines(draft: Invoice, lines: Sequence[InvoiceLine]) -> Invoice:
    """Returns a draft with the amounts of more lines in its subtotal."""
    subtotal = draft.subtotal_nanos + sum(line.amount_nanos for line in lines)
    return draft.model_copy(update={"subtotal_nanos": subtotal})


def _taxed_before(draft: Invoice, purchased: int) -> InvoiceLine:
    return invoices.line_of(draft, "Credit that was paid and taxed before", -purchased)


async def _priced(tx: Tx, draft: Invoice, purchased: int, buyer: Buyer, seller: Seller) -> Invoice:
    """Returns a draft with purchased credit taken off before tax, and the tax of now."""
    reduced = draft.model_copy(update={"subtotal_nanos": draft.subtotal_nanos - purchased})
    return await taxed(tx, reduced, buyer, seller, draft.period.ends)


async def taxed(tx: Tx, invoice: Invoice, buyer: Buyer, seller: Seller, at: datetime) -> Invoice:
    """Returns an invoice with the tax of a time on the lines without another one, and its total."""
    own = await tax.at(tx, buyer, seller.country, at)
    tax_nanos = tax.on(invoice.taxes[0].subtotal_nanos, own.percent)
    tax_nanos += sum(part.tax_nanos for part in invoice.other_taxes)
    total = to_minor(invoice.subtotal_nanos + tax_nanos, invoice.currency)
    return invoice.model_copy(update={"tax_nanos": tax_nanos, "tax_note": own.note, "total_minor": total})


async def finalise(tx: Tx, tenant_id: str, invoice_id: UUID, seller: Seller, actor: str) -> Invoice:
    """Numbers a draft, books it, and applies grants. A finalised invoice is answered as it is. Raises Conflict for the
    order of prepaid credit.

    Purchased credit is a line below zero, because the tax on it is paid; the other grants pay the total. The limit of
    the account has counted the period's usage at the price book's prices, and the grants have paid fees, markup and tax
    as well. If they have paid more than the usage, the limit is lowered by the difference; if they have paid less and
    nothing is due, it is raised by it. So the tenant may use the rest of its grants.

    Corrections of the usage of an unpaid invoice are given by a credit note on that one, and a line here takes them
    back. The other corrections keep the tax of the corrected usage.
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
    buyer = await tax.buyer(tx, tenant_id)
    draft, lines, given = await _corrected(tx, tenant_id, draft, buyer, seller)
    for one in given:
        await credit(
            tx,
            tenant_id,
            one.invoice.id,
            one.minor,
            reason="corrections of its usage",
            actor=actor,
            refund=False,
            corrections=True,
        )
    # After the credit notes: each one ends the grants that have expired, and would keep this credit again.
    await grants.give_kept_back(tx, tenant_id, invoice_id)
    for line in lines:
        await invoices.add_line(tx, tenant_id, invoice_id, line)
    purchased = await grants.burn(
        tx,
        tenant_id,
        _payable_before_tax(draft),
        for_="revenue",
        reference=str(invoice_id),
        only="purchased",
    )
    if purchased:
        await invoices.add_line(tx, tenant_id, invoice_id, _taxed_before(draft, purchased))
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
            applied_minor = $8, buyer = $9, seller = $10, finalised_at = $11, due_at = $12, dunning_at = $11,
            other_taxes = $14
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
        msgspec.json.encode([part.model_dump() for part in priced.other_taxes]).decode(),
    )
    if total < 0:
        # Corrections are larger than the charges: the tenant is owed the rest.
        await grants.add(
            tx,
            tenant_id,
            -total * unit,
            kind="prepaid",
            reason=f"corrections until {draft.local_period.ends.date()}",
            actor=actor,
            source="receivable",
        )
    usage = await _usage_nanos(tx, tenant_id, invoice_id) + sum(one.usage_nanos for one in given)
    unpaid = usage - purchased - min(applied, total) * unit
    if unpaid < 0 or applied >= total:
        reason = f"difference between invoice {number} and its usage"
        await accounts.change_limit(tx, tenant_id, unpaid, reason=reason, actor=actor)
    return await invoices.get(tx, tenant_id, invoice_id)


async def _usage_nanos(tx: Tx, tenant_id: str, invoice_id: UUID) -> int:
    """Returns the usage and the corrections of an invoice's period as the limit has counted them."""
    [(nanos,)] = await tx.sql(
        """
        SELECT (coalesce((
            SELECT sum(b.quantity)
            FROM usage_bucket AS b
            WHERE b.tenant_id = i.tenant_id AND b.period = i.period AND b.meter IN ('cost_nanos', 'correction_nanos')
        ), 0) - coalesce((
            SELECT sum(l.amount_nanos)
            FROM ledger_entry AS l
            WHERE l.tenant_id = i.tenant_id AND l.period = i.period AND l.kind = 'correction'
              AND l.price_version IS NULL
        ), 0))::bigint
        FROM invoice AS i
        WHERE i.tenant_id = $1 AND i.invoice_id = $2
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
        await _recover(tx, tenant_id, invoice_id, nanos, "paid after the write-off")


async def _recover(tx: Tx, tenant_id: str, invoice_id: UUID, nanos: int, reason: str) -> None:
    """Takes a part of a write-off back."""
    await journal.post(
        tx,
        tenant_id,
        "recovery",
        str(invoice_id),
        {"receivable": nanos, "write_off": -nanos},
        reason=reason,
        actor="billing",
    )


async def end(
    tx: Tx, tenant_id: str, invoice_id: UUID, status: Literal["void", "uncollectible"], actor: str
) -> Invoice:
    """Ends a finalised invoice that is not paid: `void` takes it back, `uncollectible` writes it off.

    Before a write-off, prepaid credit of the tenant pays the invoice as far as it can: the tenant would keep credit,
    such as that of corrections, while it owes money. An invoice that is paid by it is answered as paid.

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
    if status == "uncollectible":
        invoice = await _set_off(tx, tenant_id, invoice)
        if invoice.status == "paid":
            return invoice
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


async def _set_off(tx: Tx, tenant_id: str, invoice: Invoice) -> Invoice:
    """Pays an invoice from prepaid credit, in whole minor units, and lowers the limit of the account by the part that
    was not for usage, as `finalise` does. It counts as a payment, which does not change the documents."""
    unit = nanos_per_minor(invoice.currency)
    await grants.settle(tx, tenant_id)
    minor = min(invoice.due_minor, await grants.left(tx, tenant_id, only="prepaid") // unit)
    if not minor:
        return invoice
    reference = f"set-off {invoice.id}"
    burned = [sum(await grants.burned(tx, tenant_id, of)) for of in (str(invoice.id), reference)]
    before = await _usage_nanos(tx, tenant_id, invoice.id) - sum(burned)
    await grants.burn(tx, tenant_id, minor * unit, for_="receivable", reference=reference, only="prepaid")
    await accounts.change_limit(
        tx,
        tenant_id,
        min(0, before - minor * unit) - min(0, before),
        reason=f"prepaid credit has paid invoice {invoice.number}",
        actor="billing",
    )
    await add_paid(tx, tenant_id, invoice.id, minor)
    return await invoices.get(tx, tenant_id, invoice.id)


async def _corrected_elsewhere(tx: Tx, tenant_id: str, invoice_id: UUID) -> int:
    """Returns the nano-units before tax that other invoices have, or will have, as corrections of the usage that this
    one charges, with the changes of its commitment, and without the part that credit notes on this one have given. An
    invoice that is void gives and charges nothing. Below zero: given back."""
    rows = await tx.sql(
        """
        SELECT c.usage_period, c.nanos, c.by_hand_nanos, p.closed_at IS NOT NULL, coalesce(o.status = 'void', false)
        FROM invoice AS i
        JOIN period_correction AS c ON c.tenant_id = i.tenant_id AND c.usage_period = i.period
        LEFT JOIN period AS p ON p.tenant_id = c.tenant_id AND p.period = c.period
        LEFT JOIN invoice AS o ON o.tenant_id = c.tenant_id AND o.period = c.period
        WHERE i.tenant_id = $1 AND i.invoice_id = $2 AND c.period <> i.period
        """,
        tenant_id,
        invoice_id,
    )
    if not rows:
        return 0
    by_hand = sum(int(nanos) for _, _, nanos, _, is_void in rows if not is_void)
    period = await subscriptions.by_number(tx, tenant_id, rows[0][0])
    plan = await plans.version(tx, period.plan_id, period.plan_version)
    if plan.usage_markup_percent is None:
        # The plan charges by its own prices only, and corrections of the price book do not concern it.
        return by_hand
    amounts = [
        (plans.with_markup(nanos, plan.usage_markup_percent), is_counted, is_void)
        for _, nanos, _, is_counted, is_void in rows
    ]
    corrected = sum(nanos for nanos, _, is_void in amounts if not is_void)
    committed = 0
    if period.counted_nanos is not None:
        first = period.counted_nanos - sum(nanos for nanos, is_counted, _ in amounts if is_counted)
        was, now = (
            plans.missing(plan, counted, period.seconds, period.full_seconds) for counted in (first, first + corrected)
        )
        committed = now - was
    [(given,)] = await tx.sql(
        "SELECT coalesce(sum(corrections_nanos), 0)::bigint FROM credit_note WHERE tenant_id = $1 AND invoice_id = $2",
        tenant_id,
        invoice_id,
    )
    return corrected + committed + by_hand + int(given)


async def not_given_back(tx: Tx, tenant_id: str, invoice: Invoice) -> int:
    """Returns the nano-units before tax of an invoice above zero that neither its credit notes nor corrections of its
    usage on other invoices have given back."""
    burned = await grants.burned(tx, tenant_id, str(invoice.id))
    corrected = await _corrected_elsewhere(tx, tenant_id, invoice.id)
    credited = schemes.part(invoice.subtotal_nanos, invoice.credited_minor, invoice.total_minor)
    return max(0, invoice.subtotal_nanos + burned.purchased + corrected - credited)


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
    corrections: bool = False,
) -> CreditNote:
    """Takes a part of an invoice back, with its share of the tax. It reduces the amount that is due.

    `corrections`: it gives corrections of the usage that another invoice had, at most the open amount. It does so after
    a write-off, too, and takes that part of the write-off back.

    Money that was paid already becomes a grant or, with `refund`, is owed until a payment is refunded. A note about
    prepaid credit always has `refund`. It takes unspent credit back that no work in progress has reserved or, with
    `money_is_gone`, any unspent credit. Raises Conflict for a draft or void invoice, and InvalidMessage for more than
    the invoice has, less the corrections of its usage on other invoices, than is unspent or than its payments can give
    back.
    """
    await accounts.lock_one(tx, tenant_id)
    invoice = await invoices.get(tx, tenant_id, invoice_id)
    if invoice.status not in ("finalised", "paid") and not corrections:
        raise Conflict(f"the invoice is {invoice.status}; only a finalised or paid one gets a credit note")
    if invoice.total_minor <= 0:
        raise Conflict("the invoice is not above zero; there is nothing to take back")
    if minor > invoice.total_minor - invoice.credited_minor:
        raise InvalidMessage("amount_minor", f"must be at most {invoice.total_minor - invoice.credited_minor}")
    net = share(invoice, invoice.subtotal_nanos, minor)
    burned = await grants.burned(tx, tenant_id, str(invoice_id))
    if not corrections and net > (free := await not_given_back(tx, tenant_id, invoice)):
        most = most_creditable(invoice, free)
        raise InvalidMessage("amount_minor", f"must be at most {most}: corrections of its usage gave the rest back")
    if invoice.purpose == "credit":
        refund = True
        await _take_back(tx, tenant_id, invoice, net, actor=actor, money_is_gone=money_is_gone)
    over = max(0, minor - invoice.open_minor)
    if refund and over > (refundable := await _refundable(tx, tenant_id, invoice)):
        raise InvalidMessage("refund", f"payments can give back {refundable} of the {over} that were paid")
    unit = nanos_per_minor(invoice.currency)
    taxed = share(invoice, invoice.tax_nanos, minor)
    credit_note_id, number = uuid7(), await next_number(tx, tenant_id, CREDIT_SERIES)
    await tx.sql(
        """
        INSERT INTO credit_note (tenant_id, credit_note_id, invoice_id, number, amount_minor, reason, actor,
                                 corrections_nanos)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
        """,
        tenant_id,
        credit_note_id,
        invoice_id,
        number,
        minor,
        reason,
        actor,
        net if corrections else 0,
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
    if invoice.status == "uncollectible":
        await _recover(tx, tenant_id, invoice_id, minor * unit, "corrected after the write-off")
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
    if invoice.subtotal_nanos <= 0:
        # The total is the difference of two taxes: no part before tax can be given.
        return 0
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
