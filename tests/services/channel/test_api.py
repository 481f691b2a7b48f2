"""The HTTP API of channel accounts."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from infra.clock import uuid7
from infra.observe.metrics import Metrics
from infra.security.auth import IDENTITY_HEADER
from infra.web.health import Health
from infra.web.http import create_app
from infra.web.server import serve_http
from protos.catalog import CHANNEL_TYPES
from services.channel.api import MAX_CHANNELS
from tests.abilities.table import ABILITIES, Proof
from tests.services.channel.conftest import Desk
from tooling.testing import keys
from tooling.testing.vendors import TelegramStandIn, WebhookStandIn

TELEGRAM = {"bot_token": "1:abc", "secret_token": "s3cret"}
WEBHOOK = {"secret": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "reply_url": "http://127.0.0.1:9/replies"}


async def test_a_channel_is_created_shown_changed_and_deleted_and_never_shows_its_credentials(desk: Desk) -> None:
    made = await desk.connect("telegram", TELEGRAM, "http://127.0.0.1:9")
    assert made["webhook_path"].startswith("/webhooks/telegram/")
    assert len(made["webhook_path"].rpartition("/")[2]) >= 22, "at least 128 bits"
    assert (made["state"], made["enabled"], made["api_base"]) == ("ok", True, "http://127.0.0.1:9")
    async with desk.client() as http:
        path = f"/api/v1/channels/{made['id']}"
        agent_id = str(uuid7())
        changed = (await http.patch(path, json={"agent_id": agent_id, "enabled": False})).json()
        assert (changed["agent_id"], changed["enabled"], changed["type"]) == (agent_id, False, "telegram")
        listed = (await http.get("/api/v1/channels")).json()
        assert (await http.get(path)).json() == changed == listed["items"][0]
        assert not any(secret in str((made, changed, listed)) for secret in TELEGRAM.values())
        assert (await http.delete(path)).status_code == 204
        assert [(await http.request(m, path, json={})).status_code for m in ("GET", "PATCH", "DELETE")] == [404] * 3
    acts = [body for _, body in await desk.platform.outbox("channel", "audit.logs") if body["object_id"] == made["id"]]
    assert [act["action"] for act in acts] == ["channel.create", "channel.update", "channel.delete"]
    assert {act["tenant_id"] for act in acts} == {desk.tenant_id}
    assert not any(secret in str(acts) for secret in TELEGRAM.values())


async def test_a_tenant_has_so_many_channels_also_if_they_are_made_at_the_same_time(desk: Desk) -> None:
    await desk.connect("telegram", TELEGRAM, "http://127.0.0.1:9")
    async with desk.platform.database("channel").begin() as tx:
        await tx.sql(
            """
            INSERT INTO account (id, tenant_id, type, agent_id, token_hash, token, credentials, pseudonyms)
            SELECT gen_random_uuid(), $1, type, agent_id, uuid_send(gen_random_uuid()), token, credentials, pseudonyms
            FROM account, generate_series(1, $2)
            WHERE tenant_id = $1
            """,
            desk.tenant_id,
            MAX_CHANNELS - 2,
        )
    body = {"type": "telegram", "agent_id": str(uuid7()), "credentials": TELEGRAM}
    async with desk.client() as http:
        async with desk.platform.database("channel").begin() as tx:
            await tx.take_turn(f"channels of {desk.tenant_id}")
            asked = [asyncio.create_task(http.post("/api/v1/channels", json=body)) for _ in range(3)]

            async def all_wait() -> bool:
                waiting = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
                return any(one.done() for one in asked) or len(await tx.sql(waiting)) >= len(asked)

            await desk.platform.until(all_wait)
            assert not any(one.done() for one in asked)
        answers = await asyncio.gather(*asked)
    assert sorted(answer.status_code for answer in answers) == [201, 409, 409]
    refused = next(answer for answer in answers if answer.status_code == 409)
    assert f"may have {MAX_CHANNELS} channels" in refused.json()["detail"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"type": "telegram", "credentials": {"bot_token": "1:abc"}}, "credentials.secret_token"),
        ({"type": "telegram", "credentials": {**TELEGRAM, "secret_token": ""}}, "credentials.secret_token"),
        ({"type": "telegram", "credentials": {**TELEGRAM, "bot_token": "../x"}}, "credentials.bot_token"),
        ({"type": "telegram", "credentials": {**TELEGRAM, "bot_token": "1:abc\n"}}, "credentials.bot_token"),
        ({"type": "telegram", "credentials": {**TELEGRAM, "more": "x"}}, "credentials.more"),
        ({"type": "telegram", "credentials": {**TELEGRAM, "bot_token": 1}}, "credentials.bot_token"),
        ({"type": "slack", "credentials": {"signing_secret": "", "bot_token": "x"}}, "credentials.signing_secret"),
        ({"type": "webhook", "credentials": {**WEBHOOK, "secret": "whsec_c2hvcnQ="}}, "credentials.secret"),
        ({"type": "webhook", "credentials": {**WEBHOOK, "reply_url": "file:///etc/passwd"}}, "credentials.reply_url"),
        (
            {"type": "webhook", "credentials": {**WEBHOOK, "reply_url": "http://169.254.169.254/"}},
            "credentials.reply_url",
        ),
        ({"type": "webhook", "credentials": WEBHOOK, "api_base": "http://127.0.0.1:9"}, "api_base"),
        ({"type": "telegram", "credentials": TELEGRAM, "api_base": "http://169.254.169.254"}, "api_base"),
        ({"type": "telegram", "credentials": TELEGRAM, "api_base": "http://127.0.0.1:9/api"}, "api_base"),
        ({"type": "telegram", "credentials": TELEGRAM, "api_base": "no URL"}, "api_base"),
        ({"type": "feishu", "credentials": {}}, "credentials.app_id"),
        ({"type": "carrier pigeon", "credentials": {}}, "type"),
        ({"type": "telegram", "credentials": TELEGRAM, "agent_id": "x"}, "agent_id"),
        ({"type": "telegram", "credentials": TELEGRAM, "name": "x"}, "name"),
    ],
)
async def test_an_invalid_field_is_named(desk: Desk, body: dict[str, Any], field: str) -> None:
    async with desk.client() as http:
        response = await http.post("/api/v1/channels", json={"agent_id": str(uuid7()), **body})
    assert response.status_code == 422, response.text
    assert [error["field"] for error in response.json()["errors"]] == [field]
    assert "1:abc" not in response.text


async def test_each_type_says_how_to_connect_one(desk: Desk) -> None:
    async with desk.client() as http:
        types = {item["type"]: item for item in (await http.get("/api/v1/channel-types")).json()["items"]}
    assert set(types) == set(CHANNEL_TYPES)
    for name, item in types.items():
        assert item["steps"], name
        assert item["credentials"]["type"] == "object"
        assert not item["credentials"]["additionalProperties"]
    assert types["telegram"]["credentials"]["required"] == ["bot_token", "secret_token"]
    assert types["teams"]["credentials"]["required"] == ["app_id", "app_password"]
    assert [name for name, item in sorted(types.items()) if item["is_idempotent"]] == [
        "discord",
        "feishu",
        "line",
        "qq",
        "webhook",
        "wecom",
    ]
    abilities = {name: item["abilities"] for name, item in types.items()}
    assert abilities["slack"]["groups"] == ["all", "mentions", "replies"]
    assert abilities["telegram"]["live_answers"] == "draft"
    assert abilities["line"]["live_answers"] is None
    assert {name for name, found in abilities.items() if found["typing"]} == {"telegram", "teams", "whatsapp", "line"}
    assert not abilities["twilio"]["sends_files"].get("")
    assert {name for name, found in abilities.items() if found["registers"]} == {
        vendor for vendor, cell in ABILITIES["registers its webhook"].items() if isinstance(cell, Proof)
    }


async def test_a_channel_needs_an_agent_of_its_tenant(desk: Desk) -> None:
    own, agents = str(uuid7()), keys.identities("agent")

    async def find(request: Request) -> Response:
        identity = agents.verify(request.headers[IDENTITY_HEADER], request.method, request.url.path)
        assert identity.scopes == {"read"}
        is_there = (identity.tenant_id, request.path_params["id"]) == (desk.tenant_id, own)
        return JSONResponse({}, 200 if is_there else 404)

    routes = [Route("/api/v1/agents/{id}", find)]
    agent = await serve_http(
        create_app(routes, Health("agent", "0"), Metrics(CollectorRegistry())), desk.platform.ports["agent"]
    )
    try:
        async with desk.client() as http:
            body = {"type": "telegram", "agent_id": own, "credentials": TELEGRAM}
            made = await http.post("/api/v1/channels", json=body)
            assert made.status_code == 201
            refused = await http.post("/api/v1/channels", json=body | {"agent_id": str(uuid7())})
            changed = await http.patch(f"/api/v1/channels/{made.json()['id']}", json={"agent_id": str(uuid7())})
            for answer in (refused, changed):
                assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "agent_id")
            assert len((await http.get("/api/v1/channels")).json()["items"]) == 1
    finally:
        await agent.stop()


async def test_another_tenants_channel_is_404(desk: Desk) -> None:
    made = await desk.connect("telegram", TELEGRAM)
    other = Desk(desk.platform, "another")
    async with other.client() as http:
        path = f"/api/v1/channels/{made['id']}"
        assert [(await http.request(m, path, json={})).status_code for m in ("GET", "PATCH", "DELETE")] == [404] * 3
        assert (await http.get("/api/v1/channels")).json()["items"] == []
    assert (await desk.channel(made["id"]))["id"] == made["id"]


async def test_the_read_scope_does_not_allow_writing(desk: Desk) -> None:
    async with desk.platform.client("channel", desk.tenant_id, scopes=("read",)) as http:
        body = {"type": "telegram", "agent_id": str(uuid7()), "credentials": TELEGRAM}
        assert (await http.post("/api/v1/channels", json=body)).status_code == 403
        assert (await http.get("/api/v1/channels")).status_code == 200


async def test_a_repeated_request_creates_one_channel(desk: Desk) -> None:
    body = {"type": "telegram", "agent_id": str(uuid7()), "credentials": TELEGRAM}
    async with desk.client() as http:
        answers = [
            (await http.post("/api/v1/channels", json=body, headers={"idempotency-key": "k"})).json() for _ in range(2)
        ]
        assert answers[0] == answers[1]
        assert len((await http.get("/api/v1/channels")).json()["items"]) == 1


async def test_lists_come_in_pages(desk: Desk) -> None:
    made = [(await desk.connect("telegram", TELEGRAM))["id"] for _ in range(3)]
    found, cursor = [], ""
    async with desk.client() as http:
        while True:
            page = (await http.get(f"/api/v1/channels?limit=2{cursor}")).json()
            found += [item["id"] for item in page["items"]]
            if page["next"] is None:
                break
            cursor = f"&cursor={page['next']}"
        assert (await http.get("/api/v1/channels?cursor=eA==")).status_code == 422
    assert found == made


async def test_new_credentials_take_effect_at_once(desk: Desk) -> None:
    async with TelegramStandIn() as old, TelegramStandIn() as new:
        made = await desk.connect("telegram", old.credentials)
        assert (await desk.call(made, old.update("hi"))).status_code == 200
        async with desk.client() as http:
            await http.patch(f"/api/v1/channels/{made['id']}", json={"credentials": new.credentials})
        assert (await desk.call(made, old.update("hi"))).status_code == 401
        assert (await desk.call(made, new.update("hi"))).status_code == 200


async def test_the_webhook_of_a_deleted_channel_is_404(desk: Desk) -> None:
    async with WebhookStandIn() as vendor:
        made = await desk.connect("webhook", vendor.credentials)
        assert (await desk.call(made, vendor.message("hi"))).status_code == 200
        async with desk.client() as http:
            await http.delete(f"/api/v1/channels/{made['id']}")
        assert (await desk.call(made, vendor.message("hi"))).status_code == 404
