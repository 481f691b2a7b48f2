"""The erasure of a tenant: its last invoices are finalised, and the books that the law requires are kept.

Subscriptions end at once. Ten minutes later the usage of the runs that were under way has been counted: the last
periods are closed and every draft of usage is finalised with the buyer's name. Orders of prepaid credit that are not
paid stay drafts. Then the buyer is deleted: it stands only in the finalised invoices, and until the last pass in orders
whose payment is not decided, because the money may still arrive. They are kept with the journal, the ledger, payments
and usage, which name ids, meters and models.
The customer at the payment provider is deleted first, with its saved methods.
"""

from __future__ import annotations

from uuid import UUID

from infra.clock import utcnow
from infra.lanes.effects import Effects
from infra.postgres.tx import Tx
from infra.service.service import Runtime
from infra.service.tenant_erasure import PASSES, Before, EraseTenant
from services.billing.invoices import booking, closing
from services.billing.invoices.tax import Seller
from services.billing.payments import store
from services.billing.payments.api import providers
from services.billing.plans import subscriptions

KEPT = (
    "account",
    "buyer",  # deleted here, after the last invoice
    "credit_grant",
    "credit_note",
    "dead_letter",  # without payloads: the reconciliation counts them
    "deleted_usage",
    "delivered",
    "dispute",
    "duplicate",
    "invoice",
    "invoice_line",
    "invoice_series",
    "journal_balance",
    "journal_entry",
    "journal_line",
    "kept_credit",
    "ledger_entry",
    "payment",
    "payment_terms",
    "period",
    "period_correction",
    "refund",
    "reported_refund",
    "subscription",
    "usage",
    "usage_bucket",
    "usage_correction",
    "usage_label",
)


def end_billing(runtime: Runtime) -> Before:
    seller: Seller = runtime.settings.seller
    known = providers(runtime)

    async def end(item: EraseTenant, effects: Effects) -> None:
        async with effects.begin() as tx:
            customers = await store.customers(tx, item.tenant_id)
        # Before their ids are deleted. A provider that is not set up any more is not asked.
        for provider, customer in customers:
            if provider in known:
                await known[provider].forget(customer)
        async with effects.begin() as tx:
            if await tx.sql("SELECT FROM account WHERE tenant_id = $1", item.tenant_id):
                await subscriptions.end_all(tx, item.tenant_id)
                if item.is_late:
                    await _finalise(tx, item.tenant_id, seller)
            if item.is_late:
                await tx.sql("DELETE FROM buyer WHERE tenant_id = $1", item.tenant_id)
                await tx.sql(
                    """
                    UPDATE invoice AS i
                    SET buyer = '{}'
                    WHERE tenant_id = $1 AND status = 'draft' AND ($2 OR NOT EXISTS (
                        SELECT FROM payment AS p
                        WHERE p.tenant_id = i.tenant_id AND p.invoice_id = i.invoice_id AND p.status = 'pending'
                    ))
                    """,
                    item.tenant_id,
                    item.number == len(PASSES),
                )

    return end


async def _finalise(tx: Tx, tenant_id: str, seller: Seller) -> None:
    await closing.close(tx, tenant_id, utcnow(), seller.country)
    drafts = await tx.sql(
        """
        SELECT invoice_id
        FROM invoice
        WHERE tenant_id = $1 AND status = 'draft' AND purpose = 'usage'
        ORDER BY made_at, invoice_id
        """,
        tenant_id,
    )
    for (invoice_id,) in drafts:
        await booking.finalise(tx, tenant_id, UUID(str(invoice_id)), seller, "billing")
