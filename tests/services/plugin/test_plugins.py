"""Registration of plugins by a tenant: checks, events, and secrets that are never shown again."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from typing import Any

import pytest
from redis.asyncio import Redis
from sqlalchemy.exc import DBAPIError

from infra.postgres.database import Database
from infra.postgres.db import create_engine
from infra.postgres.schema import role_url
from infra.stores.cache import Cache
from protos.pubsub import CONFIG_CHANGED
from services.plugin.registry import MAX_PLUGINS
from tests.services.plugin.conftest import CallReply, call, register, tool
from tests.services.plugin.toolserver import SECRET, ToolServer
from tooling.testing.platform import PASSWORDS, Platform

URL = "http://127.0.0.1:9/tools"


def shop(**changes: Any) -> dict[str, Any]:
    return {"name": "shop", "kind": "http", "url": URL, "tools": [tool("order")]} | changes


async def test_a_plugin_is_registered_listed_changed_and_deleted(plugin: Platform, server: ToolServer) -> None:
    made = await register(
        plugin,
        "acme",
        server,
        tool("order"),
        headers={"Authorization": "Bearer shop-token"},
        config={"currency": "EUR"},
    )
    id_ = made["id"]
    assert made["headers"] == ["Authorization"]
    async with plugin.client("plugin", "acme") as client:
        listed = (await client.get("/api/v1/plugins")).json()["items"]
        of_memories = ["memories_correct", "memories_forget", "memories_list"]
        names = ["calculator", "http_fetch", "knowledge_search", *of_memories, "shop", "time"]
        assert [item["name"] for item in listed] == names
        first = (await client.get("/api/v1/plugins?limit=4")).json()
        assert (await client.get(f"/api/v1/plugins?cursor={first['next']}")).json()["items"] == listed[4:]
        shown = (await client.get(f"/api/v1/plugins/{id_}")).json()
        assert shown == made
        assert (await client.patch(f"/api/v1/plugins/{id_}", json={"enabled": False})).json()["enabled"] is False
        assert "order" not in [item["name"] for item in (await client.get("/api/v1/tools")).json()["items"]]
        changed = await client.patch(f"/api/v1/plugins/{id_}", json={"enabled": True, "config": {"currency": "USD"}})
        assert changed.json()["config"] == {"currency": "USD"}
        [order] = [item for item in (await client.get("/api/v1/tools")).json()["items"] if item["name"] == "order"]
        assert order == {**tool("order"), "plugin": "shop"}
        assert (await client.delete(f"/api/v1/plugins/{id_}")).status_code == 204
        assert (await client.get(f"/api/v1/plugins/{id_}")).status_code == 404

    acts = [body for _, body in await plugin.outbox("plugin", "audit.logs") if body["object_id"] == id_]
    assert [act["action"] for act in acts] == [
        "plugin.register",
        "plugin.disable",
        "plugin.configure",
        "plugin.enable",
        "plugin.delete",
    ]
    facts = [body for _, body in await plugin.outbox("plugin", "platform.events")]
    changes = [fact["change"] for fact in facts if (fact["tenant_id"], fact["plugin"]) == ("acme", "shop")]
    assert changes == ["enabled", "disabled", "updated", "enabled", "disabled"]
    broadcast = [body for _, body in await plugin.outbox("plugin", "plugin")]
    assert broadcast == facts


async def test_a_process_that_caches_tools_is_notified_of_a_change(plugin: Platform) -> None:
    heard: list[bytes] = []

    async def listen(cache: Cache) -> None:
        async with aclosing(cache.listen(CONFIG_CHANGED)) as messages:
            async for message in messages:
                heard.append(message[1] if message else b"")

    async with Redis.from_url(plugin.stack.redis_url) as redis:
        listening = asyncio.create_task(listen(Cache(redis)))

        async def listens() -> bool:
            return b"" in heard

        async def hears() -> bool:
            # Other tests may use this Redis at the same time.
            return any(b'"told"' in message for message in heard)

        await plugin.until(listens)
        async with plugin.client("plugin", "told") as client:
            await client.patch("/api/v1/plugins/time", json={"enabled": False})
        await plugin.until(hears)
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
    [change] = [json.loads(message) for message in heard if b'"told"' in message]
    assert change == {"tenant_id": "told", "plugin": "time", "change": "disabled"}


async def test_secrets_are_sealed_and_never_shown(plugin: Platform, server: ToolServer) -> None:
    await register(plugin, "discreet", server, tool("order"), headers={"Authorization": "Bearer shop-token"})
    async with plugin.client("plugin", "discreet") as client:
        texts = [(await client.get(path)).text for path in ("/api/v1/plugins", "/api/v1/tools")]
    texts.append(json.dumps([body for _, body in await plugin.outbox("plugin", "audit.logs")]))
    texts.append(plugin.log("plugin"))
    async with plugin.database("plugin").begin() as tx:
        texts += [str(bytes(access)) for (access,) in await tx.sql("SELECT access FROM plugin")]
    for text in texts:
        assert SECRET not in text
        assert SECRET.removeprefix("whsec_") not in text
        assert "shop-token" not in text


async def test_a_missing_secret_is_made_and_shown_once(plugin: Platform, server: ToolServer) -> None:
    body = shop(url=server.url)
    async with plugin.client("plugin", "lazy") as client:
        made = (await client.post("/api/v1/plugins", json=body, headers={"Idempotency-Key": "k"})).json()
        again = (await client.post("/api/v1/plugins", json=body, headers={"Idempotency-Key": "k"})).json()
        shown = (await client.get(f"/api/v1/plugins/{made['id']}")).json()
    assert again == made
    assert shown["secret"] is None
    server.secret = made["secret"]
    try:
        reply = await call(plugin, "lazy", "order", key="made-secret")
    finally:
        server.secret = SECRET
    assert reply.outcome == CallReply.OUTCOME_SUCCEEDED, reply.error


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (shop(kind="soap"), "kind"),
        (shop(name="shop\u2066"), "name"),
        (shop(url="ftp://shop.example/x"), "url"),
        (shop(url="http://user:pw@127.0.0.1/"), "url"),
        (shop(secret="short"), "secret"),
        (shop(tools=[]), "tools"),
        (shop(tools=[tool("Order!")]), "tools[0].name"),
        (shop(tools=[tool("order"), tool("order")]), "tools[1].name"),
        (shop(tools=[tool("order", effect="maybe")]), "tools[0].effect"),
        (shop(tools=[tool("order", item={"type": "strin"})]), "tools[0].schema.properties.item.type"),
        (shop(tools=[{**tool("order"), "description": "a\x00b"}]), "tools[0].description"),
        (shop(headers={"Host": "x"}), "headers.Host"),
        (shop(headers={"webhook-id": "x"}), "headers.webhook-id"),
        (shop(config={"n": 1}, config_schema={"type": "object", "properties": {"n": {"type": "string"}}}), "config.n"),
        (shop(colour="red"), "colour"),
        ({"name": "office", "kind": "mcp", "url": URL, "tools": [tool("order")]}, "tools"),
    ],
)
async def test_an_invalid_field_is_named(plugin: Platform, body: dict[str, Any], field: str) -> None:
    async with plugin.client("plugin", "clumsy") as client:
        answer = await client.post("/api/v1/plugins", json=body)
    assert answer.status_code == 422, answer.text
    assert [error["field"] for error in answer.json()["errors"]] == [field]


async def test_a_server_that_does_not_speak_mcp_is_refused(plugin: Platform, server: ToolServer) -> None:
    body = {"name": "office", "kind": "mcp", "url": f"{server.url}/unknown"}
    async with plugin.client("plugin", "clumsy") as client:
        answer = await client.post("/api/v1/plugins", json=body)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "url"


async def test_names_are_unique_within_a_tenant_and_only_there(plugin: Platform, server: ToolServer) -> None:
    await register(plugin, "first", server, tool("order"))
    await register(plugin, "second", server, tool("order"))
    async with plugin.client("plugin", "first") as client:
        for body in (shop(), shop(name="other"), shop(name="time", tools=[tool("x")]), shop(tools=[tool("time")])):
            assert (await client.post("/api/v1/plugins", json=body)).status_code == 409, body


async def test_one_of_several_concurrent_registrations_gets_a_name(plugin: Platform) -> None:
    bodies = [shop(name="one"), shop(name="two"), shop(name="three"), shop(name="three")]
    async with plugin.client("plugin", "hasty") as client:
        answers = await asyncio.gather(*(client.post("/api/v1/plugins", json=body) for body in bodies))
    assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409]


async def test_the_tools_of_a_tenant_have_a_size_together(plugin: Platform) -> None:
    """A list of tools reads all of them."""

    def large(n: int) -> dict[str, Any]:
        schema = {"type": "object", "description": "x" * 31_000}
        return shop(name=f"shop{n}", tools=[tool(f"order{n}_{m}") | {"schema": schema} for m in range(30)])

    async with plugin.client("plugin", "large") as client:
        answers = [await client.post("/api/v1/plugins", json=large(n)) for n in range(10)]
        assert [answer.status_code for answer in answers] == [201] * 9 + [409]
        assert "all tools" in answers[-1].json()["detail"]
        assert (await client.get("/api/v1/plugins/" + answers[0].json()["id"])).status_code == 200
        assert (await client.delete("/api/v1/plugins/" + answers[0].json()["id"])).status_code == 204
        assert (await client.post("/api/v1/plugins", json=large(9))).status_code == 201


async def test_a_tenant_has_so_many_plugins(plugin: Platform) -> None:
    """A list of tools reads all of them."""
    async with plugin.client("plugin", "many") as client:
        for n in range(MAX_PLUGINS):
            made = await client.post("/api/v1/plugins", json=shop(name=f"shop{n}", tools=[tool(f"order{n}")]))
            assert made.status_code == 201, made.text
        more = shop(name="more", tools=[tool("more")])
        refused = await client.post("/api/v1/plugins", json=more)
        assert (refused.status_code, str(MAX_PLUGINS) in refused.json()["detail"]) == (409, True)
        assert (await client.delete("/api/v1/plugins/" + made.json()["id"])).status_code == 204
        assert (await client.post("/api/v1/plugins", json=more)).status_code == 201


async def test_a_tenants_costly_schemas_leave_threads_to_the_next_tenant(plugin: Platform) -> None:
    costly = {"$defs": {"a": {"allOf": [True] * 305}}, "allOf": [{"$ref": "#/$defs/a"}] * 200}

    def body(n: int) -> dict[str, Any]:
        # The results for equal schemas are cached.
        return shop(tools=[tool(name) | {"schema": costly | {"title": f"{name}{n}"}} for name in "abcd"])

    async with plugin.client("plugin", "costly") as client, plugin.client("plugin", "cheap") as other:
        checks = [asyncio.create_task(client.post("/api/v1/plugins", json=body(n))) for n in range(90)]
        await asyncio.wait(checks, return_when=asyncio.FIRST_COMPLETED)
        assert (await other.post("/api/v1/plugins", json=shop())).status_code == 201
        assert sum(not check.done() for check in checks) > len(checks) / 2
        await asyncio.gather(*checks)


async def test_a_plugin_of_another_tenant_is_not_found(plugin: Platform, server: ToolServer) -> None:
    made = await register(plugin, "owner", server, tool("order"))
    path = f"/api/v1/plugins/{made['id']}"
    async with plugin.client("plugin", "stranger") as client:
        assert (await client.get(path)).status_code == 404
        assert (await client.patch(path, json={"enabled": False})).status_code == 404
        assert (await client.delete(path)).status_code == 404
        assert (await client.post(f"{path}/refresh")).status_code == 404
    async with plugin.client("plugin", "owner", scopes=("read",)) as client:
        assert (await client.delete(path)).status_code == 403
    # Row-level security of the database holds too, not only the queries.
    engine = create_engine(role_url(plugin.database_url, "plugin", "request", PASSWORDS.request), pool_size=1)
    request = Database(engine, "plugin", tenanted=True)
    for table in ("plugin", "tool", "tool_call", "builtin_off"):
        async with request.begin(tenant_id="stranger") as tx:
            assert await tx.sql(f"SELECT * FROM {table}") == []
    with pytest.raises(DBAPIError, match="row-level security"):
        async with request.begin(tenant_id="stranger") as tx:
            await tx.sql("INSERT INTO builtin_off VALUES ('owner', 'time')")
    await engine.dispose()


async def test_a_built_in_plugin_can_only_be_enabled_or_disabled(plugin: Platform) -> None:
    async with plugin.client("plugin", "acme") as client:
        assert (await client.delete("/api/v1/plugins/time")).status_code == 409
        assert (await client.post("/api/v1/plugins/time/refresh")).status_code == 409
        assert (await client.patch("/api/v1/plugins/time", json={"config": {}})).status_code == 422
        assert (await client.get("/api/v1/plugins/none")).status_code == 404


async def test_without_permission_for_private_addresses_no_request_goes_there(
    plugin: Platform, server: ToolServer
) -> None:
    await register(plugin, "guarded", server, tool("order"))
    plugin.stop("plugin")
    await plugin.start("plugin", CLAW_ALLOW_PRIVATE_TARGETS="0")
    before = len(server.received)
    try:
        reply = await call(plugin, "guarded", "order", key="private")
        fetched = await call(plugin, "guarded", "http_fetch", json.dumps({"url": server.url}), key="private-page")
        async with plugin.client("plugin", "guarded") as client:
            answers = [
                await client.post("/api/v1/plugins", json={"name": "inside", "url": server.url, **kind})
                for kind in ({"kind": "http", "tools": [tool("b")]}, {"kind": "mcp"})
            ]
    finally:
        plugin.stop("plugin")
        await plugin.start("plugin")
    assert (reply.outcome, reply.error) == (
        CallReply.OUTCOME_FAILED,
        "url: the host is not on the public internet",
    )
    assert fetched.outcome == CallReply.OUTCOME_FAILED
    for answer in answers:
        assert answer.status_code == 422
        assert answer.json()["errors"][0]["field"] == "url"
    assert len(server.received) == before


async def test_a_plugin_of_kind_http_may_describe_its_tools_by_an_older_draft(plugin: Platform) -> None:
    schema = {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "properties": {"price": {"type": "number", "minimum": 0, "exclusiveMinimum": True}},
    }
    body = shop(tools=[{"name": "sell", "description": "", "schema": schema}], config_schema={}, config={"a": 1})
    async with plugin.client("plugin", "vintage") as client:
        answer = await client.post("/api/v1/plugins", json=body)
    assert answer.status_code == 201, answer.text
    [sell] = answer.json()["tools"]
    assert sell["schema"] == {"type": "object", "properties": {"price": {"type": "number", "exclusiveMinimum": 0}}}


def deep(levels: int) -> str:
    return '{"a":' * levels + "{}" + "}" * levels


@pytest.mark.parametrize("levels", [100, 500, 900, 2_000, 100_000])
@pytest.mark.parametrize("field", ["config", "config_schema", "schema", "headers"])
async def test_a_deeply_nested_body_is_refused(plugin: Platform, field: str, levels: int) -> None:
    fields = {"config": "{}", "config_schema": '{"type": "object"}', "schema": '{"type": "object"}', "headers": "{}"}
    fields[field] = deep(levels)
    body = (
        f'{{"name": "deep", "kind": "http", "url": "{URL}", "config": {fields["config"]}, '
        f'"config_schema": {fields["config_schema"]}, "headers": {fields["headers"]}, '
        f'"tools": [{{"name": "a", "description": "", "schema": {fields["schema"]}}}]}}'
    )
    async with plugin.client("plugin", "deep") as client:
        answer = await client.post(
            "/api/v1/plugins", content=body.encode(), headers={"content-type": "application/json"}
        )
    assert answer.status_code in (400, 413, 422), answer.text[:500]
