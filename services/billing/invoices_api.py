"""HTTP of invoices, credit notes, the buyer and taxes."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from infra.clock import utcnow
from infra.errors import Conflict, NotFound
from infra.postgres.tx import Tx
from infra.security.audit import audit
from infra.security.auth import Identity
from infra.service.api import Admin, Operator, Paging, Viewer, bad_cursor, id_cursor, page
from infra.service.idempotency import once
from infra.service.service import Runtime
from infra.web.times import Time
from services.billing.credit import journal
from services.billing.invoices import booking, closing, countries, einvoice, invoice_files, pdf, tax, transfers
from services.billing.invoices import store as invoices
from services.billing.invoices.store import CreditNote, Invoice, InvoiceLine, WholeInvoice
from services.billing.invoices.tax import Buyer

Text = Annotated[str, Field(min_length=1, max_length=500)]
Percent = Annotated[str, Field(pattern=r"^[0-9]{1,2}(\.[0-9]{1,4})?$", examples=["19", "7.7"])]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class CloseRequest(_Body):
    tenant_id: Text
    until: Time | None = None
    """Closes the periods that have ended by then. Null: by now."""


class Drafts(BaseModel):
    items: list[Invoice]


class NewCreditNote(_Body):
    amount_minor: int = Field(gt=0)
    """Minor units (cents), tax included."""
    reason: Text
    refund: bool = False
    """True: money that was paid is owed until a payment is refunded. False: it becomes a grant."""


class ManualPayment(_Body):
    """A payment that arrived outside of a payment provider, such as a bank transfer."""

    amount_minor: int = Field(gt=0)
    reference: Text
    """The bank's reference. The same one is booked once."""


class Reversal(_Body):
    reference: Text
    """As the payment was booked with."""


class BuyerBody(_Body):
    name: str = Field("", max_length=200)
    country: str = Field(pattern=r"^[A-Z]{2}$")
    vat_id: str = Field("", max_length=20)
    address: str = Field("", max_length=300)
    """At most three lines, without the name and the country."""


class TaxRate(_Body):
    country: str = Field(pattern=r"^[A-Z]{2}$")
    percent: Percent
    valid_from: Time | None = None


class JournalView(BaseModel):
    """Account → sum of its lines in nano-units; debits above zero."""

    balances: dict[str, int]
    difference: int
    """The sum of all lines. Any value but 0 is a fault."""


def router(runtime: Runtime) -> APIRouter:
    router = APIRouter(prefix="/api/v1", tags=["invoices"])
    seller: tax.Seller = runtime.settings.seller

    @router.post("/billing/periods/close", response_model=Drafts)
    async def close_periods(body: CloseRequest, who: Operator, request: Request) -> Response:
        """Closes a tenant's periods that have ended, and makes a draft of each. This also happens by itself, two days
        after the end of a period. Usage that is counted later goes into the next invoice, marked."""

        async def work(tx: Tx) -> tuple[int, Drafts]:
            tx.tenant_id = body.tenant_id
            made = await closing.close(tx, body.tenant_id, body.until or utcnow(), seller.country)
            for invoice in made:
                audit(tx, who.actor, "billing.close", "invoice", str(invoice.id))
            shown = [(await booking.preview(tx, body.tenant_id, invoice.id, seller))[0] for invoice in made]
            return 200, Drafts(items=shown)

        return await once(request, runtime, who, work)

    @router.get("/invoices")
    async def list_invoices(
        who: Viewer, paging: Paging, tenant_id: Annotated[str | None, Query(description="for the operator")] = None
    ) -> dict[str, Any]:
        """Lists invoices, drafts included, by the time at which they were made."""
        after = id_cursor(paging)
        async with runtime.worker.begin() as tx:
            found = await invoices.listed(tx, who.tenant_id or tenant_id, after=after, limit=paging.limit + 1)
        shown = []
        for invoice in found:
            if invoice.status == "draft":
                # One transaction each: a transaction with many accounts would have to lock them in their order.
                async with runtime.worker.begin() as tx:
                    tx.tenant_id = tenant = await owner(tx, invoice.id, who)
                    invoice, _ = await booking.preview(tx, tenant, invoice.id, seller)
            shown.append(invoice)
        return page(shown, paging, lambda invoice: str(invoice.id))

    async def _whole(invoice_id: UUID, who: Identity) -> tuple[Invoice, list[InvoiceLine], list[Invoice]]:
        async with runtime.worker.begin() as tx:
            tx.tenant_id = tenant_id = await owner(tx, invoice_id, who)
            shown, more = await booking.preview(tx, tenant_id, invoice_id, seller)
            _, lines, corrected = await invoices.whole(tx, tenant_id, invoice_id)
            return shown, lines + more, corrected

    @router.get("/invoices/{invoice_id}")
    async def get_invoice(invoice_id: UUID, who: Viewer) -> WholeInvoice:
        """A draft has the amounts that it would be finalised with now: credit that was bought is taken off."""
        invoice, lines, _ = await _whole(invoice_id, who)
        return WholeInvoice(**dict(invoice), lines=lines)

    @router.get("/invoices/{invoice_id}/lines")
    async def list_lines(invoice_id: UUID, who: Viewer, paging: Paging) -> dict[str, Any]:
        """Lists the lines in their order. `/api/v1/billing/lines/{id}/explain` proves one."""
        after = paging.after or "0"
        if not after.isdecimal() or len(after) > 9:
            raise bad_cursor()
        async with runtime.worker.begin() as tx:
            tx.tenant_id = tenant_id = await owner(tx, invoice_id, who)
            found = await invoices.lines(tx, tenant_id, invoice_id, after=int(after), limit=paging.limit + 1)
            if len(found) <= paging.limit:
                # Only the last pages show the lines that `finalise` would add. It may just have done so: read again.
                _, more = await booking.preview(tx, tenant_id, invoice_id, seller)
                found = await invoices.lines(tx, tenant_id, invoice_id, after=int(after), limit=paging.limit + 1)
                last = await invoices.last_line(tx, tenant_id, invoice_id)
                found += [(number, line) for number, line in enumerate(more, 1 + last) if number > int(after)]
        shown = page(found, paging, lambda line: str(line[0]))
        return shown | {"items": [line for _, line in shown["items"]]}

    @router.get("/invoices/{invoice_id}/csv", response_class=Response)
    async def get_csv(invoice_id: UUID, who: Viewer) -> Response:
        """The lines as comma-separated values (RFC 4180), amounts before tax in units of the currency. Amounts that are
        given back are below zero; the column `document` names an invoice below zero as a credit note."""
        invoice, lines, _ = await _whole(invoice_id, who)
        return _csv(str(invoice.number or invoice.id), invoice_files.as_csv(invoice, lines))

    @router.get("/invoices/{invoice_id}/pdf", response_class=Response)
    async def get_pdf(invoice_id: UUID, who: Viewer) -> Response:
        """The invoice as PDF. The same invoice gives the same bytes. 429 while another PDF of the tenant is printed."""
        invoice, lines, corrected = await _whole(invoice_id, who)
        return await _pdf(str(invoice.number or invoice.id), invoice_files.page(invoice, lines, corrected), who)

    @router.get("/invoices/{invoice_id}/xml", response_class=Response)
    async def get_xml(invoice_id: UUID, who: Viewer) -> Response:
        """The finalised invoice as XML of EN 16931 (Cross Industry Invoice, as in Factur-X). One below zero is of type
        381, a credit note."""
        invoice, lines, corrected = await _whole(invoice_id, who)
        return _xml(str(invoice.number or invoice.id), einvoice.document(invoice, lines, corrected))

    @router.post("/invoices/{invoice_id}/finalise", response_model=Invoice)
    async def finalise(invoice_id: UUID, who: Operator, request: Request) -> Response:
        """Numbers a draft and books it. From now on it never changes."""

        async def work(tx: Tx) -> tuple[int, Invoice]:
            tx.tenant_id = tenant_id = await owner(tx, invoice_id, who)
            made = await booking.finalise(tx, tenant_id, invoice_id, seller, who.actor)
            audit(tx, who.actor, "billing.finalise", "invoice", str(invoice_id), number=made.number or "")
            return 200, made

        return await once(request, runtime, who, work)

    async def _end(
        invoice_id: UUID, who: Identity, request: Request, status: Literal["void", "uncollectible"]
    ) -> Response:
        async def work(tx: Tx) -> tuple[int, Invoice]:
            tx.tenant_id = tenant_id = await owner(tx, invoice_id, who)
            made = await booking.end(tx, tenant_id, invoice_id, status, who.actor)
            audit(tx, who.actor, f"billing.{status}", "invoice", str(invoice_id))
            return 200, made

        return await once(request, runtime, who, work)

    @router.post("/invoices/{invoice_id}/void", response_model=Invoice)
    async def void(invoice_id: UUID, who: Operator, request: Request) -> Response:
        """Takes a finalised invoice back that nothing was paid for. Its number stays used."""
        return await _end(invoice_id, who, request, "void")

    @router.post("/invoices/{invoice_id}/uncollectible", response_model=Invoice)
    async def write_off(invoice_id: UUID, who: Operator, request: Request) -> Response:
        """Writes the unpaid part of a finalised invoice off, after the tenant's prepaid credit has paid a part. If
        that pays the invoice, the answer's status is paid."""
        return await _end(invoice_id, who, request, "uncollectible")

    @router.post("/invoices/{invoice_id}/credit-notes", status_code=201, response_model=CreditNote)
    async def add_credit_note(invoice_id: UUID, body: NewCreditNote, who: Operator, request: Request) -> Response:
        """Takes a part of an invoice back, with its share of the tax."""

        async def work(tx: Tx) -> tuple[int, CreditNote]:
            tx.tenant_id = tenant_id = await owner(tx, invoice_id, who)
            made = await booking.credit(
                tx, tenant_id, invoice_id, body.amount_minor, reason=body.reason, actor=who.actor, refund=body.refund
            )
            audit(tx, who.actor, "billing.credit_note", "invoice", str(invoice_id), number=made.number)
            return 201, made

        return await once(request, runtime, who, work)

    @router.get("/invoices/{invoice_id}/credit-notes")
    async def list_credit_notes(invoice_id: UUID, who: Viewer, paging: Paging) -> dict[str, Any]:
        async with runtime.worker.begin() as tx:
            found = await invoices.credit_notes(tx, await owner(tx, invoice_id, who), invoice_id)
        after = [note for note in found if paging.after is None or note.number > paging.after]
        return page(after[: paging.limit + 1], paging, lambda note: note.number)

    async def _note(invoice_id: UUID, credit_note_id: UUID, who: Identity) -> tuple[CreditNote, Invoice]:
        async with runtime.worker.begin() as tx:
            return await invoices.credit_note(tx, await owner(tx, invoice_id, who), invoice_id, credit_note_id)

    @router.get("/invoices/{invoice_id}/credit-notes/{credit_note_id}/csv", response_class=Response)
    async def get_note_csv(invoice_id: UUID, credit_note_id: UUID, who: Viewer) -> Response:
        """The credit note as comma-separated values, with the columns of an invoice's. Its amounts are below zero, so
        that the CSVs of all documents can be added up."""
        note, invoice = await _note(invoice_id, credit_note_id, who)
        return _csv(note.number, invoice_files.note_csv(note, invoice))

    @router.get("/invoices/{invoice_id}/credit-notes/{credit_note_id}/pdf", response_class=Response)
    async def get_note_pdf(invoice_id: UUID, credit_note_id: UUID, who: Viewer) -> Response:
        """The credit note as PDF. The same note gives the same bytes. 429 while another PDF of the tenant is
        printed."""
        note, invoice = await _note(invoice_id, credit_note_id, who)
        return await _pdf(note.number, invoice_files.note_page(note, invoice), who)

    @router.get("/invoices/{invoice_id}/credit-notes/{credit_note_id}/xml", response_class=Response)
    async def get_note_xml(invoice_id: UUID, credit_note_id: UUID, who: Viewer) -> Response:
        """The credit note as XML of EN 16931 (type 381). It names its invoice."""
        note, invoice = await _note(invoice_id, credit_note_id, who)
        return _xml(note.number, einvoice.document(*invoice_files.as_invoice(note, invoice), credited=invoice))

    @router.post("/invoices/{invoice_id}/received", response_model=Invoice)
    async def receive(invoice_id: UUID, body: ManualPayment, who: Operator, request: Request) -> Response:
        """Books money that arrived outside of a payment provider. One reference is booked once. Money above the amount
        that is due is owed to the tenant. The order of prepaid credit takes exactly its total, and its credit is
        granted."""

        async def work(tx: Tx) -> tuple[int, Invoice]:
            tx.tenant_id = tenant_id = await owner(tx, invoice_id, who)
            minor = body.amount_minor
            if await transfers.receive(tx, tenant_id, invoice_id, minor, reference=body.reference, actor=who.actor):
                audit(tx, who.actor, "billing.receive", "invoice", str(invoice_id), minor=str(minor))
            return 200, await invoices.get(tx, tenant_id, invoice_id)

        return await once(request, runtime, who, work)

    @router.post("/invoices/{invoice_id}/received/reverse", response_model=Invoice)
    async def reverse_received(invoice_id: UUID, body: Reversal, who: Operator, request: Request) -> Response:
        """Takes a payment that `received` has booked back: the bank returned it, or it was booked wrongly. Its
        reference may then be booked for another invoice or amount. A credit note takes unspent credit back that it has
        paid."""

        async def work(tx: Tx) -> tuple[int, Invoice]:
            tx.tenant_id = tenant_id = await owner(tx, invoice_id, who)
            if minor := await transfers.reverse(tx, tenant_id, invoice_id, reference=body.reference, actor=who.actor):
                audit(tx, who.actor, "billing.reverse", "invoice", str(invoice_id), minor=str(minor))
            return 200, await invoices.get(tx, tenant_id, invoice_id)

        return await once(request, runtime, who, work)

    @router.get("/billing/buyer")
    async def get_buyer(who: Admin) -> Buyer:
        """The tenant as it stands on its invoices."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            return await tax.buyer(tx, who.tenant_id)

    @router.put("/billing/buyer")
    async def set_buyer(body: BuyerBody, who: Admin) -> Buyer:
        """Sets the tenant's name, address, country and VAT id. Invoices that are finalised keep their tax."""
        buyer = Buyer(**body.model_dump())
        tax.check(buyer)
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            await tax.set_buyer(tx, who.tenant_id, buyer)
            audit(tx, who.actor, "billing.buyer", "account", who.tenant_id, country=buyer.country)
        return buyer

    @router.post("/tax-rates", status_code=201, response_model=TaxRate)
    async def add_tax_rate(body: TaxRate, who: Operator, request: Request) -> Response:
        """Adds a country's rate from a time on."""
        countries.check(body.country)
        valid_from = body.valid_from or utcnow()

        async def work(tx: Tx) -> tuple[int, TaxRate]:
            if not await tx.sql(
                """
                INSERT INTO tax_rate (country, valid_from, percent, made_by)
                VALUES ($1, $2, $3, $4)
                ON CONFLICT DO NOTHING
                RETURNING country
                """,
                body.country,
                valid_from,
                body.percent,
                who.actor,
            ):
                raise Conflict(f"{body.country} has a rate from {valid_from.isoformat()} on")
            audit(tx, who.actor, "billing.tax_rate", "tax_rate", body.country, percent=body.percent)
            return 201, body.model_copy(update={"valid_from": valid_from})

        return await once(request, runtime, who, work)

    @router.get("/tax-rates")
    async def list_tax_rates(who: Viewer, paging: Paging) -> dict[str, Any]:
        async with runtime.worker.begin() as tx:
            rows = await tx.sql("SELECT country, percent, valid_from FROM tax_rate ORDER BY country, valid_from")
        found = [TaxRate(country=c, percent=p, valid_from=v) for c, p, v in rows]
        after = [rate for rate in found if paging.after is None or _rate_key(rate) > paging.after]
        return page(after[: paging.limit + 1], paging, _rate_key)

    @router.get("/billing/journal")
    async def get_journal(
        who: Viewer, tenant_id: Annotated[str | None, Query(description="for the operator; all tenants without")] = None
    ) -> JournalView:
        """Returns the balances of the journal's accounts."""
        async with runtime.worker.begin() as tx:
            found = await journal.balances(tx, who.tenant_id or tenant_id)
        return JournalView(balances=found, difference=sum(found.values()))

    return router


def _csv(name: str, content: str) -> Response:
    headers = {"content-disposition": f"attachment; filename={name}.csv"}
    return Response(content, media_type="text/csv; charset=utf-8", headers=headers)


async def _pdf(name: str, page: pdf.Page, who: Identity) -> Response:
    with pdf.one_each.place(who.tenant_id):
        content = await pdf.document(page)
    headers = {"content-disposition": f"inline; filename={name}.pdf"}
    return Response(content, media_type="application/pdf", headers=headers)


def _xml(name: str, content: bytes) -> Response:
    headers = {"content-disposition": f"attachment; filename={name}.xml"}
    return Response(content, media_type="application/xml", headers=headers)


async def owner(tx: Tx, invoice_id: UUID, who: Identity) -> str:
    """Returns the tenant of an invoice. Raises NotFound if it is not the caller's."""
    rows = await tx.sql("SELECT tenant_id FROM invoice WHERE invoice_id = $1", invoice_id)
    if not rows or who.tenant_id not in ("", rows[0][0]):
        raise NotFound(f"invoice {invoice_id}: not found")
    return str(rows[0][0])


def _rate_key(rate: TaxRate) -> str:
    assert rate.valid_from is not None
    return f"{rate.country} {rate.valid_from.isoformat()}"
