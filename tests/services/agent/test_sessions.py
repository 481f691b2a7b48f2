"""Sessions: each message is answered once, by the right run, in order."""

from __future__ import annotations

import asyncio
from uuid import UUID

from infra.clock import uuid7
from tests.services.agent.conftest import MODEL, Tenant, World
from tooling.testing.model_server import Says


async def test_the_same_idempotency_key_is_the_same_run(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    first = await tenant.say(agent, "Hi", idempotency_key="k1")
    await tenant.over(first)
    assert await tenant.say(agent, "Hi", idempotency_key="k1") == first
    path = f"/api/v1/agents/{agent}/sessions/s/messages"
    problem = await tenant.call("POST", path, expect=422, json={"text": "Ho", "idempotency_key": "k1"})
    assert problem["errors"] == [{"field": "idempotency_key", "message": "was used before with another body"}]
    # The header takes precedence over the body.
    answer = await tenant.call(
        "POST", path, json={"text": "Hi", "idempotency_key": "k2"}, headers={"Idempotency-Key": "k1"}
    )
    assert answer["run_id"] == first
    together = await asyncio.gather(*(tenant.say(agent, "Two", idempotency_key="k3") for _ in range(5)))
    assert len(set(together)) == 1
    assert len(await tenant.runs(2)) == 2


async def test_a_message_that_is_delivered_twice_is_answered_once(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    message_id = uuid7()
    await tenant.receive(agent, "Hi", message_id=message_id)
    await tenant.receive(agent, "Hi", message_id=message_id)
    await tenant.receive(agent, "Bye", chat="later")
    await tenant.runs(2)
    assert len(await tenant.sent("channel.outbound")) == 2


async def test_a_branched_conversation_begins_with_the_last_exchange_of_its_parent(
    world: World, tenant: Tenant
) -> None:
    agent = await tenant.agent()
    world.models.script(MODEL, Says("Step one, step two."), Says("One, two."), Says("Later."), Says("1, 2."))
    for chat, text, parent in (("c", "Draft a plan", None), ("c/1", "Shorter", "c"), ("c", "Other", None)):
        await tenant.receive(agent, text, chat=chat, parent=parent)
        await tenant.runs({"c/1": 2}.get(chat, 1 if text == "Draft a plan" else 3))
    await tenant.receive(agent, "Even shorter", chat="c/1", parent="c")
    await tenant.runs(4)
    asked = [
        [message["content"] for message in request.body["messages"] if message["role"] != "system"]
        for request in world.models.requests[-4:]
    ]
    assert asked[1] == ["Draft a plan", "Step one, step two.", "Shorter"]
    # The channel does not see the thread, and the thread does not see the channel's later messages.
    assert asked[2] == ["Draft a plan", "Step one, step two.", "Other"]
    assert asked[3] == ["Draft a plan", "Step one, step two.", "Shorter", "One, two.", "Even shorter"]


async def test_what_comes_during_a_run_is_answered_together_by_the_next(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    go = asyncio.Event()
    world.models.script(MODEL, Says("One.", waits=go))
    first = await tenant.say(agent, "a")
    await world.platform.until(lambda: _running(tenant, first))
    others, begins = [], []
    for text in "bcd":
        others.append(await tenant.say(agent, text))
        async with world.platform.database("agent").begin() as tx:
            [(not_before,)] = await tx.sql("SELECT not_before FROM lane_item WHERE item_id = $1", others[-1])
        begins.append(not_before)
    # Each message postpones the start of the run.
    assert begins == sorted(set(begins))
    assert len(set(others)) == 1
    assert others[0] != first
    go.set()
    run = await tenant.over(others[0])
    assert run["status"] == "completed"
    request = world.models.requests[-1]
    assert request.last_user_text == "b\nc\nd"
    assert [message["content"] for message in request.body["messages"][1:]] == ["a", "One.", "b\nc\nd"]


async def test_one_run_answers_twenty_messages_at_most(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    go = asyncio.Event()
    world.models.script(MODEL, Says("One.", waits=go))
    first = await tenant.say(agent, "first")
    await world.platform.until(lambda: _running(tenant, first))
    others = [await tenant.say(agent, f"m{n}") for n in range(25)]
    assert [others.count(run) for run in dict.fromkeys(others)] == [20, 5]
    go.set()
    for run in dict.fromkeys(others):
        assert (await tenant.over(run))["status"] == "completed"


async def test_no_message_is_left_unanswered_and_none_is_answered_twice(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()

    async def burst(n: int) -> None:
        # At different moments of the earlier runs: while they are queued, start, run, end.
        await asyncio.sleep(0.02 * (n % 15))
        await tenant.say(agent, f"<{n}>")

    before = len(world.models.requests)
    await asyncio.gather(*(burst(n) for n in range(30)))

    async def all_over() -> bool:
        items = (await tenant.call("GET", "/api/v1/runs", params={"limit": 200}))["items"]
        return all(item["status"] == "completed" for item in items)

    await world.platform.until(all_over)
    asked = [request.last_user_text for request in world.models.requests[before:]]
    answered = [text for joined in asked for text in joined.split("\n")]
    assert sorted(answered) == sorted(f"<{n}>" for n in range(30))
    # One run at a time: each run has seen all replies before it.
    history = [len(request.body["messages"]) for request in world.models.requests[before:]]
    assert history == [2 + 2 * n for n in range(len(asked))]


async def test_followup_answers_each_message_on_its_own_in_order(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(queue_mode="followup")
    runs = [await tenant.say(agent, text) for text in "abcd"]
    assert len(set(runs)) == 4
    for run in runs:
        await tenant.over(run)
    assert [request.last_user_text for request in world.models.requests[-4:]] == list("abcd")


async def test_what_would_wait_for_hours_is_refused_before_it_is_accepted(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    async with world.platform.database("agent").begin() as tx:
        await tx.sql(
            "INSERT INTO run (id, tenant_id, session_key, agent_id, subject_id) "
            "SELECT gen_random_uuid(), $1, 'other', $2, 'p' FROM generate_series(1, 1000)",
            tenant.id,
            agent,
        )
    path = f"/api/v1/agents/{agent}/sessions/s/messages"
    problem = await tenant.call("POST", path, expect=429, json={"text": "Hi"})
    assert "1000 runs" in problem["detail"]
    async with world.platform.database("agent").begin() as tx:
        assert await tx.sql("SELECT 1 FROM message WHERE tenant_id = $1", tenant.id) == []
    # The webhook has accepted a channel's message already.
    await tenant.receive(agent, "Hi")
    await tenant.runs(1, status="completed")


async def test_sessions_do_not_hear_each_other(world: World, tenant: Tenant) -> None:
    other = world.tenant()
    mine, theirs = await tenant.agent(), await other.agent()
    await tenant.over(await tenant.say(mine, "canary-1", session="same"))
    await tenant.over(await tenant.say(mine, "canary-2", session="another"))
    run = await other.over(await other.say(theirs, "hello", session="same"))
    assert [message["content"] for message in world.models.requests[-1].body["messages"][1:]] == ["hello"]
    for path in (f"/api/v1/runs/{run['id']}", f"/api/v1/runs/{run['id']}/timeline", f"/api/v1/agents/{theirs}"):
        await tenant.call("GET", path, expect=404)
    await tenant.call("GET", f"/internal/runs/{run['id']}/events", expect=404)
    await tenant.call("POST", f"/api/v1/runs/{run['id']}/cancel", expect=404)
    path = f"/api/v1/agents/{theirs}/sessions/same/messages"
    await tenant.call("POST", path, expect=404, json={"text": "hi"})
    assert UUID(run["id"]) not in {UUID(item["id"]) for item in await tenant.runs(2)}


async def _running(tenant: Tenant, run_id: str) -> bool:
    return bool((await tenant.run(run_id))["status"] == "running")
