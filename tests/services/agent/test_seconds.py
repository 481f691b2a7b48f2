"""The seconds of a run are recorded once, however it ends, and only the steps that it made itself count."""

from __future__ import annotations

from typing import Any

from infra.clock import uuid7
from tests.services.agent.conftest import MODEL, Tenant, World
from tooling.testing.model_server import Fails, Says
from tooling.testing.service_fakes import WEATHER

BERN = (WEATHER, '{"city":"Bern"}')


def begun_seconds(run: dict[str, Any]) -> int:
    """The seconds that the run's steps took, which were made one after the other. A begun second counts."""
    return -(-sum(step["ms"] or 0 for step in run["steps"]) // 1000)


async def test_a_run_that_answers_has_one_record_and_its_cost_waits_for_it(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(tools=[WEATHER])
    world.models.script(MODEL, Says(calls=(BERN,)), Says("Rain."))
    run = await tenant.over(await tenant.say(agent, "Weather?"))
    seconds = begun_seconds(run)
    assert await tenant.seconds() == {run["id"]: seconds}
    [record] = [record for record in await tenant.sent("usage.records") if record["usage_id"].endswith("/seconds")]
    assert (record["resource"], record["agent_id"], record["session_key"]) == ("agent/run", agent, run["session_key"])
    story = (await tenant.call("GET", f"/api/v1/runs/{run['id']}/timeline"))["items"]
    assert [item["data"]["quantities"] for item in story if item["kind"] == "usage"][-1] == {"run_seconds": seconds}


async def test_a_failed_run_and_its_fork_have_a_record_each(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(tools=[WEATHER])
    world.models.script(MODEL, Says(calls=(BERN,)), Fails(400))
    failed = await tenant.over(await tenant.say(agent, "Weather?"))
    first = {failed["id"]: begun_seconds(failed)}
    assert (failed["status"], await tenant.seconds()) == ("failed", first)
    world.models.script(MODEL, Says("It rains."))
    made = await tenant.call("POST", f"/api/v1/runs/{failed['id']}/fork", json={})
    fork = await tenant.over(made["id"])
    assert await tenant.seconds() == {**first, fork["id"]: begun_seconds(fork)}


async def test_a_run_that_is_cancelled_pays_for_its_steps_and_one_that_only_waited_pays_nothing(
    world: World, tenant: Tenant
) -> None:
    agent = await tenant.agent(queue_mode="followup")
    world.models.script(MODEL, Says("A long text", stalls_after=1))
    asked = len(world.models.requests)
    running = await tenant.say(agent, "Hi")

    async def called() -> bool:
        return len(world.models.requests) > asked

    await world.platform.until(called)
    queued = await tenant.say(agent, "And this?")
    assert queued != running
    for run_id in (queued, running):
        await tenant.call("POST", f"/api/v1/runs/{run_id}/cancel")
        assert (await tenant.over(run_id))["status"] == "cancelled"
    assert set(await tenant.seconds()) == {running}


async def test_a_run_that_waited_for_a_person_has_one_record(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(tools=[WEATHER], approval=[WEATHER])
    world.models.script(MODEL, Says(calls=(BERN,)))
    run_id = await tenant.say(agent, "Weather?")

    async def waits() -> bool:
        return bool((await tenant.run(run_id))["status"] == "waiting")

    await world.platform.until(waits)
    assert await tenant.seconds() == {}
    await tenant.call("POST", f"/api/v1/runs/{run_id}/cancel")
    assert await tenant.seconds() == {run_id: begun_seconds(await tenant.over(run_id))}


async def test_the_seconds_are_held_with_the_first_call_and_the_record_names_the_hold(
    world: World, tenant: Tenant
) -> None:
    agent = await tenant.agent(tools=[WEATHER], limits={"seconds": 120})
    world.models.script(MODEL, Says(calls=(BERN,)), Says("Rain."))
    known = set(world.peers.billing.holds)
    await tenant.over(await tenant.say(agent, "Weather?"))
    first, _, second = (hold for id_, hold in world.peers.billing.holds.items() if id_ not in known)
    assert (first.run_seconds, second.run_hold_id) == (120, "")
    [record] = [record for record in await tenant.sent("usage.records") if record["usage_id"].endswith("/seconds")]
    assert record["hold_id"] == first.run_hold_id


async def test_a_run_that_ends_without_a_step_gives_its_seconds_back(world: World, tenant: Tenant) -> None:
    billing = world.peers.billing
    agent = await tenant.agent(limits={"nanos": 1})
    known, billing.nanos_per_second = set(billing.holds), 1
    try:
        run = await tenant.over(await tenant.say(agent, "Hi"))
    finally:
        billing.nanos_per_second = 0
    assert run["status"] == "failed"
    [hold] = (hold for id_, hold in billing.holds.items() if id_ not in known)
    assert {hold.hold_id, hold.run_hold_id} <= set(billing.released)


async def test_usage_names_the_client_of_the_api_and_the_tag_of_the_agent(world: World, tenant: Tenant) -> None:
    member, key = uuid7(), uuid7()
    agent = await tenant.agent(tag="Sales: EU")
    for actor in (f"member:{member}", f"api_key:{key}"):
        world.models.script(MODEL, Says("Hello."))
        path = f"/api/v1/agents/{agent}/sessions/{actor}/messages"
        made = await tenant.call("POST", path, json={"text": "Hi"}, who={"actor": actor})
        await tenant.over(made["run_id"])
    await tenant.receive(agent, "Hi", person=f"api_key:{key}")
    await tenant.runs(3)
    records = [(one.get("member_id"), one.get("api_key_id"), one["tag"]) for one in await tenant.sent("usage.records")]
    assert sorted(set(records), key=str) == sorted(
        [(str(member), None, "Sales: EU"), (None, str(key), "Sales: EU"), (None, None, "Sales: EU")], key=str
    ), "the usage of a person in a chat must not name a client of the API"
    assert len(records) == 6, "one for the model call and one for the seconds of each run"
    assert str(key) in {hold.api_key_id for hold in world.peers.billing.holds.values()}


async def test_a_message_names_its_agent_and_the_tag(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(tag="Sales")
    for answer in (Says("Hello."), Fails(400)):
        world.models.script(MODEL, answer)
        await tenant.receive(agent, "Hi", position=1 + isinstance(answer, Fails))
        await tenant.runs(1 + isinstance(answer, Fails))
    sent = await tenant.sent("channel.outbound")
    assert [send["sender"] for send in sent] == [{"agent_id": agent, "tag": "Sales"}] * 2


async def test_the_seconds_of_a_failed_run_have_the_tag_of_the_agent(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(tag="Sales", tools=[WEATHER])
    world.models.script(MODEL, Says(calls=(BERN,)), Fails(400))
    await tenant.over(await tenant.say(agent, "Weather?"))
    [record] = [record for record in await tenant.sent("usage.records") if record["usage_id"].endswith("/seconds")]
    assert record["tag"] == "Sales"
