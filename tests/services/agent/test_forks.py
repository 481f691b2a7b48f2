"""A run that is over is forked: another run goes on from one of its steps."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from tests.services.agent.conftest import MODEL, Tenant, World
from tests.services.agent.test_approval import waiting
from tooling.cli.run import draw_state
from tooling.testing.model_server import Fails, Says
from tooling.testing.service_fakes import WEATHER

BERN = (WEATHER, '{"city":"Bern"}')


async def failed(world: World, tenant: Tenant) -> str:
    """A run that has made a model call and a tool call, and then failed."""
    agent = await tenant.agent(tools=[WEATHER])
    world.models.script(MODEL, Says(calls=(BERN,)), Fails(400))
    await tenant.receive(agent, "Weather?")
    [run] = await tenant.runs(1)
    assert run["status"] == "failed"
    return str(run["id"])


async def test_a_fork_goes_on_where_the_run_has_failed(world: World, tenant: Tenant) -> None:
    run_id = await failed(world, tenant)
    calls = dict(world.peers.plugin.calls)
    world.models.script(MODEL, Says("It rains."))
    # The failed step is not copied.
    made = await tenant.call("POST", f"/api/v1/runs/{run_id}/fork", json={})
    assert made["forked_from"] == run_id
    run = await tenant.over(made["id"])
    assert (run["status"], run["reply"]) == ("completed", "It rains.")
    assert [(step["n"], step["kind"], step["status"]) for step in run["steps"]] == [
        (1, "model", "completed"),
        (2, "tool", "completed"),
        (3, "model", "completed"),
    ]
    assert world.peers.plugin.calls == calls
    assert world.models.requests[-1].body["messages"][-1]["role"] == "tool"
    facts = [fact for fact in await tenant.sent("agent.events") if fact["run_id"] == run["id"]]
    assert [fact["n"] for fact in facts] == list(range(1, len(facts) + 1))
    assert [send["text"] for send in await tenant.sent("channel.outbound")][-1] == "It rains."
    # Earlier usage is not billed again, and the answer is part of the conversation.
    assert [usage["run_id"] for usage in await tenant.usage()] == [run_id, run["id"]]
    assert (await tenant.run(run_id))["status"] == "failed"
    for each in (run_id, run["id"]):
        story = (await tenant.call("GET", f"/api/v1/runs/{each}/timeline"))["items"]
        assert [item["data"]["text"] for item in story if item["kind"] == "inbound"] == ["Weather?"]
    await tenant.call("POST", f"/api/v1/runs/{run_id}/fork", expect=409, json={})


async def test_a_fork_from_the_first_step_calls_the_tool_again(world: World, tenant: Tenant) -> None:
    run_id = await failed(world, tenant)
    before = set(world.peers.plugin.calls)
    world.models.script(MODEL, Says("It rains."))
    made = await tenant.call("POST", f"/api/v1/runs/{run_id}/fork", json={"step": 1})
    assert (await tenant.over(made["id"]))["reply"] == "It rains."
    assert len(set(world.peers.plugin.calls) - before) == 1


@pytest.mark.parametrize("approved", [True, False])
async def test_a_fork_does_not_ask_again_about_a_call_that_a_person_has_decided(
    world: World, tenant: Tenant, approved: bool
) -> None:
    agent = await tenant.agent(tools=[WEATHER], approval=[WEATHER])
    world.models.script(MODEL, Says(calls=(BERN,)), Fails(400), Says("So it is."))
    run_id = await tenant.say(agent, "Weather?")
    await waiting(tenant)
    await tenant.call("POST", f"/api/v1/runs/{run_id}/approval", json={"approved": approved})
    assert (await tenant.over(run_id))["status"] == "failed"
    before = world.models.requests[-1].body["messages"]
    made = await tenant.call("POST", f"/api/v1/runs/{run_id}/fork", json={})

    async def at_rest() -> str | None:
        status = str((await tenant.run(made["id"]))["status"])
        return status if status not in ("queued", "running") else None

    assert await world.platform.until(at_rest) == "completed"
    assert world.models.requests[-1].body["messages"] == before


async def test_what_cannot_be_forked_is_said(world: World, tenant: Tenant) -> None:
    run_id = await failed(world, tenant)
    path = f"/api/v1/runs/{run_id}/fork"
    problem = await tenant.call("POST", path, expect=422, json={"step": 7})
    assert problem["errors"][0]["field"] == "step"
    await world.tenant().call("POST", path, expect=404, json={})
    agent = await tenant.agent()
    world.models.script(MODEL, Says("A long text", stalls_after=1))
    running = await tenant.say(agent, "Hi")
    await tenant.call("POST", f"/api/v1/runs/{running}/fork", expect=409, json={})
    await tenant.call("POST", f"/api/v1/runs/{running}/cancel")
    await tenant.over(running)


async def test_a_run_is_folded_to_each_of_its_events(world: World, tenant: Tenant) -> None:
    run_id = await failed(world, tenant)
    path = f"/api/v1/runs/{run_id}/state"
    end = await tenant.call("GET", path)
    types = [event["type"] for event in end["events"]]
    assert types == [
        *("RunStarted", "StepStarted", "StepCompleted", "StepStarted", "StepCompleted", "StepStarted"),
        *("StepCompleted", "RunFailed"),
    ]
    assert (end["at"], end["status"], end["fork_step"], end["steps"][2]["status"]) == (8, "over", 2, "failed")
    states = [await tenant.call("GET", f"{path}?at={n}") for n in range(1, 9)]
    assert states[-1] == end
    assert [state["status"] for state in states] == ["running"] * 7 + ["over"]
    assert [[step["status"] for step in state["steps"]] for state in states[:5]] == [
        [],
        ["started"],
        ["completed"],
        ["completed", "started"],
        ["completed", "completed"],
    ]
    assert [state["fork_step"] for state in states] == [0, 0, 1, 1, 2, 2, 2, 2]
    for wrong in ("0", "9", "x"):
        problem = await tenant.call("GET", f"{path}?at={wrong}", expect=422)
        assert [error["field"] for error in problem["errors"]] == ["at"]
    await world.tenant().call("GET", path, expect=404)
    console = Console(width=80, record=True, file=StringIO())
    draw_state(console, states[3])
    text = console.export_text()
    assert "after event 4 of 8: running" in text
    assert "step 2: tool get_weather, started, attempt 1" in text.replace(WEATHER, "get_weather")
    assert "RunFailed" not in text
