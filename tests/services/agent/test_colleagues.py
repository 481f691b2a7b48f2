"""Agents that ask other agents: child runs, whose answers are the results of steps."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from tests.services.agent.conftest import MODEL, Tenant, World
from tooling.testing.model_server import Says

CHILDS = "gpt-4.1-mini"
OTHER_CHILDS = "gpt-4.1-nano"
ASK = ("ask_librarian", '{"message":"Where is Bern?"}')


async def pair(tenant: Tenant, *, child: dict[str, Any] | None = None, **parent: Any) -> tuple[str, str]:
    """Returns an agent that may ask another one, and that other agent."""
    other = await tenant.agent(model=f"openai/{CHILDS}", **(child or {}))
    colleague = {"agent_id": other, "name": "ask_librarian", "description": "Knows places."}
    return await tenant.agent(agents=[colleague], **parent), other


async def of(tenant: Tenant, agent: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await tenant.call("GET", "/api/v1/runs", params={"agent_id": agent}))["items"]
    return found


async def test_another_agent_is_asked_and_its_answer_used(world: World, tenant: Tenant) -> None:
    agent, other = await pair(tenant)
    world.models.script(MODEL, Says(calls=(ASK,)), Says("In Switzerland, I hear."))
    world.models.script(CHILDS, Says("In Switzerland."))
    run = await tenant.over(await tenant.say(agent, "Where is Bern?"))
    assert (run["status"], run["reply"]) == ("completed", "In Switzerland, I hear.")
    assert [(step["kind"], step["name"], step["status"]) for step in run["steps"]] == [
        ("model", f"openai/{MODEL}", "completed"),
        ("tool", "ask_librarian", "completed"),
        ("model", f"openai/{MODEL}", "completed"),
    ]
    [child] = await of(tenant, other)
    assert (child["parent_run_id"], child["reply"]) == (run["id"], "In Switzerland.")
    told = [request for request in world.models.asked(MODEL) if request.body["messages"][-1]["role"] == "tool"][-1]
    assert told.body["messages"][-1]["content"] == "In Switzerland."
    schema = told.body["tools"][0]["function"]
    assert (schema["name"], schema["description"]) == ("ask_librarian", "Knows places.")
    published = await tenant.sent("agent.events")
    facts = [fact for fact in published if fact["run_id"] == run["id"]]
    assert [fact["n"] for fact in facts] == list(range(1, len(facts) + 1))
    # The question to the colleague is not the person's.
    said = {fact["run_id"]: fact["said"] for fact in published if "said" in fact}
    assert said == {run["id"]: "Where is Bern?", child["id"]: ""}


async def test_a_colleague_that_gives_no_answer_is_a_tool_that_failed(world: World, tenant: Tenant) -> None:
    agent, other = await pair(tenant, child={"enabled": False})
    world.models.script(MODEL, Says(calls=(ASK, ("ask_librarian", '{"text":1}'))), Says("Nobody knows."))
    run = await tenant.over(await tenant.say(agent, "Where is Bern?"))
    assert run["reply"] == "Nobody knows."
    first, second = [message["content"] for message in world.models.requests[-1].body["messages"][-2:]]
    assert first == "Error: the agent is disabled"
    assert second.startswith("Error: arguments: ")
    assert [step["status"] for step in run["steps"]] == ["completed", "failed", "failed", "completed"]
    assert len(await of(tenant, other)) == 1


async def test_colleagues_are_asked_together(world: World, tenant: Tenant) -> None:
    """The first agent answers when the second has answered."""
    agent, _ = await pair(tenant)
    second = await tenant.agent(model=f"openai/{OTHER_CHILDS}")
    [first] = (await tenant.call("GET", f"/api/v1/agents/{agent}"))["agents"]
    colleague = {"agent_id": second, "name": "ask_pilot", "description": "Flies."}
    await tenant.call("PATCH", f"/api/v1/agents/{agent}", json={"agents": [first, colleague]})
    may_answer = asyncio.Event()
    world.models.script(MODEL, Says(calls=(ASK, ("ask_pilot", '{"message":"And Rome?"}'))), Says("North and south."))
    world.models.script(CHILDS, Says("North.", waits=may_answer))
    world.models.script(OTHER_CHILDS, Says("South."))
    run_id = await tenant.say(agent, "Where?")

    async def second_is_over() -> bool:
        return [item["status"] for item in await of(tenant, second)] == ["completed"]

    await world.platform.until(second_is_over)
    assert (await tenant.run(run_id))["waiting"]["tool"] == "ask_librarian"
    may_answer.set()
    run = await tenant.over(run_id)
    assert run["reply"] == "North and south."
    told = [message["content"] for message in world.models.asked(MODEL)[-1].body["messages"][-2:]]
    assert told == ["North.", "South."]
    assert [step["status"] for step in run["steps"]] == ["completed"] * 4


async def test_who_is_cancelled_takes_along_all_that_are_still_at_it(world: World, tenant: Tenant) -> None:
    agent, other = await pair(tenant)
    again = ("ask_librarian", '{"message":"And Rome?"}')
    world.models.script(MODEL, Says(calls=(ASK, again, ASK)))
    world.models.script(CHILDS, Says("Here."), *[Says("A long text", stalls_after=1)] * 2)
    run_id = await tenant.say(agent, "Where?")

    async def one_is_over() -> bool:
        return sorted(item["status"] for item in await of(tenant, other)) == ["completed", "running", "running"]

    await world.platform.until(one_is_over)
    await tenant.call("POST", f"/api/v1/runs/{run_id}/cancel")
    for child in await of(tenant, other):
        await tenant.over(child["id"])
    assert sorted(item["status"] for item in await of(tenant, other)) == ["cancelled", "cancelled", "completed"]
    assert (await tenant.over(run_id))["status"] == "cancelled"


async def test_the_same_colleague_is_asked_twice_together(world: World, tenant: Tenant) -> None:
    agent, other = await pair(tenant)
    again = ("ask_librarian", '{"message":"And Rome?"}')
    world.models.script(MODEL, Says(calls=(ASK, again)), Says("North and south."))
    world.models.script(CHILDS, Says("Here."), Says("Here."))
    run = await tenant.over(await tenant.say(agent, "Where?"))
    assert run["reply"] == "North and south."
    told = [message["content"] for message in world.models.asked(MODEL)[-1].body["messages"][-2:]]
    assert told == ["Here.", "Here."]
    assert len(await of(tenant, other)) == 2


async def test_who_is_cancelled_takes_along_whom_it_has_asked(world: World, tenant: Tenant) -> None:
    agent, other = await pair(tenant)
    world.models.script(MODEL, Says(calls=(ASK,)))
    world.models.script(CHILDS, Says("A long text", stalls_after=1))
    run_id = await tenant.say(agent, "Where is Bern?")

    async def asked() -> bool:
        return any(item["status"] == "running" for item in await of(tenant, other))

    await world.platform.until(asked)
    waits = (await tenant.run(run_id))["waiting"]
    assert (waits["reason"], json.loads(waits["arguments"] or "null")) == ("agent", None)
    await tenant.call("POST", f"/api/v1/runs/{run_id}/approval", expect=409, json={"approved": True})
    await tenant.call("POST", f"/api/v1/runs/{run_id}/cancel")
    child = await tenant.over(waits["run_id"])
    assert (child["status"], child["error"]) == ("cancelled", "the run that asked for this one is over: cancelled")
    assert (await tenant.run(run_id))["status"] == "cancelled"


async def test_a_child_spends_no_more_than_its_parent_has_left(world: World, tenant: Tenant) -> None:
    # Each call is estimated at more than a thousand tokens, each of ten nano-units.
    agent, other = await pair(tenant, limits={"nanos": 15_000})
    world.models.script(MODEL, Says(calls=(ASK,)))
    asked = len(world.models.asked(CHILDS))
    run = await tenant.over(await tenant.say(agent, "Where is Bern?"))
    [child] = await of(tenant, other)
    assert child["status"] == "failed"
    limit = int(child["error"].removeprefix("the limit of ").split()[0])
    assert 0 < limit < 5_000
    assert len(world.models.asked(CHILDS)) == asked
    assert (run["status"], run["error"]) == (
        "failed",
        "the limit of 15000 nano-units would be passed by another model call",
    )


async def test_agents_do_not_ask_each_other_without_an_end(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    itself = {"agent_id": agent, "name": "ask_librarian", "description": "Me."}
    await tenant.call("PATCH", f"/api/v1/agents/{agent}", json={"agents": [itself]})
    world.models.script(MODEL, *[Says(calls=(ASK,))] * 4, *(Says(f"level {n}") for n in range(4)))
    run = await tenant.over(await tenant.say(agent, "Where is Bern?"))
    assert run["reply"] == "level 3"
    assert len(await of(tenant, agent)) == 4
