"""The client of the agent's HTTP routes."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from infra.clock import uuid7
from infra.security.auth import Identity
from services.ws_gateway.agent import CONCURRENT_READS, Agent
from tooling.testing import keys


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
