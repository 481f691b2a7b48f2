"""A document on its way into the index."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from infra.clock import uuid7
from infra.errors import NotYet
from services.memory.indexes.embeddings import LocalEmbedder
from services.memory.knowledge import indexing, passages
from services.memory.knowledge.passages import StoredPassage
from tests.services.memory.conftest import CREDIT


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
