"""A completion without events: heartbeats, and the requests to the agent."""

from __future__ import annotations

import asyncio
from typing import Any, cast
from uuid import UUID

import httpx
import msgspec
import pytest
from redis.asyncio import Redis

from infra.clock import uuid7
from infra.errors import NotFound
from infra.security.auth import Identity
from infra.stores.cache import Cache
from services.ws_gateway import clients, run_events
from services.ws_gateway.clients import Clients
from services.ws_gateway.domain import Fact
from services.ws_gateway.hub import Hub
from services.ws_gateway.keys import ApiKeys
from services.ws_gateway.openai.answer import AnswerResponse
from services.ws_gateway.openai.shapes import Chat
from tests.services.ws_gateway.agent import ValidKeys, failed, run_facts
from tooling.testing.stack import Stack

WHO = Identity("api_key:test", "acme", frozenset(("run",)))


class Agent:
    """Its run ends, or no longer exists, after this number of reads. `asked` has the other requests."""

    def __init__(self, reads: int, end: str) -> None:
        self.left = reads
        self.end = end
        self.asked: list[str] = []

    async def facts(self, run_id: UUID, after: int, who: Identity) -> list[Fact]:
        self.left -= 1
        if self.left >= 0:
            return []
        if self.end == "gone":
            raise NotFound("run")
        facts = [failed(run_id, 1, "failed")] if self.end == "failed" else run_facts(run_id)
        return [Fact(fact.n, fact.wire_name(), "", msgspec.to_builtins(fact)) for fact in facts]

    async def ask(self, who: Identity, method: str, path: str, template: str) -> httpx.Response:
        self.asked.append(f"{method} {template}")
        return httpx.Response(503)


async def never() -> Any:
    await asyncio.Event().wait()


async def told(stack: Stack, agent: Agent, *, include_usage: bool = True) -> tuple[int, str]:
    """The status and the body of a stream."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    run_id = uuid7()
    async with Redis.from_url(stack.redis_url) as redis:
        shape = Chat(run_id, "m", include_usage=include_usage)
        hub = Hub(Cache(redis), Clients(cast(ApiKeys, ValidKeys()), asyncio.Event()))
        answer = AnswerResponse(hub, agent, WHO, run_id, shape, stream=True, kept=False)  # type: ignore[arg-type]
        async with asyncio.timeout(30):
            await answer({"type": "http"}, never, send)
    body = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], body.decode()


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_events, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(run_events, "REREAD_SECONDS", 0.1)


async def test_a_quiet_stream_is_kept_alive_and_its_run_is_looked_after(stack: Stack) -> None:
    agent = Agent(3, "completed")
    status, body = await told(stack, agent)
    assert status == 200
    assert agent.asked == ["GET /api/v1/runs/{run_id}"]
    first, heartbeat, *_, text, end, done, _ = body.split("\n\n")
    assert '"role":"assistant"' in first
    assert heartbeat == ":"
    assert '"content":"Grüße\\nfrom two lines"' in text
    # The usage could not be read.
    assert '"finish_reason":"stop"' in end
    assert done == "data: [DONE]"


async def test_an_answer_beyond_the_share_of_its_tenant_is_refused_and_its_run_cancelled(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "PLACES", 0)
    agent = Agent(3, "completed")
    status, body = await told(stack, agent)
    assert (status, msgspec.json.decode(body)["error"]["type"]) == (429, "rate_limit_error")
    assert agent.asked == ["POST /api/v1/runs/{run_id}/cancel"]


async def test_a_run_that_is_over_is_not_cancelled_and_its_usage_not_read_for_nobody(stack: Stack) -> None:
    agent = Agent(0, "completed")
    await told(stack, agent, include_usage=False)
    assert agent.asked == []


@pytest.mark.parametrize(("end", "code"), [("failed", "run_failed"), ("gone", "run_gone")])
async def test_a_stream_that_was_only_kept_alive_ends_with_its_error(stack: Stack, end: str, code: str) -> None:
    agent = Agent(3, end)
    status, body = await told(stack, agent)
    assert status == 200
    assert agent.asked == []
    assert f'"code":"{code}"' in body.split("\n\n")[-2]
    assert "[DONE]" not in body
