"""A stream without events: it gets heartbeats, and its run is read again from time to time."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, cast
from uuid import UUID

import msgspec
import pytest
from redis.asyncio import Redis

from infra.clock import uuid7
from infra.errors import TooManyRequests
from infra.security.auth import Identity
from infra.stores.cache import Cache
from services.ws_gateway import clients, run_events, stream
from services.ws_gateway.clients import Clients
from services.ws_gateway.domain import Fact
from services.ws_gateway.hub import Hub
from services.ws_gateway.keys import ApiKeys
from tests.services.ws_gateway.agent import ValidKeys, run_facts
from tooling.testing.stack import Stack

WHO = Identity("api_key:test", "acme", frozenset(("read",)))


class Agent:
    """Its run completes after this number of reads."""

    def __init__(self, reads: int) -> None:
        self.left = reads

    async def facts(self, run_id: UUID, after: int, who: Identity) -> list[Fact]:
        self.left -= 1
        told = [Fact(fact.n, fact.wire_name(), "", msgspec.to_builtins(fact)) for fact in run_facts(run_id)]
        return [fact for fact in (told if self.left < 0 else told[:1]) if fact.n > after]


async def never() -> Any:
    await asyncio.Event().wait()


async def listeners(redis: Redis) -> int:
    return sum(int(client["psub"]) for client in await redis.client_list() if client["name"] == "quiet")


async def test_a_quiet_stream_is_kept_alive_and_its_run_is_looked_after(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_events, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(run_events, "REREAD_SECONDS", 0.1)
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async with Redis.from_url(stack.redis_url, client_name="quiet") as redis:
        hub = Hub(Cache(redis), Clients(cast(ApiKeys, ValidKeys()), asyncio.Event()))
        shown = stream.RunStream(hub, Agent(3), WHO, uuid7(), 0)  # type: ignore[arg-type]
        async with asyncio.timeout(30):
            await shown({"type": "http"}, never, send)
            # Without a stream, no listener is left running.
            while await listeners(redis):
                await asyncio.sleep(0.02)
    body = b"".join(message.get("body", b"") for message in sent)
    assert b"\n:\n\n" in body
    assert body.count(b"event: run.started") == 1
    assert body.count(b"event: run.completed") == 1
    assert sent[-1]["more_body"] is False


async def test_a_stream_beyond_the_share_of_its_tenant_is_refused_before_it_begins(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "PLACES", 0)

    async def send(message: Any) -> None:
        raise AssertionError("the stream has begun")

    async with Redis.from_url(stack.redis_url) as redis:
        hub = Hub(Cache(redis), Clients(cast(ApiKeys, ValidKeys()), asyncio.Event()))
        shown = stream.RunStream(hub, Agent(100), WHO, uuid7(), 0)  # type: ignore[arg-type]
        with pytest.raises(TooManyRequests, match="too many connections"):
            await shown({"type": "http"}, never, send)


async def test_a_client_whose_connection_takes_nothing_is_given_up(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "SEND_SECONDS", 0.05)

    async def send(message: Any) -> None:
        if message.get("body"):
            await never()

    async with Redis.from_url(stack.redis_url) as redis:
        hub = Hub(Cache(redis), Clients(cast(ApiKeys, ValidKeys()), asyncio.Event()))
        shown = stream.RunStream(hub, Agent(100), WHO, uuid7(), 0)  # type: ignore[arg-type]
        async with asyncio.timeout(30):
            await shown({"type": "http"}, never, send)


async def test_a_stream_whose_key_was_revoked_ends(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    class Revoked:
        async def renewed(self, who: Identity) -> Identity:
            return replace(who, scopes=frozenset())

    monkeypatch.setattr(clients, "CHECK_SECONDS", 0.02)
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async with Redis.from_url(stack.redis_url) as redis:
        hub = Hub(Cache(redis), Clients(cast(ApiKeys, Revoked()), asyncio.Event()))
        shown = stream.RunStream(hub, Agent(100), WHO, uuid7(), 0)  # type: ignore[arg-type]
        async with asyncio.timeout(30):
            await shown({"type": "http"}, never, send)
    assert sent[-1]["more_body"] is False
    assert not any(b"run.completed" in message.get("body", b"") for message in sent)


async def test_a_key_whose_check_fails_does_not_stop_the_checks(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        checks = 0

        async def renewed(self, who: Identity) -> Identity:
            self.checks += 1
            if self.checks < 3:
                raise ValueError("a fault of the user service")
            return replace(who, scopes=frozenset())

    monkeypatch.setattr(clients, "CHECK_SECONDS", 0.02)
    keys = Broken()
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async with Redis.from_url(stack.redis_url) as redis:
        hub = Hub(Cache(redis), Clients(cast(ApiKeys, keys), asyncio.Event()))
        shown = stream.RunStream(hub, Agent(100), WHO, uuid7(), 0)  # type: ignore[arg-type]
        async with asyncio.timeout(30):
            await shown({"type": "http"}, never, send)
    assert sent[-1]["more_body"] is False
    assert keys.checks == 3


async def test_connections_end_if_nothing_checks_their_keys_any_more(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Clients):
        async def _tick(self) -> None:
            raise ValueError("a fault of this program")

    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async with Redis.from_url(stack.redis_url) as redis:
        hub = Hub(Cache(redis), Broken(cast(ApiKeys, ValidKeys()), asyncio.Event()))
        shown = stream.RunStream(hub, Agent(100), WHO, uuid7(), 0)  # type: ignore[arg-type]
        async with asyncio.timeout(30):
            await shown({"type": "http"}, never, send)
    assert sent[-1]["more_body"] is False
