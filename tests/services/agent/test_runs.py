"""Runs as clients see them: live, afterwards, and when they are cancelled."""

from __future__ import annotations

import asyncio
import base64
import json
from contextlib import aclosing
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from redis.asyncio import Redis

from infra.clock import uuid7
from infra.postgres.tx import Tx
from infra.security.crypto import Cipher
from infra.security.subjects import SubjectKeys
from infra.stores.cache import Cache
from protos.catalog import CHANNEL_EVENTS, PLATFORM_EVENTS
from protos.messages.channel import MessageDelivered, MessageUndelivered
from protos.messages.user import SubjectErased
from services.agent.runs import queries
from tests.services.agent.conftest import MODEL, Tenant, World
from tooling.testing.model_server import Fails, Says
from tooling.testing.platform import MASTER_KEY
from tooling.testing.service_fakes import WEATHER


async def test_the_text_can_be_watched_while_it_is_written(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    # Longer than the beginning that is held back until it is clear that it is not a thought of the model.
    text = "Ein Satz, 一句话, and a crab 🦀 at the end. " * 4
    heard: list[dict[str, Any]] = []
    redis = Redis.from_url(world.platform.stack.redis_url)
    async with aclosing(Cache(redis).listen("claw:run:*")) as messages:
        assert await anext(messages) is None
        world.models.script(MODEL, Fails(500), Says(text))
        run_id = await tenant.say(agent, "Hi")
        async for message in messages:
            assert message
            channel, data = message
            if channel == f"claw:run:{run_id}":
                heard.append(json.loads(data))
            if "".join(piece["text"] for piece in heard) == text:
                break
    await redis.aclose()
    assert [piece["n"] for piece in heard] == list(range(1, len(heard) + 1))
    # The first attempt wrote no text.
    assert {(piece["step"], piece["attempt"]) for piece in heard} == {(1, 2)}
    assert len(heard) > 1


async def test_the_facts_of_a_run_that_ends_while_they_are_read_have_its_reply(
    world: World, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = asyncio.Event()
    world.models.script(MODEL, Says("It rains.", waits=go))
    run_id = await tenant.say(await tenant.agent(), "Weather?")
    await world.platform.until(lambda: _is(tenant, run_id, "running"))
    load = queries.load

    async def loaded_just_before(tx: Tx, id_: UUID) -> queries.StoredRun:
        row = await load(tx, id_)
        go.set()
        await tenant.over(run_id)
        return row

    monkeypatch.setattr(queries, "load", loaded_just_before)
    async with world.platform.database("agent").begin(tenant_id=tenant.id) as tx:
        facts = await queries.facts(tx, SubjectKeys(Cipher(MASTER_KEY)), UUID(run_id), 0)
    assert (facts[-1].type, facts[-1].data["reply"]) == ("agent.v1.RunCompleted", "It rains.")


async def test_a_run_that_waits_its_turn_is_cancelled_at_once(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    go = asyncio.Event()
    world.models.script(MODEL, Says("One.", waits=go))
    first = await tenant.say(agent, "a")
    await world.platform.until(lambda: _is(tenant, first, "running"))
    second = await tenant.say(agent, "b")
    answer = await tenant.call("POST", f"/api/v1/runs/{second}/cancel")
    assert answer["status"] == "cancelled"
    # A second cancellation changes nothing. The next message needs a run of its own.
    assert (await tenant.call("POST", f"/api/v1/runs/{second}/cancel"))["status"] == "cancelled"
    third = await tenant.say(agent, "c")
    assert third not in (first, second)
    go.set()
    assert (await tenant.over(third))["status"] == "completed"
    assert (await tenant.run(second))["error"] == "cancelled on request"
    await tenant.call("POST", f"/api/v1/runs/{first}/cancel", expect=409)


async def test_a_run_is_cancelled_in_the_middle_of_a_call(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    world.models.script(MODEL, Says("A long text", stalls_after=1))
    await tenant.receive(agent, "Hi")
    [run] = await world.platform.until(lambda: _listed(tenant, "running"))
    await tenant.call("POST", f"/api/v1/runs/{run['id']}/cancel")
    found = await tenant.over(run["id"])
    assert (found["status"], found["reply"]) == ("cancelled", None)
    assert await tenant.sent("channel.outbound") == []
    assert (await tenant.sent("agent.events"))[-1]["status"] == "cancelled"


@pytest.mark.parametrize("answer", [Says(calls=((WEATHER, '{"city":"Bern"}'),)), Says("The answer.")])
async def test_after_a_cancel_no_tool_runs_and_nothing_is_said(world: World, tenant: Tenant, answer: Says) -> None:
    agent = await tenant.agent(tools=[WEATHER])
    go = asyncio.Event()
    world.models.script(MODEL, replace(answer, waits=go))
    asked = len(world.models.asked(MODEL))
    run_id = await tenant.say(agent, "Weather?")
    await world.platform.until(lambda: _is_asked(world, asked + 1))
    before = dict(world.peers.plugin.calls)
    await tenant.call("POST", f"/api/v1/runs/{run_id}/cancel")
    go.set()
    run = await tenant.over(run_id)
    assert (run["status"], run["reply"]) == ("cancelled", None)
    assert world.peers.plugin.calls == before


async def test_a_run_is_cancelled_while_it_waits_to_try_again(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    world.models.script(MODEL, Fails(429, retry_after=120))
    asked = len(world.models.asked(MODEL))
    run_id = await tenant.say(agent, "Hi")

    await world.platform.until(lambda: _is_asked(world, asked + 1))
    await tenant.call("POST", f"/api/v1/runs/{run_id}/cancel")
    assert (await tenant.over(run_id))["status"] == "cancelled"


async def test_the_timeline_tells_the_story_with_delivery_and_charge(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    await tenant.receive(agent, "Hi")
    [run] = await tenant.runs(1)
    [send] = await tenant.sent("channel.outbound")
    world.peers.billing.charge(run["id"], f"{run['id']}/1/1", amount_nanos=1_700)
    world.peers.billing.charge(run["id"], f"{run['id']}/seconds", amount_nanos=0)
    event = MessageDelivered(
        delivery_id=send["delivery_id"],
        channel_id=send["channel_id"],
        session_key=send["session_key"],
        run_id=run["id"],
        vendor_message_id="v1",
    )
    await world.platform.produce(CHANNEL_EVENTS, event, key=send["session_key"], tenant_id=tenant.id)
    path = f"/api/v1/runs/{run['id']}/timeline"

    async def delivered() -> list[dict[str, Any]] | None:
        items: list[dict[str, Any]] = (await tenant.call("GET", path))["items"]
        return items if any(item["data"].get("state") == "delivered" for item in items) else None

    items = await world.platform.until(delivered)
    assert items
    kinds = [item["kind"] for item in items]
    assert sorted(kinds) == sorted(["inbound", "queued", "model", "reply", "delivery"] + 2 * ["usage", "charge"])
    assert kinds[:3] == ["inbound", "queued", "model"]
    assert [item["at"] for item in items] == sorted(item["at"] for item in items)
    # The first of each kind: the call of the model comes before the seconds of the run.
    by_kind = {item["kind"]: item for item in reversed(items)}
    assert by_kind["inbound"]["data"]["text"] == "Hi"
    assert by_kind["reply"]["data"]["text"] == "You said: Hi"
    assert by_kind["usage"]["data"]["quantities"]["input_tokens"] == 12
    assert by_kind["charge"]["data"]["amount_nanos"] == 1_700
    shown = await tenant.run(run["id"])
    assert (shown["cost_nanos"], shown["currency"]) == (1_700, "USD")


async def test_a_reply_that_did_not_arrive_is_shown(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    await tenant.receive(agent, "Hi")
    [run] = await tenant.runs(1)
    [send] = await tenant.sent("channel.outbound")
    event = MessageUndelivered(
        delivery_id=send["delivery_id"],
        channel_id=send["channel_id"],
        session_key=send["session_key"],
        run_id=run["id"],
        outcome="unknown",
        reason="no answer",
    )
    await world.platform.produce(CHANNEL_EVENTS, event, key=send["session_key"], tenant_id=tenant.id)

    async def shown() -> bool:
        items = (await tenant.call("GET", f"/api/v1/runs/{run['id']}/timeline"))["items"]
        return any(item["data"].get("state") == "unknown" for item in items)

    await world.platform.until(shown)


async def test_the_timeline_has_the_message_of_a_channel_whose_clock_is_fast(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    await tenant.receive(agent, "Hi", seconds_late=-240)
    [run] = await tenant.runs(1)
    items = (await tenant.call("GET", f"/api/v1/runs/{run['id']}/timeline"))["items"]
    assert [item["data"]["text"] for item in items if item["kind"] == "inbound"] == ["Hi"]


async def test_what_a_live_stream_has_missed_can_be_read(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    run_id = await tenant.say(agent, "Hi")
    await tenant.over(run_id)
    path = f"/internal/runs/{run_id}/events"
    items = (await tenant.call("GET", path))["items"]
    published = await tenant.sent("agent.events")
    # The same events in the same order as on the topic, without the words of the person.
    assert published[-1]["said"] == "Hi"
    assert [item["data"] for item in items] == [*published[:-1], published[-1] | {"said": "", "message_id": None}]
    assert [item["type"] for item in items] == [
        "agent.v1.RunStarted",
        "agent.v1.StepStarted",
        "agent.v1.StepCompleted",
        "agent.v1.RunCompleted",
    ]
    assert (await tenant.call("GET", path, params={"after": 2}))["items"] == items[2:]


async def test_an_erased_person_is_read_by_nobody_and_answered_no_more(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    await tenant.receive(agent, "My secret")
    [run] = await tenant.runs(1)
    async with world.platform.database("agent").begin() as tx:
        stored = await tx.sql("SELECT data FROM event")
    plain = base64.b64encode(b"My secret")
    assert stored
    assert not any(b"secret" in bytes(data) or plain in bytes(data) for (data,) in stored)
    erased = SubjectErased(tenant_id=tenant.id, subject_id="person-1")
    await world.platform.produce(PLATFORM_EVENTS, erased, key=tenant.id, tenant_id=tenant.id)

    async def gone() -> bool:
        return bool((await tenant.run(run["id"]))["reply"] == "[erased]")

    await world.platform.until(gone)
    items = (await tenant.call("GET", f"/api/v1/runs/{run['id']}/timeline"))["items"]
    assert "secret" not in json.dumps(items)
    late = await tenant.receive(agent, "Late")
    after = await tenant.agent()
    await tenant.over(await tenant.say(after, "still here"))

    async def handled() -> bool:
        async with world.platform.database("agent").begin() as tx:
            return bool(await tx.sql("SELECT 1 FROM inbox WHERE message_id = $1", late))

    await world.platform.until(handled)
    assert len((await tenant.call("GET", "/api/v1/runs"))["items"]) == 2


async def test_lists_are_filtered_and_paged(world: World, tenant: Tenant) -> None:
    agent, other = await tenant.agent(), await tenant.agent()
    mine = [await tenant.say(agent, "Hi", session=f"s{n}") for n in range(3)]
    await tenant.say(other, "Hi")
    await tenant.runs(4)
    first = await tenant.call("GET", "/api/v1/runs", params={"agent_id": agent, "limit": 2})
    rest = await tenant.call("GET", "/api/v1/runs", params={"agent_id": agent, "cursor": first["next"]})
    assert [item["id"] for item in first["items"] + rest["items"]] == mine[::-1]
    assert rest["next"] is None
    key = first["items"][0]["session_key"]
    found = await tenant.call("GET", "/api/v1/runs", params={"session_key": key, "status": "completed"})
    assert [item["id"] for item in found["items"]] == [mine[2]]
    await tenant.call("GET", "/api/v1/runs", params={"cursor": "bm9uZQ=="}, expect=422)
    await tenant.call("GET", f"/api/v1/runs/{uuid7()}", expect=404)


async def test_a_page_of_long_answers_is_cut(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    made = []
    for n in range(7):
        world.models.script(MODEL, Says("x" * 800_000, whole=True))
        made.append(await tenant.say(agent, "Hi", session=f"s{n}"))
        await tenant.over(made[-1])
    first = await tenant.call("GET", "/api/v1/runs?limit=200")
    rest = await tenant.call("GET", f"/api/v1/runs?limit=200&cursor={first['next']}")
    assert [[run["id"] for run in page["items"]] for page in (first, rest)] == [made[:0:-1], made[:1]]
    assert rest["next"] is None


async def _is(tenant: Tenant, run_id: str, status: str) -> bool:
    return bool((await tenant.run(run_id))["status"] == status)


async def _is_asked(world: World, count: int) -> bool:
    return len(world.models.asked(MODEL)) == count


async def _listed(tenant: Tenant, status: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await tenant.call("GET", "/api/v1/runs", params={"status": status}))["items"]
    return found
