"""Streams of runs, by the real process, real Kafka and real Redis, beside a stand-in for the agent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import httpx
import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.new_partitions import NewPartitions
from redis.asyncio import Redis

from infra.clock import uuid7
from protos.catalog import AGENT_EVENTS
from tests.services.ws_gateway.agent import Agent, failed, happen, run_facts
from tooling.testing.platform import Platform

Events = AsyncIterator[tuple[str, str | None, Any]]


@asynccontextmanager
async def watching(
    platform: Platform, run_id: UUID, *, after: str | None = None, tenant: str = "acme"
) -> AsyncIterator[Events]:
    headers = {"Last-Event-ID": after} if after is not None else {}
    async with (
        platform.client("ws_gateway", tenant) as client,
        client.stream("GET", f"/api/v1/runs/{run_id}/events", headers=headers) as answer,
    ):
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield events(answer)


async def events(answer: httpx.Response) -> Events:
    fields: dict[str, str] = {}
    async for line in answer.aiter_lines():
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        else:
            if "event" in fields:
                yield fields["event"], fields.get("id"), json.loads(fields["data"])
            fields = {}


async def receive(events: Events, count: int) -> list[tuple[str, str | None, Any]]:
    async with asyncio.timeout(30):
        return [await anext(events) for _ in range(count)]


async def rest(events: Events) -> list[tuple[str, str | None, Any]]:
    async with asyncio.timeout(30):
        return [event async for event in events]


def names(events: list[tuple[str, str | None, Any]]) -> list[tuple[str, str | None]]:
    return [(name, id_) for name, id_, _ in events]


WHOLE = [
    ("run.started", "1"),
    ("step.started", "2"),
    ("step.completed", "3"),
    ("reply", "4"),
    ("run.completed", "5"),
]


async def test_a_run_is_told_from_what_was_before_to_its_end(gateway: Platform, agent: Agent) -> None:
    run_id = agent.new_run("acme")
    facts = run_facts(run_id)
    await happen(gateway, agent, *facts[:2])
    async with watching(gateway, run_id) as stream:
        before = await receive(stream, 2)
        await happen(gateway, agent, *facts[2:])
        told = before + await rest(stream)
    assert names(told) == WHOLE
    data = {name: data for name, _, data in told}
    assert data["reply"] == {"run_id": str(run_id), "text": "Grüße\nfrom two lines"}
    assert (data["step.completed"]["status"], data["step.completed"]["duration_ms"]) == ("completed", 7)
    assert "session_key" not in data["run.started"]


async def test_a_client_that_comes_again_gets_what_it_has_not(gateway: Platform, agent: Agent) -> None:
    run_id = agent.new_run("acme")
    await happen(gateway, agent, *run_facts(run_id))
    async with watching(gateway, run_id, after="2") as stream:
        assert names(await rest(stream)) == WHOLE[2:]
    # With the last event the client has everything: a browser does not reconnect after a 204.
    async with gateway.client("ws_gateway", "acme") as client:
        done = await client.get(f"/api/v1/runs/{run_id}/events", headers={"Last-Event-ID": "5"})
        assert done.status_code == 204
        # An id behind the end of the run: nothing would ever follow.
        behind = await client.get(f"/api/v1/runs/{run_id}/events", headers={"Last-Event-ID": "999"})
        assert behind.status_code == 204
        running = agent.new_run("acme")
        await happen(gateway, agent, run_facts(running)[0])
        foreign = await client.get(f"/api/v1/runs/{running}/events", headers={"Last-Event-ID": "999"})
    assert (foreign.status_code, foreign.json()["errors"][0]["field"]) == (422, "header Last-Event-ID")


async def test_what_did_not_arrive_is_fetched_before_what_did(gateway: Platform, agent: Agent) -> None:
    run_id = agent.new_run("acme")
    facts = run_facts(run_id)
    await happen(gateway, agent, facts[0])
    async with watching(gateway, run_id) as stream:
        await receive(stream, 1)
        await happen(gateway, agent, facts[1], facts[2], heard=False)
        await happen(gateway, agent, facts[3])
        assert names(await rest(stream)) == WHOLE[1:]


async def test_a_stream_waits_for_an_agent_that_is_away(gateway: Platform, agent: Agent) -> None:
    run_id = agent.new_run("acme")
    facts = run_facts(run_id)
    await happen(gateway, agent, facts[0])
    async with watching(gateway, run_id) as stream:
        await receive(stream, 1)
        reads = len(agent.reads)
        agent.away = True
        await happen(gateway, agent, facts[1], heard=False)
        await happen(gateway, agent, *facts[2:])
        async with asyncio.timeout(30):
            while len(agent.reads) < reads + 2:
                await asyncio.sleep(0.02)
        agent.away = False
        assert names(await rest(stream)) == WHOLE[1:]


async def test_what_happens_while_the_past_is_read_is_not_lost(gateway: Platform, agent: Agent) -> None:
    run_id = agent.new_run("acme")
    facts = run_facts(run_id)
    await happen(gateway, agent, *facts[:3])
    async with watching(gateway, run_id) as other:
        await receive(other, 3)
        agent.hold.clear()
        async with gateway.client("ws_gateway", "acme") as client:
            asked = asyncio.create_task(client.get(f"/api/v1/runs/{run_id}/events"))
            await agent.was_read(run_id, 2)
            # The answer is already made when the last fact arrives, and no fact follows.
            await happen(gateway, agent, facts[3])
            await rest(other)
            agent.hold.set()
            async with asyncio.timeout(30):
                answer = await asked
    assert answer.text.count("event: run.completed") == 1


async def test_what_a_broken_tail_has_missed_is_fetched(gateway: Platform, agent: Agent) -> None:
    run_id = agent.new_run("acme")
    facts = run_facts(run_id)
    await happen(gateway, agent, facts[0])
    async with watching(gateway, run_id) as stream:
        await receive(stream, 1)
        await happen(gateway, agent, *facts[1:], heard=False)
        # The tail begins again if its topic was replaced.
        admin = AIOKafkaAdminClient(bootstrap_servers=gateway.stack.kafka_bootstrap_servers)
        await admin.start()
        await admin.create_partitions({gateway.prefix + AGENT_EVENTS.name: NewPartitions(AGENT_EVENTS.partitions + 1)})
        await admin.close()
        assert names(await rest(stream)) == WHOLE[1:]


@pytest.mark.parametrize("status", ["failed", "cancelled", "refused"])
async def test_a_run_without_a_reply_ends_its_stream_too(gateway: Platform, agent: Agent, status: str) -> None:
    run_id = agent.new_run("acme")
    async with watching(gateway, run_id) as stream:
        await happen(gateway, agent, failed(run_id, 1, status))
        [(name, id_, data)] = await rest(stream)
    assert (name, id_, data["error"]) == (f"run.{status}", "1", "out of quota")


async def test_text_comes_while_it_is_written_and_not_of_an_attempt_that_was_given_up(
    gateway: Platform, agent: Agent, redis: Redis
) -> None:
    run_id = agent.new_run("acme")
    told: list[tuple[str, str | None, Any]] = []

    async def write(attempt: int, n: int, text: str) -> None:
        piece = {"step": 1, "attempt": attempt, "n": n, "text": text}
        await redis.publish(f"claw:run:{run_id}", json.dumps(piece))

    async def is_heard() -> bool:
        await write(1, 1, "Hel")
        return bool(told)

    async def listen(stream: Events) -> None:
        async for event in stream:
            told.append(event)

    async with watching(gateway, run_id) as stream, asyncio.timeout(60):
        listening = asyncio.create_task(listen(stream))
        await gateway.until(is_heard)
        await write(2, 1, "Good")
        await write(1, 2, "lo")
        await redis.publish(f"claw:run:{run_id}", b"nonsense")
        await write(2, 2, " day")

        async def is_written() -> bool:
            return any(name == "delta" and data["text"] == " day" for name, _, data in told)

        await gateway.until(is_written)
        await happen(gateway, agent, *run_facts(run_id))
        await listening
    assert [event for event in names(told) if event[0] != "delta"] == WHOLE
    pieces = [data for name, id_, data in told if (name, id_) == ("delta", None)]
    # The first delta was published until the gateway listened.
    assert list({data["text"]: data for data in pieces}.values()) == [
        {"step": 1, "attempt": 1, "n": 1, "text": "Hel"},
        {"step": 1, "attempt": 2, "n": 1, "text": "Good"},
        {"step": 1, "attempt": 2, "n": 2, "text": " day"},
    ]
    assert [data["text"] for data in pieces].count(" day") == 1


async def test_who_may_not_see_a_run_gets_a_problem(gateway: Platform, agent: Agent) -> None:
    run_id = agent.new_run("acme")
    path = f"/api/v1/runs/{run_id}/events"
    async with gateway.client("ws_gateway", "other") as client:
        assert (await client.get(path)).status_code == 404
        assert (await client.get(f"/api/v1/runs/{uuid7()}/events")).status_code == 404
    async with gateway.client("ws_gateway", "acme", scopes=("write",)) as client:
        assert (await client.get(path)).status_code == 403
    async with httpx.AsyncClient(base_url=gateway.url("ws_gateway")) as client:
        assert (await client.get(path)).status_code == 401
    async with gateway.client("ws_gateway", "acme") as client:
        for bad in (b"x", b"-1", b"1.5", "²".encode(), b"9" * 20):
            answer = await client.get(path, headers={b"Last-Event-ID": bad})
            assert answer.status_code == 422
            assert answer.json()["errors"][0]["field"] == "header Last-Event-ID"
        agent.away = True
        assert (await client.get(path)).status_code == 503
        agent.away = False


async def test_a_posted_message_is_handed_on_and_its_run_is_shown(gateway: Platform, agent: Agent) -> None:
    run_id = agent.new_run("acme")
    agent.answer = 202, {"run_id": str(run_id)}
    path = f"/api/v1/agents/{uuid7()}/sessions/web%2F42/messages"
    headers = httpx.Headers({"accept": "text/event-stream", "idempotency-key": "k\xe9"}, encoding="latin-1")
    async with gateway.client("ws_gateway", "acme", scopes=("run",)) as client:
        body = b'{"text": "hello"}'
        headers["content-type"] = "application/json"
        async with client.stream("POST", path, headers=headers, content=body) as answer:
            assert answer.status_code == 200
            await happen(gateway, agent, *run_facts(run_id))
            assert names(await rest(events(answer))) == WHOLE
        [(posted, sent, content)] = agent.posted
        assert (posted, sent["idempotency-key"], content) == (path, "k\xe9", body)

        agent.answer = 503, {"detail": "later"}
        refused = await client.post(path, headers=headers, content=body)
    assert (refused.status_code, refused.json(), refused.headers["retry-after"]) == (503, {"detail": "later"}, "3")


async def test_a_client_that_takes_nothing_is_dropped_alone(gateway: Platform, agent: Agent, redis: Redis) -> None:
    run_id = agent.new_run("acme")
    url = httpx.URL(gateway.url("ws_gateway"))
    lines = [f"GET /api/v1/runs/{run_id}/events HTTP/1.1", "Host: gateway"]
    lines += [f"{name}: {value}" for name, value in gateway.headers("acme").items()]
    _, writer = await asyncio.open_connection(url.host, url.port, limit=1024)
    writer.write("\r\n".join([*lines, "", ""]).encode())
    await agent.was_read(run_id)
    piece = {"step": 1, "attempt": 1, "n": 1, "text": "x" * 20_000}

    async def is_dropped() -> bool:
        for _ in range(50):
            await redis.publish(f"claw:run:{run_id}", json.dumps(piece))
        return "reads too slowly" in gateway.log("ws_gateway")

    async with watching(gateway, run_id) as stream:
        other = asyncio.create_task(rest(stream))
        await gateway.until(is_dropped)
        await happen(gateway, agent, *run_facts(run_id))
        assert names(await other)[-5:] == WHOLE
    assert gateway.log("ws_gateway").count("reads too slowly") == 1
    writer.close()


async def test_a_gateway_that_is_stopped_ends_its_streams_and_the_next_one_goes_on(
    gateway: Platform, agent: Agent
) -> None:
    run_id = agent.new_run("acme")
    facts = run_facts(run_id)
    await happen(gateway, agent, *facts[:2])
    async with watching(gateway, run_id) as stream:
        last = (await receive(stream, 2))[-1][1]
        stopping = asyncio.create_task(asyncio.to_thread(gateway.stop, "ws_gateway"))
        assert await rest(stream) == []
    assert await stopping == 0
    await happen(gateway, agent, facts[2])
    await gateway.start("ws_gateway")
    async with watching(gateway, run_id, after=last) as stream:
        await receive(stream, 1)
        await happen(gateway, agent, facts[3])
        assert names(await rest(stream)) == WHOLE[3:]


async def test_one_that_is_killed_loses_nothing_either(gateway: Platform, agent: Agent) -> None:
    run_id = agent.new_run("acme")
    facts = run_facts(run_id)
    await happen(gateway, agent, *facts[:2])
    with pytest.raises(httpx.RemoteProtocolError):
        async with watching(gateway, run_id) as stream:
            await receive(stream, 2)
            gateway.kill("ws_gateway")
            await rest(stream)
    await happen(gateway, agent, *facts[2:])
    await gateway.start("ws_gateway")
    async with watching(gateway, run_id, after="2") as stream:
        assert names(await rest(stream)) == WHOLE[2:]
