"""Fixtures: the memory service as a process, and helpers to upload documents and read Milvus."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from time import sleep
from typing import Any, cast

import httpx
import pytest
from pymilvus import MilvusClient

from infra.web import rpc
from protos.memory.v1 import memory_pb2, memory_pb2_grpc
from services.memory.metering.credit import Credit
from tooling.testing.platform import Platform
from tooling.testing.service_fakes import FakeBilling, HasCredit, running_service_fakes

CREDIT = Credit(cast(Any, HasCredit()))
"""Of a part of memory in the test's own process."""


class Client:
    """One tenant of the running service."""

    def __init__(self, platform: Platform, tenant_id: str, http: httpx.AsyncClient | None = None) -> None:
        self.platform = platform
        self.tenant_id = tenant_id
        self.http = http or platform.client("memory", tenant_id)
        self._memory = memory_pb2_grpc.MemoryStub(platform.channels("agent").to(platform.grpc("memory"), "memory"))

    async def upload(self, name: str, content: bytes, **headers: str) -> str:
        """Uploads a file. Returns the id of the new document."""
        answer = await self.http.post("/api/v1/documents", files={"file": (name, content)}, headers=headers)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    async def done(self, document_id: str) -> dict[str, Any]:
        """Waits until the document is indexed or failed, and returns it."""

        async def ended() -> dict[str, Any] | None:
            answer = await self.http.get(f"/api/v1/documents/{document_id}")
            document: dict[str, Any] = answer.raise_for_status().json()
            return document if document["status"] in ("indexed", "failed") else None

        found = await self.platform.until(ended)
        assert found is not None
        return found

    async def indexed(self, name: str, content: bytes) -> str:
        """Uploads a file, waits until it is indexed, and returns its id."""
        document_id = await self.upload(name, content)
        document = await self.done(document_id)
        assert (document["status"], document["progress"], document["error"]) == ("indexed", 1.0, None)
        return document_id

    async def embeddings(self) -> list[dict[str, Any]]:
        """The usage of embeddings that memory has reported for all tenants, in order."""
        records = [body for _, body in await self.platform.outbox("memory", "usage.records")]
        return [record for record in records if record["resource"].startswith("embedding/")]

    async def retrieve(self, query: str, **options: Any) -> list[memory_pb2.Passage]:
        request = memory_pb2.RetrieveRequest(query=query, **options)
        reply = await self._memory.Retrieve(request, metadata=rpc.tenant_metadata(self.tenant_id), timeout=20)
        return list(reply.passages)


class Vectors:
    """Milvus's rows of this test module, read with the client of Milvus."""

    def __init__(self, url: str, prefix: str) -> None:
        self._client = MilvusClient(url)
        self._prefix = re.sub(r"\W", "_", prefix)

    def collections(self) -> list[str]:
        return [name for name in self._client.list_collections() if name.startswith(self._prefix)]

    def ids(self, document_id: str) -> list[str]:
        """The rows of a document, including copies."""
        found: list[str] = []
        for name in self.collections():
            rows = self._client.query(
                name, filter=f'owner_id == "{document_id}"', output_fields=["text_id"], consistency_level="Strong"
            )
            found += [row["text_id"] for row in rows]
        return sorted(found)

    def by_owner(self) -> dict[str, list[str]]:
        """The rows of all documents and replies, including copies, by their owner."""
        found: dict[str, list[str]] = {}
        for name in self.collections():
            rows = self._client.query(
                name, filter='owner_id != ""', output_fields=["owner_id", "text_id"], consistency_level="Strong"
            )
            for row in rows:
                found.setdefault(row["owner_id"], []).append(row["text_id"])
        return {owner: sorted(ids) for owner, ids in found.items()}

    def flush(self) -> None:
        """Writes all rows to the object store, and waits until their index is built and loaded."""
        for name in self.collections():
            self._client.flush(name, timeout=120)
            while self._client.describe_index(name, "vector")["pending_index_rows"]:
                sleep(0.2)
            self._client.refresh_load(name, timeout=120)

    def wipe(self) -> None:
        """Deletes all rows, and waits until no search finds them."""
        for name in self.collections():
            self._client.delete(name, filter='owner_id != ""')
            while self._client.query(name, filter='owner_id != ""', output_fields=["text_id"], limit=1):
                sleep(0.1)

    def drop_indexes(self) -> None:
        for name in self.collections():
            self._client.release_collection(name)
            self._client.drop_index(name, "vector")

    def drop(self) -> None:
        for name in self.collections():
            self._client.drop_collection(name)


@pytest.fixture(scope="module")
async def billing(platform: Platform) -> AsyncIterator[FakeBilling]:
    """All tenants have credit."""
    async with running_service_fakes(platform, ["billing"]) as fakes:
        yield fakes.billing


@pytest.fixture(scope="module")
async def vectors(platform: Platform) -> AsyncIterator[Vectors]:
    platform.stack.need("milvus", "s3")
    milvus = Vectors(platform.stack.engines["milvus"]["url"], platform.prefix)
    yield milvus
    await asyncio.to_thread(milvus.drop)


@pytest.fixture(scope="module")
async def memory(platform: Platform, vectors: Vectors, billing: FakeBilling) -> Platform:
    await platform.prepare("memory")
    await platform.start("memory")
    return platform


@pytest.fixture(scope="module")
async def norrland(memory: Platform) -> AsyncIterator[Client]:
    client = Client(memory, "tenant-norrland")
    yield client
    await client.http.aclose()


@pytest.fixture(scope="module")
async def stranger(memory: Platform) -> AsyncIterator[Client]:
    client = Client(memory, "tenant-of-somebody-else")
    yield client
    await client.http.aclose()
