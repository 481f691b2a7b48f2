"""The embedding model changes while the service runs: searches use the old one until the new one has everything."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from infra.clock import uuid7
from protos.catalog import AGENT_EVENTS
from protos.messages.agent import RunCompleted
from services.memory.indexes import engines, vectors
from services.memory.indexes.engines import Choice
from tests.services.memory.conftest import Client, Vectors
from tests.services.memory.indexes.test_embeddings import Endpoint, endpoint
from tooling.testing.platform import Platform
from tooling.testing.service_fakes import FakeBilling

__all__ = ["endpoint"]
TENANT = "tenant-of-models"
QUESTION = "the ferry leaves at nine"


class Change:
    """A service with documents, a reply and a memory, and its settings."""

    def __init__(self, platform: Platform, endpoint: Endpoint, client: Client, found: Vectors) -> None:
        self.platform, self.endpoint, self.client, self.vectors = platform, endpoint, client, found
        self.model = "words-8"
        self.engine = "milvus"

    async def start(self, model: str, url: str = "", **environment: str) -> None:
        """Starts the service again with this model in its settings."""
        if "memory" in self.platform.processes:
            self.platform.stop("memory")
        await self.platform.start(
            "memory",
            CLAW_EMBEDDING_BASE_URL=url or self.endpoint.url,
            CLAW_EMBEDDING_MODEL=model,
            CLAW_EMBEDDING_API_KEY="a key",
            **environment,
        )

    async def index(self) -> dict[str, Any]:
        shown: dict[str, Any] = (await self.client.http.get("/api/v1/memory/index")).raise_for_status().json()
        return shown

    async def nearest(self) -> list[str]:
        """The texts that a search by meaning finds, best first."""
        body = {"query": QUESTION, "mode": "dense", "types": ["document"]}
        answer = (await self.client.http.post("/api/v1/memory/search", json=body)).raise_for_status().json()
        return [item["text"] for item in answer["items"]]

    async def reply(self) -> list[str]:
        passages = await self.client.retrieve("the ferry waits", mode="dense", types=["conversation"], session_key="s")
        return [passage.text for passage in passages]

    async def finds_the_reply(self) -> bool:
        """False also while an index on a busy machine answers too late for a search."""
        return await self.reply() == ["The ferry waits."]

    async def billed(self, model: str) -> list[str]:
        """The ids of the usage of passages, replies and memories."""
        used = [each for each in await self.client.embeddings() if each["resource"] == f"embedding/{model}"]
        return [each["usage_id"] for each in used if not each["usage_id"].startswith("query/")]

    async def switched(self, model: str) -> None:
        """Waits for the model. The right text is the first one all the time."""

        async def done() -> bool:
            assert (await self.nearest())[0] == "The ferry leaves at nine."
            shown = await self.index()
            return bool(shown["name"] == f"{self.engine}/{model}" and shown["next_model"] is None)

        await self.platform.until(done)
        self.model = model

    async def expire(self) -> None:
        """Lets the vectors of former models be deleted now."""
        async with self.platform.database("memory").begin() as tx:
            await tx.sql("UPDATE embedding_model SET since = since - interval '1 hour' WHERE state = 'former'")

    async def forgotten(self, model: str) -> None:
        """Waits until nothing of any other model than `model` is left."""
        await self.expire()

        async def left() -> bool:
            async with self.platform.database("memory").begin() as tx:
                [(models,)] = await tx.sql("SELECT array_agg(key) FROM embedding_model")
            return bool(models == [model])

        await self.platform.until(left)
        async with self.platform.database("memory").begin() as tx:
            for table in vectors.KEYS:
                rows = await tx.sql(f"SELECT DISTINCT model, other_model FROM {table} WHERE model <> ''")
                others = await tx.sql(f"SELECT DISTINCT model, other_model FROM {table} WHERE other_model <> ''")
                kept = {name for row in (*rows, *others) for name in row if name}
                assert kept == {model}, table
            rows = await tx.sql(
                "SELECT unnest(indexed_in) FROM document UNION SELECT unnest(indexed_in) FROM utterance"
            )
            assert {name.partition("/")[2] for (name,) in rows} == {model}
            rows = await tx.sql("SELECT DISTINCT model FROM index_row")
            assert [name for (name,) in rows] == ([model] if self.engine == "pgvector" else [])
        collections = await asyncio.to_thread(self.vectors.collections)
        plain = model.replace("-", "_").replace("@", "_")
        assert [name.partition("vectors_")[2] for name in collections] == (
            [f"{plain}_8"] if self.engine == "milvus" else []
        )


@pytest.fixture(scope="module", params=engines.ENGINES)
async def change(
    request: pytest.FixtureRequest, platform: Platform, vectors: Vectors, endpoint: Endpoint, billing: FakeBilling
) -> AsyncIterator[Change]:
    await platform.prepare("memory")
    client = Client(platform, TENANT)
    change = Change(platform, endpoint, client, vectors)
    change.engine = request.param
    async with platform.database("memory").begin() as tx:
        for table in ("document", "utterance", "memory", "embedding_model", "index_row"):
            await tx.sql(f"DELETE FROM {table}")
        await engines.choose(tx, Choice(change.engine, (change.engine,)))
    await asyncio.to_thread(vectors.drop)
    await change.start("words-8")
    for name, text in (
        ("ferry", "The ferry leaves at nine."),
        ("cat", "A cat sleeps here."),
    ):
        await client.indexed(f"{name}.txt", text.encode())
    note = {"scope": "tenant", "text": "The ferry is red."}
    (await client.http.post("/api/v1/memories", json=note)).raise_for_status()
    said = RunCompleted(run_id=uuid7(), session_key="s", reply="The ferry waits.")
    await platform.produce(AGENT_EVENTS, said, key="s", tenant_id=TENANT)

    async def embedded() -> bool:
        async with platform.database("memory").begin() as tx:
            rows = await tx.sql(
                """
                SELECT model FROM memory
                UNION ALL
                SELECT model FROM utterance WHERE indexed_in <> '{}'
                """
            )
        return [model for (model,) in rows] == ["words-8"] * 2

    await platform.until(embedded)
    yield change
    await client.http.aclose()
    platform.stop("memory")


async def test_the_old_model_answers_until_the_new_one_has_everything(change: Change) -> None:
    client, endpoint, model = change.client, change.endpoint, change.model
    gone = await client.indexed("gone.txt", b"gone soon")
    before = await change.index()
    billed = await change.billed("words-9")
    endpoint.failing = {"words-9"}
    await change.start("words-9")

    async def told() -> dict[str, Any] | None:
        shown = await change.index()
        return shown if shown["next_model"] and shown["next_model"]["error"] else None

    shown = await change.platform.until(told)
    # The new endpoint is down: the old model stays in use, and the view says so.
    assert shown["name"] == f"{change.engine}/{model}"
    documents = before["documents"]
    assert shown["documents"] == shown["documents_inside"] == documents
    assert shown["next_model"]["name"] == "words-9"
    # A reply and a memory.
    texts = documents + 2
    assert (shown["next_model"]["texts"], shown["next_model"]["texts_inside"]) == (texts, 0)
    assert "HTTP 503" in shown["next_model"]["error"]
    assert (await change.nearest())[0] == "The ferry leaves at nine."
    await change.platform.until(change.finds_the_reply)
    # A new document is found at once, and a deleted one no more.
    bridge = await client.indexed("bridge.txt", b"The bridge is closed.")
    assert "The bridge is closed." in await change.nearest()
    (await client.http.delete(f"/api/v1/documents/{gone}")).raise_for_status()
    # One text is refused for good: the others are embedded, the old model stays, and the view says so.
    endpoint.refused, endpoint.failing = "bridge", set()

    async def nearly() -> dict[str, Any] | None:
        shown = await change.index()
        return shown if shown["next_model"]["texts_inside"] == texts - 1 and shown["next_model"]["error"] else None

    shown = await change.platform.until(nearly)
    assert (shown["name"], shown["next_model"]["texts"]) == (f"{change.engine}/{model}", texts)
    assert "HTTP 400" in shown["next_model"]["error"]
    endpoint.refused = ""
    await change.switched("words-9")
    assert {"The ferry leaves at nine.", "The bridge is closed."} < set(await change.nearest())
    await change.platform.until(change.finds_the_reply)
    await change.forgotten("words-9")
    assert (await change.nearest())[0] == "The ferry leaves at nine."
    # Each text was billed once for the new model. The deleted document may have been on its way to the endpoint.
    of_texts = [id_ for id_ in (await change.billed("words-9"))[len(billed) :] if not id_.startswith(gone)]
    assert len(of_texts) == len(set(of_texts)) == texts
    assert sum(id_.startswith(bridge) for id_ in of_texts) == 1


async def test_a_third_model_and_a_way_back(change: Change) -> None:
    change.endpoint.failing = {"words-10", "words-11"}
    model = change.model
    for target in ("words-10", "words-11"):
        await change.start(target)
        assert (await change.index())["next_model"]["name"] == target
    # A document that the failing model does not get is not kept waiting.
    await change.client.indexed("late.txt", b"Late in the evening.")
    change.endpoint.failing = set()
    await change.start(model)
    shown = await change.index()
    assert (shown["name"], shown["next_model"]) == (f"{change.engine}/{model}", None)
    await change.forgotten(model)
    # The same model at another endpoint is another model.
    await change.start(model, url=change.endpoint.url.replace("127.0.0.1", "localhost"))
    await change.switched(f"{model}@2")
    await change.forgotten(f"{model}@2")


# The state is in PostgreSQL, so most boundaries need one engine.
BOUNDARIES = {
    "milvus": ["after_effect_commit"],
    "pgvector": [
        "after_effect_commit",  # Some texts have their new vectors.
        "before_model_switch",  # The new index has everything.
        "after_model_switch",
        "before_model_forgotten",  # The old vectors are deleted.
    ],
}


async def test_a_change_ends_whenever_the_process_dies(change: Change, tmp_path: Path) -> None:
    async def dead() -> bool:
        return change.platform.processes["memory"].poll() is not None

    for boundary in BOUNDARIES[change.engine]:
        once = tmp_path / boundary
        once.touch()
        target = f"words-{boundary}"
        await change.start(target, CLAW_FAILPOINT=boundary, CLAW_FAILPOINT_ONCE=str(once))
        if boundary == "before_model_forgotten":
            await change.switched(target)
            await change.expire()
        await change.platform.until(dead)
        assert not once.exists()
        await change.start(target)
        await change.switched(target)
        await change.forgotten(target)
