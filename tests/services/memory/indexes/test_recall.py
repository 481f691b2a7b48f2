"""Both engines of the index against exact search, with tenants of uneven size.

On demand: CLAW_RECALL_VECTORS=100000 CLAW_RECALL_TENANTS=50.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from uuid import uuid4

import numpy as np
import pytest
from numpy.typing import NDArray

from services.memory.indexes import engines
from services.memory.indexes.index import INSERT_ROWS, VectorIndex, VectorRow
from services.memory.indexes.pgvector import LARGE, PgvectorIndex
from tests.services.memory.conftest import Vectors
from tests.services.memory.indexes.test_engines import made
from tooling.testing.platform import Platform
from tooling.testing.progress import Progress

VECTORS = int(os.environ.get("CLAW_RECALL_VECTORS", "2000"))
TENANTS = int(os.environ.get("CLAW_RECALL_TENANTS", "6"))
DIMENSION = 384
QUERIES = 10
TOP = 10
# As many as a search for ten passages asks of the index.
ASKED = 30


def sizes() -> list[int]:
    """The rows of each tenant: the second has half as many as the first, the third a third, and so on."""
    whole = sum(1 / n for n in range(1, TENANTS + 1))
    return [max(TOP, round(VECTORS / n / whole)) for n in range(1, TENANTS + 1)]


def clustered(chance: np.random.Generator, count: int, centres: NDArray[np.float32]) -> NDArray[np.float32]:
    """Unit vectors around centres, as embeddings of texts on some subjects."""
    points = centres[chance.integers(len(centres), size=count)]
    points = points + 0.7 * chance.normal(size=points.shape) / np.sqrt(DIMENSION)
    unit: NDArray[np.float32] = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype("<f4")
    return unit


async def fill(index: VectorIndex, tenant_id: str, vectors: NDArray[np.float32]) -> list[VectorRow]:
    rows = [VectorRow(uuid4(), vector.tolist()) for vector in vectors]

    async def batch(part: list[VectorRow]) -> AsyncIterator[list[VectorRow]]:
        yield part

    for first in range(0, len(rows), INSERT_ROWS):
        await index.replace(tenant_id, uuid4(), "document", batch(rows[first : first + INSERT_ROWS]))
    return rows


@pytest.mark.timeout(120 + VECTORS // 20)
@pytest.mark.parametrize("engine", engines.ENGINES)
async def test_an_index_finds_95_of_100_exact_neighbours_of_every_tenant(
    platform: Platform, vectors: Vectors, engine: str, capfd: pytest.CaptureFixture[str]
) -> None:
    progress = Progress(capfd)
    await platform.prepare("memory")
    index = made(platform, engine, f"recall-{engine}")
    chance = np.random.default_rng(7)
    centres = chance.normal(size=(200, DIMENSION)) / np.sqrt(DIMENSION)
    points = [clustered(chance, size, centres) for size in sizes()]
    stored = []
    for n, own in enumerate(points):
        stored.append(await fill(index, f"tenant-{n}", own))
        progress.show(f"vectors in {engine}", sum(map(len, stored)), sum(map(len, points)))
    if isinstance(index, PgvectorIndex):
        indexed = await index.index_large_tenants("document")
        assert len(indexed) == sum(len(own) >= LARGE for own in points)
    await measured(index, points, stored, chance, centres, progress, engine)
    if engine == "milvus" and VECTORS >= LARGE:
        # Until now Milvus has compared the vectors themselves: new rows have no index, and few rows never get one.
        await asyncio.to_thread(vectors.flush)
        await measured(index, points, stored, chance, centres, progress, "milvus, flushed")


async def measured(
    index: VectorIndex,
    points: Sequence[NDArray[np.float32]],
    stored: Sequence[Sequence[VectorRow]],
    chance: np.random.Generator,
    centres: NDArray[np.float32],
    progress: Progress,
    state: str,
) -> None:
    recalls = []
    for n, (own, rows) in enumerate(zip(points, stored, strict=True)):
        found = 0
        for query in clustered(chance, QUERIES, centres):
            exact = {rows[place].id for place in np.argsort(-(own @ query))[:TOP]}
            hits = await index.search(query.tolist(), f"tenant-{n}", "document", ASKED)
            found += len(exact & {hit.id for hit in hits[:TOP]})
        recalls.append(found / QUERIES / TOP)
        progress.say(f"{state}: recall {recalls[-1]:.3f} for the tenant of {len(rows)} rows")
    progress.say(f"{state}: recall {np.mean(recalls):.3f}, lowest {min(recalls):.3f}")
    assert np.mean(recalls) >= 0.95
