"""Reading a file of a chat: by gRPC, from the object store, through the parser process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from infra.errors import Forbidden, InvalidMessage, NotFound
from infra.stores import filetypes
from infra.stores.objects import Kind, Objects
from infra.web import rpc
from protos.memory.v1 import memory_pb2, memory_pb2_grpc
from services.memory.domain import Chunk
from services.memory.knowledge import reading
from services.memory.knowledge.reading import FileReader
from tests.services.memory.files import pdf
from tooling.testing.platform import Platform

FILES = Kind("attachment", 10**7, frozenset((filetypes.PDF, filetypes.HTML, *filetypes.OFFICE)))
PLAN, PAGE = "s-1/attachments/t-1/c/plan.pdf", "s-1/attachments/t-1/c/page.html"
RULES = " ".join(f"Rule {n} is number {n}." for n in range(400))


@pytest.fixture(scope="module")
async def objects(platform: Platform) -> Objects:
    platform.stack.need("s3")
    objects = Objects(**platform.stack.engines["s3"])
    files = {
        PLAN: pdf(["Refunds take five days.", "", "Ask first."]),
        PAGE: f"<html><body><h1>Rules</h1><p>{RULES}</p></body></html>".encode(),
    }
    for path, content in files.items():

        async def parts(content: bytes = content) -> AsyncIterator[bytes]:
            yield content

        await objects.upload(FILES, parts(), name=path, user_id="u", path=lambda _, path=path: path)  # type: ignore[misc]
    return objects


async def read(platform: Platform, caller: str = "channel", **fields: Any) -> memory_pb2.ReadFileReply:
    stub = memory_pb2_grpc.MemoryStub(platform.channels(caller).to(platform.grpc("memory"), "memory"))
    given: dict[str, Any] = {"path": PLAN, "content_type": filetypes.PDF, "max_characters": 60_000} | fields
    request = memory_pb2.ReadFileRequest(**given)
    return await stub.ReadFile(request, metadata=rpc.tenant_metadata("t-1"), timeout=60)


async def test_the_pages_of_a_file_are_named(memory: Platform, objects: Objects) -> None:
    reply = await read(memory)
    assert (reply.refused, reply.is_cut) == ("", False)
    assert reply.text == "[Page 1]\nRefunds take five days.\n\n[Page 3]\nAsk first."
    assert [note.partition(":")[0] for note in reply.warnings] == ["Pages without text"]


async def test_each_sentence_is_read_once_and_a_long_text_is_cut(memory: Platform, objects: Objects) -> None:
    page = {"path": PAGE, "content_type": filetypes.HTML}
    reply = await read(memory, **page)
    assert " ".join(reply.text.split()) == f"[Rules] {RULES}"
    cut = await read(memory, **page, max_characters=100)
    assert (cut.is_cut, cut.text) == (True, reply.text[:100])


async def test_a_wrong_call_is_refused_by_its_field(memory: Platform, objects: Objects) -> None:
    for field, value in (
        ("path", "s-1/documents/d/plan.pdf"),
        ("path", "plan.pdf"),
        ("path", "s-1/attachments/t-2/c/plan.pdf"),
        ("path", "s-1/attachments/t-1"[:-1]),
        ("content_type", "text/plain"),
        ("max_characters", 0),
        ("max_characters", 100_001),
    ):
        with pytest.raises(InvalidMessage) as refused:
            fields: dict[str, Any] = {field: value}
            await read(memory, **fields)
        assert refused.value.field == field
    with pytest.raises(NotFound):
        await read(memory, path="s-1/attachments/t-1/c/gone.pdf")
    with pytest.raises(Forbidden):
        await read(memory, caller="plugin")
    # The content is not that of a Word document.
    assert "cannot be read as a Word document" in (await read(memory, content_type=filetypes.DOCX)).refused


async def test_a_file_has_a_limited_time(objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "READ_SECONDS", 0.01)
    found = await FileReader(objects).read("t-1", PLAN, filetypes.PDF, 1_000)
    assert (found.text, found.refused) == ("", "The file could not be read within 0.01 s.")


async def test_one_file_is_read_at_a_time_in_turns_by_tenant(objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    running, most = 0, 0

    async def slow(*_: Any) -> AsyncIterator[list[Chunk]]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        yield [Chunk("text", None, None, 1)]
        running -= 1

    monkeypatch.setattr(reading, "parsed", slow)
    reader = FileReader(objects)
    ended: list[str] = []

    async def read_for(tenant_id: str) -> None:
        await reader.read(tenant_id, PLAN, filetypes.PDF, 1_000)
        ended.append(tenant_id)

    await asyncio.gather(*(read_for("many") for _ in range(5)), read_for("one"))
    assert most == 1
    assert ended == ["many", "many", "one", *["many"] * 3]
