"""Corrections by hand: amounts that an operator charges in addition or gives back, with a reason.

One of the time of a subscription is a line on its next invoice, before tax and without the plan's markup. Any other one
is covered by grants.
"""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from infra.clock import utcnow
from infra.errors import Conflict, InvalidMessage
from infra.postgres.tx import Tx
from services.billing.credit import accounts, budgets
from services.billing.credit.accounts import Entry
from services.billing.invoices import booking
from services.billing.invoices import store as invoices
from services.billing.invoices.store import Invoice
from services.billing.plans import subscriptions
from services.billing.usage import reports


async def correct(tx: Tx, tenant_id: str, nanos: int, usage_id: str | None, *, reason: str, actor: str) -> None:
    """Books a correction: nano-units above zero are given back, below zero charged. One that names a record belongs to
    the subscription and the budgets of the record, as its use. Any other one belongs to the subscription of now, and to
    no budget.

    Raises NotFound for an unknown record, and for a tenant without an account. For an amount that is given back of a
    record it raises Conflict if the record's invoice is void, and InvalidMessage (field ``amount_nanos``) for more than
    the credit notes of that invoice have left.
    """
    await accounts.lock_one(tx, tenant_id)
    at = utcnow()
    counted: Sequence[tuple[int, UUID | None]] = []
    if usage_id is not None:
        at = (await reports.verdict(tx, tenant_id, usage_id)).occurred_at
        counted = await tx.sql(
            """
            SELECT u.period, i.invoice_id
            FROM usage AS u
            LEFT JOIN invoice AS i ON i.tenant_id = u.tenant_id AND i.period = u.period
            WHERE u.tenant_id = $1 AND u.usage_id = $2 AND u.verdict = 'counted'
            """,
            tenant_id,
            usage_id,
        )
        await budgets.correct(tx, tenant_id, [(usage_id, -nanos)])
    if counted:
        [(of_usage, invoice_id)] = counted
        if invoice_id and nanos > 0:
            await _check_not_given_back(tx, await invoices.get(tx, tenant_id, invoice_id), tenant_id, nanos)
        [period] = await subscriptions.place_corrections(tx, tenant_id, [of_usage])
        await tx.sql(
            """
            INSERT INTO period_correction AS c (tenant_id, period, usage_period, nanos, by_hand_nanos)
            SELECT $1, $2, $3::bigint, 0, $4
            WHERE $3 <> 0
            ON CONFLICT (tenant_id, period, usage_period) DO UPDATE
            SET by_hand_nanos = c.by_hand_nanos + excluded.by_hand_nanos
            """,
            tenant_id,
            period,
            of_usage,
            -nanos,
        )
    else:
        [(period, _)] = await subscriptions.place(tx, [(tenant_id, at)])
    entry = Entry(tenant_id, "correction", nanos, usage_id, reason=reason, actor=actor, period=period)
    await accounts.debit(tx, [entry])


async def _check_not_given_back(tx: Tx, invoice: Invoice, tenant_id: str, nanos: int) -> None:
    """Raises an error if that much of the usage of an invoice cannot be given back any more: the invoice is void or has
    credit notes."""
    if invoice.status == "void":
        raise Conflict(f"invoice {invoice.number} of the record is void; it has been given back")
    if invoice.credited_minor and nanos > (most := await booking.not_given_back(tx, tenant_id, invoice)):
        text = f"must be at most {most}: credit notes of invoice {invoice.number} gave the rest back"
        raise InvalidMessage("amount_nanos", text)
