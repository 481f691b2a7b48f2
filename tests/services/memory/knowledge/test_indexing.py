"""A document on its way into the index."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import pytest

from infra.clock import uuid7
from infra.errors import NotYet
from infra.postgres.tx import Tx
from infra.stores.objects import Stored
from services.memory.indexes import engines
from services.memory.indexes.embeddings import LocalEmbedder
from services.memory.indexes.engines import Choice
from services.memory.indexes.index import VectorRow
from services.memory.indexes.pgvector import PgvectorIndex
from services.memory.knowledge import documents, indexing, passages
from services.memory.knowledge.passages import StoredPassage
from tests.services.memory.conftest import CREDIT
from tooling.testing.platform import Platform


async def test_a_large_document_gives_its_place_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    embedded = 0

    class NoTransaction:
        @asynccontextmanager
        async def begin(self) -> AsyncGenerator[None, None]:
            yield

    async def count(*_: Any) -> int:
        return 100

    async def next_passages(*_: Any) -> list[StoredPassage]:
        return [StoredPassage(uuid7(), 0, "text", None)]

    async def embed(*_: Any) -> None:
        nonlocal embedded
        embedded += 1

    monkeypatch.setattr(indexing, "TURN_SECONDS", -1.0)
    monkeypatch.setattr(passages, "count", count)
    monkeypatch.setattr(passages, "without_vector", next_passages)
    document = SimpleNamespace(id=uuid7())
    large = indexing.Indexing(cast(Any, None), cast(Any, None), cast(Any, None), CREDIT)
    monkeypatch.setattr(large, "_embed_batch", embed)
    with pytest.raises(NotYet):
        await large._embed(cast(Any, document), LocalEmbedder(), cast(Any, NoTransaction()))
    assert embedded == 1


async def test_rows_that_came_behind_their_removal_are_removed(platform: Platform) -> None:
    """The process died after it had put the rows of a document there that was deleted or replaced meanwhile."""
    await platform.prepare("memory")
    database, embedder, tenant = platform.database("memory"), LocalEmbedder(), "tenant-of-leftovers"
    index = PgvectorIndex(database, embedder.key)
    former, document_id = uuid7(), uuid7()

    class Fill:
        item_id = uuid7()

        def begin(self) -> AbstractAsyncContextManager[Tx]:
            return database.begin(tenant_id=tenant)

    async def rows() -> AsyncIterator[list[VectorRow]]:
        yield [VectorRow(uuid7(), [1.0, 2.0])]

    async def left() -> set[UUID]:
        async with database.begin() as tx:
            return {owner for (owner,) in await tx.sql("SELECT owner_id FROM index_row")}

    async with database.begin(tenant_id=tenant) as tx:
        stored = Stored(path="path", size=1, sha256="0", content_type="text/plain")
        await documents.add(tx, document_id, "replaced", stored)
        await documents.advance(tx, document_id, "indexed", 1.0)
        await engines.choose(tx, Choice("pgvector", ("pgvector",)))
    filling = indexing.Indexing(cast(Any, None), cast(Any, None), engines.Engines(database, lambda *_: index), CREDIT)
    for filled, owner, expected in (
        (uuid7(), former, set()),
        (document_id, former, set()),
        (document_id, None, {former}),
    ):
        await index.replace(tenant, former, "document", rows())
        await filling.fill(filled, owner, embedder, cast(Any, Fill()))
        assert await left() == expected
    # An index that has the document already does not get it again, as long as another one does not answer.
    await index.replace(tenant, document_id, "document", rows())
    async with database.begin() as tx:
        marked = await tx.sql("SELECT indexed_in FROM document WHERE id = $1", document_id)
    assert marked == [([index.name],)]
    await filling.fill(document_id, None, embedder, cast(Any, Fill()))
    assert await left() == {former, document_id}
