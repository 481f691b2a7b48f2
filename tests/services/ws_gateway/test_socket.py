"""The WebSocket, by the real process, real Kafka and real Redis, beside a stand-in for the agent."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import httpx
import jsonschema
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from infra.clock import uuid7
from infra.observe import telemetry
from infra.observe.metrics import Metrics
from infra.security.auth import Identity
from infra.service.refusals import Refusals
from infra.stores.cache import Cache
from infra.web.http import Health, create_app
from infra.web.rpc_client import DEFAULT_TIMEOUT_SECONDS
from infra.web.server import PING_SECONDS, PONG_SECONDS, serve_http
from services.ws_gateway import api, clients, connection, socket
from services.ws_gateway.agent import Agent as Caller
from services.ws_gateway.clients import Clients, End
from services.ws_gateway.domain import Delta
from services.ws_gateway.feed import MAX_WAITING, Live, Room
from services.ws_gateway.hub import Hub
from services.ws_gateway.keys import SAFE, ApiKeys
from tests.services.ws_gateway.agent import Agent, ValidKeys, failed, happen, run_facts
from tooling.testing import keys as key_pairs
from tooling.testing.gateway import running_gateway
from tooling.testing.platform import ADMIN_TOKEN, Platform

SCHEMA = json.loads((Path(__file__).parents[3] / "protos" / "ws-schema.json").read_text())
FITS = jsonschema.Draft202012Validator({**SCHEMA, "anyOf": [{"$ref": "#/$defs/ServerMessage"}]})
WHOLE = [
    ("run.started", 1),
    ("step.started", 2),
    ("step.completed", 3),
    ("reply", 4),
    ("run.completed", 5),
]


@asynccontextmanager
async def opened(url: str, headers: dict[str, str], **options: Any) -> AsyncIterator[ClientConnection]:
    address = f"{url.replace('http', 'ws', 1)}/ws"
    async with connect(address, additional_headers=headers, proxy=None, **options) as socket:
        yield socket


@asynccontextmanager
async def connected(platform: Platform, tenant: str = "acme", **kwargs: Any) -> AsyncIterator[ClientConnection]:
    async with opened(platform.url("ws_gateway"), platform.headers(tenant, **kwargs)) as socket:
        yield socket


async def say(socket: ClientConnection, type_: str, **fields: Any) -> None:
    await socket.send(json.dumps({"type": type_, **fields}, default=str))


async def receive(socket: ClientConnection, count: int) -> list[dict[str, Any]]:
    async with asyncio.timeout(30):
        taken = [json.loads(await socket.recv()) for _ in range(count)]
    for message in taken:
        FITS.validate(message)
    return taken


async def ask(socket: ClientConnection, type_: str, **fields: Any) -> dict[str, Any]:
    """Sends a message and returns the next one from the server."""
    await say(socket, type_, **fields)
    [answer] = await receive(socket, 1)
    return answer


async def follow(socket: ClientConnection, run_id: UUID, **fields: Any) -> None:
    assert await ask(socket, "subscribe", run_id=run_id, **fields) == accepted(run_id)


def accepted(run_id: UUID, ref: str | None = None) -> dict[str, Any]:
    return {"type": "accepted", "run_id": str(run_id), "ref": ref}


async def closed(socket: ClientConnection) -> int:
    """The code with which the server closes it."""
    async with asyncio.timeout(30):
        with pytest.raises(ConnectionClosed) as end:
            while True:
                await socket.recv()
    assert end.value.rcvd is not None
    return end.value.rcvd.code


async def is_quiet(socket: ClientConnection) -> None:
    """Checks that no other message is on its way to the client."""
    assert await ask(socket, "ping") == {"type": "pong", "ref": None}


def names(messages: list[dict[str, Any]], run_id: UUID) -> list[tuple[str, int | None]]:
    return [
        (message["event"], message["id"])
        for message in messages
        if message["type"] == "event" and message["run_id"] == str(run_id)
    ]


async def test_a_run_is_told_from_what_was_before_to_its_end(gateway: Platform, agent: Agent) -> None:
    run_id = agent.new_run("acme")
    facts = run_facts(run_id)
    await happen(gateway, agent, *facts[:2])
    async with connected(gateway) as socket:
        assert await ask(socket, "subscribe", run_id=run_id, ref="mine") == accepted(run_id, "mine")
        told = await receive(socket, 2)
        await happen(gateway, agent, *facts[2:])
        told += await receive(socket, 3)
        await is_quiet(socket)
    assert names(told, run_id) == WHOLE
    data = {message["event"]: message["data"] for message in told}
    assert data["reply"] == {"run_id": str(run_id), "text": "Grüße\nfrom two lines"}
    assert (data["step.completed"]["status"], data["step.completed"]["duration_ms"]) == ("completed", 7)
    assert "session_key" not in data["run.started"]


async def test_a_client_that_comes_again_gets_what_it_has_not(gateway: Platform, agent: Agent) -> None:
    run_id = agent.new_run("acme")
    await happen(gateway, agent, *run_facts(run_id))
    async with connected(gateway) as socket:
        await follow(socket, run_id, after=2)
        assert names(await receive(socket, 3), run_id) == WHOLE[2:]
    async with connected(gateway) as socket:
        # With the last event the client has everything.
        await follow(socket, run_id, after=5)
        await is_quiet(socket)
        answer = await ask(socket, "subscribe", run_id=run_id, after=6, ref="r")
        assert (answer["status"], answer["errors"][0]["field"], answer["ref"]) == (422, "after", "r")


async def test_one_socket_follows_many_runs_and_leaves_one(gateway: Platform, agent: Agent) -> None:
    runs = [agent.new_run("acme") for _ in range(20)]
    left, *others = runs
    async with connected(gateway) as socket:
        for run_id in runs:
            await follow(socket, run_id)
        await happen(gateway, agent, *(run_facts(run_id)[0] for run_id in runs))
        told = await receive(socket, len(runs))
        assert await ask(socket, "unsubscribe", run_id=left, ref="u") == accepted(left, "u")
        await happen(gateway, agent, *(fact for run_id in runs for fact in run_facts(run_id)[1:]))
        told += await receive(socket, 4 * len(others))
        await is_quiet(socket)
    assert names(told, left) == WHOLE[:1]
    for run_id in others:
        assert names(told, run_id) == WHOLE


async def test_who_subscribes_again_gets_it_from_there_again(gateway: Platform, agent: Agent) -> None:
    run_id = agent.new_run("acme")
    facts = run_facts(run_id)
    await happen(gateway, agent, *facts[:2])
    async with connected(gateway) as socket:
        for _ in range(2):
            await follow(socket, run_id, after=1)
            assert names(await receive(socket, 1), run_id) == WHOLE[1:2]
        await happen(gateway, agent, facts[2])
        assert names(await receive(socket, 1), run_id) == WHOLE[2:3]
        await is_quiet(socket)


async def test_what_did_not_arrive_is_fetched_before_what_did(gateway: Platform, agent: Agent) -> None:
    run_id = agent.new_run("acme")
    facts = run_facts(run_id)
    await happen(gateway, agent, facts[0])
    async with connected(gateway) as socket:
        await follow(socket, run_id)
        await receive(socket, 1)
        await happen(gateway, agent, facts[1], facts[2], heard=False)
        await happen(gateway, agent, facts[3])
        assert names(await receive(socket, 4), run_id) == WHOLE[1:]


async def test_sockets_that_have_caught_up_share_one_read_of_a_gap(gateway: Platform, agent: Agent) -> None:
    run_id = agent.new_run("acme")
    facts = run_facts(run_id)
    await happen(gateway, agent, facts[0])
    async with AsyncExitStack() as stack:
        sockets = [await stack.enter_async_context(connected(gateway)) for _ in range(5)]
        for socket in sockets:
            await follow(socket, run_id)
            await receive(socket, 1)
        reads = len([read for read, _ in agent.reads if read == run_id])
        await happen(gateway, agent, facts[1], facts[2], heard=False)
        await happen(gateway, agent, facts[3])
        for socket in sockets:
            assert names(await receive(socket, 4), run_id) == WHOLE[1:]
            await is_quiet(socket)
    assert len([read for read, _ in agent.reads if read == run_id]) == reads + 1


async def test_a_subscription_waits_for_an_agent_that_is_away(gateway: Platform, agent: Agent) -> None:
    run_id = agent.new_run("acme")
    await happen(gateway, agent, *run_facts(run_id))
    agent.away = True
    async with connected(gateway) as socket:
        await say(socket, "subscribe", run_id=run_id)
        await agent.was_read(run_id, 2)
        agent.away = False
        answer, *told = await receive(socket, 6)
    assert answer == accepted(run_id)
    assert names(told, run_id) == WHOLE


async def test_text_comes_while_it_is_written_and_not_of_an_attempt_that_was_given_up(
    gateway: Platform, agent: Agent, redis: Redis
) -> None:
    run_id = agent.new_run("acme")
    told: list[dict[str, Any]] = []

    async def write(attempt: int, n: int, text: str) -> None:
        piece = {"step": 1, "attempt": attempt, "n": n, "text": text}
        await redis.publish(f"claw:run:{run_id}", json.dumps(piece))

    async def is_heard() -> bool:
        await write(1, 1, "Hel")
        return bool(told)

    async def is_told() -> bool:
        return ("run.completed", 5) in names(told, run_id)

    async def listen(socket: ClientConnection) -> None:
        while True:
            told.extend(await receive(socket, 1))

    async with connected(gateway) as socket:
        await follow(socket, run_id)
        listening = asyncio.create_task(listen(socket))
        await gateway.until(is_heard)
        await write(2, 1, "Good")
        await write(1, 2, "lo")
        await write(2, 2, " day")

        async def is_written() -> bool:
            return any(message["data"].get("text") == " day" for message in told)

        await gateway.until(is_written)
        await happen(gateway, agent, *run_facts(run_id))
        await gateway.until(is_told)
        listening.cancel()
        await asyncio.wait({listening})
    assert [event for event in names(told, run_id) if event[0] != "delta"] == WHOLE
    pieces = [message["data"] for message in told if (message["event"], message["id"]) == ("delta", None)]
    # The first delta was published until the gateway listened.
    assert list({data["text"]: data for data in pieces}.values()) == [
        {"step": 1, "attempt": 1, "n": 1, "text": "Hel"},
        {"step": 1, "attempt": 2, "n": 1, "text": "Good"},
        {"step": 1, "attempt": 2, "n": 2, "text": " day"},
    ]


@pytest.mark.parametrize("status", ["failed", "cancelled", "refused"])
async def test_a_run_without_a_reply_ends_too_and_the_socket_goes_on(
    gateway: Platform, agent: Agent, status: str
) -> None:
    run_id = agent.new_run("acme")
    async with connected(gateway) as socket:
        await follow(socket, run_id)
        await happen(gateway, agent, failed(run_id, 1, status))
        [told] = await receive(socket, 1)
        await is_quiet(socket)
    assert (told["event"], told["id"], told["data"]["error"]) == (f"run.{status}", 1, "out of quota")


async def test_another_tenants_run_is_not_there(gateway: Platform, agent: Agent) -> None:
    run_id = agent.new_run("acme")
    async with connected(gateway, "other") as socket:
        for type_, run in (("subscribe", run_id), ("subscribe", uuid7()), ("cancel", run_id)):
            answer = await ask(socket, type_, run_id=run, ref="r")
            assert (answer["type"], answer["status"], answer["ref"]) == ("error", 404, "r")
        await happen(gateway, agent, *run_facts(run_id))
        await is_quiet(socket)


RUN = '"run_id":"01890000-0000-7000-8000-000000000000"'
AGENT = '"agent_id":"01890000-0000-7000-8000-000000000000"'
BAD: dict[str, tuple[str | bytes, int, str, str | None]] = {
    "no JSON": ("hello", 422, "body", None),
    "nothing": ("", 422, "body", None),
    "half of it": ('{"type":"ping","ref":"r"', 422, "body", None),
    "a list": ("[]", 422, "body", None),
    "too deep": ('{"x":' + "[" * 50_000, 422, "body", None),
    "no type": ('{"ref":"r"}', 422, "type", "r"),
    "a type that is not known": ('{"type":"auth","token":"t","ref":"r"}', 422, "type", "r"),
    "a type of the server": ('{"type":"pong","ref":"r"}', 422, "type", "r"),
    "no run": ('{"type":"subscribe","ref":"r"}', 422, "run_id", "r"),
    "no UUID": ('{"type":"cancel","run_id":"x","ref":"r"}', 422, "run_id", "r"),
    "after nothing": (f'{{"type":"subscribe",{RUN},"after":-1,"ref":"r"}}', 422, "after", "r"),
    "after too much": (f'{{"type":"subscribe",{RUN},"after":{2**31},"ref":"r"}}', 422, "after", "r"),
    "a field too many": (f'{{"type":"unsubscribe",{RUN},"x":1,"ref":"r"}}', 422, "x", "r"),
    "a ref that is none": ('{"type":"ping","ref":1}', 422, "ref", None),
    "no session": (f'{{"type":"message",{AGENT},"session":"","text":"x","ref":"r"}}', 422, "session", "r"),
    "no text": (f'{{"type":"message",{AGENT},"session":"s","ref":"r"}}', 422, "text", "r"),
    "binary": (b'{"type":"ping"}', 415, "body", None),
}


@pytest.mark.parametrize(("sent", "status", "field", "ref"), BAD.values(), ids=BAD)
async def test_bad_input_is_refused_and_the_socket_goes_on(
    gateway: Platform, sent: str | bytes, status: int, field: str, ref: str | None
) -> None:
    async with connected(gateway) as socket:
        await socket.send(sent)
        [answer] = await receive(socket, 1)
        assert (answer["type"], answer["status"], answer["ref"]) == ("error", status, ref)
        assert [error["field"] for error in answer["errors"]] == [field]
        await is_quiet(socket)


async def test_a_message_that_is_too_large_ends_its_socket(gateway: Platform) -> None:
    async with connected(gateway) as socket:
        await say(socket, "ping", ref="x" * 1_048_000)
        await receive(socket, 1)
        await say(socket, "ping", ref="x" * 1_048_576)
        assert await closed(socket) == 1009


async def test_a_posted_message_is_handed_on_and_its_run_is_followed(gateway: Platform, agent: Agent) -> None:
    run_id, agent_id = agent.new_run("acme"), uuid7()
    agent.answer = 202, {"run_id": str(run_id)}
    async with connected(gateway, scopes=("run",)) as socket:
        message = {"agent_id": agent_id, "session": "../a?b", "text": "tell no log", "idempotency_key": "k1"}
        assert await ask(socket, "message", **message, ref="m") == accepted(run_id, "m")
        # Answered together with the first message: the same run, whose events are sent once.
        assert await ask(socket, "message", **message, ref="n") == accepted(run_id, "n")
        await happen(gateway, agent, *run_facts(run_id))
        assert names(await receive(socket, 5), run_id) == WHOLE
        await is_quiet(socket)
    path = f"/api/v1/agents/{agent_id}/sessions/%2E%2E%2Fa%3Fb/messages"
    sent = [(headers, json.loads(body)) for posted, headers, body in agent.posted if posted == path]
    assert [body for _, body in sent] == [{"text": "tell no log", "idempotency_key": "k1"}] * 2
    assert "traceparent" in sent[0][0]
    assert "tell no log" not in gateway.log("ws_gateway")


async def test_what_the_agent_refuses_is_told_as_it_said(gateway: Platform, agent: Agent) -> None:
    problem = {"detail": "not as it must be", "errors": [{"field": "text", "message": "too short"}], "title": "x"}
    message = {"agent_id": uuid7(), "session": "s", "text": "", "ref": "m"}
    async with connected(gateway) as socket:
        agent.answer = 422, problem
        refused = await ask(socket, "message", **message)
        assert refused == {"type": "error", "status": 422, "ref": "m", **{k: problem[k] for k in ("detail", "errors")}}
        agent.answer = 503, {"detail": "later", "errors": []}
        assert (await ask(socket, "message", **message))["detail"] == "later"
        agent.answer = 502, {}
        assert (await ask(socket, "message", **message))["status"] == 503
        await is_quiet(socket)


async def test_a_run_is_cancelled_unless_it_is_over(gateway: Platform, agent: Agent) -> None:
    run_id, over = agent.new_run("acme"), agent.new_run("acme")
    await happen(gateway, agent, *run_facts(over))
    async with connected(gateway) as socket:
        assert await ask(socket, "cancel", run_id=run_id, ref="c") == accepted(run_id, "c")
        assert run_id in agent.cancelled
        answer = await ask(socket, "cancel", run_id=over, ref="c")
        assert (answer["status"], answer["detail"], answer["ref"]) == (409, "the run is completed", "c")


async def test_a_scope_that_is_missing_is_named_and_the_socket_goes_on(gateway: Platform, agent: Agent) -> None:
    run_id, tenant = agent.new_run("acme"), str(uuid7())
    message = {"agent_id": uuid7(), "session": "s", "text": "x"}
    for scopes, type_, fields, missing in (
        (("run",), "subscribe", {"run_id": run_id}, "read"),
        (("read", "write", "admin"), "cancel", {"run_id": run_id}, "run"),
        (("read",), "message", message, "run"),
    ):
        async with connected(gateway, tenant, scopes=scopes) as socket:
            answer = await ask(socket, type_, **fields)
            assert (answer["status"], answer["detail"]) == (403, f"the scope {missing} is missing")
            await is_quiet(socket)
    assert run_id not in agent.cancelled
    acts = [act for headers, act in await gateway.outbox("ws_gateway", "audit.logs") if act["tenant_id"] == tenant]
    assert [(act["object_id"], act["outcome"]) for act in acts] == [
        ("GET /ws subscribe", "denied"),
        ("GET /ws cancel", "denied"),
        ("GET /ws message", "denied"),
    ]


async def test_who_is_not_a_tenants_gets_a_problem_and_no_socket(gateway: Platform) -> None:
    for headers, status in (({}, 401), ({"x-claw-identity": "x"}, 401), (gateway.headers(""), 403)):
        with pytest.raises(InvalidStatus) as refused:
            async with opened(gateway.url("ws_gateway"), headers):
                pass
        answer = refused.value.response
        assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
        assert json.loads(answer.body or b"")["status"] == status
    acts = [act for _, act in await gateway.outbox("ws_gateway", "audit.logs")]
    assert [act["object_id"] for act in acts if act["actor"] == "operator"] == ["GET /ws"]
    async with gateway.client("ws_gateway", "acme") as client:
        plain = await client.get("/ws")
        metrics = (await client.get("/metrics")).text
    assert (plain.status_code, plain.headers["upgrade"]) == (426, "websocket")
    assert 'claw_http_request_seconds_count{method="GET",route="/ws",status="401"}' in metrics


async def test_what_a_client_puts_into_the_address_is_not_logged(gateway: Platform) -> None:
    address = f"{gateway.url('ws_gateway').replace('http', 'ws', 1)}/ws?my=hunter2"
    async with connect(address, additional_headers=gateway.headers("acme"), proxy=None) as socket:
        await is_quiet(socket)
    assert "hunter2" not in gateway.log("ws_gateway")


async def test_the_schema_is_served_as_it_is_committed(gateway: Platform) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    async with gateway.client("ws_gateway") as client:
        answer = await client.get("/docs/ws-schema.json")
        assert answer.headers["content-type"] == "application/schema+json"
        assert answer.json() == SCHEMA
        assert "ws-schema.json" in (await client.get("/docs/openapi.json")).json()["paths"]["/ws"]["get"]["description"]


async def test_a_client_that_takes_nothing_is_dropped_alone(gateway: Platform, agent: Agent, redis: Redis) -> None:
    run_id = agent.new_run("acme")
    piece = {"step": 1, "attempt": 1, "n": 1, "text": "x" * 20_000}
    dropped = gateway.log("ws_gateway").count("reads too slowly")

    async def is_dropped() -> bool:
        for _ in range(50):
            await redis.publish(f"claw:run:{run_id}", json.dumps(piece))
        return gateway.log("ws_gateway").count("reads too slowly") > dropped

    async def told(socket: ClientConnection) -> list[tuple[str, int | None]]:
        events: list[tuple[str, int | None]] = []
        while ("run.completed", 5) not in events:
            message = json.loads(await socket.recv())
            if message["event"] != "delta":
                events.append((message["event"], message["id"]))
        return events

    async with (
        opened(gateway.url("ws_gateway"), gateway.headers("acme"), max_queue=1, close_timeout=1) as slow,
        connected(gateway) as socket,
    ):
        await follow(slow, run_id)
        await follow(socket, run_id)
        other = asyncio.create_task(told(socket))
        await gateway.until(is_dropped)
        await happen(gateway, agent, *run_facts(run_id))
        async with asyncio.timeout(30):
            assert await other == WHOLE
        async with asyncio.timeout(30):
            with pytest.raises(ConnectionClosed):
                while True:
                    await slow.recv()
    assert gateway.log("ws_gateway").count("reads too slowly") == dropped + 1


async def test_a_gateway_that_is_stopped_says_so_and_the_next_one_goes_on(gateway: Platform, agent: Agent) -> None:
    run_id = agent.new_run("acme")
    facts = run_facts(run_id)
    await happen(gateway, agent, *facts[:2])
    async with connected(gateway) as idle, connected(gateway) as socket:
        await follow(socket, run_id)
        last = (await receive(socket, 2))[-1]["id"]
        stopping = asyncio.create_task(asyncio.to_thread(gateway.stop, "ws_gateway"))
        assert await closed(socket) == 1012
        assert await closed(idle) == 1012
    assert await stopping == 0
    await happen(gateway, agent, facts[2])
    await gateway.start("ws_gateway")
    async with connected(gateway) as socket:
        await follow(socket, run_id, after=last)
        await receive(socket, 1)
        await happen(gateway, agent, facts[3])
        assert names(await receive(socket, 2), run_id) == WHOLE[3:]


@pytest.fixture(scope="module")
async def user(platform: Platform) -> Platform:
    await platform.prepare("user")
    await platform.start("user")
    return platform


@pytest.fixture
async def tenant(user: Platform) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the user service with the first key of a new tenant."""
    async with user.client("user") as operator:
        made = (await operator.post("/api/v1/tenants", json={"name": "Acme"})).json()
    async with user.client("user", made["id"]) as client:
        client.headers["authorization"] = f"Bearer {made['api_key']}"
        yield client


async def identity(tenant: httpx.AsyncClient, key: str) -> dict[str, str]:
    """The header that the gateway adds to a request with this key."""
    answer = await tenant.get("/internal/auth", headers={"authorization": key, "x-claw-service": "ws_gateway"})
    return {"x-claw-identity": answer.headers["x-claw-identity"]}


class NoRefusals:
    """Records nothing."""

    async def record_message(self, who: Identity, name: str) -> None:
        pass


@asynccontextmanager
async def in_this_process(platform: Platform, user_grpc: str) -> AsyncIterator[str]:
    """The URL of a gateway in this process, so that a test can change its intervals."""
    identities = key_pairs.identities("ws_gateway")
    async with Redis.from_url(platform.stack.redis_url) as redis:
        keys = ApiKeys(platform.channels("ws_gateway").to(user_grpc, "user", safe=SAFE))
        hub = Hub(Cache(redis), Clients(keys, asyncio.Event()))
        caller = Caller(platform.url("agent"), identities)
        route = api.websocket(hub, caller, identities, cast(Refusals, NoRefusals()))
        server = await serve_http(create_app([route], Health("ws_gateway", "1"), Metrics(CollectorRegistry())), 0)
        yield f"http://127.0.0.1:{server.port}"
        await server.stop()
        await caller._http.aclose()


async def test_through_the_real_gateway_a_key_opens_a_socket(
    gateway: Platform, agent: Agent, tenant: httpx.AsyncClient
) -> None:
    run_id = agent.new_run((await tenant.get("/api/v1/tenant")).json()["id"])
    await happen(gateway, agent, *run_facts(run_id))
    async with running_gateway(gateway.ports) as url:
        async with opened(url, {"Authorization": tenant.headers["authorization"]}) as socket:
            await follow(socket, run_id)
            assert names(await receive(socket, 5), run_id) == WHOLE
        with pytest.raises(InvalidStatus) as refused:
            async with opened(url, {"Authorization": "Bearer claw_unknown"}):
                pass
        assert refused.value.response.status_code == 401
        async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
            assert (await client.get("/docs/ws_gateway/ws-schema.json")).json() == SCHEMA


async def test_a_revoked_key_closes_its_sockets_and_no_others(
    agent: Agent, user: Platform, tenant: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "CHECK_SECONDS", 0.05)
    made = (await tenant.post("/api/v1/api-keys", json={"name": "lost"})).json()
    mine = await identity(tenant, tenant.headers["authorization"])
    lost = await identity(tenant, f"Bearer {made['api_key']}")
    async with in_this_process(user, user.grpc("user")) as url, opened(url, mine) as good, opened(url, lost) as bad:
        await is_quiet(bad)
        assert (await tenant.delete(f"/api/v1/api-keys/{made['id']}")).status_code == 204
        assert await closed(bad) == 4401
        await is_quiet(good)


def test_a_revoked_key_ends_its_connections_within_ten_seconds() -> None:
    """A key that is revoked directly after its check waits for the next round, and that for the slowest call."""
    assert clients.CHECK_SECONDS + DEFAULT_TIMEOUT_SECONDS <= 10


async def test_a_member_may_do_what_the_role_allows_now(
    agent: Agent, user: Platform, tenant: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "CHECK_SECONDS", 0.05)
    member = (await tenant.post("/api/v1/members", json={"email": "o@acme.example", "role": "operator"})).json()["id"]
    key = (await tenant.post("/api/v1/api-keys", json={"name": "laptop", "member_id": member})).json()["api_key"]
    headers = await identity(tenant, f"Bearer {key}")
    async with in_this_process(user, user.grpc("user")) as url, opened(url, headers) as socket_:

        async def status() -> int:
            answer: int = (await ask(socket_, "cancel", run_id=uuid7()))["status"]
            return answer

        async def is_forbidden() -> bool:
            return await status() == 403

        assert await status() == 404
        await tenant.patch(f"/api/v1/members/{member}", json={"role": "viewer"})
        await user.until(is_forbidden)
        await tenant.delete(f"/api/v1/members/{member}")
        assert await closed(socket_) == 4401


async def test_the_operator_in_a_tenants_place_has_no_key_and_stays(
    agent: Agent, user: Platform, tenant: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "CHECK_SECONDS", 0.05)
    tenant.headers["x-claw-tenant"] = (await tenant.get("/api/v1/tenant")).json()["id"]
    headers = await identity(tenant, f"Bearer {ADMIN_TOKEN}")
    made = (await tenant.post("/api/v1/api-keys", json={"name": "lost"})).json()
    lost = await identity(tenant, f"Bearer {made['api_key']}")
    async with in_this_process(user, user.grpc("user")) as url, opened(url, headers) as operator:
        await is_quiet(operator)
        async with opened(url, lost) as later:
            await tenant.delete(f"/api/v1/api-keys/{made['id']}")
            # The first socket was checked before the later one.
            assert await closed(later) == 4401
        await is_quiet(operator)


async def test_a_client_of_whom_nobody_knows_whether_it_may_stay_is_sent_away_in_the_end(
    agent: Agent, user: Platform, tenant: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "CHECK_SECONDS", 0.01)
    headers = await identity(tenant, tenant.headers["authorization"])
    asked: list[str] = []
    renewed = ApiKeys.renewed

    async def counted(keys: ApiKeys, who: Identity) -> Identity:
        asked.append(who.key_id)
        return await renewed(keys, who)

    async def are_two() -> bool:
        return len(asked) > 2

    monkeypatch.setattr(ApiKeys, "renewed", counted)
    # The billing service does not run.
    async with in_this_process(user, user.grpc("billing")) as url, opened(url, headers) as patient:
        await user.until(are_two)
        await is_quiet(patient)
        monkeypatch.setattr(clients, "UNCHECKED_SECONDS", 0.1)
        assert await closed(patient) == 1013


async def test_a_socket_follows_so_many_runs_and_no_more(
    agent: Agent, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "MAX_RUNS", 2)
    first, second, third, over = (agent.new_run("acme") for _ in range(4))
    agent.committed[over] = run_facts(over)
    agent.answer = 202, {"run_id": str(third)}
    message = {"agent_id": uuid7(), "session": "full", "text": "x"}
    async with in_this_process(platform, "") as url, opened(url, platform.headers("acme")) as socket_:
        await follow(socket_, first)
        await follow(socket_, over, after=5)

        async def has_room() -> bool:
            return bool((await ask(socket_, "subscribe", run_id=second))["type"] == "accepted")

        # A run without further events takes no place.
        await platform.until(has_room)
        # A second subscription to the same run takes no second place.
        await follow(socket_, second)
        assert (await ask(socket_, "subscribe", run_id=third))["status"] == 409
        assert (await ask(socket_, "message", **message))["status"] == 409
        assert not any("/sessions/full/" in path for path, _, _ in agent.posted)
        assert await ask(socket_, "unsubscribe", run_id=first) == accepted(first)
        await follow(socket_, third)


async def test_a_posted_message_has_a_trace_of_its_own_and_the_socket_has_none(
    agent: Agent, platform: Platform
) -> None:
    exporter = InMemorySpanExporter()
    tracing = telemetry.setup("ws_gateway", "1", None, processor=SimpleSpanProcessor(exporter))
    run_id = agent.new_run("acme")
    agent.answer = 202, {"run_id": str(run_id)}
    async with in_this_process(platform, "") as url, opened(url, platform.headers("acme")) as socket_:
        for ref in ("a", "b"):
            message = {"agent_id": uuid7(), "session": "s", "text": "x"}
            assert await ask(socket_, "message", **message, ref=ref) == accepted(run_id, ref)
        await agent.was_read(run_id)
    tracing.shutdown()
    spans = exporter.get_finished_spans()
    posted = [span for span in spans if span.name == "ws message"]
    assert [(span.kind, span.parent) for span in posted] == [(SpanKind.SERVER, None)] * 2
    for span in posted:
        below = [other for other in spans if other.context and other.context.trace_id == span.context.trace_id]
        # Our span, the call, and the span of the agent.
        assert [other.kind for other in below].count(SpanKind.SERVER) == 2
        assert [other.kind for other in below].count(SpanKind.CLIENT) == 1
    assert "/ws" not in {(span.attributes or {}).get("url.path") for span in spans}


WHO = Identity("api_key:test", "acme", frozenset(("read",)))


class Transport:
    """Stands in for the transport of a socket. `unsent` is the size of its write buffer."""

    def __init__(self) -> None:
        self.sent = b""
        self.unsent = 0
        self.ended = ""

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        pass

    def set_write_buffer_limits(self, high: int) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def write(self, data: bytes) -> None:
        self.sent += data

    def close(self) -> None:
        self.ended = self.ended or "closed"

    def abort(self) -> None:
        self.ended = self.ended or "aborted"

    @property
    def code(self) -> int:
        """The code of the close frame, the last frame that was sent."""
        at = self.sent.index(0x88)
        return int.from_bytes(self.sent[at + 2 : at + 4], "big")


def new_hub(stopping: asyncio.Event | None = None) -> Hub:
    return Hub(cast(Cache, None), Clients(cast(ApiKeys, ValidKeys()), stopping or asyncio.Event()))


def opened_on(transport: Transport, hub: Hub | None = None, who: Identity = WHO) -> socket.Socket:
    shown = socket.Socket(hub or new_hub(), cast(Caller, None), who, cast(Refusals, None))
    shown.take_over(cast(asyncio.Transport, transport), lambda: None)
    return shown


async def test_a_socket_that_cannot_go_on_is_closed_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    transport = Transport()
    shown = opened_on(transport)

    async def bug() -> None:
        raise ValueError("a bug")

    await asyncio.wait({shown._start(bug())})
    await asyncio.sleep(0)
    assert transport.code == 1011
    assert capsys.readouterr().out.count("socket failed") == 1


async def test_one_tenant_does_not_get_all_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "PLACES", 4)
    hub = new_hub()
    sockets = [opened_on(Transport(), hub, replace(WHO, key_id=f"k{n}")) for n in range(2)]
    more, theirs, again = Transport(), Transport(), Transport()
    refused = opened_on(more, hub, replace(WHO, key_id="k2"))
    assert (more.code, refused.is_open) == (1013, False)
    # The end of the refused one gives no place back.
    refused.connection_lost(None)
    assert not opened_on(more, hub).is_open
    sockets.append(opened_on(theirs, hub, replace(WHO, tenant_id="other")))
    sockets[0].connection_lost(None)
    sockets.append(opened_on(again, hub))
    assert [shown.is_open for shown in sockets] == [False, True, True, True]
    for shown in sockets[1:]:
        shown.connection_lost(None)


async def test_a_client_that_does_not_read_is_dropped_by_bytes_or_by_time() -> None:
    full, late = Transport(), Transport()
    for transport, now in ((full, 0.0), (late, 1e9)):
        shown = opened_on(transport)
        shown._heard_at = now
        shown.pause_writing()
        transport.unsent = connection.MAX_UNSENT_BYTES
        shown.write(b"x")
        assert shown.is_open
        if transport is full:
            transport.unsent += 1
            shown.write(b"y")
        else:
            shown.tick(shown._paused_at + connection.SEND_SECONDS)
            assert shown.is_open
            shown.tick(shown._paused_at + connection.SEND_SECONDS + 1)
        assert not shown.is_open
        assert transport.code == 1013
        sent = len(transport.sent)
        shown.write(b"after the close frame")
        assert len(transport.sent) == sent


async def test_a_silent_client_gets_pings_and_is_cut_off_in_the_end() -> None:
    transport = Transport()
    shown = opened_on(transport)
    began = shown._heard_at
    shown.tick(began + PING_SECONDS - 1)
    assert transport.sent == b""
    shown.tick(began + PING_SECONDS + 1)
    assert transport.sent == bytes((0x89, 0))
    shown.tick(began + PING_SECONDS + PONG_SECONDS)
    assert transport.ended == ""
    shown.tick(began + PING_SECONDS + PONG_SECONDS + 1)
    assert transport.ended == "aborted"


@pytest.mark.parametrize(("sent", "code"), [(b"\x81\x82\0\0\0\0\xff\xff", 1007), (b"\x81\x02hi", 1002)])
async def test_invalid_frames_end_the_socket(sent: bytes, code: int) -> None:
    """Text that is not UTF-8, and a frame without a mask (RFC 6455 §5.1, §8.1)."""
    transport = Transport()
    shown = opened_on(transport)
    shown.data_received(sent)
    assert transport.code == code
    assert not shown.is_open


async def test_empty_fragments_without_an_end_take_no_memory() -> None:
    transport = Transport()
    shown = opened_on(transport)
    shown.data_received(masked(0x01, b"{"))
    empty = masked(0x00, b"") * 10_000
    shown.data_received(empty)
    tracemalloc.start()
    for _ in range(20):
        shown.data_received(empty)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A list of the fragments would be twenty megabytes.
    assert grown < 200_000
    shown.data_received(masked(0x80, b"}"))
    await asyncio.sleep(0)
    assert b"type" in transport.sent


async def test_a_tenants_clients_have_a_share_of_the_memory_for_what_they_send(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "HELD_BYTES", 300)
    monkeypatch.setattr(socket, "FREE_BYTES", 10)
    hub = new_hub()

    def sends(size: int, who: Identity = WHO, head: int = 0x01) -> tuple[Transport, socket.Socket]:
        """The beginning of a message."""
        shown = opened_on(transport := Transport(), hub, who)
        shown.data_received(masked(head, b"x" * size))
        return transport, shown

    _, first = sends(120)
    transport, second = sends(100)
    assert (transport.code, transport.ended, second.is_open) == (End.TOO_MUCH.value[0], "aborted", False)
    few, other = sends(10)[1], sends(80, replace(WHO, tenant_id="another"))[1]
    assert few.is_open
    assert other.is_open
    # A frame in parts, which the protocol keeps.
    third = opened_on(transport := Transport(), hub)
    third.data_received(masked(0x81, b"x" * 100)[:60])
    assert transport.code == End.TOO_MUCH.value[0]
    # The bytes of answered messages and of closed clients are given back.
    first.data_received(masked(0x80, b"x"))
    other.connection_lost(None)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert sends(120)[1].is_open


async def test_a_client_that_sends_pings_and_does_not_read_the_answers_is_dropped() -> None:
    transport = Transport()
    shown = opened_on(transport)
    pings = masked(0x89, b"x" * 125) * 100
    shown.pause_writing()
    transport.unsent = connection.MAX_UNSENT_BYTES
    shown.data_received(pings)
    assert transport.ended == ""
    transport.unsent += 1
    shown.data_received(pings)
    assert transport.ended == "aborted"
    # Also after the close frame of the server.
    closing = Transport()
    shown = opened_on(closing)
    shown.close(1000, "")
    shown.pause_writing()
    closing.unsent = connection.MAX_UNSENT_BYTES + 1
    shown.data_received(pings)
    assert closing.ended == "aborted"


def masked(head: int, data: bytes) -> bytes:
    """A client's frame with a mask of zeros."""
    return bytes((head, 0x80 | len(data), 0, 0, 0, 0)) + data


@pytest.mark.parametrize("stopping", [False, True])
async def test_a_socket_that_opens_while_the_process_stops_is_sent_away(stopping: bool) -> None:
    transport, stop = Transport(), asyncio.Event()
    if stopping:
        stop.set()
    shown = opened_on(transport, new_hub(stop))
    if not stopping:
        assert shown.is_open
        shown.shutdown()
    assert transport.code == End.RESTARTING.value[0]


def test_what_waits_for_a_client_is_bounded_over_all_its_runs_and_given_back() -> None:
    ended: list[bool] = []
    room = Room(lambda: ended.append(True))
    one, other = Live(room), Live(room)
    piece = Delta(1, 1, 1, "x")
    for _ in range(3):
        one.push(piece)
    one.close()
    other.push(piece)
    other.close()
    assert room.left == MAX_WAITING
    one, other = Live(room), Live(room)
    for live in (one, other) * (MAX_WAITING // 2 + 1):
        live.push(piece)
    assert ended == []
    one.push(piece)
    other.push(piece)
    assert ended == [True]
