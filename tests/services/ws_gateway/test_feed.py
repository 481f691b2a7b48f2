"""Sockets that share the position of a run: each gets every event once and in order, however facts arrive."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from typing import cast
from uuid import UUID

import msgspec
import pytest

from infra.clock import uuid7
from infra.errors import NotFound, Transient
from infra.security.auth import Identity
from infra.service.refusals import Refusals
from infra.stores.cache import Cache
from services.ws_gateway.agent import Agent
from services.ws_gateway.clients import Clients
from services.ws_gateway.domain import Delta, Fact
from services.ws_gateway.feed import Feed
from services.ws_gateway.hub import Hub
from services.ws_gateway.keys import ApiKeys
from services.ws_gateway.protocol import Subscribe
from services.ws_gateway.socket import Socket
from tests.services.ws_gateway.agent import ValidKeys, failed, run_facts

WHO = Identity("api_key:test", "acme", frozenset(("read",)))


class NoRedis:
    async def listen(self, pattern: str) -> AsyncIterator[None]:
        await asyncio.Event().wait()
        yield


class Store:
    """The agent: `facts` are committed. It is away for the next `away` reads."""

    def __init__(self) -> None:
        self.facts_: list[Fact] = []
        self.away = 0
        self.is_gone = False
        self.reads = 0

    async def facts(self, run_id: UUID, after: int, who: Identity) -> list[Fact]:
        self.reads += 1
        found = [fact for fact in self.facts_ if fact.n > after]
        await asyncio.sleep(0)
        if self.is_gone:
            raise NotFound("run")
        if self.away:
            self.away -= 1
            raise Transient("away")
        return found


class Screen:
    """The transport of one socket, and the messages on it."""

    def __init__(self) -> None:
        self.messages: list[dict[str, object]] = []

    def write(self, data: bytes) -> None:
        while data:
            begin, length = 2, data[1]
            if length == 126:
                begin, length = 4, int.from_bytes(data[2:4], "big")
            self.messages.append(json.loads(data[begin : begin + length]))
            data = data[begin + length :]

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        pass

    def set_write_buffer_limits(self, high: int) -> None:
        pass

    def events(self) -> list[tuple[object, object]]:
        return [(each["event"], each["id"]) for each in self.messages if each["type"] == "event" and each["id"]]


def many_facts(run_id: UUID, steps: int) -> list[Fact]:
    start, step, completed, end = run_facts(run_id)
    messages = [start]
    for n in range(steps):
        messages += [
            msgspec.structs.replace(each, step=n + 1, n=len(messages) + m + 1)
            for m, each in enumerate((step, completed))
        ]
    messages.append(msgspec.structs.replace(end, n=len(messages) + 1))
    return [Fact(each.n, each.wire_name(), "", msgspec.to_builtins(each)) for each in messages]


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.ws_gateway.agent._RETRY_SECONDS", (0.001,))


def new_hub() -> Hub:
    return Hub(cast(Cache, NoRedis()), Clients(cast(ApiKeys, ValidKeys()), asyncio.Event()))


def new_socket(hub: Hub, store: Store) -> tuple[Socket, Screen]:
    socket, screen = Socket(hub, cast(Agent, store), WHO, cast(Refusals, None)), Screen()
    socket.take_over(cast(asyncio.Transport, screen), lambda: None)
    return socket, screen


def say(socket: Socket, message: Subscribe) -> None:
    socket.on_message(msgspec.json.encode(message).decode())


@pytest.mark.parametrize("seed", range(40))
async def test_every_socket_gets_every_event_once_and_in_order(seed: int) -> None:
    chance = random.Random(seed)
    hub, store, run_id = new_hub(), Store(), uuid7()
    left = many_facts(run_id, 8)
    sockets: list[tuple[Socket, Screen, int]] = []
    while left:
        match chance.choice(
            ("commit", "commit", "commit", "join", "deliver", "missed", "away", "delta", "turn", "turn")
        ):
            case "commit":
                store.facts_.append(left.pop(0))
                if chance.random() < 0.7:
                    hub.fact(store.facts_[-1])
            case "deliver" if store.facts_:
                # A copy, or a fact that is late.
                hub.fact(chance.choice(store.facts_))
            case "join":
                after = chance.choice([0, len(store.facts_)])
                socket, screen = new_socket(hub, store)
                say(socket, Subscribe(run_id=run_id, after=after))
                sockets.append((socket, screen, after))
            case "missed":
                hub.missed()
            case "away":
                store.away = 2
            case "delta":
                hub._feeds[str(run_id)].push(Delta(1, 1, 1, "x")) if hub._feeds else None
            case _:
                await asyncio.sleep(0)
    # The tail announces the gap, so nothing stays missing.
    hub.missed()
    n = len(store.facts_)
    whole = [(fact.event, fact.n) for fact in store.facts_[:-1]] + [("reply", n), ("run.completed", n + 1)]
    async with asyncio.timeout(10):
        for _, screen, after in sockets:
            while ("run.completed", n + 1) not in screen.events():
                await asyncio.sleep(0.001)
            assert screen.events() == whole[after:]
        # A socket that was catching up removes the run when its task has ended.
        while hub._feeds or any(socket._runs for socket, _, _ in sockets):
            await asyncio.sleep(0.001)


async def test_deltas_while_a_socket_catches_up_are_not_lost() -> None:
    hub, store, run_id = new_hub(), Store(), uuid7()
    store.facts_ = many_facts(run_id, 2)[:2]
    (first, shown), (second, late) = new_socket(hub, store), new_socket(hub, store)
    say(first, Subscribe(run_id=run_id))
    while len(shown.events()) < 2:
        await asyncio.sleep(0)
    say(second, Subscribe(run_id=run_id))
    while not hub._feeds[str(run_id)].queues:
        await asyncio.sleep(0)
    hub._feeds[str(run_id)].push(Delta(1, 1, 1, "x"))
    while len(late.messages) < 4:
        await asyncio.sleep(0)
    for screen in (shown, late):
        assert [each.get("event") for each in screen.messages] == [None, "run.started", "step.started", "delta"]


async def test_a_run_that_is_gone_is_refused_to_all_its_sockets_and_they_stay() -> None:
    hub, store, run_id = new_hub(), Store(), uuid7()
    store.facts_ = many_facts(run_id, 2)[:2]
    sockets = [new_socket(hub, store) for _ in range(3)]
    for socket, _ in sockets:
        say(socket, Subscribe(run_id=run_id))
    while not all(len(screen.events()) == 2 for _, screen in sockets):
        await asyncio.sleep(0)
    store.is_gone = True
    hub.missed()
    while not all(screen.messages[-1]["type"] == "error" for _, screen in sockets):
        await asyncio.sleep(0)
    assert all(screen.messages[-1]["status"] == 404 and socket.is_open for socket, screen in sockets)
    assert not hub._feeds


async def test_a_run_without_news_is_read_again_by_one_of_its_sockets() -> None:
    hub, store, run_id = new_hub(), Store(), uuid7()
    sockets = [new_socket(hub, store) for _ in range(3)]
    for socket, _ in sockets:
        say(socket, Subscribe(run_id=run_id))
    while not all(isinstance(socket._runs.get(run_id), Feed) for socket, _ in sockets):
        await asyncio.sleep(0)
    store.reads = 0
    lost = failed(run_id, 1, "failed")
    store.facts_ = [Fact(1, lost.wire_name(), "", msgspec.to_builtins(lost))]
    hub._feeds[str(run_id)].tick(1e12)
    while not all(screen.events() == [("run.failed", 1)] for _, screen in sockets):
        await asyncio.sleep(0)
    assert store.reads == 1
