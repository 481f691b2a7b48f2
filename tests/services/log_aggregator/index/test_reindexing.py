"""The documents of a topic are compared with its records, and stored again if they are missing or differ."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import msgspec
import pytest
from opensearchpy import OpenSearch
from sqlalchemy.ext.asyncio import AsyncEngine

from infra.clock import uuid7
from infra.postgres.db import create_engine
from infra.postgres.read_models import RowDifference
from infra.service import verification
from infra.service.verification import VerificationResult
from protos.catalog import AGENT_EVENTS
from protos.messages.agent import RunStarted
from services.log_aggregator.index import reindexing
from services.log_aggregator.index.reindexing import INDEXED
from services.log_aggregator.index.search_index import SearchIndex
from tests.services.log_aggregator.test_search import event
from tooling.testing.platform import Platform

EVENTS = next(one for one in INDEXED if one.name == "index_agent_events")


@pytest.fixture
async def engine(aggregator: Platform) -> AsyncIterator[AsyncEngine]:
    made = create_engine(aggregator.database_url, schema="log_aggregator")
    yield made
    await made.dispose()


@pytest.fixture
async def index(aggregator: Platform) -> AsyncIterator[SearchIndex]:
    made = SearchIndex(aggregator.stack.engines["opensearch"]["url"], aggregator.prefix)
    yield made
    await made.aclose()


async def test_documents_that_are_missing_or_differ_are_found_and_stored_again(
    aggregator: Platform, search: OpenSearch, engine: AsyncEngine, index: SearchIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reindexing, "BATCH", 2)
    tenant, pattern = str(uuid4()), f"{aggregator.prefix}clawbus-events-*"
    for n in range(1, 6):
        started = RunStarted(run_id=uuid7(), session_key=f"s{n}", agent_id=uuid7(), attempt=1, n=1)
        await event(aggregator, AGENT_EVENTS, started, tenant, "0" * 31 + "1")

    async def stored() -> list[dict[str, Any]] | None:
        query = {"query": {"term": {"tenant": tenant}}, "sort": "session_key"}
        hits: list[dict[str, Any]] = search.search(index=pattern, body=query)["hits"]["hits"]
        return hits if len(hits) == 5 else None

    hits = await aggregator.until(stored)

    async def verify(**options: Any) -> VerificationResult:
        kafka = aggregator.stack.kafka_bootstrap_servers
        return await reindexing.verify(engine, index, EVENTS, bootstrap=kafka, prefix=aggregator.prefix, **options)

    async def intact() -> VerificationResult | None:
        # The reader commits its position a moment after it has stored the documents.
        found = await verify()
        assert found.different == 0
        return found if found.rows >= 5 else None

    whole = await aggregator.until(intact)
    assert whole.live_hash == whole.rebuilt_hash != "0"
    search.delete(index=hits[1]["_index"], id=hits[1]["_id"])
    changed = hits[3]["_source"] | {"session_key": "another"}
    search.index(index=hits[3]["_index"], id=hits[3]["_id"], body=changed)

    wrong = {RowDifference(hits[1]["_id"], "missing"), RowDifference(hits[3]["_id"], "session_key")}
    found = await verify()
    assert (set(found.differences), found.repaired) == (wrong, 0)
    assert found.live_hash != found.rebuilt_hash
    repaired = await verify(switch=True)
    assert (set(repaired.differences), repaired.repaired) == (wrong, 2)
    again = await verify()
    assert (again.rows, again.different, again.live_hash) == (whole.rows, 0, whole.live_hash)
    # Paused when Kafka had another topic of this name: it begins again.
    old = msgspec.json.decode(again.cursor)
    paused = VerificationResult(EVENTS.name, cursor=msgspec.json.encode(old | {"topic": str(uuid4())}).decode())
    async with engine.begin() as connection:
        await verification.save(connection, paused)
    assert (await verify()).rows == whole.rows
