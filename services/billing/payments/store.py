"""Payments and their money, in the tables ``payment``, ``dispute``, ``refund`` and ``payment_event``.

A payment's state is made of figures that only grow and, of each dispute, of the report with the most movements of
money, so events may come in any order and any number of times. After each event the difference between the balance that
follows from the state and the one that the journal has is booked.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Literal, NamedTuple
from uuid import UUID, uuid5

from pydantic import BaseModel

from infra.clock import uuid7
from infra.errors import Conflict, InvalidMessage, NotFound
from infra.postgres.tx import Tx
from infra.service.idempotency import HEADER
from services.billing.credit import accounts, journal
from services.billing.credit.journal import JournalAccount
from services.billing.invoices import booking, purchases
from services.billing.invoices import store as invoices
from services.billing.invoices.store import Invoice
from services.billing.invoices.tax import Seller
from services.billing.payments.provider import CANCELLED, Intent, PaymentRequest, ProviderEvent
from services.billing.rating.currencies import nanos_per_minor


class Payment(BaseModel):
    id: UUID
    tenant_id: str
    invoice_id: UUID
    provider: str
    reference: str
    """The provider's id. Empty until it has answered."""
    method_id: UUID | None
    amount_minor: int
    currency: str
    status: Literal["pending", "succeeded", "failed"]
    failure: str
    received_minor: int
    refunded_minor: int
    failed_refund_minor: int
    """Refunds that the provider reported and that failed later: the tenant did not get this money."""
    disputed_minor: int
    """Taken back by a bank until it decides and gives it back."""
    lost_minor: int
    """Taken back for good."""
    made_at: datetime


class Method(BaseModel):
    id: UUID
    provider: str
    reference: str
    made_at: datetime


class PaymentBalance(NamedTuple):
    """The money of a payment in minor units: received, in dispute, and kept for its invoice."""

    cash: int
    disputed: int
    kept: int


_PAYMENT = """
    SELECT payment_id, tenant_id, invoice_id, provider, reference, method_id, amount_minor, currency, status, failure,
           received_minor, refunded_minor, failed_refund_minor,
           coalesce((SELECT sum(minor) FROM dispute AS d
                     WHERE d.tenant_id = p.tenant_id AND d.payment_id = p.payment_id AND state <> 'lost'), 0)::bigint,
           coalesce((SELECT sum(minor) FROM dispute AS d
                     WHERE d.tenant_id = p.tenant_id AND d.payment_id = p.payment_id AND state = 'lost'), 0)::bigint,
           made_at
    FROM payment AS p
"""


def balance_of(payment: Payment) -> PaymentBalance:
    """Nothing counts before the money was received: a refund or dispute may be reported first."""
    if not payment.received_minor:
        return PaymentBalance(0, 0, 0)
    kept = payment.received_minor - payment.refunded_minor - payment.lost_minor
    return PaymentBalance(kept - payment.disputed_minor, payment.disputed_minor, kept)


async def outdated(tx: Tx, tenant_id: str, invoice_id: UUID, method_id: UUID | None, seller: Seller) -> Payment | None:
    """Returns the payment of an invoice that is not decided yet, if it is not for the amount that is due or not by this
    method, or if the tax or the buyer of prepaid credit has changed. The provider must cancel it before another one can
    begin.

    One without the provider's id was never charged, and no payer can complete it: it is ended here.
    """
    await accounts.lock_one(tx, tenant_id)
    found = await pending(tx, tenant_id, invoice_id)
    invoice = await invoices.get(tx, tenant_id, invoice_id)
    due = await purchases.priced(tx, tenant_id, invoice, seller)
    if found is None or _is_current(found, invoice, due, method_id):
        return None
    if found.reference:
        return found
    await _apply(tx, found.id, ProviderEvent("", "failed", "", "", 0, found.currency, CANCELLED))
    return None


async def begin(
    tx: Tx, tenant_id: str, invoice_id: UUID, provider: str, method_id: UUID | None, seller: Seller
) -> Payment:
    """Returns the payment of an invoice that is not decided yet, or makes it for the amount that is due. The order of
    prepaid credit gets the tax and the parties of now.

    Raises Conflict for an invoice that is not to be paid, and while an outdated payment is not decided.
    """
    await accounts.lock_one(tx, tenant_id)
    invoice = await invoices.get(tx, tenant_id, invoice_id)
    due = await purchases.priced(tx, tenant_id, invoice, seller)
    if found := await pending(tx, tenant_id, invoice_id):
        if _is_current(found, invoice, due, method_id):
            return found
        raise Conflict(f"payment {found.id} of the invoice is being processed; ask again when it is decided")
    if invoice.is_order:
        await purchases.keep_price(tx, tenant_id, due)
    elif invoice.status != "finalised":
        raise Conflict(f"the invoice is {invoice.status}; only a finalised one can be paid")
    payment_id = uuid7()
    await tx.sql(
        """
        INSERT INTO payment (tenant_id, payment_id, invoice_id, provider, method_id, amount_minor, currency)
        VALUES ($1, $2, $3, $4, $5, $6, $7)
        """,
        tenant_id,
        payment_id,
        invoice_id,
        provider,
        method_id,
        due.due_minor,
        invoice.currency,
    )
    return await get(tx, payment_id)


async def to_look_up(tx: Tx, providers: Sequence[str], limit: int) -> list[Payment]:
    """Returns payments of these providers that are not decided for long: the event of one may be lost. Each is due
    again at twice its age, and after a day at the latest."""
    rows = await tx.sql(
        """
        UPDATE payment
        SET look_at = clock_timestamp() + least(clock_timestamp() - made_at, interval '1 day')
        WHERE payment_id IN (
            SELECT payment_id
            FROM payment
            WHERE status = 'pending' AND reference <> '' AND provider = ANY($1::text[]) AND look_at <= clock_timestamp()
            ORDER BY look_at
            LIMIT $2
            -- Without the account's lock: another process looks the others up, and none waits.
            FOR UPDATE SKIP LOCKED
        )
        RETURNING payment_id
        """,
        providers,
        limit,
    )
    return [await get(tx, payment_id) for (payment_id,) in rows]


async def pending(tx: Tx, tenant_id: str, invoice_id: UUID) -> Payment | None:
    """Returns the payment of an invoice that is not decided yet."""
    rows = await tx.sql(
        f"{_PAYMENT} WHERE tenant_id = $1 AND invoice_id = $2 AND status = 'pending'", tenant_id, invoice_id
    )
    return _payment(rows[0]) if rows else None


def _is_current(payment: Payment, invoice: Invoice, due: Invoice, method_id: UUID | None) -> bool:
    """due: the invoice as a payment that begins now would pay it."""
    return due == invoice and (payment.amount_minor, payment.method_id) == (due.due_minor, method_id)


async def request_for(tx: Tx, payment: Payment) -> PaymentRequest:
    """Returns the request to the provider: the same one however often it is made."""
    customer = method = ""
    if payment.method_id:
        rows = await tx.sql(
            """
            SELECT customer, reference
            FROM payment_method
            WHERE tenant_id = $1 AND method_id = $2 AND removed_at IS NULL
            """,
            payment.tenant_id,
            payment.method_id,
        )
        if not rows:
            raise NotFound(f"payment method {payment.method_id}: not found")
        [(customer, method)] = rows
    invoice = await invoices.get(tx, payment.tenant_id, payment.invoice_id)
    about = f"invoice {invoice.number}" if invoice.number else "prepaid credit"
    return PaymentRequest(payment.id, payment.amount_minor, payment.currency, customer, method, about)


async def keep_answer(tx: Tx, payment: Payment, intent: Intent) -> Payment:
    """Stores the provider's answer. Money that it reports is booked as by an event."""
    await _lock_reference(tx, payment.provider, intent.reference)
    await accounts.lock_one(tx, payment.tenant_id)
    await _keep_reference(tx, payment.id, intent.reference)
    if intent.status != "pending":
        event = ProviderEvent(
            "",
            intent.status,
            intent.reference,
            str(payment.id),
            intent.received_minor,
            payment.currency,
            intent.failure,
        )
        await _apply(tx, payment.id, event)
    return await get(tx, payment.id)


async def handle(tx: Tx, provider: str, event: ProviderEvent) -> str:
    """Applies a provider's event once. Returns the outcome: applied, ignored, unmatched or repeated.

    An event about a payment that is not ours is kept as unmatched: money may have been received. If it comes before the
    provider's id of a payment of ours is known, it is applied when that id is known.
    """
    found = None
    if event.kind != "ignored":
        await _lock_reference(tx, provider, event.reference)
        rows = await tx.sql(
            """
            SELECT payment_id, tenant_id
            FROM payment
            WHERE provider = $1 AND currency = $4 AND (reference = $2 AND $2 <> '' OR payment_id::text = $3)
            """,
            provider,
            event.reference,
            event.payment_id,
            event.currency,
        )
        found = rows[0] if rows else None
    outcome = "ignored" if event.kind == "ignored" else "applied" if found else "unmatched"
    if found:
        tx.tenant_id = found[1]
        await accounts.lock_one(tx, found[1])
    # Locks the event's row: a second delivery at the same time waits, and is then a repeat.
    if not await tx.sql(
        """
        INSERT INTO payment_event (provider, event_id, kind, reference, minor, outcome, currency, detail, movements)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
        ON CONFLICT DO NOTHING
        RETURNING event_id
        """,
        provider,
        event.id,
        event.kind,
        event.reference,
        event.minor,
        outcome,
        event.currency,
        event.detail,
        event.movements,
    ):
        return "repeated"
    if found:
        await _keep_reference(tx, found[0], event.reference)
        await _apply(tx, found[0], event)
    return outcome


async def _lock_reference(tx: Tx, provider: str, reference: str) -> None:
    """The id of a payment does not become known while an event about it is handled as unknown."""
    await tx.take_turn(f"billing payment {provider} {reference}")


async def _keep_reference(tx: Tx, payment_id: UUID, reference: str) -> None:
    """Stores the provider's id of a payment when it is seen first: the answer to our request may be lost. Applies the
    events about it that came before. The caller has locked the reference and then the account."""
    if not await tx.sql(
        "UPDATE payment SET reference = $2 WHERE payment_id = $1 AND reference = '' AND $2 <> '' RETURNING payment_id",
        payment_id,
        reference,
    ):
        return
    rows = await tx.sql(
        """
        UPDATE payment_event AS e
        SET outcome = 'applied'
        FROM payment AS p
        WHERE p.payment_id = $1 AND e.provider = p.provider AND e.reference = p.reference AND e.currency = p.currency
          AND e.outcome = 'unmatched'
        RETURNING e.event_id, e.kind, e.minor, e.currency, e.detail, e.movements
        """,
        payment_id,
    )
    for id_, kind, minor, currency, detail, movements in rows:
        event = ProviderEvent(id_, kind, reference, "", minor, currency, detail, movements=movements)
        await _apply(tx, payment_id, event)


async def _apply(tx: Tx, payment_id: UUID, event: ProviderEvent) -> None:
    before = await get(tx, payment_id)
    place = before.tenant_id, before.id
    match event.kind:
        case "succeeded":
            await tx.sql(
                """
                UPDATE payment
                SET status = 'succeeded', failure = '', received_minor = greatest(received_minor, $3)
                WHERE tenant_id = $1 AND payment_id = $2
                """,
                *place,
                event.minor,
            )
        case "failed" | "declined":
            # A failure that arrives after the success is older than it. In the browser the payer may try another card
            # with the same payment: a second one beside it could be paid too.
            await tx.sql(
                """
                UPDATE payment
                SET status = CASE WHEN method_id IS NULL AND $4 THEN status ELSE 'failed' END, failure = $3
                WHERE tenant_id = $1 AND payment_id = $2 AND status = 'pending'
                """,
                *place,
                event.detail[:500],
                event.kind == "declined",
            )
        case "refunded":
            await tx.sql(
                """
                UPDATE payment
                SET refund_sum_minor = greatest(refund_sum_minor, $3)
                WHERE tenant_id = $1 AND payment_id = $2
                """,
                *place,
                event.minor,
            )
            await _sum_refunds(tx, *place)
        case "refund" | "refund_failed":
            await tx.sql(
                """
                INSERT INTO reported_refund AS r (tenant_id, payment_id, reference, minor, failed)
                VALUES ($1, $2, $3, $4, $5)
                ON CONFLICT (tenant_id, payment_id, reference) DO UPDATE
                SET failed = r.failed OR excluded.failed
                """,
                *place,
                event.detail,
                event.minor,
                event.kind == "refund_failed",
            )
            await _sum_refunds(tx, *place)
            if event.kind == "refund_failed":
                await tx.sql(
                    """
                    UPDATE refund
                    SET status = 'failed'
                    WHERE tenant_id = $1 AND payment_id = $2 AND refund_id::text = $3
                    """,
                    *place,
                    event.refund_id,
                )
        case "dispute_open" | "dispute_won" | "dispute_lost":
            await tx.sql(
                """
                -- Of two reports with as many movements the one that is decided is the later one.
                INSERT INTO dispute AS d (tenant_id, payment_id, reference, minor, state, movements)
                VALUES ($1, $2, $3, $4, $5, $6)
                ON CONFLICT (tenant_id, payment_id, reference) DO UPDATE
                SET minor = excluded.minor, state = excluded.state, movements = excluded.movements
                WHERE (excluded.movements, excluded.state <> 'open') > (d.movements, d.state <> 'open')
                """,
                *place,
                event.detail,
                event.minor,
                event.kind.removeprefix("dispute_"),
                event.movements,
            )
    await _book(tx, before, await get(tx, payment_id), event)


async def _sum_refunds(tx: Tx, tenant_id: str, payment_id: UUID) -> None:
    """The sum that the provider reports may contain the failed refunds or not, and may miss the latest one. With the
    refunds that were reported one by one it is known in any order."""
    await tx.sql(
        """
        UPDATE payment AS p
        SET refunded_minor = greatest(p.refund_sum_minor, r.made) - r.failed, failed_refund_minor = r.failed
        FROM (
            SELECT coalesce(sum(minor), 0)::bigint AS made,
                   coalesce(sum(minor) FILTER (WHERE failed), 0)::bigint AS failed
            FROM reported_refund
            WHERE tenant_id = $1 AND payment_id = $2
        ) AS r
        WHERE p.tenant_id = $1 AND p.payment_id = $2
        """,
        tenant_id,
        payment_id,
    )


async def _book(tx: Tx, before: Payment, after: Payment, event: ProviderEvent) -> None:
    unit = nanos_per_minor(after.currency)
    old, new = balance_of(before), balance_of(after)
    if new.kept > 0:
        await purchases.issue(tx, after.tenant_id, after.invoice_id, after.provider)
    amounts: dict[JournalAccount, int] = {
        "cash": (new.cash - old.cash) * unit,
        "disputed": (new.disputed - old.disputed) * unit,
        "receivable": (old.kept - new.kept) * unit,
    }
    await journal.post(
        tx,
        after.tenant_id,
        f"payment_{event.kind}",
        str(after.id),
        amounts,
        reason=f"{after.provider} {event.reference}",
        actor=after.provider,
    )
    if new.kept != old.kept:
        await booking.add_paid(tx, after.tenant_id, after.invoice_id, new.kept - old.kept)
    await purchases.follow_money(tx, after.tenant_id, after.invoice_id, after.provider)


async def begin_refund(
    tx: Tx, payment_id: UUID, minor: int, *, reason: str, actor: str, key: str | None
) -> tuple[Payment, UUID, Literal["new", "pending", "made"]]:
    """Reserves a refund. The same `key` means the same refund. Its status is `pending` if the provider's answer to an
    earlier call is not known.

    Raises InvalidMessage for more than is left of the payment, and for a key of another refund, and Conflict for the
    key of a refund that has failed, and for prepaid credit that no credit note has taken back.
    """
    payment = await get(tx, payment_id)
    await accounts.lock_one(tx, payment.tenant_id)
    payment = await get(tx, payment_id)
    refund_id = uuid7() if key is None else uuid5(payment_id, key)
    known = await tx.sql(
        "SELECT minor, reason, status FROM refund WHERE tenant_id = $1 AND refund_id = $2", payment.tenant_id, refund_id
    )
    if known:
        [(*before, status)] = known
        if before != [minor, reason]:
            raise InvalidMessage(HEADER, "was used before with another body")
        if status == "failed":
            raise Conflict("the refund has failed; ask for another one with another key")
        return payment, refund_id, status
    money = await booking.received(tx, payment.tenant_id, payment.invoice_id, payment_id)
    left = money.left - money.going
    if minor > left:
        raise InvalidMessage("amount_minor", f"must be at most {left}, the rest of the payment")
    invoice = await invoices.get(tx, payment.tenant_id, payment.invoice_id)
    going = (await booking.received(tx, payment.tenant_id, invoice.id)).going
    if invoice.purpose == "credit" and minor > (owed := max(0, invoice.owed_minor - going)):
        raise Conflict(f"{owed} of prepaid credit are owed; make a credit note first, which takes the credit back")
    await tx.sql(
        "INSERT INTO refund (tenant_id, refund_id, payment_id, minor, reason, actor) VALUES ($1, $2, $3, $4, $5, $6)",
        payment.tenant_id,
        refund_id,
        payment_id,
        minor,
        reason,
        actor,
    )
    return payment, refund_id, "new"


async def end_refund(tx: Tx, tenant_id: str, refund_id: UUID, status: Literal["made", "failed"]) -> None:
    """The money is booked by the provider's event, which has the sum of all refunds."""
    await tx.sql(
        # The provider's event that it has failed may come before its answer.
        "UPDATE refund SET status = $3 WHERE tenant_id = $1 AND refund_id = $2 AND status = 'pending'",
        tenant_id,
        refund_id,
        status,
    )


async def save_method(tx: Tx, tenant_id: str, provider: str, customer: str, reference: str) -> Method:
    await tx.sql(
        """
        INSERT INTO payment_method (tenant_id, method_id, provider, reference, customer)
        VALUES ($1, $2, $3, $4, $5)
        ON CONFLICT DO NOTHING
        """,
        tenant_id,
        uuid7(),
        provider,
        reference,
        customer,
    )
    return next(method for method in await methods(tx, tenant_id) if method.reference == reference)


async def customer(tx: Tx, tenant_id: str, provider: str) -> str:
    """Returns the provider's latest id of the tenant, empty if it has none."""
    rows = await tx.sql(
        """
        SELECT customer
        FROM payment_method
        WHERE tenant_id = $1 AND provider = $2
        ORDER BY method_id DESC
        LIMIT 1
        """,
        tenant_id,
        provider,
    )
    return str(rows[0][0]) if rows else ""


async def customers(tx: Tx, tenant_id: str) -> list[tuple[str, str]]:
    """Returns the tenant's ids at its providers: (provider, customer)."""
    rows = await tx.sql("SELECT DISTINCT provider, customer FROM payment_method WHERE tenant_id = $1", tenant_id)
    return [(provider, found) for provider, found in rows]


async def remove_method(tx: Tx, tenant_id: str, method_id: UUID) -> None:
    await tx.sql(
        "UPDATE payment_method SET removed_at = clock_timestamp() WHERE tenant_id = $1 AND method_id = $2",
        tenant_id,
        method_id,
    )


async def methods(tx: Tx, tenant_id: str) -> list[Method]:
    rows = await tx.sql(
        """
        SELECT method_id, provider, reference, made_at
        FROM payment_method
        WHERE tenant_id = $1 AND removed_at IS NULL
        ORDER BY method_id
        """,
        tenant_id,
    )
    return [Method(**dict(zip(Method.model_fields, row, strict=True))) for row in rows]


async def get(tx: Tx, payment_id: UUID) -> Payment:
    """Raises NotFound."""
    rows = await tx.sql(f"{_PAYMENT} WHERE payment_id = $1", payment_id)
    if not rows:
        raise NotFound(f"payment {payment_id}: not found")
    return _payment(rows[0])


async def listed(tx: Tx, tenant_id: str | None, *, after: UUID | None, limit: int) -> list[Payment]:
    rows = await tx.sql(
        f"""
        {_PAYMENT}
        WHERE ($1::text IS NULL OR tenant_id = $1) AND ($2::uuid IS NULL OR payment_id > $2)
        ORDER BY payment_id
        LIMIT $3
        """,
        tenant_id,
        after,
        limit,
    )
    return [_payment(row) for row in rows]


def _payment(row: tuple[object, ...]) -> Payment:
    return Payment(**dict(zip(Payment.model_fields, row, strict=True)))  # type: ignore[arg-type]


class PaymentReconciliation(BaseModel):
    """Payments compared with the journal, in nano-units."""

    payments_nanos: int
    """The cash of all payments: received minus refunded, in dispute and lost."""
    journal_nanos: int
    """The account cash, entries of payments only."""
    difference: int
    """Any value but 0 is a fault."""
    unmatched: int
    """Events about payments that are not known. A person has to look at them."""
    after_erasure: int
    """Invoices of prepaid credit whose money arrived after the erasure of the tenant. A person has to give it back."""


async def reconcile(tx: Tx, tenant_id: str | None) -> PaymentReconciliation:
    # The cash of `balance_of`, summed by the database: a tenant may have any number of payments.
    rows = await tx.sql(
        """
        SELECT p.currency, sum(p.received_minor - p.refunded_minor - coalesce((
                   SELECT sum(minor) FROM dispute AS d
                   WHERE d.tenant_id = p.tenant_id AND d.payment_id = p.payment_id
               ), 0))::text
        FROM payment AS p
        WHERE p.received_minor <> 0 AND ($1::text IS NULL OR p.tenant_id = $1)
        GROUP BY p.currency
        ORDER BY p.currency
        """,
        tenant_id,
    )
    due = sum(int(minor) * nanos_per_minor(currency) for currency, minor in rows)
    booked = (await journal.balances(tx, tenant_id, "payments")).get("cash", 0)
    cases = await open_cases(tx) if tenant_id is None else OpenCases(0, 0)
    return PaymentReconciliation(
        payments_nanos=due,
        journal_nanos=booked,
        difference=due - booked,
        unmatched=cases.unmatched,
        after_erasure=cases.after_erasure,
    )


class OpenCases(NamedTuple):
    """As in `PaymentReconciliation`."""

    unmatched: int
    after_erasure: int


async def open_cases(tx: Tx, since: datetime | None = None) -> OpenCases:
    """Counts the events and invoices that a person has to look at, of all tenants.

    since: without the events that came before this time.
    """
    [(unmatched,)] = await tx.sql(
        """
        SELECT count(*) FROM payment_event
        WHERE outcome = 'unmatched' AND ($1::timestamptz IS NULL OR received_at > $1)
        """,
        since,
    )
    [(late,)] = await tx.sql(
        """
        SELECT count(*)
        FROM invoice AS i
        JOIN erased_tenant AS e USING (tenant_id)
        WHERE i.purpose = 'credit' AND i.finalised_at > e.asked_at AND i.paid_minor > 0
        """
    )
    return OpenCases(unmatched, late)
