"""The index in Milvus. It lags and may hold copies.

Never upsert: with a partition key, Milvus 2.3 writes upserted rows into the wrong partition. A search by tenant misses
them and a delete by tenant leaves them. Never use a primary key twice: if an id was deleted and inserted several times
between two flushes, 2.3 shows some of the rows and counts all of them. The id of the text is a field of its own.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import grpc
from pymilvus import AsyncMilvusClient, DataType, MilvusClient, MilvusException

from infra.clock import uuid7
from infra.connections import HttpTarget
from infra.errors import Transient
from services.memory.indexes.index import Hit, VectorRow
from services.memory.indexes.together import Together
from services.memory.rights import EVERY, Owners

TIMEOUT_SECONDS = 3.0
# Creating a collection takes some seconds; loading a large one takes longer.
OPEN_SECONDS = 60.0
# Above the 64 of the HNSW build. With 100,000 vectors of 50 tenants in flushed segments the recall is .976 on average
# and below .95 for 9 tenants; with 128 it was .952, and below for 15.
SEARCH_EF = 256
PARTITIONS = 16
# While so many calls for the same rows run, further searches in them wait and then go together.
SEARCHES_AT_ONCE, MAX_TOGETHER = 2, 32
_NOT_FOUND, _NOT_LOADED = 100, 101


class MilvusIndex:
    """Connects on first use. Has one collection per embedding model and dimension, created if it is missing.

    `refill` is awaited with the index's name before a missing collection is created: it enqueues everything that must
    be indexed.
    Every call raises Transient if Milvus does not answer.
    """

    def __init__(self, url: str, prefix: str, model: str, refill: Callable[[str], Awaitable[None]]) -> None:
        # The client logs a stack trace for each error that it raises.
        logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
        self._target = HttpTarget.parse(url)
        self._prefix = _name(prefix, "vectors_")
        self._model = model
        self.name = f"milvus/{model}"
        self._refill = refill
        self._client: AsyncMilvusClient | None = None
        self._open: set[str] = set()
        self._opening = asyncio.Lock()
        self._searches = Together(self._search, at_once=SEARCHES_AT_ONCE, most=MAX_TOGETHER)

    async def search(
        self, vector: list[float], tenant_id: str, scope: str, limit: int, owners: Owners = EVERY
    ) -> list[Hit]:
        """The tenant's `limit` nearest rows in `scope`, best first. PostgreSQL may have deleted some of them."""
        name = await self._ready(len(vector))
        rows = f"tenant_id == {json.dumps(tenant_id)} and scope == {json.dumps(scope)}{_narrowed(owners)}"
        return await self._searches.ask((name, rows, limit), vector)

    async def _search(self, where: tuple[str, str, int], vectors: Sequence[list[float]]) -> list[list[Hit]]:
        """For each vector its hits in the collection, among the rows. Milvus finds the rows once for all: eight vectors
        in one call cost it 4.2 ms of CPU, one 2.4."""
        name, rows, limit = where
        async with self._calling(name) as client:
            found = await client.search(
                name,
                vectors,
                filter=rows,
                limit=limit,
                output_fields=["text_id"],
                search_params={"metric_type": "COSINE", "params": {"ef": max(SEARCH_EF, limit)}},
                consistency_level="Bounded",
                timeout=TIMEOUT_SECONDS,
            )
        return [_hits(each) for each in found]

    async def replace(
        self, tenant_id: str, owner_id: UUID, scope: str, batches: AsyncIterator[Sequence[VectorRow]]
    ) -> None:
        """Replaces the owner's rows by these rows, and returns once every search finds them."""
        name, count, insertion = "", 0, str(uuid7())
        async for rows in batches:
            if not name:
                name = await self._ready(len(rows[0].vector))
                await self._delete(name, _owned(tenant_id, owner_id))
            data = [
                {
                    "id": str(uuid7()),
                    "text_id": str(row.id),
                    "tenant_id": tenant_id,
                    "scope": scope,
                    "owner_id": str(owner_id),
                    "insertion": insertion,
                    "vector": row.vector,
                }
                for row in rows
            ]
            async with self._calling(name) as client:
                await client.insert(name, data, timeout=TIMEOUT_SECONDS * 5)
            count += len(rows)
        if not name:
            return
        async with self._calling(name) as client:
            # Strong waits until all earlier writes are applied. After that, weaker reads see them as well.
            [answer] = await client.query(
                name,
                # Only the rows of this attempt: the rows of an earlier attempt may disappear later.
                filter=f'{_owned(tenant_id, owner_id)} and insertion == "{insertion}"',
                output_fields=["count(*)"],
                consistency_level="Strong",
                timeout=TIMEOUT_SECONDS * 5,
            )
        if answer["count(*)"] != count:
            raise Transient(f"Milvus shows {answer['count(*)']} of the {count} rows that were inserted")

    async def remove(self, tenant_id: str, owner_id: UUID) -> None:
        """Removes the owner's rows from all collections, including those of former models."""
        await self._delete_everywhere(_owned(tenant_id, owner_id))

    async def remove_tenant(self, tenant_id: str) -> None:
        """Removes all rows of the tenant."""
        await self._delete_everywhere(_of_tenant(tenant_id))

    async def drop(self) -> None:
        """Removes the collections of the model."""
        of_model = re.compile(re.escape(_name(self._prefix, self._model)) + "_[0-9]+")
        async with self._calling("") as client:
            for name in await client.list_collections(timeout=TIMEOUT_SECONDS):
                if of_model.fullmatch(name):
                    await client.drop_collection(name, timeout=OPEN_SECONDS)
                    self._open.discard(name)

    async def check(self) -> None:
        """Makes one round trip to Milvus."""
        async with self._calling("") as client:
            await client.list_collections(timeout=TIMEOUT_SECONDS)

    async def _delete_everywhere(self, rows: str) -> None:
        async with self._calling("") as client:
            names = await client.list_collections(timeout=TIMEOUT_SECONDS)
            names = [name for name in names if name.startswith(self._prefix)]
        for name in names:
            await self._delete(name, rows)

    async def _delete(self, name: str, rows: str) -> None:
        async with self._calling(name) as client:
            await client.delete(name, filter=rows, timeout=TIMEOUT_SECONDS * 5)

    async def _ready(self, dimension: int) -> str:
        """The name of the collection, after it was created and loaded."""
        name = _name(self._prefix, self._model, f"_{dimension}")
        if name in self._open:
            return name
        async with self._opening, self._calling(name) as client:
            if name not in self._open:
                if not await client.has_collection(name, timeout=TIMEOUT_SECONDS):
                    await self._refill(self.name)
                    await self._make(client, name, dimension)
                if not await client.list_indexes(name, timeout=TIMEOUT_SECONDS):
                    # New, or Milvus or a process went away after it had made the collection.
                    params = MilvusClient.prepare_index_params()
                    build = {"M": 16, "efConstruction": 64}
                    params.add_index("vector", index_type="HNSW", metric_type="COSINE", params=build)
                    await client.create_index(name, params, timeout=OPEN_SECONDS)
                await client.load_collection(name, timeout=OPEN_SECONDS)
                self._open.add(name)
        return name

    async def _make(self, client: AsyncMilvusClient, name: str, dimension: int) -> None:
        schema = MilvusClient.create_schema(auto_id=False, description=f"embeddings by {self._model}")
        schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=36)
        schema.add_field("text_id", DataType.VARCHAR, max_length=36)
        schema.add_field("insertion", DataType.VARCHAR, max_length=36)
        schema.add_field("tenant_id", DataType.VARCHAR, max_length=255, is_partition_key=True)
        schema.add_field("scope", DataType.VARCHAR, max_length=1024)
        schema.add_field("owner_id", DataType.VARCHAR, max_length=36)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dimension)
        # If another process has created it by now, Milvus accepts the same collection again.
        await client.create_collection(
            name,
            schema=schema,
            num_partitions=PARTITIONS,
            consistency_level="Bounded",
            timeout=OPEN_SECONDS,
        )

    @asynccontextmanager
    async def _calling(self, name: str) -> AsyncIterator[AsyncMilvusClient]:
        if self._client is None:
            target = self._target
            # The client reads the authority under another name if it has no certificate of its own.
            files = {
                "ca_pem_path" if target.certificate else "server_pem_path": target.authority,
                "client_pem_path": target.certificate,
                "client_key_path": target.key,
            }
            self._client = AsyncMilvusClient(target.url, timeout=TIMEOUT_SECONDS, **files)
        try:
            yield self._client
        except MilvusException as error:
            if error.code in (_NOT_FOUND, _NOT_LOADED):
                # Milvus was wiped or restarted. The next call creates or loads the collection again.
                self._open.discard(name)
            raise Transient(f"Milvus: {error.message}") from error
        except (grpc.RpcError, OSError, TimeoutError) as error:
            raise Transient(f"Milvus: {type(error).__name__}") from error


def _hits(found: Iterable[Any]) -> list[Hit]:
    # An id may be there twice: a process that had lost the document's lane may have inserted it again.
    best: dict[UUID, float] = {}
    for hit in found:
        best.setdefault(UUID(hit["entity"]["text_id"]), float(hit["distance"]))
    return [Hit(id_, score) for id_, score in best.items()]


def _narrowed(owners: Owners) -> str:
    if owners.only is not None:
        return f" and owner_id in {json.dumps([str(id_) for id_ in owners.only])}"
    return f" and owner_id not in {json.dumps([str(id_) for id_ in owners.without])}" if owners.without else ""


def _of_tenant(tenant_id: str) -> str:
    return f"tenant_id == {json.dumps(tenant_id)}"


def _owned(tenant_id: str, owner_id: UUID) -> str:
    return f'{_of_tenant(tenant_id)} and owner_id == "{owner_id}"'


def _name(*parts: str) -> str:
    """Milvus accepts letters, digits and underscores; the first character must not be a digit."""
    name = re.sub(r"[^A-Za-z0-9_]", "_", "".join(parts))
    return name if name[:1].isalpha() else f"_{name}"
