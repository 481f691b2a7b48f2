"""HTTP of payments: methods, payments of invoices, refunds, and the providers' webhooks."""

from __future__ import annotations

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from infra.clock import utcnow
from infra.errors import Conflict, NotFound
from infra.postgres.tx import Tx
from infra.security.audit import audit
from infra.service.api import Admin, Manager, Operator, Paging, Viewer, id_cursor, page
from infra.service.idempotency import key_of, once
from infra.service.service import Runtime
from services.billing.invoices_api import owner
from services.billing.payments import store
from services.billing.payments.provider import PaymentProvider
from services.billing.payments.store import Method, Payment, PaymentReconciliation
from services.billing.payments.stripe import Stripe


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NewMethod(_Body):
    provider: str = "stripe"
    token: str = Field(min_length=1, max_length=255, pattern=r"^[\w-]+$", examples=["pm_1PgafyB7WZ01zgkW6dKueIc5"])
    """The provider's id of the method, as its script in the payer's browser has made it."""


class Pay(_Body):
    payment_method_id: UUID | None = None
    """A saved method. Null: the payer completes the payment in the browser, with `client_secret`."""


class Paying(BaseModel):
    payment: Payment
    client_secret: str


class NewRefund(_Body):
    amount_minor: int = Field(gt=0)
    reason: str = Field(min_length=1, max_length=500)


class Refund(BaseModel):
    id: UUID
    payment_id: UUID
    amount_minor: int


class Handled(BaseModel):
    outcome: str
    """applied, repeated, ignored, or unmatched: kept, because it is about a payment that is not known."""


def providers(runtime: Runtime) -> dict[str, PaymentProvider]:
    """The providers that the environment has keys of."""
    settings = runtime.settings
    if settings.stripe_api_key is None:
        return {}
    stripe = Stripe(runtime.outgoing, settings.stripe_api_base, settings.stripe_api_key, settings.stripe_webhook_secret)
    return {stripe.name: stripe}


def router(runtime: Runtime) -> APIRouter:
    router = APIRouter(tags=["payments"])
    known = providers(runtime)
    seller = runtime.settings.seller

    def provider(name: str) -> PaymentProvider:
        if name not in known:
            raise Conflict(f"the payment provider {name} is not set up here")
        return known[name]

    @router.post("/api/v1/payment-methods", status_code=201, response_model=Method)
    async def save_method(body: NewMethod, who: Admin, request: Request) -> Response:
        """Saves a method of payment at the provider. No card number ever comes here."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            customer = await store.customer(tx, who.tenant_id, body.provider)
        customer, reference = await provider(body.provider).save(who.tenant_id, body.token, customer)

        async def work(tx: Tx) -> tuple[int, Method]:
            made = await store.save_method(tx, who.tenant_id, body.provider, customer, reference)
            audit(tx, who.actor, "billing.payment_method", "payment_method", str(made.id))
            return 201, made

        return await once(request, runtime, who, work)

    @router.get("/api/v1/payment-methods")
    async def list_methods(who: Admin, paging: Paging) -> dict[str, Any]:
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            found = await store.methods(tx, who.tenant_id)
        after = [method for method in found if paging.after is None or str(method.id) > paging.after]
        return page(after[: paging.limit + 1], paging, lambda method: str(method.id))

    @router.delete("/api/v1/payment-methods/{method_id}", status_code=204)
    async def remove_method(method_id: UUID, who: Admin) -> None:
        """Removes a saved method, here and at the provider. Payments that were made by it stay."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            found = [method for method in await store.methods(tx, who.tenant_id) if method.id == method_id]
        if not found:
            raise NotFound(f"payment method {method_id}: not found")
        # At the provider first: if the process dies then, the call is repeated.
        await provider(found[0].provider).remove(found[0].reference)
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            await store.remove_method(tx, who.tenant_id, method_id)
            audit(tx, who.actor, "billing.remove_payment_method", "payment_method", str(method_id))

    @router.post("/api/v1/invoices/{invoice_id}/pay")
    async def pay(invoice_id: UUID, body: Pay, who: Manager) -> Paying:
        """Pays a finalised invoice, or the order of prepaid credit. A repeated call asks for the same payment, so it is
        charged once. A payment that is not decided yet is cancelled first if another amount is due by now, or if it is
        by another method."""
        async with runtime.worker.begin() as tx:
            tx.tenant_id = tenant_id = await owner(tx, invoice_id, who)
            outdated = await store.outdated(tx, tenant_id, invoice_id, body.payment_method_id, seller)
        if outdated:
            intent = await provider(outdated.provider).cancel(outdated.reference)
            async with runtime.worker.begin(tenant_id=tenant_id) as tx:
                await store.keep_answer(tx, outdated, intent)
        async with runtime.worker.begin(tenant_id=tenant_id) as tx:
            payment = await store.begin(
                tx, tenant_id, invoice_id, provider("stripe").name, body.payment_method_id, seller
            )
            wanted = await store.request_for(tx, payment)
            audit(tx, who.actor, "billing.pay", "invoice", str(invoice_id), payment=str(payment.id))
        # Outside of any transaction. If the process dies here, the next call asks again with the same key.
        # A payment whose id is known is looked up: the provider forgets keys after a day.
        asked = provider(payment.provider)
        intent = await (asked.look(payment.reference) if payment.reference else asked.prepare(wanted))
        async with runtime.worker.begin(tenant_id=tenant_id) as tx:
            payment = await store.keep_answer(tx, payment, intent)
        # The id is stored before money is taken: a payment whose answer is lost can be looked up and cancelled.
        if payment.status == "pending" and wanted.method:
            intent = await asked.charge(payment.reference, wanted)
            async with runtime.worker.begin(tenant_id=tenant_id) as tx:
                payment = await store.keep_answer(tx, payment, intent)
        secret = intent.client_secret if payment.status == "pending" else ""
        return Paying(payment=payment, client_secret=secret)

    @router.get("/api/v1/payments")
    async def list_payments(
        who: Viewer, paging: Paging, tenant_id: Annotated[str | None, Query(description="for the operator")] = None
    ) -> dict[str, Any]:
        after = id_cursor(paging)
        async with runtime.worker.begin() as tx:
            found = await store.listed(tx, who.tenant_id or tenant_id, after=after, limit=paging.limit + 1)
        return page(found, paging, lambda payment: str(payment.id))

    @router.get("/api/v1/payments/reconciliation")
    async def reconcile(who: Viewer) -> PaymentReconciliation:
        """Compares the payments with the journal. The operator gets the figures of all tenants."""
        async with runtime.worker.begin() as tx:
            return await store.reconcile(tx, who.tenant_id or None)

    @router.get("/api/v1/payments/{payment_id}")
    async def get_payment(payment_id: UUID, who: Viewer) -> Payment:
        async with runtime.worker.begin() as tx:
            found = await store.get(tx, payment_id)
        if who.tenant_id not in ("", found.tenant_id):
            raise NotFound(f"payment {payment_id}: not found")
        return found

    @router.post("/api/v1/payments/{payment_id}/refunds", status_code=201)
    async def refund(payment_id: UUID, body: NewRefund, who: Operator, request: Request) -> Refund:
        """Gives a part of a payment back; of prepaid credit, the part that credit notes have taken back. It is booked
        when the provider reports it. With an Idempotency-Key a repeated call means the same refund."""
        key = key_of(request)
        async with runtime.worker.begin() as tx:
            payment, refund_id, status = await store.begin_refund(
                tx, payment_id, body.amount_minor, reason=body.reason, actor=who.actor, key=key
            )
            tx.tenant_id = payment.tenant_id
            audit(tx, who.actor, "billing.refund", "payment", str(payment_id), minor=str(body.amount_minor))
        asked = provider(payment.provider)
        # The provider forgets keys after a day: one that may have been made is looked up.
        if status == "new" or (status == "pending" and not await asked.has_refund(payment.reference, refund_id)):
            try:
                await asked.refund(payment.reference, body.amount_minor, payment.currency, refund_id)
            except Conflict:
                async with runtime.worker.begin(tenant_id=payment.tenant_id) as tx:
                    await store.end_refund(tx, payment.tenant_id, refund_id, "failed")
                raise
        async with runtime.worker.begin(tenant_id=payment.tenant_id) as tx:
            await store.end_refund(tx, payment.tenant_id, refund_id, "made")
        return Refund(id=refund_id, payment_id=payment_id, amount_minor=body.amount_minor)

    @router.post("/webhooks/payments/{name}")
    async def webhook(name: str, request: Request) -> Handled:
        """Takes an event of a payment provider, signed in the provider's way. Each event is applied once."""
        if name not in known:
            raise NotFound(f"payment provider {name}: not found")
        event = known[name].event(request.headers, await request.body(), utcnow())
        async with runtime.worker.begin() as tx:
            return Handled(outcome=await store.handle(tx, name, event))

    return router
