"""The process is killed while it indexes a document; the next process continues, and no passage exists twice."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from services.memory.domain import chunk, sections
from tests.services.memory import files
from tests.services.memory.conftest import Client, Vectors
from tooling.testing.platform import Platform

pytestmark = pytest.mark.usefixtures("billing")

# A text with more passages than one embedding batch.
TEXT = files.handbook("en")[:5000]


@pytest.mark.parametrize(
    "boundary",
    [
        "after_passages",  # The passages are stored; the status does not say so yet.
        "after_effect_commit",  # Some passages have their vectors.
        "before_lane_commit",  # Milvus has all rows; PostgreSQL does not know it yet.
    ],
)
async def test_a_document_is_indexed_once_whenever_the_process_dies(
    platform: Platform, vectors: Vectors, tmp_path: Path, boundary: str
) -> None:
    await platform.prepare("memory")
    once = tmp_path / "once"
    once.touch()
    await platform.start("memory", CLAW_FAILPOINT=boundary, CLAW_FAILPOINT_ONCE=str(once))
    client = Client(platform, f"tenant-{boundary}")
    document_id = await client.upload("handbook.md", TEXT)

    async def dead() -> bool:
        return platform.processes["memory"].poll() is not None

    await platform.until(dead)
    assert not once.exists()
    await platform.start("memory")
    assert (await client.done(document_id))["status"] == "indexed"

    expected = [each.text for each in chunk(sections(TEXT.decode(errors="replace")))]
    async with platform.database("memory").begin() as tx:
        passages = await tx.sql(
            "SELECT id::text, text FROM passage WHERE document_id = $1::uuid ORDER BY n", document_id
        )
    assert [text for _, text in passages] == expected
    assert len(expected) > 8
    assert await asyncio.to_thread(vectors.ids, document_id) == sorted(id_ for id_, _ in passages)
    found = await client.retrieve("Which error means a leak under the boilers?", limit=100, min_similarity=-1)
    assert sorted(passage.text for passage in found) == sorted(expected)
    # Each batch is billed once, although the last batch before the kill may have been embedded twice.
    records = [body for _, body in await platform.outbox("memory", "usage.records")]
    paid = [record["usage_id"] for record in records if record["usage_id"].startswith(document_id)]
    assert sorted(paid) == sorted(f"{document_id}/{first}/1" for first in range(0, len(expected), 8))
    await client.http.aclose()
    assert platform.stop("memory") == 0
