"""The tools of memories: only an agent that gets memories has them, and they act for the one person who speaks."""

from __future__ import annotations

import asyncio

from services.agent.execution.tools import OF_MEMORIES
from services.plugin.tools.builtin import BUILTIN
from tests.services.agent.conftest import MODEL, Tenant, World
from tests.services.agent.test_queue_modes import asked
from tooling.testing.model_server import Says
from tooling.testing.service_fakes import FORGET, WEATHER

CALL = (FORGET, '{"memory_id":"1"}')
BERN = (WEATHER, '{"city":"Bern"}')


def test_the_agent_knows_the_plugin_services_tools_of_memories() -> None:
    assert {name for name in BUILTIN if name.startswith("memories_")} == OF_MEMORIES


async def test_a_call_names_the_person_who_speaks(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(tools=[FORGET, WEATHER], knowledge=True)
    world.models.script(MODEL, Says(calls=(CALL, BERN)), Says("Done."))
    speakers = world.peers.plugin.speakers
    before = set(speakers)
    await tenant.receive(agent, "Forget my allergy.", person="person-9")
    [run] = await tenant.runs(1)
    assert (run["status"], run["reply"]) == ("completed", "Done.")
    # Another tool is not told the person.
    assert sorted(speakers[key] for key in speakers.keys() - before) == ["", "person-9"]
    [said] = [fact for fact in await tenant.sent("agent.events") if "said" in fact]
    assert said["channel_id"] == "00000000-0000-0000-0000-000000000007"


async def test_an_agent_without_memories_does_not_have_their_tools(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(tools=[FORGET, WEATHER])
    world.models.script(MODEL, Says(calls=(CALL,)), Says("I cannot."))
    before = set(world.peers.plugin.calls)
    run = await tenant.over(await tenant.say(agent, "Forget my allergy."))
    assert (run["status"], run["reply"]) == ("completed", "I cannot.")
    last = world.models.requests[-1].body
    assert [tool["function"]["name"] for tool in last["tools"]] == [WEATHER]
    assert last["messages"][-1]["content"] == f"Error: there is no tool {FORGET}"
    assert set(world.peers.plugin.calls) == before


async def test_a_run_of_several_people_speaks_for_none(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(queue_mode="steer", tools=[FORGET], knowledge=True, system_prompt=tenant.id)
    go = asyncio.Event()
    world.models.script(MODEL, Says(calls=(CALL,), waits=go), Says("Done."))
    speakers = world.peers.plugin.speakers
    before = set(speakers)
    await tenant.receive(agent, "What do you know about me?", person="person-1")
    await asked(world, tenant, 1)
    await tenant.receive(agent, "And forget it all.", person="person-2", position=1)

    async def joined() -> bool:
        async with world.platform.database("agent").begin(tenant_id=tenant.id) as tx:
            [(count,)] = await tx.sql("SELECT count(*) FROM message WHERE tenant_id = $1", tenant.id)
        return bool(count == 2)

    await world.platform.until(joined)
    go.set()
    [run] = await tenant.runs(1)
    assert (run["status"], run["reply"]) == ("completed", "Done.")
    assert [speakers[key] for key in speakers.keys() - before] == [""]


async def test_an_agent_that_another_agent_asks_speaks_for_none(world: World, tenant: Tenant) -> None:
    child = "gpt-4.1-mini"
    other = await tenant.agent(model=f"openai/{child}", tools=[FORGET], knowledge=True)
    colleague = {"agent_id": other, "name": "ask_clerk", "description": "Forgets."}
    agent = await tenant.agent(agents=[colleague])
    world.models.script(MODEL, Says(calls=(("ask_clerk", '{"message":"Forget her allergy."}'),)), Says("Done."))
    world.models.script(child, Says(calls=(CALL,)), Says("Forgotten."))
    speakers = world.peers.plugin.speakers
    before = set(speakers)
    run = await tenant.over(await tenant.say(agent, "Hello"))
    assert (run["status"], run["reply"]) == ("completed", "Done.")
    assert [speakers[key] for key in speakers.keys() - before] == [""]
