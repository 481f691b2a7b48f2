"""Messages that come while a run of their session is queued or running."""

from __future__ import annotations

import asyncio

from protos.plugin.v1 import plugin_pb2
from services.agent.runs.notices import FAILED
from tests.services.agent.conftest import MODEL, Tenant, World
from tooling.testing.model_server import Says
from tooling.testing.service_fakes import WEATHER

UNKNOWN = plugin_pb2.CallReply(outcome=plugin_pb2.CallReply.OUTCOME_UNKNOWN, error="it did not answer")


async def asked(world: World, tenant: Tenant, count: int) -> None:
    """Waits until this tenant's agent has asked the model `count` times."""

    async def enough() -> bool:
        return len(of(world, tenant)) >= count

    await world.platform.until(enough)


def of(world: World, tenant: Tenant) -> list[list[str]]:
    """The messages of each model call without the system prompt, which holds the tenant's id."""
    return [
        [message["content"] for message in request.body["messages"][1:] if message["content"]]
        for request in world.models.asked(MODEL)
        if tenant.id in request.system
    ]


async def test_one_run_answers_the_parts_of_an_album(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(queue_mode="followup", system_prompt=tenant.id)
    for position, text in enumerate(("What is on these?", "[a.jpg]", "[b.jpg]"), 1):
        await tenant.receive(agent, text, position=position, in_album=True)
    [run] = await tenant.runs(1)
    assert run["status"] == "completed"
    assert of(world, tenant) == [["What is on these?\n[a.jpg]\n[b.jpg]"]]


async def test_steering_reaches_the_run_before_its_next_step(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(queue_mode="steer", tools=[WEATHER], system_prompt=tenant.id)
    go = asyncio.Event()
    world.models.script(
        MODEL, Says(calls=((WEATHER, '{"city":"Bern"}'),), waits=go), Says("Rain in Bern, sun in Rome.")
    )
    first = await tenant.say(agent, "Bern?")
    await asked(world, tenant, 1)
    assert await tenant.say(agent, "And Rome?") == first
    go.set()
    run = await tenant.over(first)
    assert (run["status"], run["reply"]) == ("completed", "Rain in Bern, sun in Rome.")
    # At the place at which it came, with the sender's words verbatim at the end.
    assert of(world, tenant)[1][0] == "Bern?"
    assert of(world, tenant)[1][-1] == "And Rome?"
    facts = await tenant.sent("agent.events")
    assert [fact["n"] for fact in facts] == list(range(1, len(facts) + 1))
    assert [(fact["step"], fact["messages"]) for fact in facts if "messages" in fact] == [(3, 2)]


async def test_messages_that_joined_a_run_that_fails_are_answered_by_the_next_run(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(queue_mode="steer", tools=[WEATHER], system_prompt=tenant.id)
    go = asyncio.Event()
    world.models.script(MODEL, Says(calls=((WEATHER, '{"city":"Bern"}'),), waits=go), Says(""), Says("Two and three."))
    await tenant.receive(agent, "one")
    await asked(world, tenant, 1)
    await tenant.receive(agent, "two")
    await tenant.receive(agent, "three")

    async def joined() -> bool:
        async with world.platform.database("agent").begin() as tx:
            rows = await tx.sql("SELECT count(*), count(DISTINCT run_id) FROM message WHERE tenant_id = $1", tenant.id)
        return rows == [(3, 1)]

    await world.platform.until(joined)
    go.set()
    failed, answered = await tenant.runs(2)
    assert (failed["status"], answered["status"]) == ("failed", "completed")
    # The failed run was shown all three. The next one answers the two that had joined.
    assert of(world, tenant)[1][-1] == "two\nthree"
    assert of(world, tenant)[2] == ["one", "two\nthree"]
    assert [send["text"] for send in await tenant.sent("channel.outbound")] == [FAILED, "Two and three."]
    async with world.platform.database("agent").begin() as tx:
        events = await tx.sql(
            "SELECT type FROM event WHERE stream_id = $1 ORDER BY version", f"session:{tenant.id}/{tenant.id}-c"
        )
    assert events == [("MessageAccepted",)] * 3 + [("MessagesRequeued",)]


async def test_messages_that_joined_a_run_that_an_operator_lets_fail_are_answered(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(queue_mode="steer", tools=[WEATHER], system_prompt=tenant.id)
    world.peers.plugin.outcomes[WEATHER] = [UNKNOWN]
    go = asyncio.Event()
    world.models.script(MODEL, Says(calls=((WEATHER, '{"city":"Bern"}'),), waits=go), Says("Sun in Rome."))
    run_id = await tenant.say(agent, "Bern?")
    await asked(world, tenant, 1)
    assert await tenant.say(agent, "And Rome?") == run_id
    go.set()

    async def is_indeterminate() -> bool:
        return bool((await tenant.run(run_id))["status"] == "indeterminate")

    await world.platform.until(is_indeterminate)
    await tenant.call("POST", f"/api/v1/runs/{run_id}/resolution", json={"action": "fail"})
    failed, answered = await tenant.runs(2)
    assert (failed["id"], failed["status"]) == (run_id, "failed")
    assert (answered["status"], answered["reply"]) == ("completed", "Sun in Rome.")
    assert of(world, tenant)[1] == ["Bern?", "And Rome?"]


async def test_a_draft_that_does_not_answer_all_is_written_anew(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(queue_mode="steer", system_prompt=tenant.id)
    go = asyncio.Event()
    world.models.script(MODEL, Says("One.", waits=go), Says("One and two."))
    await tenant.receive(agent, "a")
    await asked(world, tenant, 1)
    await tenant.receive(agent, "b")

    async def joined() -> bool:
        async with world.platform.database("agent").begin() as tx:
            [(count,)] = await tx.sql("SELECT count(*) FROM message WHERE tenant_id = $1", tenant.id)
        return bool(count == 2)

    await world.platform.until(joined)
    go.set()
    [run] = await tenant.runs(1)
    assert run["reply"] == "One and two."
    assert of(world, tenant) == [["a"], ["a", "b"]]
    assert [send["text"] for send in await tenant.sent("channel.outbound")] == ["One and two."]
    # Both model calls were made and are billed.
    assert len(await tenant.usage()) == 2


async def test_no_steered_message_is_left_unanswered(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(queue_mode="steer", system_prompt=tenant.id)

    async def burst(n: int) -> None:
        # At different moments of the earlier runs: while they are queued, start, run, end.
        await asyncio.sleep(0.02 * (n % 15))
        await tenant.say(agent, f"<{n}>")

    await asyncio.gather(*(burst(n) for n in range(30)))

    async def all_over() -> bool:
        items = (await tenant.call("GET", "/api/v1/runs", params={"limit": 200}))["items"]
        return all(item["status"] == "completed" for item in items)

    await world.platform.until(all_over)
    # Only the user's turns: the model's earlier answers repeat their messages line by line.
    last = [request for request in world.models.asked(MODEL) if tenant.id in request.system][-1]
    turns = [message["content"] for message in last.body["messages"] if message["role"] == "user"]
    answered = [text for turn in turns for text in turn.split("\n")]
    assert sorted(answered) == sorted(f"<{n}>" for n in range(30))


async def test_an_interruption_cancels_what_is_under_way_and_queued(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(queue_mode="interrupt", system_prompt=tenant.id)
    world.models.script(MODEL, Says("A long text", stalls_after=1))
    first = await tenant.say(agent, "a")
    await asked(world, tenant, 1)
    second = await tenant.say(agent, "b")
    assert second != first
    run = await tenant.over(second)
    assert (run["status"], run["reply"]) == ("completed", "You said: b")
    run = await tenant.over(first)
    assert (run["status"], run["error"]) == ("cancelled", "interrupted by a newer message")
    # The unanswered message stays in the conversation.
    assert of(world, tenant)[-1] == ["a", "b"]


async def test_a_busy_session_rejects_and_an_idle_one_answers(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(queue_mode="reject", system_prompt=tenant.id)
    go = asyncio.Event()
    world.models.script(MODEL, Says("One.", waits=go))
    first = await tenant.say(agent, "a")
    await asked(world, tenant, 1)
    path = f"/api/v1/agents/{agent}/sessions/s/messages"
    problem = await tenant.call("POST", path, expect=409, json={"text": "b", "idempotency_key": "k"})
    assert "busy" in problem["detail"]
    go.set()
    await tenant.over(first)
    # The refused message was not stored: a retry with the same key is possible.
    again = await tenant.over(await tenant.say(agent, "b", idempotency_key="k"))
    assert again["reply"] == "You said: b"


async def test_a_person_in_a_chat_is_told_that_the_session_is_busy(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(queue_mode="reject", system_prompt=tenant.id)
    go = asyncio.Event()
    world.models.script(MODEL, Says("One.", waits=go))
    await tenant.receive(agent, "a")
    await asked(world, tenant, 1)
    await tenant.receive(agent, "b")
    [refused] = await tenant.runs(1)
    assert (refused["status"], refused["error"]) == (
        "refused",
        "the session is busy and its agent rejects messages meanwhile",
    )
    [send] = await tenant.sent("channel.outbound")
    assert (send["text"].startswith("I am still busy"), send["run_id"]) == (True, refused["id"])
    go.set()
    await tenant.runs(2)
    assert [send["text"] for send in await tenant.sent("channel.outbound")][1:] == ["One."]
