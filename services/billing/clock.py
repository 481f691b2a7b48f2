"""The loop that closes periods, finalises drafts, ends expired grants, looks payments up, sends mails and deletes old
records when their time has come."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from datetime import datetime, timedelta
from uuid import UUID

from infra.clock import utcnow
from infra.errors import describe
from infra.observe.logs import get_logger
from infra.postgres.database import Database
from infra.service.periodic import Periodic
from services.billing.credit import accounts
from services.billing.invoices import booking, closing, credit_notes, dunning, invoice_files, pdf
from services.billing.invoices import store as invoices
from services.billing.invoices.tax import Seller
from services.billing.payments import store
from services.billing.payments.provider import PaymentProvider
from services.billing.payments.store import Payment
from services.billing.usage import retention

# Records of a period that arrive within this time after its end are still in its invoice.
CLOSE_AFTER = timedelta(days=2)
# A draft can be looked at for this time.
FINALISE_AFTER = timedelta(days=1)
# The payment of an order of prepaid credit can be completed for this time.
CANCEL_AFTER = timedelta(days=1)
# Tenants of one tick. The others follow in the next ones.
MOST = 100


class Clock(Periodic):
    """Runs until stopped. Several processes may run it: each step is done once, under the lock of the account."""

    pause = 60.0
    failure = "could not close billing periods"

    def __init__(self, database: Database, seller: Seller, providers: Mapping[str, PaymentProvider]) -> None:
        super().__init__()
        self._database = database
        self._seller = seller
        self._providers = providers

    async def tick(self) -> None:
        await self.close()
        await self.look_up()
        await self.mail()
        await self.forget()

    async def close(self) -> None:
        """Ends grants, closes periods and finalises drafts that are due, at most MOST tenants of each kind."""
        async with self._database.begin() as tx:
            expired = await tx.sql(
                "SELECT tenant_id FROM account WHERE next_expiry <= clock_timestamp() ORDER BY next_expiry LIMIT $1",
                MOST,
            )
            ended = await tx.sql(
                """
                SELECT tenant_id
                FROM period
                WHERE closed_at IS NULL AND ends <= $1
                GROUP BY tenant_id
                ORDER BY min(ends)
                LIMIT $2
                """,
                utcnow() - CLOSE_AFTER,
                MOST,
            )
            drafts = await tx.sql(
                """
                SELECT tenant_id, invoice_id
                FROM invoice
                WHERE status = 'draft' AND purpose = 'usage' AND made_at <= $1
                ORDER BY made_at
                LIMIT $2
                """,
                utcnow() - FINALISE_AFTER,
                MOST,
            )
        for (tenant_id,) in expired:
            await self._try(tenant_id, self._end_expired(tenant_id))
        for (tenant_id,) in ended:
            await self._try(tenant_id, self._close(tenant_id))
        for tenant_id, invoice_id in drafts:
            await self._try(tenant_id, self._finalise(tenant_id, invoice_id))

    async def look_up(self) -> None:
        """Asks the providers about payments whose event may be lost, at most MOST, and cancels those of abandoned
        orders and those for another amount than is due by now."""
        async with self._database.begin() as tx:
            due = await store.to_look_up(tx, list(self._providers), MOST)
        for payment in due:
            await self._try(payment.tenant_id, self._look_up(payment))

    async def mail(self) -> None:
        """Sends the invoices and reminders that are due, at most MOST, and as many credit notes."""
        async with self._database.begin() as tx:
            due = await dunning.due(tx, utcnow(), MOST)
            notes = await credit_notes.due(tx, MOST)
        for tenant_id, invoice_id, first in due:
            await self._try(tenant_id, self._mail(tenant_id, invoice_id, first))
        for tenant_id, invoice_id, note_id in notes:
            await self._try(tenant_id, self._mail_note(tenant_id, invoice_id, note_id))

    async def forget(self) -> None:
        """Deletes a page of old holds, and a page of the old records of usage of at most MOST tenants."""
        before = retention.kept_since(utcnow())
        async with self._database.begin() as tx:
            await retention.delete_holds(tx, before)
            due = await retention.due(tx, before, MOST)
        for tenant_id in due:
            await self._try(tenant_id, self._delete(tenant_id, before))

    async def _delete(self, tenant_id: str, before: datetime) -> None:
        async with self._database.begin(tenant_id=tenant_id) as tx:
            await retention.delete(tx, tenant_id, before)

    async def _mail(self, tenant_id: str, invoice_id: UUID, first: bool) -> None:
        document = None
        if first:
            async with self._database.begin(tenant_id=tenant_id) as tx:
                page = invoice_files.page(*await invoices.whole(tx, tenant_id, invoice_id))
            # Between two transactions: printing takes seconds, and a finalised invoice does not change meanwhile.
            document = await pdf.document(page)
        else:
            # If the event of its payment is lost, a paid invoice would be written off.
            async with self._database.begin(tenant_id=tenant_id) as tx:
                payment = await store.pending(tx, tenant_id, invoice_id)
            if payment and payment.reference and payment.provider in self._providers:
                await self._look_up(payment)
        async with self._database.begin(tenant_id=tenant_id) as tx:
            await dunning.step(tx, tenant_id, invoice_id, document, utcnow())

    async def _look_up(self, payment: Payment) -> None:
        provider = self._providers[payment.provider]
        async with self._database.begin(tenant_id=payment.tenant_id) as tx:
            invoice = await invoices.get(tx, payment.tenant_id, payment.invoice_id)
        # The payer could complete it at any time: with the tax of today, or for an amount that is not due any more.
        is_abandoned = invoice.is_order and payment.made_at < utcnow() - CANCEL_AFTER
        is_outdated = payment.amount_minor != invoice.due_minor
        intent = await (provider.cancel if is_abandoned or is_outdated else provider.look)(payment.reference)
        async with self._database.begin(tenant_id=payment.tenant_id) as tx:
            await store.keep_answer(tx, payment, intent)

    async def _mail_note(self, tenant_id: str, invoice_id: UUID, note_id: UUID) -> None:
        async with self._database.begin(tenant_id=tenant_id) as tx:
            note, invoice = await invoices.credit_note(tx, tenant_id, invoice_id, note_id)
        document = await pdf.document(invoice_files.note_page(note, invoice))
        async with self._database.begin(tenant_id=tenant_id) as tx:
            await credit_notes.send(tx, tenant_id, invoice_id, note_id, document)

    async def _end_expired(self, tenant_id: str) -> None:
        async with self._database.begin(tenant_id=tenant_id) as tx:
            # Locking an account ends its expired grants.
            await accounts.lock_one(tx, tenant_id)

    async def _close(self, tenant_id: str) -> None:
        async with self._database.begin(tenant_id=tenant_id) as tx:
            await closing.close(tx, tenant_id, utcnow() - CLOSE_AFTER, self._seller.country)

    async def _finalise(self, tenant_id: str, invoice_id: UUID) -> None:
        async with self._database.begin(tenant_id=tenant_id) as tx:
            await booking.finalise(tx, tenant_id, invoice_id, self._seller, "billing")

    async def _try(self, tenant_id: str, work: Awaitable[None]) -> None:
        """One tenant's fault must not keep the others from their invoices."""
        try:
            await work
        except Exception as error:
            get_logger("services.billing.clock").error(
                "could not bill a tenant; will retry", tenant=tenant_id, error=describe(error)
            )
