"""Queries of several callers are embedded together, and each caller gets the own vector or the own error."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest

from infra.errors import EffectFailed, InvalidMessage, Transient
from infra.outgoing.shares import tenant, work_for
from services.memory.indexes.embeddings import BATCH, Embedded
from services.memory.indexes.together import Together
from services.memory.search.queries import QueryVectors
from tests.services.memory.conftest import CREDIT
from tooling.testing.platform import Platform


class Slow:
    """An embedder whose calls wait for `go`. A text that begins with "bad" is refused, and "down" ends the call."""

    model = key = "slow"
    paid = True
    min_similarity = -1.0
    calls_at_once = 1

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.go = asyncio.Event()

    async def passages(self, texts: Sequence[str]) -> Embedded:
        raise AssertionError("a query is no passage")

    async def queries(self, texts: Sequence[str]) -> Sequence[Embedded]:
        self.calls.append(list(texts))
        await self.go.wait()
        if any(text.startswith("bad") for text in texts):
            raise EffectFailed("HTTP 400")
        if "down" in texts:
            raise Transient("HTTP 503")
        return [Embedded(np.full((1, 2), len(text), dtype="<f4"), len(text)) for text in texts]


@pytest.fixture
async def slow(platform: Platform) -> Slow:
    await platform.prepare("memory")
    return Slow()


@pytest.fixture
def vectors(platform: Platform, slow: Slow) -> QueryVectors:
    return QueryVectors(platform.database("memory"), slow, CREDIT)


async def begun(slow: Slow, vectors: QueryVectors, texts: Sequence[str]) -> list[asyncio.Task[object]]:
    """Asks for all texts, after the call for the first one has begun."""
    first = asyncio.create_task(vectors.of("tenant", texts[0]))
    while not slow.calls:
        await asyncio.sleep(0)
    others = [asyncio.create_task(vectors.of("tenant", text)) for text in texts[1:]]
    await asyncio.sleep(0)
    return [first, *others]


async def test_queries_that_wait_go_together_and_a_single_one_at_once(slow: Slow, vectors: QueryVectors) -> None:
    texts = [f"query {'x' * n}" for n in range(BATCH + 3)]
    asked = await begun(slow, vectors, texts)
    await asyncio.sleep(0)
    assert slow.calls == [texts[:1]]
    slow.go.set()
    made = await asyncio.gather(*asked)
    assert [float(vector[0]) for vector in made] == [len(text) for text in texts]  # type: ignore[index]
    assert slow.calls == [texts[:1], texts[1 : BATCH + 1], texts[BATCH + 1 :]]
    # Known now.
    await vectors.of("tenant", texts[3])
    assert len(slow.calls) == 3
    await vectors.of("another tenant", texts[3])
    assert len(slow.calls) == 4


async def test_each_tenant_is_billed_for_its_own_tokens(platform: Platform, slow: Slow, vectors: QueryVectors) -> None:
    slow.go.set()
    await asyncio.gather(vectors.of("tenant-of-four", "four"), vectors.of("tenant-of-seven", "sevenxx"))
    records = [body for _, body in await platform.outbox("memory", "usage.records")]
    billed = {record["tenant_id"]: record["quantities"] for record in records}
    assert billed["tenant-of-four"] == {"input_tokens": 4}
    assert billed["tenant-of-seven"] == {"input_tokens": 7}


async def test_a_refused_text_fails_only_its_own_caller(slow: Slow, vectors: QueryVectors) -> None:
    asked = await begun(slow, vectors, ["first", "good", "bad", "fine"])
    slow.go.set()
    _, good, bad, fine = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(bad, InvalidMessage)
    assert [float(vector[0]) for vector in (good, fine)] == [4, 4]  # type: ignore[index]


async def test_an_endpoint_that_is_down_fails_all_who_wait_and_nobody_after(slow: Slow, vectors: QueryVectors) -> None:
    asked = await begun(slow, vectors, ["first", "down", "other"])
    slow.go.set()
    _, *failed = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(error) for error in failed] == [Transient, Transient]
    assert float((await vectors.of("tenant", "later"))[0]) == 5


async def test_a_caller_whose_time_is_over_is_left_out(slow: Slow, vectors: QueryVectors) -> None:
    first, gone, other = await begun(slow, vectors, ["first", "gone", "other"])
    gone.cancel()
    await asyncio.wait({gone})
    slow.go.set()
    await asyncio.gather(first, other)
    assert slow.calls == [["first"], ["other"]]


async def test_a_query_waits_for_few_queries_of_another_tenant(slow: Slow, vectors: QueryVectors) -> None:
    many = await begun(slow, vectors, [f"many {n}" for n in range(4 * BATCH)])
    one = asyncio.create_task(vectors.of("one", "one"))
    await asyncio.sleep(0)
    slow.go.set()
    await asyncio.gather(*many, one)
    assert ["one" in texts for texts in slow.calls].index(True) == 2
    assert len(slow.calls) > 4


async def test_queries_of_several_tenants_are_embedded_with_the_share_of_none() -> None:
    async def call(_: None, asked: Sequence[str]) -> list[str]:
        return [tenant.get()] * len(asked)

    work_for("tenant-1")
    assert await Together(call, at_once=1, most=9).ask(None, "query") == ""
