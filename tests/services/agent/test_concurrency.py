"""Limits on runs at the same time, per agent and per model at its provider; other runs wait."""

from __future__ import annotations

import asyncio

import pytest

from tests.services.agent.conftest import MODEL, Tenant, World
from tooling.testing.model_server import Says


@pytest.mark.parametrize("limit", ["concurrency", "model_concurrency"])
async def test_no_more_runs_go_on_at_once_than_may(world: World, tenant: Tenant, limit: str) -> None:
    agents = [await tenant.agent(**{limit: 2}) for _ in range(1 if limit == "concurrency" else 3)]
    go = asyncio.Event()
    world.models.script(MODEL, *(Says("Done.", waits=go) for _ in range(6)))
    before = len(world.models.asked(MODEL))
    runs = [await tenant.say(agents[n % len(agents)], f"Message {n}", session=f"s{n}") for n in range(6)]

    async def all_have_tried() -> bool:
        async with world.platform.database("agent").begin() as tx:
            [(tried,)] = await tx.sql(
                "SELECT count(*) FROM lane_item WHERE tenant_id = $1 AND state = 'waiting' AND attempts > 0", tenant.id
            )
        return bool(tried == 4 and len(world.models.asked(MODEL)) == before + 2)

    await world.platform.until(all_have_tried)
    statuses = sorted([(await tenant.run(run))["status"] for run in runs])
    assert statuses == ["queued"] * 4 + ["running"] * 2
    # Runs of another tenant do not count.
    other = world.tenant()
    world.models.scripted(MODEL).appendleft(Says("Hello."))
    assert (await other.over(await other.say(await other.agent(**{limit: 2}), "Hi")))["reply"] == "Hello."
    go.set()
    assert [(await tenant.over(run))["reply"] for run in runs] == ["Done."] * 6
    # A run that waits for a place is logged without a warning.
    assert "runs go on already" not in world.platform.log("agent")


async def test_a_run_that_waits_for_a_colleague_leaves_its_place(world: World, tenant: Tenant) -> None:
    world.models.script(MODEL, Says(calls=(("ask", '{"message":"What?"}'),)), Says("No."), Says("No, I hear."))
    other = await tenant.agent(model_concurrency=1)
    colleague = {"agent_id": other, "name": "ask", "description": "Knows."}
    agent = await tenant.agent(agents=[colleague], model_concurrency=1)
    assert (await tenant.over(await tenant.say(agent, "What is new?")))["reply"] == "No, I hear."
