"""``retrieve``: `memory.Retrieve` with Milvus and with pgvector, against an empty gRPC call to the same process and
against Milvus called directly, with 1, 8 and 32 callers.

The service runs as a process on real engines and searches the passages of one tenant. The vectors of the queries are
known to it, as for a question that is asked again: to embed a new one takes longer than all the rest.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from time import perf_counter

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pymilvus import AsyncMilvusClient

from infra.web import rpc
from protos.memory.v1 import memory_pb2, memory_pb2_grpc
from services.memory.indexes.embeddings import LocalEmbedder
from services.memory.indexes.migration import migrate
from services.memory.indexes.milvus import SEARCH_EF
from services.memory.indexes.pgvector import PgvectorIndex
from tooling.bench.fixture import PRODUCTION, Fixture, running_platform_on
from tooling.bench.protocol import SLICE_SECONDS, Anchor, Figure, Slice, run_pairs
from tooling.testing.platform import Platform
from tooling.testing.service_fakes import running_service_fakes

CALLERS = (1, 8, 32)
TENANT = "bench"
SECTIONS = 400
QUERIES = [f"Which valve does machine {n} need for pressure {n % 7}?" for n in range(40)]
# As many as a search for ten passages asks of the index.
HITS = 30
EMPTY_GOAL, MILVUS_GOAL = 0.5, 1 / 3


async def measure(place: Fixture, progress: Callable[[int, int], None], pairs: int) -> Sequence[Figure]:
    async with running_platform_on(place) as platform, running_service_fakes(platform, ["billing"]):
        await platform.prepare("memory")
        await platform.start("memory", **PRODUCTION)
        await _upload(platform)
        embedder = LocalEmbedder()
        vectors = [(await embedder.queries([query]))[0].vectors[0].tolist() for query in QUERIES]
        memory = memory_pb2_grpc.MemoryStub(platform.channels("agent").to(platform.grpc("memory"), "memory"))
        direct = AsyncMilvusClient(place.stack.engines["milvus"]["url"])
        database = platform.database("memory")
        [collection] = [name for name in await direct.list_collections() if name.startswith(_plain(platform.prefix))]

        async def retrieve(n: int) -> None:
            request = memory_pb2.RetrieveRequest(query=QUERIES[n % len(QUERIES)])
            reply = await memory.Retrieve(request, metadata=rpc.tenant_metadata(TENANT), timeout=30)
            if reply.degraded or not reply.passages:
                raise ValueError("retrieve: an answer was degraded or empty; no figure is reported")

        async def search(n: int) -> None:
            [found] = await direct.search(
                collection,
                [vectors[n % len(vectors)]],
                filter=f'tenant_id == {json.dumps(TENANT)} and scope == "document"',
                limit=HITS,
                output_fields=["text_id"],
                search_params={"metric_type": "COSINE", "params": {"ef": SEARCH_EF}},
                consistency_level="Bounded",
            )
            if len(found) != HITS:
                raise ValueError("retrieve: Milvus found too few rows; no figure is reported")

        figures: list[Figure] = []
        async with grpc.aio.insecure_channel(platform.grpc("memory")) as channel:
            health = health_pb2_grpc.HealthStub(channel)

            async def empty(_: int) -> None:
                await health.Check(health_pb2.HealthCheckRequest())

            for engine in ("milvus", "pgvector"):
                if engine == "pgvector":
                    await migrate(
                        database,
                        engine,
                        lambda _, model: PgvectorIndex(database, model),
                        alone=False,
                        progress=lambda done, total: None,
                    )
                for n in range(len(QUERIES)):
                    await retrieve(n)
                for callers in CALLERS:
                    of = f"{callers} callers, {engine}"
                    anchors = [
                        Anchor(f"empty gRPC call, {of}", EMPTY_GOAL, partial(_slice, empty, callers)),
                        Anchor(f"Milvus directly, {of}", MILVUS_GOAL, partial(_slice, search, callers)),
                    ]
                    ours = partial(_slice, retrieve, callers)
                    figures += await run_pairs(f"retrieve {engine}", ours, anchors, progress, pairs=pairs)
        await direct.close()
        return figures


async def _slice(call: Callable[[int], Awaitable[None]], callers: int) -> Slice:
    done = 0
    began = perf_counter()

    async def caller() -> None:
        nonlocal done
        while perf_counter() < began + SLICE_SECONDS:
            done += 1
            await call(done)

    await asyncio.gather(*(caller() for _ in range(callers)))
    return Slice(done, perf_counter() - began)


async def _upload(platform: Platform) -> None:
    text = "\n\n".join(
        f"# Machine {n}\n\nMachine {n} of series {n % 13} needs the valve {1000 + n} for pressure {n % 7}, and "
        f"is cleaned every {n % 31 + 1} days. Its spare parts have the numbers {n * 17} and {n * 23}."
        for n in range(SECTIONS)
    )
    async with platform.client("memory", TENANT) as http:
        answer = await http.post("/api/v1/documents", files={"file": ("machines.md", text.encode())})
        path = f"/api/v1/documents/{answer.raise_for_status().json()['id']}"

    async def indexed() -> bool:
        # A new client each time: its identity is valid for one minute.
        async with platform.client("memory", TENANT) as http:
            return bool((await http.get(path)).raise_for_status().json()["status"] == "indexed")

    await platform.until(indexed, seconds=600)


def _plain(prefix: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in prefix)
