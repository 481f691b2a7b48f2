"""The HTTP routes of documents."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

from infra.clock import uuid7
from infra.errors import InvalidMessage, NoCredit, NotFound, Transient
from infra.postgres.tx import Tx
from infra.security.audit import audit
from infra.security.auth import Identity
from infra.service.api import Paging, Reader, Writer, page
from infra.service.idempotency import Work, once
from infra.service.service import Runtime
from infra.stores.objects import DOWNLOAD_LIFE
from protos.catalog import DOCUMENT_INDEX
from protos.messages.memory import IndexDocument
from services.memory import adapters, rights
from services.memory.knowledge import documents, received, versions
from services.memory.knowledge.documents import StoredDocument
from services.memory.lanes import enqueue_document
from services.memory.metering.usage import of_client

_NAMES = {"type": "array", "items": {"type": "string"}}
_FILE_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "audience": _NAMES | {"description": "Who may read it; see the field of the answer."},
                        "tags": _NAMES,
                    },
                },
                "encoding": {
                    "audience": {"style": "form", "explode": True},
                    "tags": {"style": "form", "explode": True},
                },
            },
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["url"],
                    "properties": {
                        "url": {"type": "string", "format": "uri"},
                        "name": {"type": "string"},
                        "audience": _NAMES,
                        "tags": _NAMES,
                    },
                    "additionalProperties": False,
                },
                "example": {"url": "https://example.com/handbook.pdf", "tags": ["handbook"]},
            },
        },
    }
}


class _View(BaseModel):
    """The comments under the fields stand on the page of the API."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class DocumentView(_View):
    id: UUID
    name: str
    content_type: str
    size: int
    """Bytes."""
    status: str
    """stored, parsed, chunked, embedded, indexed (search finds it) or failed."""
    progress: float
    """From 0 to 1."""
    error: str | None
    """The reason if the status is failed."""
    created_at: datetime
    pages: int | None
    """The number of pages or slides; null if the type has none, or the document was not read yet."""
    pages_without_text: list[int]
    """The numbers of the pages without text, for example scans: search does not find their content."""
    warnings: list[str]
    """Remarks about parts of the file that could not be read as they are."""
    audience: list[str]
    """Who may read it: all, or agent:<id>, member:<id> and group:<name>. Search shows its passages only to these. The
    client that uploaded it and clients with the scope admin see it in lists and views, too."""
    tags: list[str]
    version: int
    """Of the newest version. Name, type, size, status, progress and remarks are that version's."""
    indexed_version: int | None
    """The version that searches read; null if none was indexed yet."""
    channel_id: UUID | None
    message_id: UUID | None
    """The message with which a person sent the newest version as a file; null if it was uploaded."""
    subject_id: str | None
    """The person: its erasure deletes the document."""


class DocumentList(_View):
    items: list[DocumentView]
    next: str | None


class DocumentChange(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        json_schema_extra={"examples": [{"audience": ["agent:0199c1d2-0000-7000-8000-000000000001", "group:sales"]}]},
    )

    audience: list[str] | None = None
    """Replaces the readers; null leaves them."""
    tags: list[str] | None = None
    """Replaces the tags; null leaves them."""


class ContentLink(_View):
    url: str
    """Downloads the file without further authentication."""
    expires_in: int
    """Seconds."""


def router(runtime: Runtime) -> APIRouter:
    routes = APIRouter()
    objects, uploads, credit = adapters.objects(runtime), adapters.uploads(runtime), adapters.credit(runtime)

    @routes.post("/api/v1/documents", status_code=202, response_model=DocumentView, openapi_extra=_FILE_FORM)
    async def upload(who: Writer, request: Request) -> Response:
        """Stores one file: PDF, Office, text, Markdown or HTML, up to 100 MB. It is indexed after the answer.

        With a JSON body, the platform fetches the file from the URL before it answers.
        """
        id_ = uuid7()
        given = await received.receive(request, runtime.outgoing, uploads, who, id_)
        audience = given.audience or [rights.ALL]

        async def work(tx: Tx) -> tuple[int, DocumentView]:
            document = await documents.add(
                tx, id_, given.name, given.stored, audience=audience, tags=given.tags, created_by=who.actor
            )
            tx.send(DOCUMENT_INDEX, IndexDocument(document_id=id_))
            _audit(tx, who, "document.upload", id_, content_type=given.stored.content_type, audience=audience)
            return 202, _view(document)

        return await _stored_once(request, who, id_, given, work)

    @routes.put(
        "/api/v1/documents/{document_id}", status_code=202, response_model=DocumentView, openapi_extra=_FILE_FORM
    )
    async def replace(document_id: str, who: Writer, request: Request) -> Response:
        """Stores a new version of the document. Searches read the version before until the new one is indexed, and
        then the new one only. If the bytes are those of the newest version, nothing is done: 200.

        Audience and tags stay; PATCH changes them.
        """
        id_, next_id = _id(document_id), uuid7()
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            await documents.get(tx, id_, rights.view_names(who))
        given = await received.receive(request, runtime.outgoing, uploads, who, next_id)
        for field, value in (("audience", given.audience), ("tags", given.tags)):
            if value:
                raise InvalidMessage(field, "cannot be given here; PATCH changes it")
        added = False

        async def work(tx: Tx) -> tuple[int, DocumentView]:
            nonlocal added
            await documents.get(tx, id_, rights.view_names(who))
            added, given_up = await versions.replace(tx, id_, next_id, given.name, given.stored, who.actor)
            if given_up:
                enqueue_document(tx, given_up, "remove")
            if added:
                tx.send(DOCUMENT_INDEX, IndexDocument(document_id=next_id))
                _audit(tx, who, "document.replace", id_, content_type=given.stored.content_type)
            return 202 if added else 200, _view(await documents.get(tx, id_))

        response = await _stored_once(request, who, next_id, given, work)
        if not added:
            await give_up(who, next_id, given)
        return response

    async def give_up(who: Identity, id_: UUID, given: received.ReceivedDocument) -> None:
        """Deletes the file of a document that is not added, and gives its hold back."""
        await objects.delete(given.stored.path)
        await credit.release_document(who.tenant_id, id_)

    async def _stored_once(
        request: Request, who: Identity, id_: UUID, given: received.ReceivedDocument, work: Work
    ) -> Response:
        """The answer of `work`. Nothing is kept for the id if the document is not added.

        Raises NoCredit, and Transient if billing does not answer, for too many uploads.
        """
        try:
            await credit.hold_document(who.tenant_id, id_, of_client(who.actor), cannot_wait=True)
        except (NoCredit, Transient):
            await objects.delete(given.stored.path)
            raise
        # Compares the parts of the form: the text around them differs in each request.
        compared = f"{given.stored.sha256} {given.name}"
        if given.tags or given.audience:
            compared += f" {given.audience} {given.tags}"
        try:
            response = await once(request, runtime, who, work, body=compared.encode())
        except (InvalidMessage, NotFound):
            await give_up(who, id_, given)
            raise
        if "Idempotent-Replayed" in response.headers:
            await give_up(who, id_, given)
        return response

    @routes.get("/api/v1/documents")
    async def list_documents(who: Reader, paging: Paging) -> DocumentList:
        """The documents that the caller may see, newest first."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            found = await documents.newest(tx, paging.limit + 1, paging.after_time(UUID), rights.view_names(who))
        listed = page(found, paging, key=lambda document: f"{document.created_at.isoformat()} {document.id}")
        return DocumentList(items=[_view(document) for document in listed["items"]], next=listed["next"])

    @routes.get("/api/v1/documents/{document_id}")
    async def show(document_id: str, who: Reader) -> DocumentView:
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            return _view(await documents.get(tx, _id(document_id), rights.view_names(who)))

    @routes.patch("/api/v1/documents/{document_id}")
    async def change(document_id: str, body: DocumentChange, who: Writer) -> DocumentView:
        """Changes who may read the document, and its tags. Searches follow at once."""
        id_ = _id(document_id)
        audience = None if body.audience is None else rights.checked_audience(body.audience)
        tags = None if body.tags is None else rights.checked_tags(body.tags)
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            await documents.get(tx, id_, rights.view_names(who))
            document = await documents.change(tx, id_, audience, tags)
            if audience is not None:
                _audit(tx, who, "document.share", id_, audience=audience)
        return _view(document)

    @routes.get("/api/v1/documents/{document_id}/content")
    async def content(document_id: str, who: Reader) -> ContentLink:
        """A link to the uploaded file."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            document = await documents.get(tx, _id(document_id), rights.view_names(who))
            audit(tx, who.actor, "document.download", "document", str(document.id))
        url = await uploads.download_url(who.tenant_id, document.path)
        return ContentLink(url=url, expires_in=int(DOWNLOAD_LIFE.total_seconds()))

    @routes.delete("/api/v1/documents/{document_id}", status_code=204)
    async def delete(document_id: str, who: Writer) -> None:
        """Hides the document at once. Its file and vectors are removed soon after."""
        id_ = _id(document_id)
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            await documents.get(tx, id_, rights.view_names(who))
            await documents.delete(tx, [id_])
            _audit(tx, who, "document.delete", id_)

    return routes


def _audit(tx: Tx, who: Identity, act: str, id_: UUID, *, audience: Sequence[str] = (), **about: str) -> None:
    if audience:
        about["audience"] = " ".join(audience)
    audit(tx, who.actor, act, "document", str(id_), **about)


def _id(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise NotFound(f"document {text}: does not exist") from None


def _view(document: StoredDocument) -> DocumentView:
    shown: dict[str, Any] = document._asdict()
    return DocumentView.model_validate({name: shown[name] for name in DocumentView.model_fields})
