"""An agent's reply is remembered for its session only."""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import uuid4

import pytest

from infra.errors import InvalidMessage
from protos.catalog import AGENT_EVENTS, PLATFORM_EVENTS
from protos.messages.agent import RunCompleted
from protos.messages.user import SubjectErased
from tests.services.memory.conftest import Client
from tooling.testing.platform import Platform

REPLY = "Your order of two bags of beans leaves the roastery on Thursday."
QUESTION = "When is the order sent?"


@pytest.fixture(scope="module")
async def client(memory: Platform) -> AsyncIterator[Client]:
    client = Client(memory, "tenant-of-talk")
    yield client
    await client.http.aclose()


async def test_a_reply_is_found_in_its_own_session_when_it_is_asked_for(memory: Platform, client: Client) -> None:
    for session_key in ("session-a", "session-b"):
        said = RunCompleted(run_id=uuid4(), session_key=session_key, reply=f"{REPLY} ({session_key})")
        for _ in range(2):
            await memory.produce(AGENT_EVENTS, said, key=session_key, tenant_id=client.tenant_id)

    async def remembered() -> list[str]:
        found = await client.retrieve(QUESTION, types=["conversation"], session_key="session-a")
        return [passage.text for passage in found]

    assert await memory.until(remembered) == [f"{REPLY} (session-a)"]
    [passage] = await client.retrieve(QUESTION, types=["conversation", "document"], session_key="session-a")
    assert (passage.source.name, passage.source.document_id) == ("conversation", "")
    assert await client.retrieve(QUESTION) == []
    assert await client.retrieve(QUESTION, types=["conversation"], session_key="session-c") == []
    with pytest.raises(InvalidMessage, match="session_key"):
        await client.retrieve(QUESTION, types=["conversation"])
    answer = await client.http.post(
        "/api/v1/memory/search", json={"query": QUESTION, "types": ["conversation"], "session_key": "session-a"}
    )
    assert answer.json()["items"][0]["source"]["document_id"] is None

    async with memory.database("memory").begin() as tx:
        stored = await tx.sql(
            "SELECT sealed, expires_at > now() + interval '29 days' FROM utterance WHERE session_key IN ('session-a', "
            "'session-b')"
        )
    assert len(stored) == 2
    # The platform's own model costs nothing.
    reported = [body["usage_id"] for _, body in await memory.outbox("memory", "usage.records")]
    assert not [usage_id for usage_id in reported if usage_id.startswith("conversation/")]
    assert all(b"roastery" not in sealed and expires for sealed, expires in stored)


async def test_a_reply_is_erased_with_its_person_and_a_late_one_is_not_stored(memory: Platform, client: Client) -> None:
    said = [
        RunCompleted(run_id=uuid4(), session_key="session-e", reply=f"{REPLY} ({person})", subject_id=person)
        for person in ("ann", "bob")
    ]
    for event in said:
        await memory.produce(AGENT_EVENTS, event, key="session-e", tenant_id=client.tenant_id)

    async def remembered() -> list[str]:
        found = await client.retrieve(QUESTION, types=["conversation"], session_key="session-e")
        return sorted(passage.text for passage in found)

    async def both() -> bool:
        return len(await remembered()) == 2

    await memory.until(both)
    erased = SubjectErased(tenant_id=client.tenant_id, subject_id="ann")
    await memory.produce(PLATFORM_EVENTS, erased, key=client.tenant_id, tenant_id=client.tenant_id)

    async def one() -> bool:
        return await remembered() == [f"{REPLY} (bob)"]

    await memory.until(one)
    late = RunCompleted(run_id=uuid4(), session_key="session-e", reply=REPLY, subject_id="ann")
    after = RunCompleted(run_id=uuid4(), session_key="session-e", reply=f"{REPLY} (after)", subject_id="bob")
    for event in (late, after):
        await memory.produce(AGENT_EVENTS, event, key="session-e", tenant_id=client.tenant_id)

    async def came() -> bool:
        return await remembered() == [f"{REPLY} (after)", f"{REPLY} (bob)"]

    await memory.until(came)
    async with memory.database("memory").begin() as tx:
        assert not await tx.sql("SELECT FROM utterance WHERE subject_id = 'ann'")


async def test_what_has_expired_is_not_found_any_more(memory: Platform, client: Client) -> None:
    said = RunCompleted(run_id=uuid4(), session_key="session-d", reply=REPLY)
    await memory.produce(AGENT_EVENTS, said, key="session-d", tenant_id=client.tenant_id)

    async def remembered() -> bool:
        return bool(await client.retrieve(QUESTION, types=["conversation"], session_key="session-d"))

    await memory.until(remembered)
    async with memory.database("memory").begin() as tx:
        await tx.sql("UPDATE utterance SET expires_at = now() WHERE run_id = $1", said.run_id)
    assert not await remembered()
