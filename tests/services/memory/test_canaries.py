"""Many tenants with a canary each, and an index that mixes them all up: no search shows another's canary.

On demand with 500 tenants: CLAW_CANARY_TENANTS=500 CLAW_CANARY_SEARCHES=100000.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from typing import NamedTuple
from unittest.mock import AsyncMock, Mock
from uuid import UUID

import numpy as np
import pytest

from infra.clock import uuid7
from infra.postgres.database import Database
from infra.postgres.db import create_engine
from infra.postgres.schema import role_url
from infra.security.crypto import Cipher
from infra.security.subjects import SubjectKeys
from infra.stores.objects import Stored
from services.memory.domain import Block, chunk
from services.memory.indexes.embeddings import LocalEmbedder
from services.memory.indexes.index import Hit
from services.memory.indexes.vectors import store
from services.memory.knowledge import documents, passages
from services.memory.memories.conversations import Conversations
from services.memory.memories.store import Memories
from services.memory.rights import EVERY, Owners, ReaderNames
from services.memory.search.retrieval import MODES, Query, Retrieval
from tests.services.memory.conftest import CREDIT
from tooling.testing.platform import PASSWORDS, Platform
from tooling.testing.progress import Progress

TENANTS = int(os.environ.get("CLAW_CANARY_TENANTS", "8"))
SEARCHES = int(os.environ.get("CLAW_CANARY_SEARCHES", "160"))
AT_ONCE = 20


class Mixed:
    """Finds the nearest rows of all tenants and all readers."""

    def __init__(self) -> None:
        self.ids: list[UUID] = []
        self.vectors: list[np.ndarray] = []

    async def search(
        self, model: str, vector: list[float], tenant_id: str, scope: str, limit: int, owners: Owners = EVERY
    ) -> list[Hit]:
        cosines = np.asarray(self.vectors) @ np.asarray(vector, dtype="<f4")
        return [Hit(self.ids[n], float(cosines[n])) for n in np.argsort(-cosines)[:limit]]


class Aviary(NamedTuple):
    retrieval: Retrieval
    tenants: list[str]


@pytest.fixture(scope="module")
async def aviary(platform: Platform) -> AsyncIterator[Aviary]:
    await platform.prepare("memory")
    url = role_url(platform.database_url, "memory", "request", PASSWORDS.request)
    engine = create_engine(url, pool_size=4)
    embedder, index, cipher = LocalEmbedder(), Mixed(), Cipher("m" * 43 + "=")
    tenants = [f"tenant-{n}" for n in range(TENANTS)]
    for tenant in tenants:
        await add(platform.database("memory"), embedder, index, tenant, ["all"])
        await add(platform.database("memory"), embedder, index, tenant, ["member:owner"])
    database = Database(engine, "memory", tenanted=True)
    conversations = Conversations(cipher, Mock(), Mock(), CREDIT)
    memories = Memories(SubjectKeys(cipher))
    worker = platform.database("memory")
    active = AsyncMock(return_value=embedder)
    yield Aviary(Retrieval(database, worker, active, index, conversations, memories, CREDIT), tenants)
    await engine.dispose()


async def add(database: Database, embedder: LocalEmbedder, index: Mixed, tenant: str, audience: list[str]) -> None:
    chunks = list(chunk([Block(f"The canary of {tenant} for {audience[0]} sings in the aviary.")]))
    made = await embedder.passages([each.text for each in chunks])
    id_ = uuid7()
    async with database.begin(tenant_id=tenant) as tx:
        await documents.add(tx, id_, "canary", Stored(path="path", size=1, sha256="0", content_type="text/plain"))
        await tx.sql("UPDATE document SET audience = $2 WHERE id = $1", id_, audience)
        await passages.add(tx, id_, 0, chunks)
        stored = await passages.without_vector(tx, id_, embedder.key, 10)
        embedded = {passage.id: vector.tobytes() for passage, vector in zip(stored, made.vectors, strict=True)}
        await store(tx, "passage", embedder.key, None, embedded)
        await documents.advance(tx, id_, "indexed", 1.0)
        index.ids += list(embedded)
    index.vectors += list(made.vectors)


@pytest.mark.timeout(180 + SEARCHES)
async def test_no_search_shows_the_canary_of_another_tenant_or_reader(
    aviary: Aviary, capfd: pytest.CaptureFixture[str]
) -> None:
    progress = Progress(capfd)
    chance = random.Random(11)

    async def search() -> None:
        n = chance.randrange(TENANTS)
        # Few enough queries that a process keeps their vectors.
        asking, other = aviary.tenants[n], aviary.tenants[(n + chance.choice((0, 1, 3))) % TENANTS]
        owner = chance.random() < 0.5
        caller = ReaderNames(asking, ("all", "member:owner") if owner else ("all", "member:guest"))
        query = Query(f"the canary of {other} for member:owner", 100, min_similarity=-1, mode=chance.choice(MODES))
        answer = await aviary.retrieval.search(caller, query, seconds=60)
        assert not answer.degraded
        own = {f"The canary of {asking} for {name} sings in the aviary." for name in ("all", "member:owner")}
        expected = own if owner else {text for text in own if "for all" in text}
        # Neither too many nor too few: an answer without passages would leak nothing, either.
        assert {item.passage.text for item in answer.items} == expected

    for done in range(0, SEARCHES, AT_ONCE):
        if done % 1_000 == 0:
            progress.show("searches", done, SEARCHES)
        # At the same time, because reads of several searches go together.
        await asyncio.gather(*(search() for _ in range(AT_ONCE)))
