"""A worker is killed at each boundary of each step: another one goes on, and no completed step is made again."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Literal

import pytest

from tests.services.agent.conftest import MODEL, Tenant, World
from tooling.testing.model_server import Says
from tooling.testing.service_fakes import WEATHER

Moment = Literal["before", "in model 1", "in tool", "in model 2"]
# The moment of arming decides at which step the worker reaches the place: 1 and 3 are model calls, 2 is a tool.
ARMED: dict[str, dict[Moment, int]] = {
    "after_effect_started": {"before": 1, "in model 1": 2, "in tool": 3},
    "after_effect_call": {"in model 1": 1, "in tool": 2, "in model 2": 3},
    "after_effect_commit": {"in model 1": 1, "in tool": 2, "in model 2": 3},
    # The end of the last step and the end of the run are one commit.
    "before_lane_commit": {"in model 2": 3},
    "after_lane_commit": {"in model 2": 4},
}


@pytest.mark.parametrize("place", ARMED)
async def test_a_killed_worker_is_replaced_and_the_run_ends_once(world: World, tmp_path: Path, place: str) -> None:
    platform, marker = world.platform, tmp_path / "armed"
    # A short lease, so that the lanes of a dead worker are taken over soon. A shorter one can run out while a worker
    # starts on a loaded machine: the lane changes hands, and a step is made again.
    failpoint = {"CLAW_FAILPOINT": place, "CLAW_FAILPOINT_ONCE": str(marker), "CLAW_LEASE_SECONDS": "3"}
    await asyncio.to_thread(platform.stop, "agent")
    await platform.start("agent", **failpoint)
    for moment, step in ARMED[place].items():
        tenant = world.tenant()
        agent = await tenant.agent(tools=[WEATHER])
        await _die(world, tenant, agent, marker, moment)
        await platform.start("agent", **failpoint)
        await _check(world, tenant, place, step)


async def _die(world: World, tenant: Tenant, agent: str, marker: Path, moment: Moment) -> None:
    """Sends a question and arms the failpoint at that moment of the answer."""
    models, plugin = world.models, world.peers.plugin
    models.forget()
    models.requests.clear()
    plugin.effects.clear()
    gates = {name: asyncio.Event() for name in ("in model 1", "in tool", "in model 2")}
    plugin.waits = gates["in tool"]
    plugin.reached.clear()
    first = Says(calls=((WEATHER, '{"city":"Bern"}'),), waits=gates["in model 1"])
    models.script(MODEL, first, Says("Rain.", waits=gates["in model 2"]))
    asked = len(models.asked(MODEL))

    async def reached(count: int) -> bool:
        return len(models.asked(MODEL)) == asked + count

    if moment == "before":
        _arm(marker)
    await tenant.receive(agent, "Weather in Bern?")
    if moment != "before":
        await world.platform.until(lambda: reached(1))
        if moment == "in model 1":
            _arm(marker)
        gates["in model 1"].set()
    if moment in ("in tool", "in model 2"):
        await plugin.reached.wait()
        if moment == "in tool":
            _arm(marker)
        gates["in tool"].set()
    if moment == "in model 2":
        await world.platform.until(lambda: reached(2))
        _arm(marker)
        gates["in model 2"].set()
    process = world.platform.processes["agent"]
    assert await asyncio.to_thread(process.wait, 30) == -signal.SIGKILL
    for gate in gates.values():
        gate.set()


def _arm(marker: Path) -> None:
    marker.touch()


async def _check(world: World, tenant: Tenant, place: str, step: int) -> None:
    # A call that is not recorded is made again; the model then answers as before.
    is_lost = place in ("after_effect_call", "before_lane_commit")
    again = is_lost and step in (1, 3)
    if again and step == 1:
        scripted = world.models.scripted(MODEL)
        scripted.appendleft(Says(calls=((WEATHER, '{"city":"Bern"}'),)))
    elif again:
        world.models.script(MODEL, Says("Rain."))
    [item] = await tenant.runs(1)
    run = await tenant.run(item["id"])
    assert (run["status"], run["reply"]) == ("completed", "Rain.")
    begun_twice = step if is_lost or place == "after_effect_started" else None
    if place == "after_effect_commit" and step == 1:
        begun_twice = 2  # The end of a model call and the start of its tool call are one commit.
    assert [s["attempts"] for s in run["steps"]] == [1 + (n == begun_twice) for n in (1, 2, 3)]
    facts = await tenant.sent("agent.events")
    assert [fact["n"] for fact in facts] == list(range(1, len(facts) + 1))
    assert [fact["step"] for fact in facts if "duration_ms" in fact] == [1, 2, 3]
    assert [fact["reply"] for fact in facts if "reply" in fact] == ["Rain."]
    assert len(await tenant.sent("channel.outbound")) == 1
    usage = await tenant.usage()
    # A model call with an unknown end is billed by estimate.
    known = {record["usage_id"] for record in usage if not record["estimated"]}
    assert known == {f"{run['id']}/{n}/{1 + (n == begun_twice)}" for n in (1, 3)}
    lost = {record["usage_id"] for record in usage if record["estimated"]}
    assert lost == ({f"{run['id']}/{begun_twice}/1"} if begun_twice in (1, 3) else set())
    assert set(await tenant.seconds()) == {run["id"]}
    arguments = [asked for asked in world.models.asked(MODEL) if asked.last_user_text == "Weather in Bern?"]
    assert len(arguments) == 2 + again
    assert sum(world.peers.plugin.effects.values()) == 1


async def test_a_call_of_the_callers_tool_is_on_record_before_the_run_ends_with_it(
    world: World, tmp_path: Path
) -> None:
    platform, marker, tenant = world.platform, tmp_path / "armed", world.tenant()
    world.models.forget()
    await asyncio.to_thread(platform.stop, "agent")
    for place in ("after_effect_commit", "before_lane_commit"):
        environment = {"CLAW_FAILPOINT": place, "CLAW_FAILPOINT_ONCE": str(marker), "CLAW_LEASE_SECONDS": "3"}
        await platform.start("agent", **environment)
        agent = await tenant.agent()
        asked = len(world.models.asked(MODEL))
        # The call and the end of the run are one commit: before it, the model has to be asked again.
        answers = 1 if place == "after_effect_commit" else 2
        world.models.script(MODEL, *[Says(calls=(("place", "{}"),))] * answers)
        tool = {"name": "place", "description": "", "parameters": {"type": "object"}}
        _arm(marker)
        body = {"text": "Where?", "tools": [tool]}
        run_id = (await tenant.call("POST", f"/internal/agents/{agent}/completions", json=body))["run_id"]
        assert await asyncio.to_thread(platform.processes["agent"].wait, 30) == -signal.SIGKILL
        await platform.start("agent", **environment)
        run = await tenant.over(run_id)
        assert (run["status"], run["tool_calls"]) == (
            "completed",
            [{"id": "call_0", "name": "place", "arguments": "{}"}],
        )
        assert len(world.models.asked(MODEL)) == asked + answers
        facts = [fact for fact in await tenant.sent("agent.events") if fact["run_id"] == run_id]
        told = [item["data"] for item in (await tenant.call("GET", f"/internal/runs/{run_id}/events"))["items"]]
        # Only the topic has the words of the person.
        assert [fact | ({"said": "", "message_id": None} if "said" in fact else {}) for fact in facts] == told
        assert len([fact for fact in told if fact.get("tool_calls")]) == 1
        await asyncio.to_thread(platform.stop, "agent")
    await platform.start("agent")
