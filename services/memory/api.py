"""The HTTP routes of memory: a tenant's documents, and search."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

import msgspec
from fastapi import APIRouter, Request
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field
from starlette.datastructures import FormData, UploadFile
from starlette.responses import Response
from starlette.routing import BaseRoute

from infra.clock import uuid7
from infra.errors import InvalidMessage, NotFound, WrongType
from infra.postgres.tx import Tx
from infra.security.audit import audit
from infra.service.api import Paging, Reader, Writer, api, page
from infra.service.idempotency import once
from infra.service.service import Runtime
from infra.stores import filetypes
from infra.stores.objects import DOWNLOAD_LIFE, Kind, safe_name
from infra.web.http import allow_body
from protos.catalog import DOCUMENT_INDEX
from protos.messages.memory import IndexDocument
from services.memory import adapters, documents, rights
from services.memory.documents import Document
from services.memory.handlers import enqueue
from services.memory.retrieval import Query, Scored

# The most bytes that multipart adds around a file.
_FORM_BYTES = 65_536
_MAX_NAME = 255
# Not the Office formats before 2007: encrypted files of today look like them, and nothing here reads them.
DOCUMENT = Kind(
    "document",
    100 * 1024 * 1024,
    frozenset((filetypes.PDF, *filetypes.OFFICE, filetypes.TEXT, filetypes.MARKDOWN, filetypes.HTML)),
)
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
            }
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


class SearchFilters(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    document_ids: list[UUID] | None = Field(default=None, max_length=1000)
    tags: list[str] | None = None
    """The documents that have all of these tags."""
    since: AwareDatetime | None = None
    """The documents that were uploaded then or later."""


class ContentLink(_View):
    url: str
    """Downloads the file without further authentication."""
    expires_in: int
    """Seconds."""


class Search(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    query: str
    limit: int | None = None
    """From 1 to 100; 10 by default."""
    min_similarity: float | None = None
    """A cosine from -1 to 1. The default belongs to the embedding model and removes unrelated passages. Scores of
    right and wrong passages overlap and do not compare between models: no value tells whether an answer exists."""
    types: list[str] = []
    """document (the default), conversation (the agents' replies in `session_key`)."""
    session_key: str | None = None
    mode: Literal["hybrid", "dense", "keyword"] = "hybrid"
    """dense: by meaning. keyword: documents by their words. hybrid: both rankings fused by reciprocal rank."""
    filters: SearchFilters = SearchFilters()
    """Narrow the search to some of the documents that the caller may read."""


class Source(_View):
    document_id: UUID | None
    """null for a reply in a conversation."""
    name: str
    """The document's name, or ``conversation``."""
    section: str | None
    page: int | None


class Scores(_View):
    dense: float | None
    """The cosine similarity; null if the query has no vector."""
    keyword: float | None
    """The share of the query's words in the passage, weighted by their rarity, from 0 to 1; null if it has none."""


class Passage(_View):
    text: str
    score: float
    """The cosine similarity, or the rank by words if there is none."""
    scores: Scores
    match: list[str]
    """Why the passage was found: meaning, words, codes."""
    source: Source


class Passages(_View):
    items: list[Passage]
    degraded: bool
    """True if the passages were found by their words only, because the search by meaning is unavailable."""


def routes(runtime: Runtime) -> Sequence[BaseRoute]:
    router = APIRouter()
    objects = adapters.objects(runtime)
    retrieval = adapters.retrieval(runtime)

    @router.post("/api/v1/documents", status_code=202, response_model=DocumentView, openapi_extra=_FILE_FORM)
    async def upload(who: Writer, request: Request) -> Response:
        """Stores one file: PDF, Office, text, Markdown or HTML, up to 100 MB. It is indexed after the answer."""
        allow_body(request, DOCUMENT.max_bytes + _FORM_BYTES)
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise WrongType("content-type", "must be multipart/form-data")
        id_ = uuid7()
        user_id = who.actor.partition(":")[2]
        async with request.form(max_files=1, max_fields=2 * rights.MAX_NAMES) as form:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise InvalidMessage("file", "missing: must be a multipart field of this name")
            name = _name(file.filename)
            audience = rights.checked_audience(_texts(form, "audience") or [rights.ALL])
            tags = rights.checked_tags(_texts(form, "tags"))
            stored = await objects.upload(
                DOCUMENT,
                _chunks(file),
                name=name,
                user_id=user_id,
                path=lambda _: f"{user_id}/documents/{id_}_{safe_name(name)}",
            )

        async def work(tx: Tx) -> tuple[int, DocumentView]:
            document = await documents.add(tx, id_, name, stored, audience=audience, tags=tags, created_by=who.actor)
            tx.send(DOCUMENT_INDEX, IndexDocument(document_id=id_))
            audit(
                tx,
                who.actor,
                "document.upload",
                "document",
                str(id_),
                content_type=stored.content_type,
                audience=" ".join(audience),
            )
            return 202, _view(document)

        try:
            # Compares the parts of the form: the text around them differs in each request.
            compared = f"{stored.sha256} {name}"
            if tags or audience != [rights.ALL]:
                compared += f" {audience} {tags}"
            response = await once(request, runtime, who, work, body=compared.encode())
        except InvalidMessage:
            await objects.delete(stored.path)
            raise
        if "Idempotent-Replayed" in response.headers:
            await objects.delete(stored.path)
        return response

    @router.get("/api/v1/documents")
    async def list_documents(who: Reader, paging: Paging) -> DocumentList:
        """The documents that the caller may see, newest first."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            found = await documents.newest(tx, paging.limit + 1, paging.after_time(UUID), rights.view_names(who))
        listed = page(found, paging, key=lambda document: f"{document.created_at.isoformat()} {document.id}")
        return DocumentList(items=[_view(document) for document in listed["items"]], next=listed["next"])

    @router.get("/api/v1/documents/{document_id}")
    async def show(document_id: str, who: Reader) -> DocumentView:
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            return _view(await documents.get(tx, _id(document_id), rights.view_names(who)))

    @router.patch("/api/v1/documents/{document_id}")
    async def change(document_id: str, body: DocumentChange, who: Writer) -> DocumentView:
        """Changes who may read the document, and its tags. Searches follow at once."""
        id_ = _id(document_id)
        audience = None if body.audience is None else rights.checked_audience(body.audience)
        tags = None if body.tags is None else rights.checked_tags(body.tags)
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            await documents.get(tx, id_, rights.view_names(who))
            document = await documents.change(tx, id_, audience, tags)
            if audience is not None:
                audit(tx, who.actor, "document.share", "document", str(id_), audience=" ".join(audience))
        return _view(document)

    @router.get("/api/v1/documents/{document_id}/content")
    async def content(document_id: str, who: Reader) -> ContentLink:
        """A link to the uploaded file."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            document = await documents.get(tx, _id(document_id), rights.view_names(who))
        url = await objects.download_url(document.path)
        return ContentLink(url=url, expires_in=int(DOWNLOAD_LIFE.total_seconds()))

    @router.delete("/api/v1/documents/{document_id}", status_code=204)
    async def delete(document_id: str, who: Writer) -> None:
        """Hides the document at once. Its file and vectors are removed soon after."""
        id_ = _id(document_id)
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            await documents.get(tx, id_, rights.view_names(who))
            await documents.delete(tx, id_)
            enqueue(tx, id_, "remove")
            audit(tx, who.actor, "document.delete", "document", str(id_))

    @router.post("/api/v1/memory/search")
    async def search(body: Search, who: Reader) -> Passages:
        """The passages that are nearest to the query in meaning or have its words, best first.

        Only of documents whose audience names the caller.
        """
        tags = body.filters.tags
        filters = rights.Filters(
            body.filters.document_ids,
            None if tags is None else rights.checked_tags(tags, "filters.tags"),
            body.filters.since,
        )
        query = Query(body.query, body.limit, body.min_similarity, body.types, body.session_key, body.mode, filters)
        answer = await retrieval.search(rights.of_identity(who), query)
        return Passages(items=[_passage(each) for each in answer.items], degraded=answer.degraded)

    return api("memory", runtime, router)


async def _chunks(file: UploadFile) -> AsyncIterator[bytes]:
    while piece := await file.read(1024 * 1024):
        yield piece


def _texts(form: FormData, field: str) -> list[str]:
    """The texts of a field that is repeated, or given once as a JSON array."""
    given = form.getlist(field)
    texts = [text for text in given if isinstance(text, str)]
    if len(texts) < len(given):
        raise InvalidMessage(field, "must be a text, not a file")
    if len(texts) == 1 and texts[0].startswith("["):
        try:
            return msgspec.json.decode(texts[0], type=list[str])
        except msgspec.DecodeError:
            raise InvalidMessage(field, "must be a JSON array of texts") from None
    return texts


def _name(given: str | None) -> str:
    """The sender's name of the file, without folders and invisible characters."""
    name = "".join(letter for letter in given or "" if letter.isprintable())
    name = re.split(r"[/\\]", name)[-1].strip()
    if not name:
        raise InvalidMessage("file", "must have a name")
    if len(name) > _MAX_NAME:
        raise InvalidMessage("file", f"its name must have at most {_MAX_NAME} characters")
    return name


def _id(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise NotFound(f"document {text}: does not exist") from None


def _view(document: Document) -> DocumentView:
    shown: dict[str, Any] = document._asdict()
    return DocumentView.model_validate({name: shown[name] for name in DocumentView.model_fields})


def _passage(scored: Scored) -> Passage:
    found = scored.passage
    source = Source(document_id=found.document_id, name=found.name, section=found.section, page=found.page)
    return Passage(
        text=found.text,
        score=scored.score,
        scores=Scores(dense=scored.dense, keyword=scored.keyword),
        match=list(scored.match),
        source=source,
    )
