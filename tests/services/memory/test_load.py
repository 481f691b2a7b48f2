"""Many documents while the process is killed, and a file that is as large as a file may be.

On demand with 10,000 documents: CLAW_LOADED_DOCUMENTS=10000 CLAW_LOADED_KILLS=100.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.memory.domain import chunk, sections
from tests.services.memory.conftest import Client, Vectors
from tooling.testing.platform import Platform
from tooling.testing.progress import Progress

DOCUMENTS = int(os.environ.get("CLAW_LOADED_DOCUMENTS", "12"))
KILLS = int(os.environ.get("CLAW_LOADED_KILLS", "2"))
UPLOADS_AT_ONCE = 8
MIB = 1024**2


def text(n: int) -> bytes:
    """Three sections, each with the number of the crate."""
    parts = ("arrived with lamps", "stands in the north hall", "goes to the island of Hven")
    return "\n\n".join(f"# Note {k}\n\nCrate crate{n} {part}." for k, part in enumerate(parts)).encode()


@pytest.mark.timeout(600 + 10 * DOCUMENTS)
async def test_documents_under_kills_are_indexed_once_and_never_seen_by_halves(
    memory: Platform, vectors: Vectors, capfd: pytest.CaptureFixture[str]
) -> None:
    progress = Progress(capfd)
    client = Client(memory, "tenant-crates")
    chance = random.Random(7)
    waiting = asyncio.Semaphore(UPLOADS_AT_ONCE)
    ids: dict[int, str] = {}

    async def upload(n: int) -> None:
        async with waiting:
            ids[n] = await client.upload(f"crate{n}.md", text(n))

    await asyncio.gather(*(upload(n) for n in range(DOCUMENTS)))
    whole = len(list(chunk(sections(text(0).decode()))))
    assert whole == 3
    seen: set[int] = set()

    async def look() -> None:
        n = chance.randrange(DOCUMENTS)
        mode = chance.choice(("keyword", "hybrid"))
        query = {"query": f"crate{n}", "mode": mode, "filters": {"document_ids": [ids[n]]}, "min_similarity": -1}
        answer = await client.http.post("/api/v1/memory/search", json=query)
        if answer.status_code == 200:
            seen.add(len(answer.json()["items"]))

    async def count(status: str) -> int:
        async with memory.database("memory").begin() as tx:
            [(found,)] = await tx.sql("SELECT count(*) FROM document WHERE status = $1", status)
        return int(found)

    for kill in range(KILLS):
        enough = DOCUMENTS * (kill + 1) // (KILLS + 1)

        async def reached(enough: int = enough) -> bool:
            await look()
            return await count("indexed") >= enough

        await memory.until(reached, seconds=150 + 5 * DOCUMENTS)
        progress.show(f"documents indexed, kill {kill + 1}", enough, DOCUMENTS)
        memory.processes["memory"].kill()
        await asyncio.to_thread(memory.processes["memory"].wait)
        await memory.start("memory")

    async def complete() -> bool:
        await look()
        return await count("indexed") == DOCUMENTS

    await memory.until(complete, seconds=150 + 5 * DOCUMENTS)
    for _ in range(10):
        await look()
    assert seen <= {0, whole}
    assert whole in seen

    async with memory.database("memory").begin() as tx:
        passages = await tx.sql("SELECT document_id::text, array_agg(id::text) FROM passage GROUP BY 1")
    stored = {document_id: sorted(found) for document_id, found in passages}
    assert set(stored) == set(ids.values())
    assert {len(found) for found in stored.values()} == {whole}
    # Of a campaign a sample: Milvus is asked once for each.
    for document_id in chance.sample(sorted(stored), min(DOCUMENTS, 200)):
        assert await asyncio.to_thread(vectors.ids, document_id) == stored[document_id]
    # Each batch is billed once, under the number of the attempt that was kept.
    reported = [record["usage_id"].split("/") for record in await client.embeddings()]
    assert sorted(owner for owner, *_ in reported if owner != "query") == sorted(ids.values())
    await client.http.aclose()


def highest_memory(pid: int) -> int:
    """Bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


async def test_a_file_of_99_megabytes_passes_in_flat_memory(memory: Platform) -> None:
    client = Client(memory, "tenant-large")

    async def form(mebibytes: int) -> AsyncIterator[bytes]:
        yield b'--edge\r\ncontent-disposition: form-data; name="file"; filename="large.pdf"\r\n\r\n%PDF-1.7\n'
        for _ in range(mebibytes):
            yield b"x" * MIB
        yield b"\r\n--edge--\r\n"

    async def peak(mebibytes: int) -> int:
        """The most memory of the process in bytes, after such a file was stored, fetched, and refused as damaged."""
        headers = {"content-type": "multipart/form-data; boundary=edge"}
        answer = await client.http.post("/api/v1/documents", content=form(mebibytes), headers=headers, timeout=120)
        assert answer.status_code == 202, answer.text
        document = await client.done(answer.json()["id"])
        assert (document["status"], document["size"] > mebibytes * MIB) == ("failed", True)
        return highest_memory(memory.processes["memory"].pid)

    small = await peak(4)
    assert await peak(99) - small < 32 * MIB
    await client.http.aclose()
