"""Search: the tenant's passages that are nearest to a query in meaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from infra.clock import uuid7
from infra.errors import EffectFailed, InvalidMessage, Transient, Unanswered
from infra.postgres.tx import Database
from services.memory import documents
from services.memory.conversations import Conversations, scope
from services.memory.documents import Found
from services.memory.domain import codes, fuse
from services.memory.embeddings import Embedded, Embedder
from services.memory.index import Index
from services.memory.usage import record_usage

DEFAULT_LIMIT = 10
MAX_LIMIT = 100
DOCUMENT, CONVERSATION = TYPES = ("document", "conversation")
# The index may still have rows that PostgreSQL has deleted, so a search asks for more hits than it needs. If they are
# not enough, it asks for four times as many, up to this number.
MAX_HITS = 2000


class Query(NamedTuple):
    text: str
    limit: int | None = None
    min_similarity: float | None = None
    """A cosine. None is the default of the embedding model."""
    types: Sequence[str] = ()
    """Empty means documents."""
    session_key: str | None = None
    """The session whose conversation is searched."""


class Scored(NamedTuple):
    passage: Found
    score: float
    """The cosine similarity."""


class Retrieval:
    """`database` must be the request role's: row-level security then hides other tenants' rows from a wrong index."""

    def __init__(self, database: Database, embedder: Embedder, index: Index, conversations: Conversations) -> None:
        self._database = database
        self._embedder = embedder
        self._index = index
        self._conversations = conversations

    async def search(self, tenant_id: str, query: Query) -> list[Scored]:
        """Up to `limit` passages (10) with a cosine of at least `min_similarity`, best first. If the query has codes
        (E04), passages with the same codes come first, because an embedding hardly distinguishes two codes.

        Raises InvalidMessage naming the wrong field, Transient if the index or the embedding endpoint is unavailable.
        """
        floor = self._embedder.min_similarity if query.min_similarity is None else query.min_similarity
        limit = DEFAULT_LIMIT if query.limit is None else query.limit
        types = _checked(query, limit, floor)
        embedded = await self._embed(query.text)
        async with self._database.begin(tenant_id=tenant_id) as tx:
            record_usage(tx, self._embedder.model, f"query/{uuid7()}/1", embedded.tokens)
        vector = embedded.vectors[0]
        scored: dict[UUID, Scored] = {}
        for type_ in types:
            session_key = query.session_key if type_ == CONVERSATION else None
            scored |= await self._nearest(tenant_id, vector, session_key, limit, floor)
        by_cosine = sorted(scored, key=lambda id_: -scored[id_].score)
        by_codes: list[UUID] = []
        if DOCUMENT in types and (wanted := codes(query.text)):
            coded = await self._with_codes(tenant_id, vector, wanted, floor)
            scored |= coded
            by_codes = list(coded)
        return [scored[id_] for id_ in fuse(by_cosine, by_codes)[:limit]]

    async def _embed(self, text: str) -> Embedded:
        try:
            return await self._embedder.query(text)
        except EffectFailed as error:
            raise InvalidMessage("query", f"could not be embedded: {error.reason}") from error
        except Unanswered as error:
            raise Transient(str(error)) from error

    async def _nearest(
        self, tenant_id: str, vector: NDArray[np.float32], session_key: str | None, limit: int, floor: float
    ) -> dict[UUID, Scored]:
        """At least the `limit` best hits that PostgreSQL still has, if it has that many."""
        index_scope = DOCUMENT if session_key is None else scope(session_key)
        wanted = 2 * limit + 10
        while True:
            hits = await self._index.search(vector.tolist(), tenant_id, index_scope, wanted)
            near = [hit for hit in hits if hit.score >= floor]
            stored = await self._stored(tenant_id, [hit.id for hit in near], session_key)
            if len(stored) >= limit or len(near) < wanted or wanted == MAX_HITS:
                return {hit.id: Scored(stored[hit.id], hit.score) for hit in near if hit.id in stored}
            wanted = min(4 * wanted, MAX_HITS)

    async def _stored(self, tenant_id: str, ids: Sequence[UUID], session_key: str | None) -> Mapping[UUID, Found]:
        """The texts that PostgreSQL has for these ids."""
        if not ids:
            return {}
        async with self._database.begin(tenant_id=tenant_id) as tx:
            if session_key is None:
                return await documents.found(tx, ids)
            return await self._conversations.found(tx, ids, session_key)

    async def _with_codes(
        self, tenant_id: str, vector: NDArray[np.float32], wanted: Sequence[str], floor: float
    ) -> dict[UUID, Scored]:
        """The passages with the most of the codes first; among equals the nearest first."""
        async with self._database.begin(tenant_id=tenant_id) as tx:
            rows = await documents.with_codes(tx, wanted, self._embedder.model, MAX_LIMIT)
            stored = await documents.found(tx, [id_ for id_, _, _ in rows])
        ranked = sorted(((-count, -_cosine(vector, other), id_) for id_, count, other in rows if id_ in stored))
        return {id_: Scored(stored[id_], -score) for _, score, id_ in ranked if -score >= floor}


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def _checked(query: Query, limit: int, floor: float) -> Sequence[str]:
    """The query's types without duplicates. Raises InvalidMessage."""
    if not query.text.strip():
        raise InvalidMessage("query", "must not be empty")
    if not 1 <= limit <= MAX_LIMIT:
        raise InvalidMessage("limit", f"must be from 1 to {MAX_LIMIT}")
    # This form of the comparison also refuses NaN.
    if not -1 <= floor <= 1:
        raise InvalidMessage("min_similarity", "must be a cosine, from -1 to 1")
    for n, type_ in enumerate(query.types):
        if type_ not in TYPES:
            raise InvalidMessage(f"types[{n}]", f"must be one of {', '.join(TYPES)}")
    if CONVERSATION in query.types and not query.session_key:
        raise InvalidMessage("session_key", "missing: must name the session whose conversation is searched")
    return list(dict.fromkeys(query.types)) or [DOCUMENT]
