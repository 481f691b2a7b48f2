"""Documents that are made of files which people sent in chats."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import pytest

from infra.clock import uuid7
from infra.errors import Forbidden, InvalidMessage, NotFound
from infra.stores import filetypes
from infra.stores.objects import Kind, Objects, once
from infra.web import rpc
from protos.catalog import PLATFORM_EVENTS
from protos.memory.v1 import memory_pb2, memory_pb2_grpc
from protos.messages.user import SubjectErased
from tests.services.memory.conftest import Client
from tooling.testing.platform import Platform

FILES = Kind("attachment", 10**6, frozenset((*filetypes.TEXTS, "image/")))
TENANT = "tenant-of-sent-files"
NOTE, PHOTO = f"ann/attachments/{TENANT}/c/note.txt", f"ann/attachments/{TENANT}/c/photo.png"
BOBS = f"bob/attachments/{TENANT}/c/note.txt"
QUERY = "Where is the key of the lighthouse?"


@pytest.fixture(scope="module")
async def client(memory: Platform) -> AsyncIterator[Client]:
    memory.stack.need("s3")
    objects = Objects(**memory.stack.engines["s3"])
    note = b"The key of the lighthouse hangs behind the barometer."
    files = {NOTE: note, BOBS: note, PHOTO: b"\x89PNG\r\n\x1a\n picture"}
    for path, content in files.items():
        await objects.upload(FILES, once(content), name=path, user_id="u", path=lambda _, path=path: path)  # type: ignore[misc]
    client = Client(memory, TENANT)
    yield client
    await client.http.aclose()


def stub(client: Client, caller: str = "channel") -> memory_pb2_grpc.MemoryStub:
    return memory_pb2_grpc.MemoryStub(client.platform.channels(caller).to(client.platform.grpc("memory"), "memory"))


async def keep(client: Client, caller: str = "channel", **fields: Any) -> str:
    """Returns the id of the document."""
    given: dict[str, Any] = {
        "document_id": str(uuid7()),
        "path": NOTE,
        "name": "note.txt",
        "audience": ["agent:a1"],
        "tags": ["sea"],
        "actor": "member:m1",
        "subject_id": "ann",
        "channel_id": str(uuid7()),
        "message_id": str(uuid7()),
    } | fields
    request = memory_pb2.KeepFileRequest(**given)
    await stub(client, caller).KeepFile(request, metadata=rpc.tenant_metadata(client.tenant_id), timeout=30)
    return str(given["document_id"])


async def forget(client: Client, message_id: UUID) -> None:
    request = memory_pb2.ForgetFilesRequest(subject_id="ann", message_id=str(message_id))
    await stub(client).ForgetFiles(request, metadata=rpc.tenant_metadata(client.tenant_id), timeout=30)


async def is_gone(client: Client, document_id: str) -> bool:
    return (await client.http.get(f"/api/v1/documents/{document_id}")).status_code == 404


async def found(client: Client, agent_id: str) -> list[str]:
    return [each.source.document_id for each in await client.retrieve(QUERY, agent_id=agent_id)]


async def test_a_sent_file_becomes_a_document_until_its_message_is_deleted(client: Client) -> None:
    message_id, channel_id = uuid7(), uuid7()
    fields: dict[str, Any] = {"message_id": str(message_id), "channel_id": str(channel_id)}
    id_ = await keep(client, **fields)
    await keep(client, **fields, document_id=id_, name="other.txt")
    document = await client.done(id_)
    assert (
        document
        | fields
        | {
            "name": "note.txt",
            "status": "indexed",
            "audience": ["agent:a1"],
            "tags": ["sea"],
            "subject_id": "ann",
        }
        == document
    )
    # The other tests leave documents with the same text.
    assert id_ in await found(client, "a1")
    assert id_ not in await found(client, "a2")
    stranger = Client(client.platform, "tenant-of-others")
    assert await stranger.retrieve(QUERY, agent_id="a1") == []
    await stranger.http.aclose()

    await forget(client, uuid7())
    assert not await is_gone(client, id_)
    await forget(client, message_id)
    assert await is_gone(client, id_)
    assert id_ not in await found(client, "a1")
    with pytest.raises(NotFound):
        await keep(client, **fields)


async def test_a_version_that_was_uploaded_belongs_to_no_message(client: Client) -> None:
    message_id = uuid7()
    id_ = await keep(client, message_id=str(message_id))
    await client.done(id_)
    answer = await client.http.put(f"/api/v1/documents/{id_}", files={"file": ("new.txt", b"A new text.")})
    assert (answer.status_code, answer.json()["message_id"]) == (202, None)

    async def switched() -> bool:
        return bool((await client.http.get(f"/api/v1/documents/{id_}")).json()["indexed_version"] == 2)

    await client.platform.until(switched)
    await forget(client, message_id)
    assert not await is_gone(client, id_)


async def test_the_erasure_of_the_person_deletes_the_document(client: Client) -> None:
    id_, other = await keep(client, path=BOBS, subject_id="bob"), await keep(client)
    erased = SubjectErased(tenant_id=client.tenant_id, subject_id="bob")
    await client.platform.produce(PLATFORM_EVENTS, erased, key=client.tenant_id, tenant_id=client.tenant_id)

    async def gone() -> bool:
        return await is_gone(client, id_)

    await client.platform.until(gone)
    assert not await is_gone(client, other)
    with pytest.raises(NotFound):
        await keep(client, path=BOBS, subject_id="bob")


async def test_a_wrong_call_is_refused_by_its_field(client: Client) -> None:
    wrong: tuple[tuple[str, Any, str], ...] = (
        ("path", "ann/documents/d/plan.pdf", "path"),
        ("path", "ann/attachments/another-tenant/c/note.txt", "path"),
        ("path", BOBS, "path"),
        ("path", PHOTO, "file"),
        ("document_id", "one", "document_id"),
        ("message_id", "", "message_id"),
        ("subject_id", "", "subject_id"),
        ("audience", ["everyone"], "audience[0]"),
        ("tags", [" "], "tags[0]"),
        ("name", "/", "name"),
    )
    for field, value, named in wrong:
        with pytest.raises(InvalidMessage) as refused:
            await keep(client, **{field: value})
        assert refused.value.field == named
    with pytest.raises(NotFound):
        await keep(client, path=f"ann/attachments/{TENANT}/c/gone.txt")
    with pytest.raises(Forbidden):
        await keep(client, caller="plugin")
