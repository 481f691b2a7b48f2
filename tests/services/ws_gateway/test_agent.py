"""The client of the agent's HTTP routes."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from infra.clock import uuid7
from infra.security.auth import Identity
from services.ws_gateway.agent import CONCURRENT_CALLS, CONCURRENT_READS, Agent
from tooling.testing import keys
from tooling.testing.until import until


async def test_a_tenants_reads_leave_places_to_the_next_tenant(monkeypatch: pytest.MonkeyPatch) -> None:
    hostile, other = (Identity("api_key:k", tenant, frozenset(("read",))) for tenant in ("t1", "t2"))
    agent = Agent("http://127.0.0.1:1", keys.identities("ws_gateway"))

    async def ask(who: Identity, *_: Any) -> httpx.Response:
        if who == hostile:
            await asyncio.Event().wait()
        return httpx.Response(200, json={"items": []})

    monkeypatch.setattr(agent, "ask", ask)
    reads = [asyncio.create_task(agent.facts(uuid7(), 0, hostile)) for _ in range(2 * CONCURRENT_READS)]
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        assert await agent.facts(uuid7(), 0, other) == []
    for read in reads:
        read.cancel()
    await asyncio.gather(*reads, return_exceptions=True)


async def test_a_tenants_requests_leave_connections_to_the_next_tenant() -> None:
    hostile, other = (Identity("api_key:k", tenant, frozenset(("run",))) for tenant in ("t1", "t2"))
    held = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal held
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET /held "):
            held += 1
            # Until the client goes away.
            await reader.read()
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    agent = Agent(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", keys.identities("ws_gateway"))
    calls = [asyncio.create_task(agent.ask(hostile, "GET", "/held", "/held")) for _ in range(2 * CONCURRENT_CALLS)]
    await until(lambda: asyncio.sleep(0, held >= CONCURRENT_CALLS // 2))
    assert (await agent.ask(other, "GET", "/read", "/read")).status_code == 200
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    server.close()
