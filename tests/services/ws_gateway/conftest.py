"""The real gateway beside a stand-in for the agent."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from tests.services.ws_gateway.agent import Agent, stand_in
from tooling.testing.platform import Platform


@pytest.fixture(scope="module")
async def agent(platform: Platform) -> AsyncIterator[Agent]:
    async with stand_in(platform.ports["agent"]) as agent:
        yield agent


@pytest.fixture(scope="module")
async def gateway(platform: Platform, agent: Agent) -> Platform:
    await platform.prepare("ws_gateway")
    await platform.start("ws_gateway", CLAW_LOG_LEVEL="debug")
    return platform


@pytest.fixture(scope="module")
async def redis(platform: Platform) -> AsyncIterator[Redis]:
    client = Redis.from_url(platform.stack.redis_url)
    yield client
    await client.aclose()
