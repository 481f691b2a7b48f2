"""The embedding models in use, and the vectors of two models side by side."""

from __future__ import annotations

import asyncio
from unittest.mock import Mock
from uuid import UUID

import pytest

from infra.clock import uuid7
from infra.errors import NotYet
from infra.security.crypto import Cipher
from infra.stores.objects import Stored
from services.memory.indexes import engines, model_change, vectors
from services.memory.indexes.embeddings import Endpoint
from services.memory.indexes.engines import Engines
from services.memory.indexes.model_change import ModelChange
from services.memory.indexes.models import EmbeddingModels
from services.memory.knowledge import documents
from services.memory.knowledge.versions import reuse_vectors
from tooling.testing.platform import Platform


async def test_no_document_is_missed_that_is_indexed_during_the_switch(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    await platform.prepare("memory")
    database, cipher, tenant = platform.database("memory"), Cipher("m" * 43 + "="), "tenant-of-switch"

    def models(name: str) -> EmbeddingModels:
        return EmbeddingModels(database, cipher, Endpoint(name, "http://x", None), lambda key, _: Mock(key=key))

    async def fine(*_: object) -> None:
        pass

    monkeypatch.setattr(model_change, "verified", fine)
    assert (await models("old").active()).key == "old"
    changing = models("new")
    change = ModelChange(database, changing, Engines(database, lambda *_: Mock()))
    id_ = uuid7()
    async with database.begin(tenant_id=tenant) as tx:
        await documents.add(tx, id_, "x", Stored(path="x", size=1, sha256="0", content_type="text/plain"))
    async with database.begin(tenant_id=tenant) as tx:
        await changing.hold(tx, (await changing.active()).key)
        switch = asyncio.create_task(change._advance("new"))
        await asyncio.sleep(0.3)
        await documents.advance(tx, id_, "indexed", 1.0)
    await switch
    assert (await models("new").current()).active.key == "old"
    # The other way round: who embeds by the old model after the switch begins again.
    async with database.begin(tenant_id=tenant) as tx:
        [(names,)] = await tx.sql("SELECT filling FROM index_engine")
        await tx.sql("UPDATE document SET indexed_in = $2 WHERE id = $1", id_, engines.names(names, "new"))
    await change._advance("new")
    for check in (changing.hold, changing.keep):
        with pytest.raises(NotYet):
            async with database.begin(tenant_id=tenant) as tx:
                await check(tx, "old")
    assert (await changing.active()).key == "new"


async def test_a_row_keeps_the_vectors_of_both_models(platform: Platform) -> None:
    await platform.prepare("memory")
    database, tenant = platform.database("memory"), "tenant-of-vectors"
    first, second = uuid7(), uuid7()

    async def read(id_: UUID) -> list[tuple[object, ...]]:
        async with database.begin(tenant_id=tenant) as tx:
            return list(
                await tx.sql(
                    f"SELECT {vectors.of('$2', 'p')}, {vectors.of('$3', 'p')} FROM passage p WHERE document_id = $1",
                    id_,
                    "old",
                    "new",
                )
            )

    async with database.begin(tenant_id=tenant) as tx:
        for id_ in (first, second):
            await documents.add(tx, id_, "x", Stored(path="x", size=1, sha256="0", content_type="text/plain"))
            await tx.sql(
                "INSERT INTO passage (id, tenant_id, document_id, n, text) VALUES ($1, $2, $1, 0, 'same')", id_, tenant
            )
        for model, kept in (("new", "old"), ("old", "new"), ("new", "old"), ("old", "new")):
            await vectors.store(tx, "passage", model, kept, {first: model.encode()})
        await reuse_vectors(tx, second, first)
    for id_ in (first, second):
        assert await read(id_) == [(b"old", b"new")]
    async with database.begin(tenant_id=tenant) as tx:
        await vectors.forget(tx, "passage", "document_id = $2", "old", first)
        # A third model takes the place of the one that is gone, and the second one stays.
        await vectors.store(tx, "passage", "third", "new", {first: b"third"})
        await vectors.forget(tx, "passage", "document_id = $2", "third", first)
    assert await read(first) == [(None, b"new")]
