"""Search: the tenant's passages that are nearest to a query in meaning, or have its words."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import cache
from itertools import chain
from typing import NamedTuple, Protocol
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from infra.clock import uuid7
from infra.errors import Conflict, EffectFailed, InvalidMessage, NoCredit, Transient, Unanswered, describe
from infra.observe.logs import get_logger
from infra.postgres.database import Database
from services.memory import readable
from services.memory.domain import codes, embedded_text, ends, folded, fuse
from services.memory.indexes.embeddings import Embedder
from services.memory.indexes.index import Hit
from services.memory.indexes.together import Together
from services.memory.knowledge import documents
from services.memory.memories.conversations import Conversations, session_scope
from services.memory.memories.store import Memories, Memory, MemoryScope
from services.memory.metering.credit import Credit
from services.memory.metering.usage import record_reranking, reranking
from services.memory.readable import Found, Scope
from services.memory.rights import EVERY, NO_FILTERS, Filters, Owners, ReaderNames
from services.memory.search.keywords import with_words
from services.memory.search.queries import QueryVectors
from services.memory.search.reranking import Reranker

DEFAULT_LIMIT = 10
# A search by words gets the other half of the caller's time.
DENSE_SHARE = 0.5
DEFAULT_SECONDS = 10.0
# The reranking endpoint gets so many passages, and this part of the time that is left.
RERANKED = 50
RERANK_SHARE = 0.8
MAX_LIMIT = 100
DOCUMENT, CONVERSATION, MEMORY = TYPES = ("document", "conversation", "memory")
HYBRID, DENSE, KEYWORD = MODES = ("hybrid", "dense", "keyword")
# A longer query is searched by the words of its beginning and its end.
MAX_QUERY_TOKENS = 480
# The index may still have rows that PostgreSQL has deleted, so a search asks for more hits than it needs. If they are
# not enough, it asks for four times as many, up to this number.
MAX_HITS = 2000
# While so many statements for the same readers run, further searches for them wait and then go together: a round trip
# costs both sides as much as a small statement.
READS_AT_ONCE, MAX_TOGETHER = 2, 16
# How long a search waits for a document of its caller, and how often it looks.
AFTER_SECONDS = 5.0
AFTER_POLL_SECONDS = 0.1

_log = get_logger("memory.retrieval")


class Query(NamedTuple):
    text: str
    limit: int | None = None
    min_similarity: float | None = None
    """A cosine. None is the default of the embedding model, which applies to dense hits only."""
    types: Sequence[str] = ()
    """Empty means documents."""
    session_key: str | None = None
    """The session whose conversation is searched, and whose memories are read."""
    mode: str = HYBRID
    filters: Filters = NO_FILTERS


class Scored(NamedTuple):
    passage: Found
    score: float
    """The cosine similarity, or the rank by words if the query has no vector."""
    dense: float | None
    """The cosine similarity."""
    keyword: float | None
    """The share of the query's words in the passage, weighted by their rarity."""
    match: tuple[str, ...]
    """Why the passage was found: meaning, words, codes."""
    memory: Memory | None = None
    """The memory whose text it is."""


class RetrievalResult(NamedTuple):
    items: list[Scored]
    degraded: bool
    """True if the index or the embedding endpoint is unavailable, or the credit does not suffice, so the passages were
    found by their words only."""
    reranked: bool = False
    """True if the order is that of the reranking endpoint."""


class Ranked(NamedTuple):
    """A passage in one ranking."""

    dense: float | None
    keyword: float | None = None


class _ByWords(NamedTuple):
    """The findings of PostgreSQL, which does not need the vector of the query."""

    owners: Owners = EVERY
    """To which the search in the index is narrowed."""
    ranks: Mapping[UUID, float] = {}
    """The passages with words of the query, best first."""
    counts: Mapping[UUID, int] = {}
    """The passages with codes of the query, and how many."""


class _Words(NamedTuple):
    """Searches by words that may go together."""

    tenant_id: str
    scope: Scope
    mode: str
    limit: int
    model: str
    """The key of the embedding model."""


class _Wanted(NamedTuple):
    """The passages that a search reads, and those of them whose vectors it needs."""

    ids: Sequence[UUID]
    compared: Sequence[UUID]


_Passages = tuple[Mapping[UUID, Found], Mapping[UUID, NDArray[np.float32]]]


class _Read(NamedTuple):
    texts: Mapping[UUID, Found]
    cosines: Mapping[UUID, float]
    """Of the passages that were found by words or codes, if the query has a vector."""
    gone: bool
    """Some of these were deleted or replaced before they were read."""


class _Found(NamedTuple):
    """The passages for a query, in the fused order, and why each was found."""

    order: Sequence[UUID]
    texts: Mapping[UUID, Found]
    near: Mapping[UUID, Ranked]
    worded: Mapping[UUID, Ranked]
    coded: Mapping[UUID, Ranked]
    vector: NDArray[np.float32] | None
    """Of the query."""
    degraded: bool
    gone: bool
    """As in `_Read`."""


class Searched(Protocol):
    """The part of the indexes that a search uses."""

    async def search(
        self, model: str, vector: list[float], tenant_id: str, scope: str, limit: int, owners: Owners = EVERY
    ) -> list[Hit]: ...


class Retrieval:
    """`active`: gives the embedding model in use. A search keeps to one, also if it changes meanwhile.
    `request`: reads texts, by the request role: row-level security then hides other tenants' rows from a wrong
    index. `worker`: finds ids by words and codes, by the worker role, because row-level security keeps PostgreSQL from
    using their indexes."""

    def __init__(
        self,
        request: Database,
        worker: Database,
        active: Callable[[], Awaitable[Embedder]],
        index: Searched,
        conversations: Conversations,
        memories: Memories,
        credit: Credit,
        reranker: Reranker | None = None,
    ) -> None:
        self._request = request
        self._worker = worker
        self._active = active
        self._index = index
        self._conversations = conversations
        self._memories = memories
        self._credit = credit
        self._reranker = reranker
        self._vectors = cache(lambda embedder: QueryVectors(request, embedder, credit))
        self._words = Together(self._find_words, at_once=READS_AT_ONCE, most=MAX_TOGETHER)
        self._passages = Together(self._read_passages, at_once=READS_AT_ONCE, most=MAX_TOGETHER)

    async def wait_for(
        self, tenant_id: str, id_: UUID, names: Sequence[str] | None, seconds: float = DEFAULT_SECONDS
    ) -> None:
        """Waits until the document's newest version is indexed. names: of the client; None for an administrator.
        seconds: the time of the caller. Raises NotFound, Conflict."""
        deadline = time.monotonic() + min(AFTER_SECONDS, seconds * DENSE_SHARE)
        while True:
            async with self._request.begin(tenant_id=tenant_id) as tx:
                document = await documents.get(tx, id_, names)
            if document.indexed_version == document.version:
                return
            if document.status == "failed" or time.monotonic() > deadline:
                raise Conflict(f"after: document {id_} is not indexed: {document.error or document.status}")
            await asyncio.sleep(AFTER_POLL_SECONDS)

    async def search(self, caller: ReaderNames, query: Query, seconds: float = DEFAULT_SECONDS) -> RetrievalResult:
        """Up to `limit` passages (10) that the caller may read, best first. seconds: the time of the caller.

        dense: by the cosine of their embeddings, which is at least `min_similarity`. keyword: documents by their words.
        hybrid: both rankings and the one by codes (E04) are fused, because an embedding hardly distinguishes two codes.
        The reranking endpoint, if there is one, orders the first of them again.

        Memories of the caller follow after the passages, as many as fit into a part of a prompt.

        Raises InvalidMessage naming the wrong field. Raises Transient if the index or the embedding endpoint is
        unavailable, and NoCredit, but not in the mode hybrid: its answer is degraded then.
        """
        began = time.monotonic()
        query = query._replace(text=ends(folded(query.text), MAX_QUERY_TOKENS))
        model = await self._active()
        limit = DEFAULT_LIMIT if query.limit is None else query.limit
        found = await self._find(model, caller, query, limit, seconds)
        if found.gone:
            # Documents were replaced or deleted while it read.
            found = await self._find(model, caller, query, limit, seconds - (time.monotonic() - began))
        order, reranked = found.order, False
        if self._reranker and query.mode == HYBRID and len(order) > 1:
            left = seconds - (time.monotonic() - began)
            texts = [embedded_text(found.texts[id_].text, found.texts[id_].section) for id_ in order]
            if best := await self._reranked(self._reranker, caller, query.text, texts, left):
                order, reranked = [order[n] for n in best], True
        items = [
            _scored(found.texts[id_], found.near.get(id_), found.worded.get(id_), found.coded.get(id_))
            for id_ in order[:limit]
        ]
        if MEMORY in query.types:
            items += await self._recalled(model, caller, query, found.vector)
        return RetrievalResult(items, found.degraded, reranked)

    async def _find(self, model: Embedder, caller: ReaderNames, query: Query, limit: int, seconds: float) -> _Found:
        """The passages for `search`, before they are ordered again: more than `limit` then."""
        floor = model.min_similarity if query.min_similarity is None else query.min_similarity
        types = _checked(query, limit, floor)
        scope = Scope(caller.names, query.filters)
        deadline = asyncio.get_running_loop().time() + max(0.0, seconds * DENSE_SHARE)
        by_words = await self._by_words(model.key, caller.tenant_id, query, types, limit, scope)
        vector: NDArray[np.float32] | None = None
        degraded = False
        wanted = 2 * limit + 10
        while True:
            hits: list[list[Hit]] = []
            if query.mode != KEYWORD:
                try:
                    async with asyncio.timeout_at(deadline):
                        vector = await self._vectors(model).of(caller.tenant_id, query.text, caller.origin)
                        hits = await self._nearest(
                            model.key, caller.tenant_id, query, types, vector, wanted, by_words.owners
                        )
                except NoCredit:
                    if query.mode == DENSE:
                        raise
                    degraded = True
                except (Transient, TimeoutError) as error:
                    if query.mode == DENSE or (CONVERSATION in types and DOCUMENT not in types):
                        raise Transient(f"search by meaning: {describe(error)}") from error
                    _log.warning(
                        "index or embedding endpoint is unavailable; the search is by words", error=describe(error)
                    )
                    degraded = True
            hits = [[hit for hit in found if hit.score >= floor] for found in hits]
            near = dict(chain.from_iterable(hits))
            read = await self._read(model.key, caller, query, scope, by_words, vector, near)
            # Of an index that has many deleted rows, more are needed.
            if wanted == MAX_HITS or all(
                len(found) < wanted or sum(hit.id in read.texts for hit in found) >= limit for found in hits
            ):
                break
            wanted = min(4 * wanted, MAX_HITS)
        ranked = {hit.id: Ranked(hit.score) for found in hits for hit in found if hit.id in read.texts}
        worded = _worded(by_words, read, query.min_similarity)
        coded = _coded(by_words, read, floor)
        by_cosine = sorted(ranked, key=lambda id_: -(ranked[id_].dense or 0.0))
        most = max(limit, RERANKED) if self._reranker and query.mode == HYBRID else limit
        order = fuse(by_cosine, list(worded), list(coded))[:most]
        return _Found(order, read.texts, ranked, worded, coded, vector, degraded, read.gone)

    async def _by_words(
        self, model: str, tenant_id: str, query: Query, types: Sequence[str], limit: int, scope: Scope
    ) -> _ByWords:
        if DOCUMENT not in types:
            return _ByWords()
        wanted = codes(query.text) if query.mode == HYBRID else []
        text = query.text.replace("\0", " ")
        return await self._words.ask(_Words(tenant_id, scope, query.mode, 2 * limit + 10, model), (text, wanted))

    async def _find_words(self, key: _Words, asked: Sequence[tuple[str, Sequence[str]]]) -> list[_ByWords]:
        """For each text and its codes."""
        async with self._worker.read_only(tenant_id=key.tenant_id) as tx:
            owners = EVERY if key.mode == KEYWORD else await readable.owners(tx, key.scope)
            if key.mode == DENSE:
                return [_ByWords(owners)] * len(asked)
            ranks = await with_words(tx, [text for text, _ in asked], key.limit, key.scope)
            counts: list[Mapping[UUID, int]] = [
                await readable.with_codes(tx, wanted, key.model, MAX_LIMIT, key.scope) if wanted else {}
                for _, wanted in asked
            ]
        return [_ByWords(owners, *each) for each in zip(ranks, counts, strict=True)]

    async def _reranked(
        self, reranker: Reranker, caller: ReaderNames, text: str, texts: Sequence[str], left: float
    ) -> Sequence[int]:
        """The positions of the texts in their new order; empty if the endpoint gives none in time, or without credit.
        An order that is used is billed."""
        try:
            async with asyncio.timeout(max(0.0, left * RERANK_SHARE)):
                await self._credit.use(caller.tenant_id, reranking(reranker.model), "calls", 1, caller.origin)
                best = await reranker.order(text, texts)
        except (Transient, EffectFailed, Unanswered, TimeoutError) as error:
            _log.warning(
                "the passages could not be ordered again; kept the order of the hybrid search", error=describe(error)
            )
            return ()
        async with self._request.begin(tenant_id=caller.tenant_id) as tx:
            record_reranking(tx, reranker.model, f"rerank/{uuid7()}/1", best.quantities, caller.origin)
        return best.positions

    async def _recalled(
        self, model: Embedder, caller: ReaderNames, query: Query, vector: NDArray[np.float32] | None
    ) -> list[Scored]:
        wanted = MemoryScope(caller.subject_id, caller.agent_id, query.session_key or "")
        async with self._request.begin(tenant_id=caller.tenant_id) as tx:
            recalled = await self._memories.recall(tx, wanted, vector, model.key)
        return [
            Scored(
                Found(each.memory.text, None, "memory", _origin(each.memory), None, None),
                each.similarity or 0.0,
                each.similarity,
                None,
                (MEMORY,),
                each.memory,
            )
            for each in recalled
        ]

    async def _read(
        self,
        model: str,
        caller: ReaderNames,
        query: Query,
        scope: Scope,
        by_words: _ByWords,
        vector: NDArray[np.float32] | None,
        near: Mapping[UUID, float],
    ) -> _Read:
        """The texts that the caller may read. One statement for all documents: if a document is replaced meanwhile, the
        answer has passages of the old version or of the new one, never of both."""
        found = list({**by_words.ranks, **by_words.counts})
        others = [id_ for id_ in found if id_ not in near]
        passages, vectors = await self._passages.ask(
            (model, caller.tenant_id, scope), _Wanted([*near, *others], [] if vector is None else others)
        )
        gone = any(id_ not in passages for id_ in found)
        texts = {id_: passages[id_] for id_ in (*near, *others) if id_ in passages}
        if query.session_key and CONVERSATION in query.types:
            async with self._request.begin(tenant_id=caller.tenant_id) as tx:
                texts |= await self._conversations.found(tx, list(near), query.session_key)
        cosines = {id_: score for id_, score in near.items() if id_ in texts}
        if vector is not None:
            cosines |= _cosines(vector, {id_: vectors[id_] for id_ in others if id_ in vectors})
        return _Read(texts, cosines, gone)

    async def _read_passages(self, key: tuple[str, str, Scope], asked: Sequence[_Wanted]) -> list[_Passages]:
        """The passages of all searches for each of them."""
        model, tenant_id, scope = key
        ids = list(dict.fromkeys(id_ for each in asked for id_ in each.ids))
        compared = list(dict.fromkeys(id_ for each in asked for id_ in each.compared))
        async with self._request.begin(tenant_id=tenant_id) as tx:
            passages = await readable.found(tx, ids, scope, model, compared)
        return [passages] * len(asked)

    async def _nearest(
        self,
        model: str,
        tenant_id: str,
        query: Query,
        types: Sequence[str],
        vector: NDArray[np.float32],
        wanted: int,
        owners: Owners,
    ) -> list[list[Hit]]:
        """The nearest `wanted` rows that the index has of each type. PostgreSQL may have deleted some of them."""
        hits = []
        for type_ in types:
            if type_ == DOCUMENT and owners.only != ():
                hits.append(await self._index.search(model, vector.tolist(), tenant_id, DOCUMENT, wanted, owners))
            elif type_ == CONVERSATION and query.session_key:
                scope = session_scope(query.session_key)
                hits.append(await self._index.search(model, vector.tolist(), tenant_id, scope, wanted))
        return hits


def _worded(by_words: _ByWords, read: _Read, floor: float | None) -> dict[UUID, Ranked]:
    """The passages with the words of the query, best first. Only a floor of the caller applies: a passage with the word
    may be right although its cosine is low."""
    hits = {}
    for id_, rank in by_words.ranks.items():
        cosine = read.cosines.get(id_)
        if id_ in read.texts and (floor is None or cosine is None or cosine >= floor):
            hits[id_] = Ranked(cosine, rank)
    return hits


def _coded(by_words: _ByWords, read: _Read, floor: float) -> dict[UUID, Ranked]:
    """The passages with the most of the query's codes first; among equals the nearest first."""
    ranked = sorted((-count, -read.cosines[id_], id_) for id_, count in by_words.counts.items() if id_ in read.cosines)
    return {id_: Ranked(-score) for _, score, id_ in ranked if -score >= floor}


def _scored(passage: Found, near: Ranked | None, worded: Ranked | None, coded: Ranked | None) -> Scored:
    reasons = {"meaning": near, "words": worded, "codes": coded}
    hits = [hit for hit in reasons.values() if hit]
    dense = next((hit.dense for hit in hits if hit.dense is not None), None)
    keyword = worded.keyword if worded else None
    score = dense if dense is not None else keyword or 0.0
    return Scored(passage, score, dense, keyword, tuple(reason for reason, hit in reasons.items() if hit))


def _origin(memory: Memory) -> str:
    """The source as a person would write it: ``preference of the person, said on 2026-11-29, run 0199…``."""
    of = {"user": "the person", "agent": "the agent", "session": "the conversation", "tenant": "the organisation"}
    run = f", run {memory.run_id}" if memory.run_id else ""
    return f"{memory.kind} of {of[memory.scope]}, noted on {memory.said_at:%Y-%m-%d}{run}"


def _cosines(query: NDArray[np.float32], vectors: Mapping[UUID, NDArray[np.float32]]) -> dict[UUID, float]:
    if not vectors:
        return {}
    rows = np.stack(list(vectors.values()))
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(query)
    return dict(zip(vectors, (rows @ query / lengths).tolist(), strict=True))


def _checked(query: Query, limit: int, floor: float) -> Sequence[str]:
    """The query's types without duplicates. Raises InvalidMessage."""
    if not query.text.strip():
        raise InvalidMessage("query", "must not be empty")
    if not 1 <= limit <= MAX_LIMIT:
        raise InvalidMessage("limit", f"must be from 1 to {MAX_LIMIT}")
    # This form of the comparison also refuses NaN.
    if not -1 <= floor <= 1:
        raise InvalidMessage("min_similarity", "must be a cosine, from -1 to 1")
    if query.mode not in MODES:
        raise InvalidMessage("mode", f"must be one of {', '.join(MODES)}")
    for n, type_ in enumerate(query.types):
        if type_ not in TYPES:
            raise InvalidMessage(f"types[{n}]", f"must be one of {', '.join(TYPES)}")
    if CONVERSATION in query.types and not query.session_key:
        raise InvalidMessage("session_key", "missing: must name the session whose conversation is searched")
    return list(dict.fromkeys(query.types)) or [DOCUMENT]
