"""A passage reaches only the callers that its document's audience names."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any
from unittest.mock import AsyncMock, Mock
from uuid import UUID

import httpx
import pytest

from infra.clock import uuid7
from infra.postgres.database import Database
from infra.postgres.db import create_engine
from infra.postgres.schema import role_url
from infra.security.crypto import Cipher
from infra.security.subjects import SubjectKeys
from infra.stores.objects import Stored
from services.memory import readable
from services.memory.domain import Block, chunk
from services.memory.indexes.embeddings import LocalEmbedder
from services.memory.indexes.engines import Engines
from services.memory.indexes.index import Hit, VectorRow
from services.memory.indexes.milvus import MilvusIndex
from services.memory.indexes.pgvector import PgvectorIndex
from services.memory.knowledge import documents, passages
from services.memory.memories.conversations import Conversations
from services.memory.memories.store import Memories
from services.memory.rights import EVERY, Filters, Owners, ReaderNames, of_agent
from services.memory.search import retrieval
from services.memory.search.retrieval import Query, Retrieval
from tests.services.memory.conftest import CREDIT, Client, Vectors
from tooling.testing.platform import PASSWORDS, Platform

TENANT = "tenant-of-rights"
OTHER_TENANT = "other-tenant-of-rights"
QUESTION = "What is the code of the vault XK-4711?"
AUDIENCES = {
    "all": ["all"],
    "agent": ["agent:a1"],
    "member": ["member:m1"],
    "group": ["group:sales", "member:m9"],
}


def text(name: str) -> str:
    return f"The code of the vault XK-4711 is written in the {name} book."


@pytest.fixture(scope="module")
async def client(memory: Platform) -> AsyncIterator[Client]:
    client = Client(memory, TENANT)
    yield client
    await client.http.aclose()


@pytest.fixture(scope="module")
async def other(memory: Platform) -> AsyncIterator[Client]:
    """Of another tenant, so that the documents of one test are not found by another test."""
    client = Client(memory, OTHER_TENANT)
    yield client
    await client.http.aclose()


@pytest.fixture(scope="module")
async def vaults(client: Client) -> dict[str, str]:
    """A document for each audience: name → id."""
    ids = {}
    for name, audience in AUDIENCES.items():
        answer = await client.http.post(
            "/api/v1/documents",
            files={"file": (f"{name}.txt", text(name).encode())},
            data={"audience": audience, "tags": [name, "vault"]},
        )
        assert answer.status_code == 202, answer.text
        assert (answer.json()["audience"], answer.json()["tags"]) == (audience, sorted([name, "vault"]))
        ids[name] = answer.json()["id"]
    for id_ in ids.values():
        assert (await client.done(id_))["status"] == "indexed"
    return ids


def member(platform: Platform, actor: str, tenant: str = TENANT, **identity: Any) -> httpx.AsyncClient:
    """An HTTP client of another caller of the tenant."""
    return platform.client("memory", tenant, actor=actor, **identity)


CALLERS = {
    "a key of the tenant": ("api_key:k1", (), {"all"}),
    "a member": ("member:m1", (), {"all", "member"}),
    "a member of a group": ("member:m2", ("sales", "support"), {"all", "group"}),
    "another member": ("member:m3", ("a1", "all"), {"all"}),
}


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("mode", ["hybrid", "dense", "keyword"])
async def test_a_search_shows_only_documents_for_its_caller(
    memory: Platform, vaults: dict[str, str], caller: str, mode: str
) -> None:
    actor, groups, expected = CALLERS[caller]
    async with member(memory, actor, groups=groups) as http:
        answer = await http.post("/api/v1/memory/search", json={"query": QUESTION, "mode": mode, "limit": 100})
    assert {item["text"] for item in answer.json()["items"]} == {text(name) for name in expected}


async def test_an_agent_finds_its_own_documents(client: Client, vaults: dict[str, str]) -> None:
    assert {found.text for found in await client.retrieve(QUESTION)} == {text("all")}
    assert {found.text for found in await client.retrieve(QUESTION, agent_id="a1")} == {text("all"), text("agent")}
    assert {found.text for found in await client.retrieve(QUESTION, agent_id="a2")} == {text("all")}


class Unfiltered(MilvusIndex):
    """Finds the rows of all documents of the tenant."""

    async def search(
        self, vector: list[float], tenant_id: str, scope: str, limit: int, owners: Owners = EVERY
    ) -> list[Hit]:
        return await super().search(vector, tenant_id, scope, limit)


@pytest.fixture(scope="module")
async def retrievals(memory: Platform, vectors: Vectors) -> AsyncIterator[dict[str, Retrieval]]:
    """Searches in this process: with the filter of the index, and without it."""

    async def refill(_: str) -> None:
        raise AssertionError("the index exists")

    url = role_url(memory.database_url, "memory", "request", PASSWORDS.request)
    engine = create_engine(url, pool_size=2)
    database = Database(engine, "memory", tenanted=True)
    embedder = LocalEmbedder()
    milvus = memory.stack.engines["milvus"]["url"]
    made = {}
    for kind in (MilvusIndex, Unfiltered):
        index = kind(milvus, memory.prefix, embedder.model, refill)
        cipher = Cipher("m" * 43 + "=")
        conversations = Conversations(cipher, Mock(), Mock(), CREDIT)
        worker = memory.database("memory")
        memories = Memories(SubjectKeys(cipher))
        engines = Engines(worker, lambda *_, index=index: index)
        active = AsyncMock(return_value=embedder)
        made[kind.__name__] = Retrieval(database, worker, active, engines, conversations, memories, CREDIT)
    yield made
    await engine.dispose()


@pytest.mark.parametrize("kind", ["MilvusIndex", "Unfiltered"])
@pytest.mark.parametrize("mode", ["hybrid", "dense", "keyword"])
async def test_the_read_in_postgresql_enforces_the_audience_whatever_the_index_finds(
    retrievals: dict[str, Retrieval], vaults: dict[str, str], kind: str, mode: str
) -> None:
    for caller, expected in (
        (of_agent(TENANT, "a1"), {"all", "agent"}),
        (of_agent(TENANT, ""), {"all"}),
        (ReaderNames(TENANT, ("member:m1",)), {"member"}),
        (ReaderNames(TENANT, ("member:m5",)), set()),
    ):
        answer = await retrievals[kind].search(caller, Query(QUESTION, mode=mode))
        assert {item.passage.text for item in answer.items} == {text(name) for name in expected}
        assert not answer.degraded
    narrowed = Query(QUESTION, mode=mode, filters=Filters(tags=("agent",)))
    answer = await retrievals[kind].search(of_agent(TENANT, "a1"), narrowed)
    assert [item.passage.text for item in answer.items] == [text("agent")]
    assert (await retrievals[kind].search(of_agent(TENANT, "a2"), narrowed)).items == []


async def test_a_reader_of_few_documents_finds_them_behind_many_of_others(
    memory: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More documents of others than the index can be given, all of them nearer to the query."""
    monkeypatch.setattr(readable, "MAX_OWNERS", 3)
    monkeypatch.setattr(retrieval, "MAX_HITS", 30)
    tenant, database, embedder = "tenant-with-many-readers", memory.database("memory"), LocalEmbedder()
    index = PgvectorIndex(database, embedder.key)
    texts = {f"member:m{n}": [QUESTION] * 10 for n in range(5)} | {"group:few": ["The vault is blue."]}
    for reader, said in texts.items():
        id_, stored = uuid7(), Stored(path="path", size=1, sha256="0", content_type="text/plain")
        vectors = (await embedder.passages(said)).vectors
        async with database.begin(tenant_id=tenant) as tx:
            await documents.add(tx, id_, reader, stored, audience=[reader])
            await passages.add(tx, id_, 0, list(chunk(Block(text, str(n)) for n, text in enumerate(said))))
            ids = [row[0] for row in await tx.sql("SELECT id FROM passage WHERE document_id = $1 ORDER BY n", id_)]
            await documents.advance(tx, id_, "indexed", 1.0)

        async def rows(ids: list[UUID] = ids, vectors: Any = vectors) -> AsyncIterator[list[VectorRow]]:
            yield [VectorRow(passage_id, vector.tolist()) for passage_id, vector in zip(ids, vectors, strict=True)]

        await index.replace(tenant, id_, "document", rows())
    found = Retrieval(
        database,
        database,
        AsyncMock(return_value=embedder),
        Engines(database, lambda *_: index),
        Mock(),
        Mock(),
        CREDIT,
    )
    answer = await found.search(ReaderNames(tenant, ("group:few",)), Query(QUESTION, mode="dense", limit=1))
    assert [item.passage.text for item in answer.items] == ["The vault is blue."]


async def test_filters_narrow_a_search(client: Client, vaults: dict[str, str], memory: Platform) -> None:
    async def found(**filters: Any) -> set[str]:
        body = {"query": QUESTION, "filters": filters}
        async with member(memory, "member:m1", groups=("sales",)) as http:
            answer = await http.post("/api/v1/memory/search", json=body)
        assert answer.status_code == 200, answer.text
        return {item["source"]["name"].removesuffix(".txt") for item in answer.json()["items"]}

    assert await found() == {"all", "member", "group"}
    assert await found(tags=["vault"]) == {"all", "member", "group"}
    assert await found(tags=["vault", "group"]) == {"group"}
    assert await found(tags=["agent"]) == set()
    assert await found(document_ids=[vaults["member"], vaults["agent"]]) == {"member"}
    assert await found(document_ids=[]) == set()
    created = (await client.http.get(f"/api/v1/documents/{vaults['group']}")).json()["created_at"]
    assert await found(since=created) == {"group"}
    assert await found(since="2999-01-01T00:00:00Z") == set()
    for filters in ({"tags": [""]}, {"since": "yesterday"}, {"document_ids": ["x"]}, {"other": 1}):
        refused = await client.http.post("/api/v1/memory/search", json={"query": "x", "filters": filters})
        assert refused.status_code == 422
        assert refused.json()["errors"][0]["field"].startswith("filters.")


async def test_a_change_of_the_audience_takes_effect_at_once(other: Client, memory: Platform) -> None:
    document_id = await other.indexed("moving.txt", b"The ferry to Gotland carries ninety cars.")
    async with member(memory, "member:m7", OTHER_TENANT, scopes=("read",)) as http:

        async def sees() -> bool:
            answer = await http.post("/api/v1/memory/search", json={"query": "How many cars does the ferry carry?"})
            found = document_id in [item["source"]["document_id"] for item in answer.json()["items"]]
            view = await http.get(f"/api/v1/documents/{document_id}")
            link = await http.get(f"/api/v1/documents/{document_id}/content")
            listed = (await http.get("/api/v1/documents", params={"limit": "200"})).json()["items"]
            assert [view.status_code, link.status_code] == ([200, 200] if found else [404, 404])
            assert (document_id in [item["id"] for item in listed]) == found
            return found

        path = f"/api/v1/documents/{document_id}"
        assert await sees()
        changed = await other.http.patch(path, json={"audience": ["agent:a1", "agent:a1"], "tags": ["boat"]})
        assert (changed.json()["audience"], changed.json()["tags"]) == (["agent:a1"], ["boat"])
        assert not await sees()
        # The uploader and an administrator still see the document, although a search does not show them its passages.
        assert (await other.http.get(path)).status_code == 200
        assert (await other.http.patch(path, json={"audience": ["member:m7"]})).json()["tags"] == ["boat"]
        assert await sees()
        assert (await http.patch(path, json={"tags": []})).status_code == 403
    async with member(memory, "member:m8", OTHER_TENANT, scopes=("read", "write")) as http:
        assert (await http.patch(path, json={"tags": []})).status_code == 404
        assert (await http.delete(path)).status_code == 404
    async with memory.database("memory").begin() as tx:
        rows = await tx.sql("SELECT audience FROM document WHERE id = $1", UUID(document_id))
    assert rows == [(["member:m7"],)]


async def test_a_wrong_audience_is_refused_with_the_field(other: Client) -> None:
    for audience, field in (
        (["everyone"], "audience[0]"),
        (["all", "agent:"], "audience[1]"),
        (["member:a b"], "audience[0]"),
        (json.dumps([]), None),
        ("[1]", "audience"),
        ([f"member:{n}" for n in range(101)], "audience"),
    ):
        answer = await other.http.post(
            "/api/v1/documents", files={"file": ("a.txt", b"text")}, data={"audience": audience}
        )
        if field is None:
            assert answer.status_code == 202
            await other.done(answer.json()["id"])
        else:
            assert answer.status_code == 422, answer.text
            assert answer.json()["errors"][0]["field"] == field
    answer = await other.http.post(
        "/api/v1/documents",
        files={"file": ("b.txt", b"text")},
        data={"audience": json.dumps(["agent:a1", "all"]), "tags": json.dumps(["x"])},
    )
    assert (answer.json()["audience"], answer.json()["tags"]) == (["agent:a1", "all"], ["x"])
    await other.done(answer.json()["id"])
