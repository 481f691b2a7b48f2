"""A person takes a session over: the agent is silent until the session is released."""

from __future__ import annotations

import asyncio

from tests.services.agent.conftest import MODEL, Tenant, World
from tooling.testing.model_server import Says


async def test_the_agent_is_silent_between_takeover_and_release_and_knows_what_was_said(
    world: World, tenant: Tenant
) -> None:
    agent = await tenant.agent(system_prompt=tenant.id)
    await tenant.receive(agent, "one", position=1)
    await tenant.runs(1)
    session = f"/api/v1/sessions/{tenant.id}-c"
    assert (await tenant.call("POST", f"{session}/takeover"))["taken_over_by"]
    # One that comes alone, and a group.
    await tenant.receive(agent, "two", position=2)
    await tenant.runs(2)
    await asyncio.gather(*(tenant.receive(agent, text, position=n) for n, text in enumerate(("yes", "four"), 3)))
    runs = await tenant.runs(4)
    assert [run["status"] for run in runs] == ["completed", "cancelled", "cancelled", "cancelled"]
    assert runs[1]["error"] == "a person has taken the session over"
    assert [send["text"] for send in await tenant.sent("channel.outbound")] == ["You said: one"]
    assert (await tenant.call("POST", f"{session}/release"))["taken_over_by"] is None
    world.models.script(MODEL, Says("Welcome back."))
    await tenant.receive(agent, "five", position=5)
    await tenant.runs(5)
    assert [send["text"] for send in await tenant.sent("channel.outbound")] == ["You said: one", "Welcome back."]
    [*_, last] = [request for request in world.models.asked(MODEL) if tenant.id in request.system]
    said = [message["content"] for message in last.body["messages"][1:] if message["role"] == "user"]
    assert said == ["one", "two", "yes", "four", "five"]
    acts = [body["action"] for body in await tenant.sent("audit.logs") if body["action"].startswith("session.")]
    # The client of the test also reads the run.
    assert [act for act in acts if act != "session.read"] == ["session.takeover", "session.release"]


async def test_a_takeover_cancels_the_run_that_is_under_way(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(system_prompt=tenant.id)
    go = asyncio.Event()
    world.models.script(MODEL, Says("too late", waits=go))
    await tenant.receive(agent, "one")

    async def asked() -> bool:
        return any(tenant.id in request.system for request in world.models.asked(MODEL))

    await world.platform.until(asked)
    await tenant.call("POST", f"/api/v1/sessions/{tenant.id}-c/takeover")
    [run] = await tenant.runs(1)
    assert run["status"] == "cancelled"
    assert await tenant.sent("channel.outbound") == []
    go.set()


async def test_another_tenants_session_is_404(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    await tenant.receive(agent, "one")
    await tenant.runs(1)
    for act in ("takeover", "release"):
        await world.tenant().call("POST", f"/api/v1/sessions/{tenant.id}-c/{act}", expect=404)
