"""Completions for the gateway: the caller's conversation replaces the session's history."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from infra.clock import uuid7
from protos.catalog import PLATFORM_EVENTS
from protos.messages.user import SubjectErased
from tests.services.agent.conftest import MODEL, Tenant, World
from tooling.testing.model_server import Says
from tooling.testing.service_fakes import WEATHER

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOWN = {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]}
PLACE = {"name": "place", "description": "Where the person is.", "parameters": CITY}
HERE = ("place", '{"city":"Bern"}')
EARLIER = [{"role": "user", "text": "My secret"}, {"role": "assistant", "text": "Yes?"}]


async def complete(tenant: Tenant, agent: str, text: str, *, key: str | None = None, **body: Any) -> str:
    headers = {"Idempotency-Key": key} if key else {}
    path = f"/internal/agents/{agent}/completions"
    return str((await tenant.call("POST", path, json={"text": text} | body, headers=headers))["run_id"])


async def complete_until_asked(world: World, tenant: Tenant, agent: str, text: str) -> str:
    """Returns when the model has been asked."""
    before = len(world.models.asked(MODEL))
    run_id = await complete(tenant, agent, text)

    async def is_asked() -> bool:
        return len(world.models.asked(MODEL)) > before

    await world.platform.until(is_asked)
    return run_id


def shown(world: World) -> list[tuple[str, str]]:
    """The messages of the last model call."""
    return [(message["role"], message["content"]) for message in world.models.requests[-1].body["messages"]]


async def test_the_model_sees_the_callers_conversation_in_whole(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    # More messages than a session's history may have, and longer ones.
    history = [{"role": role, "text": f"{n} {'x' * 2_000}"} for n in range(30) for role in ("user", "assistant")]
    run = await tenant.over(await complete(tenant, agent, "Hi 🦀", history=history, system="In French."))
    assert (run["status"], run["reply"]) == ("completed", "You said: Hi 🦀")
    system, *turns = shown(world)
    assert system[1] == "Be kind.\n\nThe caller of the API adds these instructions:\n\nIn French."
    assert turns == [*((turn["role"], turn["text"]) for turn in history), ("user", "Hi 🦀")]


async def test_of_other_completions_and_sessions_nothing_is_seen(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(system_prompt="")
    await tenant.over(await tenant.say(agent, "In a session"))
    await tenant.over(await complete(tenant, agent, "First", history=EARLIER))
    await tenant.over(await complete(tenant, agent, "Second"))
    assert shown(world) == [("user", "Second")]
    await tenant.over(await complete(tenant, agent, "Third", system="In French."))
    assert shown(world)[0][1] == "The caller of the API adds these instructions:\n\nIn French."
    await tenant.over(await tenant.say(agent, "On"))
    assert [text for _, text in shown(world)] == ["In a session", "You said: In a session", "On"]


async def test_the_callers_words_stay_for_all_steps_of_a_run(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(tools=[WEATHER])
    world.models.script(MODEL, Says(calls=((WEATHER, '{"city":"Bern"}'),)), Says("Wet."))
    run = await tenant.over(await complete(tenant, agent, "Weather?", history=EARLIER, system="In French."))
    assert run["reply"] == "Wet."
    system, first, *_ = shown(world)
    assert (first, "In French." in system[1]) == (("user", "My secret"), True)


async def test_what_the_caller_asks_for_stands_for_the_agents_own_schema(world: World, tenant: Tenant) -> None:
    town, any_object = '{"town":"Bern"}', {"type": "object"}
    for own, asked, refused, fits in (
        (None, CITY, town, '{"city":"Bern"}'),
        (TOWN, CITY, town, '{"city":"Bern"}'),
        (None, any_object, "Bern", '{"a":1}'),
        # The agent's own schema asks for an object, too.
        (TOWN, any_object, '{"a":1}', town),
        (TOWN, None, '{"a":1}', town),
    ):
        agent = await tenant.agent(output_schema=own)
        world.models.script(MODEL, Says(refused), Says(fits))
        run = await tenant.over(await complete(tenant, agent, "Bern?", output_schema=asked))
        assert (run["status"], run["reply"], len(run["steps"])) == ("completed", fits, 2)
        sent = world.models.requests[-1].body["response_format"]["json_schema"]["schema"]
        assert ("city" in sent["properties"], "town" in sent["properties"]) == ("city" in fits, "town" in fits)


async def test_a_call_of_the_callers_tool_is_the_outcome_and_is_gone_on_from(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(tools=[WEATHER])
    world.models.script(MODEL, Says("Let me see.", calls=(HERE, HERE)))
    run = await tenant.over(await complete(tenant, agent, "Weather?", history=EARLIER, tools=[PLACE]))
    calls = [{"id": f"call_{n}", "name": "place", "arguments": HERE[1]} for n in (0, 1)]
    assert (run["status"], run["reply"], run["tool_calls"], len(run["steps"])) == ("completed", "Let me see.", calls, 1)
    offered = {tool["function"]["name"]: tool["function"] for tool in world.models.requests[-1].body["tools"]}
    assert offered.keys() == {WEATHER, "place"}
    assert (offered["place"]["description"], offered["place"]["parameters"]) == (PLACE["description"], CITY)
    [told] = [fact for fact in await tenant.sent("agent.events") if "reply" in fact]
    assert (told["reply"], told["tool_calls"]) == ("Let me see.", calls)
    facts = (await tenant.call("GET", f"/internal/runs/{run['id']}/events"))["items"]
    # A reader of the run does not need the person's words again.
    assert facts[-1]["data"] == told | {"said": "", "message_id": None}
    story = (await tenant.call("GET", f"/api/v1/runs/{run['id']}/timeline"))["items"]
    assert [item["data"]["tool_calls"] for item in story if item["kind"] == "reply"] == [calls]

    world.peers.memory.passages.append((tenant.id, "Bern is wet.", "cities.md"))
    await tenant.call("PATCH", f"/api/v1/agents/{agent}", json={"knowledge": True})
    since: list[dict[str, Any]] = [{"role": "assistant", "text": "Let me see.", "calls": calls}]
    since += [{"role": "tool", "call": call, "text": text} for call, text in zip(calls, ("Bern", ""), strict=True)]
    run = await tenant.over(await complete(tenant, agent, "Weather?", history=EARLIER, tools=[PLACE], since=since))
    assert (run["reply"], run["tool_calls"]) == ("You said: Weather?", [])
    assert world.peers.memory.requests[-1].query == "Weather?"
    *_, question, answered, one, two = world.models.requests[-1].body["messages"]
    assert (question["role"], question["content"]) == ("user", "Weather?")
    assert (answered["content"], [call["id"] for call in answered["tool_calls"]]) == (
        "Let me see.",
        ["call_0", "call_1"],
    )
    assert {tuple(call["function"].values()) for call in answered["tool_calls"]} == {HERE}
    assert [(message["role"], message["tool_call_id"], message["content"]) for message in (one, two)] == [
        ("tool", "call_0", "Bern"),
        ("tool", "call_1", ""),
    ]


async def test_the_agents_own_tools_are_used_on_the_way_but_not_beside_the_callers(
    world: World, tenant: Tenant
) -> None:
    agent = await tenant.agent(tools=[WEATHER])
    own = (WEATHER, '{"city":"Bern"}')
    called = len(world.peers.plugin.calls)
    world.models.script(MODEL, Says(calls=(own,)), Says(calls=(own, HERE)))
    run = await tenant.over(await complete(tenant, agent, "Weather?", tools=[PLACE]))
    assert [(call["name"], call["arguments"]) for call in run["tool_calls"]] == [HERE]
    assert [step["kind"] for step in run["steps"]] == ["model", "tool", "model"]
    assert len(world.peers.plugin.calls) == called + 1
    # Without tools of the caller the agent's own tools work as usual.
    world.models.script(MODEL, Says(calls=(HERE,)), Says("I cannot."))
    assert (await tenant.over(await complete(tenant, agent, "Weather?")))["reply"] == "I cannot."


async def test_what_is_asked_of_the_calls_holds(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    world.models.script(MODEL, Says("No."), Says("Well.", calls=(HERE,)))
    run = await tenant.over(await complete(tenant, agent, "Where?", tools=[PLACE], must_call=True))
    assert ([call["name"] for call in run["tool_calls"]], len(run["steps"])) == (["place"], 2)
    asked = world.models.requests[-1]
    assert (asked.body["tool_choice"], "no tool was called" in asked.system) == ("required", True)

    strict = PLACE | {"strict": True}
    world.models.script(MODEL, Says(calls=(("place", "{}"),)), Says(calls=(("place", "{"),)), Says(calls=(HERE,)))
    run = await tenant.over(await complete(tenant, agent, "Where?", tools=[strict]))
    assert ([call["arguments"] for call in run["tool_calls"]], len(run["steps"])) == ([HERE[1]], 3)
    refusals = [request.system for request in world.models.requests[-2:]]
    assert ["arguments.city: missing" in refusals[0], "not JSON" in refusals[1]] == [True, True]
    assert world.models.requests[-1].body["tools"][0]["function"]["strict"] is True
    world.models.script(MODEL, Says(calls=(("place", "{}"),)))
    run = await tenant.over(await complete(tenant, agent, "Where?", tools=[PLACE]))
    assert [call["arguments"] for call in run["tool_calls"]] == ["{}"]

    world.models.script(MODEL, Says(calls=(HERE, HERE)))
    run = await tenant.over(await complete(tenant, agent, "Where?", tools=[PLACE], parallel=False))
    assert (len(run["tool_calls"]), world.models.requests[-1].body["parallel_tool_calls"]) == (1, False)


async def test_tools_of_one_name_are_refused(world: World, tenant: Tenant) -> None:
    colleague = {"agent_id": await tenant.agent(), "name": "place", "description": "Knows places."}
    for own, name in (({"agents": [colleague]}, "place"), ({"tools": [WEATHER]}, WEATHER)):
        path = f"/internal/agents/{await tenant.agent(**own)}/completions"
        body = {"text": "Hi", "tools": [PLACE | {"name": name}]}
        problem = await tenant.call("POST", path, expect=422, json=body)
        assert problem["errors"] == [
            {"field": "tools", "message": f"{name} is the name of one of the agent's own tools"}
        ]
    assert (await tenant.call("GET", "/api/v1/runs"))["items"] == []


async def test_tools_that_have_one_name_once_the_run_begins_fail_it(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(concurrency=1)
    go = asyncio.Event()
    world.models.script(MODEL, Says("One.", waits=go))
    first = await complete_until_asked(world, tenant, agent, "a")
    second = await complete(tenant, agent, "b", tools=[PLACE | {"name": WEATHER}])
    await tenant.call("PATCH", f"/api/v1/agents/{agent}", json={"tools": [WEATHER]})

    async def attempts() -> int:
        async with world.platform.database("agent").begin() as tx:
            [(found,)] = await tx.sql("SELECT attempts FROM lane_item WHERE item_id = $1", second)
        return int(found)

    # An attempt that has read the agent before its change ends before the first run gives its place back.
    before = await attempts()

    async def tries_again() -> bool:
        return await attempts() >= before + 2

    await world.platform.until(tries_again)
    go.set()
    assert (await tenant.over(first))["reply"] == "One."
    run = await tenant.over(second)
    assert (run["status"], run["error"], run["steps"]) == (
        "failed",
        f"tools of the agent and of the caller have one name: {WEATHER}",
        [],
    )


async def test_the_same_key_and_body_are_the_same_run(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    first = await complete(tenant, agent, "Hi", key="k", history=EARLIER)
    together = await asyncio.gather(*(complete(tenant, agent, "Hi", key="k", history=EARLIER) for _ in range(5)))
    assert {first, *together} == {first}
    path = f"/internal/agents/{agent}/completions"
    for other in (
        {"text": "Hi"},
        {"text": "Ho", "history": EARLIER},
        {"text": "Hi", "history": EARLIER, "system": "!"},
        {"text": "Hi", "history": EARLIER, "output_schema": CITY},
        {"text": "Hi", "history": EARLIER, "tools": [PLACE]},
    ):
        problem = await tenant.call("POST", path, expect=422, json=other, headers={"Idempotency-Key": "k"})
        assert problem["errors"] == [{"field": "idempotency_key", "message": "was used before with another body"}]
    other_agent = await tenant.agent()
    assert await complete(tenant, other_agent, "Hi", key="k", history=EARLIER) != first
    assert (await tenant.over(first))["status"] == "completed"


async def test_completions_of_one_agent_do_not_wait_for_each_other(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    go = asyncio.Event()
    world.models.script(MODEL, Says("One.", waits=go))
    first = await complete_until_asked(world, tenant, agent, "a")
    assert (await tenant.over(await complete(tenant, agent, "b")))["reply"] == "You said: b"
    go.set()
    assert (await tenant.over(first))["reply"] == "One."


async def test_who_cannot_be_asked_is_said_at_once(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    path = f"/internal/agents/{agent}/completions"
    await tenant.call("PATCH", f"/api/v1/agents/{agent}", json={"enabled": False})
    assert (await tenant.call("POST", path, expect=403, json={"text": "Hi"}))["detail"] == "the agent is disabled"
    await world.tenant().call("POST", path, expect=404, json={"text": "Hi"})
    await tenant.call("POST", f"/internal/agents/{uuid7()}/completions", expect=404, json={"text": "Hi"})
    assert (await tenant.call("GET", "/api/v1/runs"))["items"] == []


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "text"),
        ({"text": ""}, "text"),
        ({"text": "x" * 100_001}, "text"),
        ({"text": "Hi", "history": [{"role": "critic", "text": "x"}]}, "history[0]"),
        ({"text": "Hi", "history": [EARLIER[0], {"role": "user", "text": ""}]}, "history[1].user.text"),
        ({"text": "Hi", "history": [{"role": "tool", "text": "x"}]}, "history[0].tool.call"),
        ({"text": "Hi", "since": EARLIER}, "since[0]"),
        ({"text": "Hi", "tools": [PLACE | {"name": "a place"}]}, "tools[0].name"),
        ({"text": "Hi", "tools": [PLACE | {"parameters": {"type": "array"}}]}, "tools[0].parameters.type"),
        ({"text": "Hi", "tools": [PLACE] * 129}, "tools"),
        ({"text": "Hi", "system": ""}, "system"),
        ({"text": "Hi", "output_schema": {"type": "string"}}, "output_schema.type"),
        ({"text": "Hi", "sytem": "x"}, "sytem"),
    ],
)
async def test_what_cannot_be_taken_is_named(tenant: Tenant, body: dict[str, Any], field: str) -> None:
    problem = await tenant.call("POST", f"/internal/agents/{uuid7()}/completions", expect=422, json=body)
    assert [error["field"] for error in problem["errors"]] == [field]


async def test_what_was_said_before_is_stored_sealed_and_erased_with_its_person(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    world.models.script(MODEL, Says(calls=(("place", '{"city":"secret"}'),)))
    run = await complete(tenant, agent, "Hi", key="k", history=EARLIER, tools=[PLACE])
    assert "secret" in str((await tenant.over(run))["tool_calls"])
    async with world.platform.database("agent").begin() as tx:
        [(context,)] = await tx.sql("SELECT context FROM message WHERE run_id = $1", run)
        [(calls,)] = await tx.sql("SELECT calls FROM run WHERE id = $1", run)
        events = [data for (data,) in await tx.sql("SELECT data FROM event WHERE stream_id LIKE $1", f"%{run}%")]
    assert events
    for stored in (context, calls, *events):
        assert b"secret" not in bytes(stored)
    erased = SubjectErased(tenant_id=tenant.id, subject_id="api_key:test")
    await world.platform.produce(PLATFORM_EVENTS, erased, key=tenant.id, tenant_id=tenant.id)

    async def gone() -> bool:
        return bool((await tenant.run(run))["reply"] == "[erased]")

    await world.platform.until(gone)
    assert (await tenant.run(run))["tool_calls"] == []
    # No further message of that person is stored or answered.
    path = f"/internal/agents/{agent}/completions"
    await tenant.call("POST", path, expect=403, json={"text": "Hi"}, headers={"Idempotency-Key": "k"})
