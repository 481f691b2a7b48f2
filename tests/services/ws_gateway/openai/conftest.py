"""The real gateway beside a stand-in for the agent, and OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import httpx2
import pytest
from openai import AsyncOpenAI
from redis.asyncio import Redis

from infra.clock import uuid7
from protos.catalog import AGENT_EVENTS
from protos.messages.agent import RunCompleted, RunFailed, RunStarted, StepCompleted, StepStarted, ToolCall
from tests.services.ws_gateway.agent import SESSION, Agent, Completion, stand_in
from tooling.testing.platform import Platform

WAIT_SECONDS = 30


@dataclass
class Run:
    """A run in progress: its facts are committed and published on Kafka, its deltas are published on Redis."""

    world: World
    asked: Completion
    n: int = 0

    @property
    def id(self) -> UUID:
        return self.asked.run_id

    async def begins(self) -> None:
        await self._happens(RunStarted, agent_id=self.asked.agent_id, attempt=1)

    async def step(self, step: int, *, kind: str = "model", attempt: int = 1) -> None:
        await self._happens(StepStarted, step=step, kind=kind, name="x", attempt=attempt)

    async def step_ends(self, step: int, *, kind: str = "model") -> None:
        await self._happens(
            StepCompleted, step=step, kind=kind, name="x", status="completed", attempts=1, duration_ms=7
        )

    async def replies(self, text: str, *calls: ToolCall, finish_reason: str = "stop", filtered: bool = False) -> None:
        await self._happens(RunCompleted, reply=text, tool_calls=calls, finish_reason=finish_reason, filtered=filtered)

    async def fails(self, status: str, error: str = "out of luck") -> None:
        await self._happens(RunFailed, status=status, error=error)

    async def writes(self, n: int, text: str, *, step: int = 1, attempt: int = 1) -> None:
        piece = {"step": step, "attempt": attempt, "n": n, "text": text}
        await self.world.redis.publish(f"claw:run:{self.id}", json.dumps(piece))

    async def answers(self, text: str, **usage: int | None) -> None:
        """All facts, from the start to the reply."""
        names = ("input_tokens", "cached_tokens", "output_tokens")
        self.world.agent.usage[self.id] = {name: usage.get(name) for name in names}
        await self.begins()
        await self.step(1)
        await self.step_ends(1)
        await self.replies(text)

    async def _happens(self, fact: Any, **fields: Any) -> None:
        self.n += 1
        message = fact(run_id=self.id, session_key=SESSION, n=self.n, **fields)
        self.world.agent.committed[self.id].append(message)
        await self.world.platform.produce(AGENT_EVENTS, message, key=SESSION, tenant_id="acme")


@dataclass
class World:
    platform: Platform
    agent: Agent
    redis: Redis

    async def run(self) -> Run:
        """The next requested completion."""
        async with asyncio.timeout(WAIT_SECONDS):
            return Run(self, await self.agent.completions.get())

    async def cancelled(self, run: Run) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            while run.id not in self.agent.cancelled:
                await asyncio.sleep(0.02)

    @asynccontextmanager
    async def client(self, tenant: str = "acme", **options: Any) -> AsyncIterator[AsyncOpenAI]:
        """OpenAI's own client, with all its retries."""
        async with AsyncOpenAI(
            base_url=f"{self.platform.url('ws_gateway')}/v1",
            api_key="what the proxy in front looks at",
            default_headers=self.platform.headers(tenant, **options),
            http_client=httpx2.AsyncClient(trust_env=False, timeout=WAIT_SECONDS),
        ) as client:
            yield client


@pytest.fixture(scope="module")
async def world(platform: Platform) -> AsyncIterator[World]:
    await platform.prepare("ws_gateway")
    async with stand_in(platform.ports["agent"]) as agent, Redis.from_url(platform.stack.redis_url) as redis:
        await platform.start("ws_gateway")
        yield World(platform, agent, redis)


@pytest.fixture
async def client(world: World) -> AsyncIterator[AsyncOpenAI]:
    async with world.client() as client:
        yield client


@pytest.fixture
def model(world: World) -> str:
    """An agent of the tenant acme."""
    return world.agent.new_agent("acme")


@pytest.fixture
def nobody() -> str:
    """No agent's id."""
    return str(uuid7())


class Hearing:
    """A stream that is read in the background. `text` has the text received so far."""

    text: str

    async def hears(self, run: Run, text: str, *, step: int = 1) -> None:
        """Publishes the first piece of a step until the stream has it: at first the gateway does not listen yet."""
        before = self.text
        async with asyncio.timeout(WAIT_SECONDS):
            while self.text == before:
                await run.writes(1, text, step=step)
                await asyncio.sleep(0.02)
