"""A person takes a session over: the agent is silent until the session is released."""

from __future__ import annotations

import asyncio
from uuid import UUID

from infra.clock import utcnow
from protos.catalog import CHANNEL_ANSWERS
from protos.messages.channel import AnswerByPerson
from services.agent.sessions.changes import DELETED_TEXT
from tests.services.agent.conftest import MODEL, Tenant, World
from tests.services.agent.test_approval import BERN, UNKNOWN
from tests.services.agent.test_changes import CORRECTED, handled
from tooling.testing.model_server import Says
from tooling.testing.service_fakes import WEATHER


async def answered(tenant: Tenant, agent: str, text: str) -> None:
    """A person of the company writes, and the agent has handled it."""
    message = AnswerByPerson(
        agent_id=UUID(agent), session_key=f"{tenant.id}-c", subject_id="person-1", text=text, sent_at=utcnow()
    )
    await handled(tenant, await tenant.world.platform.send(CHANNEL_ANSWERS, message, tenant_id=tenant.id))


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


async def test_the_agent_knows_the_answers_that_a_person_gave_during_a_takeover(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(system_prompt=tenant.id)
    await tenant.receive(agent, "one", position=1)
    await tenant.runs(1)
    session = f"/api/v1/sessions/{tenant.id}-c"
    # Not taken over: a news of another system.
    await answered(tenant, agent, "Your parcel has left.")
    await tenant.call("POST", f"{session}/takeover")
    await tenant.receive(agent, "May I return it?", position=2)
    await tenant.runs(2)
    await answered(tenant, agent, "Yes, within ten days.")
    await tenant.call("POST", f"{session}/release")
    world.models.script(MODEL, Says("Ten days."))
    await tenant.receive(agent, "How long?", position=3)
    runs = await tenant.runs(4)
    assert [run["status"] for run in runs] == ["completed", "cancelled", "cancelled", "completed"]
    assert [send["text"] for send in await tenant.sent("channel.outbound")] == ["You said: one", "Ten days."]
    [*_, last] = [request for request in world.models.asked(MODEL) if tenant.id in request.system]
    assert [(message["role"], message["content"]) for message in last.body["messages"][1:]] == [
        ("user", "one"),
        ("assistant", "You said: one"),
        ("user", "May I return it?"),
        ("assistant", "Yes, within ten days."),
        ("user", "How long?"),
    ]


async def test_what_a_person_edits_or_deletes_during_a_takeover_is_known_to_the_agent_as_it_is_then(
    world: World, tenant: Tenant
) -> None:
    agent = await tenant.agent(system_prompt=tenant.id)
    before = await tenant.receive(agent, "one", position=1, vendor_message_id="1")
    await tenant.runs(1)
    session = f"/api/v1/sessions/{tenant.id}-c"
    await tenant.call("POST", f"{session}/takeover")
    edited = await tenant.receive(agent, "Bern", position=2, vendor_message_id="2")
    with_file = await tenant.receive(agent, "see this\n\n[A file]", position=3, vendor_message_id="3")
    deleted = await tenant.receive(agent, "secret", position=4, vendor_message_id="4")
    other = await tenant.receive(agent, "Oslo", position=5, vendor_message_id="5", person="person-2")
    await tenant.runs(5)
    changes = [
        await tenant.change(agent, before, "uno", vendor_message_id="1"),
        await tenant.change(agent, edited, "Rome", position=2, vendor_message_id="2"),
        await tenant.change(agent, with_file, "see that", position=3, vendor_message_id="3", has_files=True),
        await tenant.change(agent, deleted, None, position=4, vendor_message_id="4"),
        await tenant.change(agent, other, "Paris", position=5, vendor_message_id="5", person="person-2"),
    ]
    await handled(tenant, *changes)
    await tenant.runs(7)
    await tenant.call("POST", f"{session}/release")
    # After the release, too: the agent answered nothing of it, so it does not answer the edit.
    await handled(tenant, await tenant.change(agent, edited, "Rom", position=2, order=2, vendor_message_id="2"))
    world.models.script(MODEL, Says("Welcome back."))
    await tenant.receive(agent, "last", position=6)
    await tenant.runs(8)
    assert [send["text"] for send in await tenant.sent("channel.outbound")] == ["You said: one", "Welcome back."]
    [*_, last] = [request for request in world.models.asked(MODEL) if tenant.id in request.system]
    said = [message["content"] for message in last.body["messages"][1:] if message["role"] == "user"]
    assert said[:5] == ["one", "Rom", "see this\n\n[A file]", DELETED_TEXT, "Paris"]
    # The two changes are handled at the same time.
    assert sorted(said[5:7]) == [f"{CORRECTED}see that", f"{CORRECTED}uno"]
    assert said[7:] == ["last"]


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


async def test_a_takeover_cancels_a_run_that_waits_for_an_operator(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(tools=[WEATHER])
    world.peers.plugin.outcomes[WEATHER] = [UNKNOWN]
    world.models.script(MODEL, Says(calls=(BERN,)))
    await tenant.receive(agent, "Weather?")
    [run] = await tenant.runs(1, status="indeterminate")
    await tenant.call("POST", f"/api/v1/sessions/{tenant.id}-c/takeover")
    assert [item["status"] for item in await tenant.runs(1)] == ["cancelled"]
    # The agent would answer beside the person.
    await tenant.call("POST", f"/api/v1/runs/{run['id']}/resolution", expect=409, json={"action": "retry"})


async def test_a_session_in_which_only_the_company_has_written_is_taken_over(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(system_prompt=tenant.id)
    session = f"/api/v1/sessions/{tenant.id}-c"
    await tenant.call("POST", f"{session}/takeover", expect=404)
    await answered(tenant, agent, "Your parcel has left.")
    await tenant.call("POST", f"{session}/takeover")
    await tenant.receive(agent, "When does it come?", position=1)
    assert [run["status"] for run in await tenant.runs(1)] == ["cancelled"]
    await tenant.call("POST", f"{session}/release")
    await tenant.receive(agent, "And now?", position=2)
    assert [run["status"] for run in await tenant.runs(2)] == ["cancelled", "completed"]


async def test_another_tenants_session_is_404(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    await tenant.receive(agent, "one")
    await tenant.runs(1)
    for act in ("takeover", "release"):
        await world.tenant().call("POST", f"/api/v1/sessions/{tenant.id}-c/{act}", expect=404)
