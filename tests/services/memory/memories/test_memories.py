"""Memories: learned from runs, used in prompts, seen, corrected and deleted by their people, erased with them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
import pytest

from infra.clock import utcnow, uuid7
from infra.errors import InvalidMessage
from infra.outgoing.client import Outgoing
from infra.security.crypto import Cipher
from infra.security.subjects import SubjectKeys
from infra.web import rpc
from protos.catalog import AGENT_EVENTS, PLATFORM_EVENTS
from protos.memory.v1 import memory_pb2, memory_pb2_grpc
from protos.messages.agent import RunCompleted, RunMessageDeleted
from protos.messages.user import SubjectErased
from services.memory.domain import count_tokens
from services.memory.memories.keeping import Keeping, New
from services.memory.memories.store import TOKENS
from services.memory.rpc import PAGE
from services.plugin.calls import run_tool
from services.plugin.domain import CallOutcome, ToolRequest
from services.plugin.registry import Offered
from services.plugin.runner import ToolRunner
from services.plugin.tools.builtin import BUILTIN, Backends
from services.plugin.tools.memories import NOTE
from tests.services.memory.conftest import Client
from tooling.testing.platform import MASTER_KEY, Platform

TENANT = "tenant-of-memories"


@pytest.fixture(scope="module")
async def client(memory: Platform) -> AsyncIterator[Client]:
    client = Client(memory, TENANT)
    yield client
    await client.http.aclose()


def person(memory: Platform, subject_id: str, **identity: Any) -> httpx.AsyncClient:
    """The HTTP client of a member without other rights than to read."""
    identity.setdefault("scopes", ("read",))
    return memory.client("memory", TENANT, actor=subject_id, **identity)


async def say(memory: Platform, subject_id: str, said: str, **fields: Any) -> RunCompleted:
    run = RunCompleted(
        run_id=uuid7(),
        session_key=f"session of {subject_id}",
        reply="Noted.",
        subject_id=subject_id,
        said=said,
        **fields,
    )
    await memory.produce(AGENT_EVENTS, run, key=run.session_key, tenant_id=TENANT)
    return run


async def listed(http: httpx.AsyncClient, **params: str) -> list[dict[str, Any]]:
    answer = await http.get("/api/v1/memories", params=params)
    assert answer.status_code == 200, answer.text
    items: list[dict[str, Any]] = answer.json()["items"]
    return items


async def test_what_was_learned_from_a_deleted_message_is_forgotten(memory: Platform) -> None:
    run = await say(memory, "person-deletes", "My name is Ada. I am allergic to nuts.")
    names = [item["text"] for item in await known_by_number(memory, "person-deletes", 2)]
    assert len(names) == 2
    await say(memory, "person-deletes", "My name is Eva.")
    await known(memory, "person-deletes", ["My name is Eva.", "I am allergic to nuts."])
    deleted = RunMessageDeleted(
        run_id=run.run_id,
        session_key=run.session_key,
        message_id=uuid7(),
        subject_id="person-deletes",
        channel_id=uuid7(),
        said="My name is Ada.",
    )
    await memory.produce(AGENT_EVENTS, deleted, key=run.session_key, tenant_id=TENANT)
    # The older name does not come back in the place of the newer one.
    await known(memory, "person-deletes", ["My name is Eva."])


async def known_by_number(memory: Platform, subject_id: str, count: int) -> list[dict[str, Any]]:
    """Waits until so many memories of the person are in force."""

    async def found() -> list[dict[str, Any]] | None:
        async with person(memory, subject_id) as http:
            items = [item for item in await listed(http, scope="user") if item["replaced_by"] is None]
        return items if len(items) == count else None

    return await memory.until(found) or []


async def known(memory: Platform, subject_id: str, texts: list[str]) -> list[dict[str, Any]]:
    """Waits until exactly these memories of the person are in force, and returns them, newest first."""

    async def found() -> tuple[list[dict[str, Any]]] | None:
        async with person(memory, subject_id) as http:
            items = [item for item in await listed(http, scope="user") if item["replaced_by"] is None]
        return (items,) if sorted(item["text"] for item in items) == sorted(texts) else None

    answer = await memory.until(found)
    assert answer is not None
    return answer[0]


async def test_a_fact_of_a_person_is_learned_with_its_origin_and_given_to_agents(
    memory: Platform, client: Client
) -> None:
    run = await say(memory, "person-1", "Hi! I'm allergic to nuts. What cakes are there?", message_id="m-1")
    [item] = await known(memory, "person-1", ["I'm allergic to nuts."])
    source = {"run_id": str(run.run_id), "message_id": "m-1", "channel_id": None, "learned_by": "rules"}
    assert item["source"] == source
    assert (item["scope"], item["scope_id"], item["kind"], item["speaker"]) == ("user", "person-1", "fact", "person")
    assert (item["importance"], item["confidence"]) == (9, 0.8)
    options = {"types": ["document", "memory"], "subject_id": "person-1", "session_key": "another session"}
    found = await client.retrieve("What shall I order?", **options)
    [passage] = [each for each in found if each.text == "I'm allergic to nuts."]
    assert list(passage.match) == ["memory"]
    assert (passage.source.name, passage.source.document_id) == ("memory", "")
    assert str(run.run_id) in passage.source.section
    async with person(memory, "person-1") as http:
        answer = await http.post("/api/v1/memory/search", json={"query": "nuts", "types": ["memory"]})
        assert "I'm allergic to nuts." in [each["text"] for each in answer.json()["items"]]
        assert (await listed(http, scope="user"))[0]["uses"] == 2
    other = {"types": ["memory"], "subject_id": "person-2"}
    assert passage.text not in [each.text for each in await client.retrieve("What shall I order?", **other)]
    async with memory.database("memory").begin() as tx:
        rows = await tx.sql("SELECT sealed FROM memory UNION ALL SELECT data FROM event WHERE type = 'MemoryLearned'")
    assert rows
    assert all(b"nuts" not in data for (data,) in rows)


async def test_the_same_fact_twice_is_one_memory_and_a_newer_one_replaces_the_older(memory: Platform) -> None:
    await say(memory, "person-3", "I live in Oslo. I like tea.")
    await known(memory, "person-3", ["I live in Oslo.", "I like tea."])
    await say(memory, "person-3", "i live in OSLO! I like tea.")
    async with person(memory, "person-3") as http:

        async def repeated() -> bool:
            return [item["uses"] for item in await listed(http, scope="user")] == [1, 1]

        await memory.until(repeated)
        await say(memory, "person-3", "I moved to Bergen. I do not like tea.")
        new = await known(memory, "person-3", ["I moved to Bergen.", "I do not like tea."])
        by_text = {item["text"]: item for item in await listed(http, scope="user")}
        assert by_text["I live in Oslo."]["replaced_by"] in [item["id"] for item in new]
        assert len(by_text) == 4


async def test_instances_that_learn_one_fact_at_once_keep_one_memory(memory: Platform) -> None:
    keeping = Keeping(SubjectKeys(Cipher("m" * 43 + "=")))

    def new(text: str, seconds: int = 0) -> New:
        return New(
            id=uuid7(),
            scope="user",
            scope_id="person-4",
            subject_id="person-4",
            text=text,
            kind="fact",
            topic="home",
            importance=5,
            confidence=1,
            speaker="person",
            at=utcnow() + timedelta(seconds=seconds),
        )

    async def learn(each: New) -> bool:
        async with memory.database("memory").begin(tenant_id="tenant-of-races") as tx:
            return (await keeping.learn(tx, each))[1]

    assert sum(await asyncio.gather(*(learn(new("I live in Oslo.")) for _ in range(4)))) == 1
    # Several that contradict each other: the newest by the time at which it was said is in force.
    towns = [new(f"I live in town {n}.", seconds=n) for n in (3, 9, 1, 5)]
    assert all(await asyncio.gather(*map(learn, towns)))
    async with memory.database("memory").begin() as tx:
        rows = await tx.sql("SELECT id FROM memory WHERE tenant_id = 'tenant-of-races' AND replaced_by IS NULL")
    assert rows == [(towns[1].id,)]


async def test_people_correct_and_delete_only_theirs(memory: Platform, client: Client, stranger: Client) -> None:
    await say(memory, "person-5", "I live in Oslo. I work at the harbour.")
    items = {
        item["text"]: item for item in await known(memory, "person-5", ["I live in Oslo.", "I work at the harbour."])
    }
    path = f"/api/v1/memories/{items['I live in Oslo.']['id']}"
    async with person(memory, "person-5") as http, person(memory, "person-6") as other:
        assert (await other.get(path)).status_code == 404
        assert (await other.patch(path, json={"text": "x"})).status_code == 404
        assert (await other.delete(path)).status_code == 404
        assert (await stranger.http.get(path)).status_code == 404
        changed = await http.patch(path, json={"text": "I live in Bergen.", "importance": 10})
        assert (changed.json()["text"], changed.json()["importance"]) == ("I live in Bergen.", 10)
        assert (await http.get(path)).json() == changed.json()
        same = await http.patch(path, json={"text": "i work at the HARBOUR"})
        assert same.status_code == 409
        ends = (utcnow() - timedelta(seconds=1)).isoformat()
        assert (await http.patch(path, json={"expires_at": ends})).status_code == 200
        assert (await http.get(path)).status_code == 404
        work = f"/api/v1/memories/{items['I work at the harbour.']['id']}"
        assert (await http.delete(work)).status_code == 204
        assert (await http.delete(work)).status_code == 404
        assert await listed(http, scope="user") == []
    recalled = await client.retrieve("Where do I live?", types=["memory"], subject_id="person-5")
    assert "I live in Bergen." not in [passage.text for passage in recalled]


async def test_people_put_memories_away_and_undo_a_replacement(memory: Platform, client: Client) -> None:
    await say(memory, "person-10", "I live in Oslo.")
    await known(memory, "person-10", ["I live in Oslo."])
    await say(memory, "person-10", "I moved to Bergen.")
    [bergen] = await known(memory, "person-10", ["I moved to Bergen."])

    async def given() -> set[str]:
        found = await client.retrieve("Where do I live?", types=["memory"], subject_id="person-10")
        return {passage.text for passage in found if "Oslo" in passage.text or "Bergen" in passage.text}

    async with person(memory, "person-10") as http, person(memory, "person-11") as other:
        [oslo] = [item for item in await listed(http, scope="user") if item["replaced_by"]]
        paths = [f"/api/v1/memories/{item['id']}" for item in (oslo, bergen)]
        assert (await other.patch(paths[1], json={"archived": True})).status_code == 404
        restored = (await http.patch(paths[0], json={"archived": False})).json()
        assert (restored["replaced_by"], restored["text"]) == (None, "I live in Oslo.")
        assert (await http.get(paths[0])).json() == restored
        assert await given() == {"I live in Oslo.", "I moved to Bergen."}
        away = (await http.patch(paths[1], json={"archived": True})).json()
        assert away["archived_at"] is not None
        assert (await http.get(paths[1])).json()["archived_at"] is not None
        assert await given() == {"I live in Oslo."}
        await say(memory, "person-10", "I moved to Bergen!")

        async def back() -> bool:
            return (await http.get(paths[1])).json()["archived_at"] is None

        await memory.until(back)
    async with memory.database("memory").begin() as tx:
        rows = await tx.sql("SELECT type FROM event WHERE stream_id LIKE '%' || $1 ORDER BY version", bergen["id"])
    assert [type_ for (type_,) in rows] == ["MemoryLearned", "MemoryArchived", "MemoryRepeated"]


async def test_a_client_adds_memories_of_all_scopes(memory: Platform, client: Client) -> None:
    async def add(body: dict[str, Any], status: int = 201, http: httpx.AsyncClient | None = None) -> Any:
        answer = await (http or client.http).post("/api/v1/memories", json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    async with person(memory, "member:m1") as http:
        mine = await add({"text": "I like window seats."}, http=http)
        assert (mine["scope"], mine["scope_id"], mine["speaker"]) == ("user", "member:m1", "member:m1")
        assert (await add({"text": "i like WINDOW seats"}, http=http))["id"] == mine["id"]
        await add({"text": "x", "scope": "tenant"}, 403, http)
        await add({"text": "x", "scope_id": "member:m2"}, 403, http)
    async with person(memory, "member:m3") as http:
        await add({"text": "I live in Oslo."}, http=http)
        # One that ends replaces none for good.
        await add({"text": "I live in Turku.", "expires_at": "2999-01-01T00:00:00Z"}, http=http)
        bergen = await add({"text": "I moved to Bergen."}, http=http)
        assert [item["replaced_by"] for item in await listed(http, scope="user")] == [None, None, bergen["id"]]
    run_id = str(uuid4())
    await add({"text": "We close at six.", "scope": "tenant", "importance": 8, "source": {"run_id": run_id}})
    await add({"text": "Speak formally.", "scope": "agent", "scope_id": "a1", "kind": "preference"})
    await add({"text": "The topic is cakes.", "scope": "session", "scope_id": "s1"})
    options: dict[str, Any] = {"types": ["memory"], "agent_id": "a1", "session_key": "s1", "subject_id": "member:m1"}
    texts = {passage.text for passage in await client.retrieve("anything", **options)}
    assert texts == {"We close at six.", "Speak formally.", "The topic is cakes.", "I like window seats."}
    texts = {passage.text for passage in await client.retrieve("anything", types=["memory"], agent_id="a2")}
    assert texts == {"We close at six."}
    for body, field in (
        ({"text": " "}, "text"),
        ({"text": "x", "scope": "agent"}, "scope_id"),
        ({"text": "x", "scope": "tenant", "scope_id": "a"}, "scope_id"),
        ({"text": "x", "importance": 11}, "importance"),
        ({"text": "x", "confidence": 2}, "confidence"),
        ({"text": "x", "expires_at": "2020-01-01T00:00:00Z"}, "expires_at"),
        ({"text": "x", "scope": "world"}, "scope"),
    ):
        assert (await add(body, 422))["errors"][0]["field"] == field
    pages = []
    cursor = None
    while True:
        params = {"limit": "2", **({"cursor": cursor} if cursor else {})}
        answer = (await client.http.get("/api/v1/memories", params=params)).json()
        pages += answer["items"]
        cursor = answer["next"]
        if cursor is None:
            break
    assert len({item["id"] for item in pages}) == len(pages) >= 4


async def test_memories_take_a_bounded_part_of_the_prompt_the_most_important_first(
    memory: Platform, client: Client
) -> None:
    async with person(memory, "person-7") as http:
        for n in range(40):
            body = {
                "text": f"Note {n}: " + "the harbour is closed on this day. " * 3,
                "importance": 10 if n == 7 else 2,
            }
            assert (await http.post("/api/v1/memories", json=body)).status_code == 201
    found = await client.retrieve("Which note?", types=["memory"], subject_id="person-7")
    own = [passage.text for passage in found if passage.text.startswith("Note")]
    assert own[0].startswith("Note 7:")
    assert 5 <= len(own) < 40
    assert sum(count_tokens(passage.text) for passage in found) <= TOKENS


async def test_erasure_takes_what_was_learned_and_a_late_run_brings_nothing_back(memory: Platform) -> None:
    await say(memory, "person-8", "I live in Oslo.")
    await known(memory, "person-8", ["I live in Oslo."])
    gone = SubjectErased(tenant_id=TENANT, subject_id="person-8")
    await memory.produce(PLATFORM_EVENTS, gone, key=TENANT, tenant_id=TENANT)
    await known(memory, "person-8", [])

    async def forgotten() -> bool:
        async with memory.database("memory").begin() as tx:
            return not await tx.sql("SELECT 1 FROM utterance WHERE subject_id = 'person-8'")

    await memory.until(forgotten)
    late = await say(memory, "person-8", "I live in Oslo.")
    await say(memory, "person-9", "I live in Oslo.")
    # Both runs are on one partition or not; the dead letters and the rows show that the first left nothing.
    await known(memory, "person-9", ["I live in Oslo."])

    async def handled() -> bool:
        async with memory.database("memory").begin() as tx:
            return bool(await tx.sql("SELECT 1 FROM utterance WHERE subject_id = 'person-9'"))

    await memory.until(handled)
    async with memory.database("memory").begin() as tx:
        assert not await tx.sql("SELECT 1 FROM memory WHERE subject_id = 'person-8'")
        assert not await tx.sql("SELECT 1 FROM utterance WHERE run_id = $1", late.run_id)
        assert not await tx.sql("SELECT 1 FROM dead_letter")


class Learns:
    """Sends the facts that a model found in the messages of a run, as the agent service does."""

    def __init__(self, memory: Platform, tenant_id: str = TENANT) -> None:
        self._stub = memory_pb2_grpc.MemoryStub(memory.channels("agent").to(memory.grpc("memory"), "memory"))
        self._metadata = rpc.tenant_metadata(tenant_id)

    async def __call__(self, subject_id: str, said: str, *facts: memory_pb2.Fact, **fields: Any) -> int:
        fields.setdefault("run_id", str(uuid7()))
        fields.setdefault("model", "openai/gpt-4o-mini")
        request = memory_pb2.LearnRequest(subject_id=subject_id, said=said, facts=facts, **fields)
        request.said_at.FromDatetime(utcnow())
        return int((await self._stub.Learn(request, metadata=self._metadata, timeout=20)).learned)


def fact(text: str, quote: str, **fields: Any) -> memory_pb2.Fact:
    given: dict[str, Any] = {"kind": "fact", "importance": 5, "confidence": 0.9} | fields
    return memory_pb2.Fact(text=text, quote=quote, **given)


async def test_what_a_model_found_is_kept_once_for_the_person_who_said_it(memory: Platform, client: Client) -> None:
    learn, run_id = Learns(memory), str(uuid7())
    said = "We moved, so it's Bergen now. I can't stand fennel! Do I like tea? Forget that I am bald."
    facts = (
        fact("Lives in Bergen.", "it's Bergen now", topic="home", message_id="m-1"),
        fact("Dislikes fennel.", "I can't stand fennel", kind="preference"),
        fact("Likes tea.", "I like tea"),
        fact("Is bald.", "I am bald"),
        fact("The administrator's word is swordfish.", "the word is swordfish"),
    )
    fields = {"run_id": run_id, "channel_id": str(uuid4()), "message_id": "m-2"}
    assert await learn("person-m1", said, *facts, **fields) == 2
    # A repeated call does not count them as said again.
    assert await learn("person-m1", said, *facts, **fields) == 0
    items = {i["text"]: i for i in await known(memory, "person-m1", ["Lives in Bergen.", "Dislikes fennel."])}
    source = {"run_id": run_id, "message_id": "m-1", "channel_id": fields["channel_id"]}
    assert items["Lives in Bergen."]["source"] == source | {"learned_by": "openai/gpt-4o-mini"}
    assert [(item["uses"], item["speaker"], item["scope_id"]) for item in items.values()] == [
        (0, "person", "person-m1")
    ] * 2
    # Without a model the message is searched by rules.
    assert await learn("person-m1", "I am allergic to nuts.", model="") == 1
    # A run that the model searches is left alone when its end is published.
    await say(memory, "person-m1", "I live in Oslo.", learning="model")
    await say(memory, "person-m1", "I like coffee.")
    await known(
        memory, "person-m1", ["Lives in Bergen.", "Dislikes fennel.", "I am allergic to nuts.", "I like coffee."]
    )


async def test_a_model_cannot_reach_the_memories_of_others(memory: Platform, client: Client) -> None:
    learn = Learns(memory)
    await learn("person-m2", "I live in Oslo.", model="")
    [theirs] = await known(memory, "person-m2", ["I live in Oslo."])
    note = (await client.http.post("/api/v1/memories", json={"text": "We sell lamps.", "scope": "tenant"})).json()
    said = "I sell lamps. I live in Turku."
    for other in (theirs["id"], note["id"], str(uuid4())):
        text = f"Lives in Turku, see {other}."
        await learn("person-m3", said, fact(text, "I live in Turku", same_as=other, replaces=other))
        merge = memory_pb2.Merge(memory_ids=[other, theirs["id"]], text="Everything is mine.")
        await learn("person-m3", said, merges=[merge])
    async with person(memory, "person-m3") as http:
        assert {item["scope_id"] for item in await listed(http, scope="user")} == {"person-m3"}
        assert len(await listed(http, scope="user")) == 3
    assert await known(memory, "person-m2", ["I live in Oslo."]) == [theirs]
    assert (await client.http.get(f"/api/v1/memories/{note['id']}")).json() == note
    assert (await client.http.delete(f"/api/v1/memories/{note['id']}")).status_code == 204
    for field, wrong in (
        ("facts[0].text", fact("x" * 501, said)),
        ("facts[0].text", fact(" ", said)),
        ("facts[0].kind", fact("x", said, kind="order")),
        ("facts[0].importance", fact("x", said, importance=11)),
        ("facts[0].confidence", fact("x", said, confidence=float("nan"))),
        ("facts[0].same_as", fact("x", said, same_as="nuts")),
    ):
        with pytest.raises(InvalidMessage) as refused:
            await learn("person-m3", said, wrong)
        assert refused.value.field == field
    with pytest.raises(InvalidMessage):
        await learn("person-m3", said, *[fact(f"Fact {n}", said) for n in range(11)])
    with pytest.raises(InvalidMessage):
        await learn("", said, fact("x", said))


async def test_small_memories_become_one_and_can_be_taken_apart(memory: Platform, client: Client) -> None:
    await Learns(memory)("person-m4", "I like tea. I like plums. I live in Oslo.", model="")
    items = {
        i["text"]: i for i in await known(memory, "person-m4", ["I like tea.", "I like plums.", "I live in Oslo."])
    }
    parts = [items["I like tea."]["id"], items["I like plums."]["id"]]
    whole = {"text": "I like tea and plums.", "parts": parts}
    async with person(memory, "person-m4") as http, person(memory, "person-m5") as other:
        assert (await other.post("/api/v1/memories", json=whole)).json()["errors"][0]["field"] == "parts[0]"
        for wrong in ({"parts": parts[:1]}, {"parts": parts[:1] * 2}, {"expires_at": "2100-01-01T00:00:00Z"}):
            assert (await http.post("/api/v1/memories", json=whole | wrong)).status_code == 422
        made = (await http.post("/api/v1/memories", json=whole)).json()
        assert (made["parts"], made["importance"], made["confidence"]) == (parts, 5, 0.8)
        await known(memory, "person-m4", ["I like tea and plums.", "I live in Oslo."])
        path = f"/api/v1/memories/{made['id']}/split"
        assert (await other.post(path)).status_code == 404
        assert [item["id"] for item in (await http.post(path)).json()["items"]] == parts
        assert (await http.post(path)).status_code == 404
        [oslo] = [i for i in await known(memory, "person-m4", list(items)) if i["text"] == "I live in Oslo."]
        assert (await http.post(f"/api/v1/memories/{oslo['id']}/split")).status_code == 409
    acts = [body["action"] for _, body in await memory.outbox("memory", "audit.logs") if body["actor"] == "person-m4"]
    assert [act for act in acts if act.startswith("memory.")] == ["memory.add", "memory.split"]


def chat(memory: Platform, speaker_id: str) -> Callable[..., Awaitable[CallOutcome]]:
    """Calls a tool of the plugin service as a run in which this person speaks would."""
    stub = memory_pb2_grpc.MemoryStub(memory.channels("plugin").to(memory.grpc("memory"), "memory"))
    tools = ToolRunner(Cipher(MASTER_KEY), Backends(Outgoing(allow_private=False), stub))

    async def call(name: str, **arguments: str) -> CallOutcome:
        asked = ToolRequest(TENANT, name, arguments, str(uuid4()), 20.0, subject_id=speaker_id, speaker_id=speaker_id)
        return await run_tool(tools, Offered(BUILTIN[name][0], None, name), asked)

    return call


def of(outcome: CallOutcome) -> dict[str, Any]:
    assert outcome.state == "succeeded", outcome.error
    found: dict[str, Any] = json.loads(outcome.result)
    # The sentences of a person are marked as material.
    assert "forgotten" in found or found["note"] == NOTE
    return found


async def test_a_person_sees_corrects_and_forgets_memories_in_the_chat(memory: Platform, client: Client) -> None:
    channel = uuid4()
    run = await say(memory, "person-c1", "I am allergic to nuts. I am vegetarian.", channel_id=channel)
    await known(memory, "person-c1", ["I am allergic to nuts.", "I am vegetarian."])
    call = chat(memory, "person-c1")
    listed = of(await call("memories_list"))
    items = {item["text"]: item for item in listed["memories"]}
    assert (set(items), listed["more"]) == ({"I am allergic to nuts.", "I am vegetarian."}, False)
    nuts, diet = items["I am allergic to nuts."], items["I am vegetarian."]
    assert (nuts["state"], nuts["source"]["by"]) == ("in force", "person")
    assert (nuts["source"]["channel_id"], nuts["source"]["run_id"]) == (str(channel), str(run.run_id))
    assert abs(datetime.fromisoformat(nuts["source"]["said_at"]) - utcnow()) < timedelta(days=1)

    corrected = of(await call("memories_correct", memory_id=diet["memory_id"], text=" I am no longer vegetarian. "))
    assert corrected["corrected"] == diet | {"text": "I am no longer vegetarian."}
    same = await call("memories_correct", memory_id=diet["memory_id"], text="i am allergic to NUTS")
    assert (same.state, same.error.partition(":")[0]) == ("failed", "text")
    blank = await call("memories_correct", memory_id=diet["memory_id"], text="  ")
    assert (blank.state, blank.error) == ("failed", "text: must have 1 to 500 characters")
    assert of(await call("memories_forget", memory_id=nuts["memory_id"])) == {"forgotten": nuts["memory_id"]}
    [left] = await known(memory, "person-c1", ["I am no longer vegetarian."])
    assert left["source"]["channel_id"] == str(channel)
    again = await call("memories_forget", memory_id=nuts["memory_id"])
    assert (again.state, again.error.partition(":")[0]) == ("failed", "memory_id")
    acts = [body for _, body in await memory.outbox("memory", "audit.logs") if body["actor"] == "person-c1"]
    assert [act["action"] for act in acts] == ["memory.change", "memory.delete"]
    # The wish is not learned as a fact, and the person's own sentence is the corrected memory.
    await say(memory, "person-c1", "Forget that I am allergic to nuts. I am no longer vegetarian. I live in Oslo.")
    await known(memory, "person-c1", ["I am no longer vegetarian.", "I live in Oslo."])


async def test_no_tool_reads_or_changes_the_memories_of_others(memory: Platform, client: Client) -> None:
    await say(memory, "person-c2", "I live in Turku.")
    [theirs] = await known(memory, "person-c2", ["I live in Turku."])
    note = (await client.http.post("/api/v1/memories", json={"text": "We sell lamps.", "scope": "tenant"})).json()
    for speaker_id in ("person-c3", ""):
        call = chat(memory, speaker_id)
        for memory_id in (theirs["id"], note["id"], "nuts", str(uuid4())):
            for outcome in (
                await call("memories_list", before=memory_id),
                await call("memories_correct", memory_id=memory_id, text="I live in Bergen."),
                await call("memories_forget", memory_id=memory_id),
            ):
                assert outcome.state == "failed"
                # The same for a memory of another person and for none.
                assert outcome.error.startswith(("before: ", "memory_id: ") if speaker_id else "memories are shown")
    assert of(await chat(memory, "person-c3")("memories_list"))["memories"] == []
    assert await known(memory, "person-c2", ["I live in Turku."]) == [theirs]
    assert (await client.http.get(f"/api/v1/memories/{note['id']}")).json() == note
    assert (await client.http.delete(f"/api/v1/memories/{note['id']}")).status_code == 204


async def test_many_memories_are_listed_in_pages_and_old_ones_too(memory: Platform) -> None:
    async with person(memory, "person-c4") as http:
        for n in range(PAGE + 1):
            assert (await http.post("/api/v1/memories", json={"text": f"I like number {n}."})).status_code == 201
        newest = (await listed(http, scope="user"))[0]
        assert (await http.patch(f"/api/v1/memories/{newest['id']}", json={"archived": True})).status_code == 200
    call = chat(memory, "person-c4")
    first = of(await call("memories_list"))
    assert (len(first["memories"]), first["more"], first["memories"][0]["state"]) == (PAGE, True, "put away")
    rest = of(await call("memories_list", before=first["memories"][-1]["memory_id"]))
    assert ([item["text"] for item in rest["memories"]], rest["more"]) == (["I like number 0."], False)
    source = {"by": "person-c4", "channel_id": None, "run_id": None}
    assert {key: rest["memories"][0]["source"][key] for key in source} == source
