"""The HTTP API of agents: validation, views, and a version for each change."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import pytest

from services.agent.definitions import store
from services.agent.definitions.models import NewAgent
from services.agent.definitions.store import MAX_AGENTS
from tests.services.agent.conftest import MODEL, Tenant, World
from tooling.testing.model_server import KEY, Says

GOOD: dict[str, Any] = {"name": "A", "model": f"openai/{MODEL}", "provider": {"api_key": "sk-secret"}}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": "A\u202eB"}, "name"),
        ({"model": "gpt-4o-mini"}, "model"),
        ({"model": "scripted/other"}, "model"),
        ({"provider": None}, "provider.api_key"),
        ({"provider": {"base_url": "ftp://x/v1"}}, "provider.base_url"),
        ({"provider": {"base_url": "http://user:pw@x/v1"}}, "provider.base_url"),
        # Refused even if private addresses are allowed: clouds serve their machines' secrets there.
        ({"provider": {"base_url": "http://169.254.169.254/v1"}}, "provider.base_url"),
        ({"tools": ["calculator", "nonsense"]}, "tools[1]"),
        ({"tools": ["calculator", "calculator"]}, "tools"),
        ({"queue_mode": "sideways"}, "queue_mode"),
        ({"approval": ["weather"]}, "approval[0]"),
        ({"output_schema": {"type": "array"}}, "output_schema.type"),
        ({"fallback": {"model": "anthropic/x"}}, "fallback.provider"),
        ({"agents": [{"agent_id": str(UUID(int=1)), "name": "a b", "description": "d"}]}, "agents[0].name"),
        ({"agents": [{"agent_id": str(UUID(int=1)), "name": "other", "description": "d"}]}, "agents[0].agent_id"),
        ({"budget": {"nanos": -1, "period": "day"}}, "budget.nanos"),
        ({"limits": {"steps": 0}}, "limits.steps"),
        ({"colour": "red"}, "colour"),
    ],
)
async def test_an_invalid_definition_is_refused_with_its_field(
    world: World, tenant: Tenant, change: dict[str, Any], field: str
) -> None:
    problem = await tenant.call("POST", "/api/v1/agents", json=GOOD | change, expect=422)
    assert [error["field"] for error in problem["errors"]] == [field]


async def test_each_change_creates_a_version_and_the_key_is_never_shown(world: World, tenant: Tenant) -> None:
    made = await tenant.call("POST", "/api/v1/agents", json=GOOD)
    path = f"/api/v1/agents/{made['id']}"
    assert (made["version"], made["enabled"], made["provider"]) == (1, True, {"base_url": None})
    changed = await tenant.call("PATCH", path, json={"system_prompt": "Be brief.", "limits": {"steps": 5}})
    assert (changed["version"], changed["system_prompt"], changed["limits"]["steps"]) == (2, "Be brief.", 5)
    assert changed["name"] == "A"
    disabled = await tenant.call("PATCH", path, json={"enabled": False})
    assert (disabled["version"], disabled["enabled"]) == (2, False)
    assert await tenant.call("GET", path) == disabled
    assert (await tenant.call("GET", "/api/v1/agents"))["items"] == [disabled]
    assert "sk-secret" not in str(disabled)
    async with world.platform.database("agent").begin() as tx:
        rows = await tx.sql("SELECT definition, api_key FROM agent_version WHERE agent_id = $1", made["id"])
    assert not any("sk-secret" in definition or b"sk-secret" in bytes(key) for definition, key in rows)
    audited = await tenant.sent("audit.logs")
    assert [act["action"] for act in audited] == ["agent.create", "agent.change", "agent.change"]
    assert "sk-secret" not in str(audited)


async def test_a_key_does_not_follow_to_another_address(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    path = f"/api/v1/agents/{agent}"
    await tenant.call("PATCH", path, json={"provider": {"base_url": world.models.url}})
    run = await tenant.over(await tenant.say(agent, "Hi"))
    assert run["status"] == "completed"
    elsewhere = world.models.url.replace("127.0.0.1", "localhost")
    await tenant.call("PATCH", path, json={"provider": {"base_url": elsewhere}})
    run = await tenant.over(await tenant.say(agent, "Hi"))
    assert (run["status"], run["error"]) == (
        "failed",
        f"openai/{MODEL}: HTTP 401 (is the provider's api_key right?)",
    )
    world.models.refused.clear()
    await tenant.call("PATCH", path, json={"provider": {"base_url": elsewhere, "api_key": KEY}})
    assert (await tenant.over(await tenant.say(agent, "Hi")))["status"] == "completed"


async def test_a_page_of_long_definitions_is_cut_and_a_tenant_has_so_many_agents(world: World, tenant: Tenant) -> None:
    async def copies(agent: dict[str, Any], count: int) -> None:
        async with world.platform.database("agent").begin() as tx:
            await tx.sql(
                """
                WITH copy AS (
                    INSERT INTO agent (id, tenant_id, version, enabled)
                    SELECT gen_random_uuid(), $2, 1, true FROM generate_series(1, $3)
                    RETURNING id
                )
                INSERT INTO agent_version (agent_id, version, tenant_id, definition, created_by)
                SELECT copy.id, 1, $2, v.definition, v.created_by FROM copy JOIN agent_version v ON v.agent_id = $1
                """,
                UUID(agent["id"]),
                tenant.id,
                count,
            )

    long = await tenant.call("POST", "/api/v1/agents", json=GOOD | {"system_prompt": "漢" * 100_000})
    await copies(long, 29)
    pages, cursor = [], ""
    while cursor is not None:
        page = await tenant.call("GET", f"/api/v1/agents?limit=200{cursor and f'&cursor={cursor}'}")
        pages.append([agent["id"] for agent in page["items"]])
        cursor = page["next"]
    assert [len(ids) for ids in pages] == [14, 14, 2]
    assert len({id_ for ids in pages for id_ in ids}) == 30
    first = await tenant.call("GET", "/api/v1/agents?short=true&limit=20")
    second = await tenant.call("GET", f"/api/v1/agents?short=true&limit=20&cursor={first['next']}")
    assert [agent["id"] for agent in first["items"] + second["items"]] == [id_ for ids in pages for id_ in ids]
    assert second["next"] is None
    names = ("id", "name", "enabled", "created_at")
    assert {name: long[name] for name in names} in first["items"] + second["items"]

    short = await tenant.call("POST", "/api/v1/agents", json=GOOD)
    await copies(short, MAX_AGENTS - 32)
    async with world.platform.client("agent", tenant.id) as client:
        # Of requests at the same time, one gets the last place.
        answers = await asyncio.gather(*(client.post("/api/v1/agents", json=GOOD) for _ in range(20)))
    assert sorted(answer.status_code for answer in answers) == [201] + [409] * 19
    refused = next(answer for answer in answers if answer.status_code == 409)
    assert f"may have {MAX_AGENTS} agents" in refused.json()["detail"]


async def test_an_agent_is_deleted_and_its_runs_stay(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(approval=["calculator"], tools=["calculator"])
    path = f"/api/v1/agents/{agent}"
    done = await tenant.over(await tenant.say(agent, "Hi", session="s1"))
    world.models.script(MODEL, Says("", calls=(("calculator", '{"expression": "1"}'),)))
    waiting = await tenant.say(agent, "Sum", session="s2")

    async def waits() -> bool:
        return bool((await tenant.run(waiting))["status"] == "waiting")

    await world.platform.until(waits)
    problem = await tenant.call("DELETE", path, expect=409)
    assert "not over" in problem["detail"]
    assert (await tenant.call("GET", path))["id"] == agent
    await tenant.call("POST", f"/api/v1/runs/{waiting}/cancel", expect=202)
    await tenant.call("DELETE", path, expect=204)
    await tenant.call("DELETE", path, expect=404)
    await tenant.call("GET", path, expect=404)
    assert (await tenant.call("GET", "/api/v1/agents"))["items"] == []
    await tenant.call("POST", f"{path}/sessions/s1/messages", json={"text": "Hi"}, expect=404)
    assert await tenant.run(done["id"]) == done
    assert len(await tenant.runs(2, agent_id=agent)) == 2
    # From a channel whose agent was deleted.
    await tenant.receive(agent, "Hi")
    refused = (await tenant.runs(3, agent_id=agent))[-1]
    assert refused["status"] in ("refused", "failed")
    async with world.platform.database("agent").begin() as tx:
        assert await tx.sql("SELECT FROM agent_version WHERE agent_id = $1", UUID(agent)) == []
    acts = [act["action"] for act in await tenant.sent("audit.logs") if act["object_id"] == agent]
    assert acts == ["agent.create", "agent.delete"]


async def test_an_agent_of_another_tenant_is_not_deleted(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent()
    async with world.platform.client("agent", "another") as client:
        assert (await client.delete(f"/api/v1/agents/{agent}")).status_code == 404
    assert (await tenant.call("GET", f"/api/v1/agents/{agent}"))["id"] == agent


def test_long_definitions_are_not_kept_in_memory() -> None:
    """A tenant may have a thousand of them."""
    store.mode_of(_stored("x"))
    kept = store._kept.cache_info().currsize
    for sign in "abc":
        store.mode_of(_stored(sign * store.KEPT_CHARACTERS))
    assert store._kept.cache_info().currsize == kept


def _stored(prompt: str) -> str:
    return NewAgent(name="A", model="openai/x", system_prompt=prompt).model_dump_json()


async def test_scopes_are_required(world: World, tenant: Tenant) -> None:
    for method, path, scope in (("POST", "/api/v1/agents", "read"), ("GET", "/api/v1/agents", "write")):
        async with world.platform.client("agent", tenant.id, scopes=(scope,)) as client:
            assert (await client.request(method, path, json=GOOD)).status_code == 403
    async with world.platform.client("agent", tenant.id) as client:
        client.event_hooks = {}
        assert (await client.get("/api/v1/agents")).status_code == 401


async def test_two_requests_with_one_key_create_one_agent(world: World, tenant: Tenant) -> None:
    answers = [
        await tenant.call("POST", "/api/v1/agents", json=GOOD, headers={"Idempotency-Key": "k"}) for _ in range(2)
    ]
    assert answers[0] == answers[1]
    assert len((await tenant.call("GET", "/api/v1/agents"))["items"]) == 1


async def test_a_model_without_a_price_is_named_in_a_warning(world: World, tenant: Tenant) -> None:
    model = f"openai/{MODEL}-unpriced"
    world.peers.billing.unpriced.add(model)
    made = await tenant.call("POST", "/api/v1/agents", json=GOOD | {"model": model})
    [warning] = made["warnings"]
    assert warning.startswith(f"model: {model} has no price")
    path = f"/api/v1/agents/{made['id']}"
    assert (await tenant.call("PATCH", path, json={"name": "B"}))["warnings"] == [warning]
    assert (await tenant.call("PATCH", path, json={"model": GOOD["model"]}))["warnings"] == []
