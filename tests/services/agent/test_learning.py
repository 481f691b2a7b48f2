"""After a run the agent's model finds facts about the person; if it cannot, memory's rules get the message."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from protos.memory.v1 import memory_pb2
from tests.services.agent.conftest import MODEL, Tenant, World
from tests.services.agent.learning.test_notes import NOTE, answer
from tooling.testing.model_server import Fails, Says

SAID = "Hello. I live in Bergen now."
RESOURCE = f"learning/openai/{MODEL}"


async def learned(world: World, run_id: str) -> memory_pb2.LearnRequest:
    """Waits for the call of memory about this run."""

    async def found() -> memory_pb2.LearnRequest | None:
        return next((one for one in world.peers.memory.learned if one.run_id == run_id), None)

    request = await world.platform.until(found)
    assert request
    return request


async def usage(tenant: Tenant) -> list[dict[str, Any]]:
    return [record for record in await tenant.usage() if record["resource"] == RESOURCE]


async def test_the_model_is_asked_once_after_the_run_and_memory_gets_its_facts(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(learning="model", system_prompt=tenant.id)
    assert (await tenant.call("GET", f"/api/v1/agents/{agent}"))["learning"] == "model"
    person = f"person of {tenant.id}"
    states = memory_pb2.PersonalMemory
    oslo = states(id="0199c1d2-0000-7000-8000-000000000001", text="Lives in Oslo.", state=states.STATE_IN_FORCE)
    world.peers.memory.known[person] = [oslo]
    world.models.script(MODEL, Says("Good."), Says(answer(NOTE), usage=(700, 0, 60, 0)))
    asked = len(world.models.requests)
    message_id = await tenant.receive(agent, SAID, person=person)
    [run] = await tenant.runs(1)
    request = await learned(world, run["id"])
    [fact] = request.facts
    assert (fact.text, fact.quote, fact.replaces, fact.message_id) == (
        "Lives in Bergen.",
        "I live in Bergen now",
        oslo.id,
        str(message_id),
    )
    assert (request.subject_id, request.said, request.model, request.message_id) == (
        person,
        SAID,
        f"openai/{MODEL}",
        str(message_id),
    )
    [_, question] = world.models.requests[asked:]
    assert json.loads(question.last_user_text)["messages"] == [SAID]
    # Neither the agent's prompt nor the reply is in the question.
    assert tenant.id not in question.system
    assert "Good." not in str(question.body)
    [record] = await usage(tenant)
    assert record["usage_id"] == f"learning/{run['id']}/1"
    assert record["quantities"] == {"input_tokens": 700, "cached_tokens": 0, "output_tokens": 60, "reasoning_tokens": 0}
    assert (record["agent_id"], record["run_id"], record["estimated"]) == (agent, run["id"], False)
    assert world.peers.billing.holds[record["hold_id"]].resource == RESOURCE
    [ended] = [fact for fact in await tenant.sent("agent.events") if "said" in fact]
    assert (ended["learning"], ended["message_id"]) == ("model", str(message_id))


async def test_without_a_usable_answer_rules_search_the_message(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(learning="model")
    world.models.script(MODEL, Says("Good."), Says("I have found nothing."), Says("Fine."), Fails(400))
    for n in range(2):
        run_id = await tenant.say(agent, SAID, session=str(n))
        request = await learned(world, run_id)
        assert (request.model, request.said, list(request.facts)) == ("", SAID, [])
    # The answer that was of no use was charged by the provider; the refused call was not made.
    records = await usage(tenant)
    assert len(records) == 1
    await given_back(world, run_id)


async def given_back(world: World, run_id: str) -> None:
    """Waits until the hold of the run's question is given back."""
    billing = world.peers.billing

    async def released() -> bool:
        holds = [id_ for id_, hold in billing.holds.items() if hold.resource == RESOURCE and id_ in billing.released]
        return bool(holds)

    assert await world.platform.until(released), run_id


async def test_the_model_is_not_asked_without_credit_for_it(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(learning="model", system_prompt=tenant.id)
    go = asyncio.Event()
    world.models.script(MODEL, Says("Good.", waits=go))
    run_id = await tenant.say(agent, SAID)

    async def asked() -> bool:
        return any(tenant.id in request.system for request in world.models.requests)

    await world.platform.until(asked)
    # The run's own call has its hold already.
    world.peers.billing.broke.add(tenant.id)
    before = len(world.models.requests)
    go.set()
    assert (await learned(world, run_id)).model == ""
    assert len(world.models.requests) == before
    assert await usage(tenant) == []


async def test_an_answer_is_not_asked_for_again_while_memory_is_away(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(learning="model")
    world.models.script(MODEL, Says("Good."), Says(answer(NOTE)))
    # More than the client's own attempts.
    world.peers.memory.away = 6
    before = len(world.models.requests)
    request = await learned(world, await tenant.say(agent, SAID))
    assert [fact.text for fact in request.facts] == ["Lives in Bergen."]
    assert len(world.models.requests) - before == 2
    assert len(await usage(tenant)) == 1


async def test_nothing_is_asked_about_several_people_or_by_other_agents(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(learning="model", queue_mode="collect", system_prompt=tenant.id)
    plain = await tenant.agent()
    go = asyncio.Event()
    world.models.script(MODEL, Says("Good.", waits=go))
    await tenant.receive(agent, SAID, person="person-1")

    async def asked() -> bool:
        return any(tenant.id in request.system for request in world.models.requests)

    await world.platform.until(asked)
    for position, person in enumerate(("person-2", "person-3"), 1):
        await tenant.receive(agent, SAID, person=person, position=position)

    async def joined() -> bool:
        async with world.platform.database("agent").begin(tenant_id=tenant.id) as tx:
            [(count,)] = await tx.sql("SELECT count(*) FROM message WHERE tenant_id = $1", tenant.id)
        return bool(count == 3)

    await world.platform.until(joined)
    world.models.script(MODEL, Says(answer()), Says("Both."), Says("Plain."))
    go.set()
    await tenant.runs(2)
    await tenant.over(await tenant.say(plain, SAID, session="plain"))
    ends = [fact for fact in await tenant.sent("agent.events") if "said" in fact or "reply" in fact]
    wanted = {end["run_id"] for end in ends if end.get("learning") == "model"}
    asks = [task for task in await tenant.sent("agent.tasks") if "subject_id" in task]
    assert [task["subject_id"] for task in asks] == ["person-1"]
    assert {task["run_id"] for task in asks} == wanted
