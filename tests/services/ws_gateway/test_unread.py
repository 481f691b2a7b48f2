"""Clients that ask for large answers and do not read them: they keep a share of the memory, and no more."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, cast
from uuid import UUID

import httpx
import pytest
from starlette.types import Message

from infra.clock import uuid7
from infra.errors import Transient
from infra.security.auth import Identity
from infra.stores.cache import Cache
from protos.messages.agent import RunCompleted
from services.ws_gateway import clients, stream
from services.ws_gateway.clients import Clients
from services.ws_gateway.domain import Fact
from services.ws_gateway.hub import Hub
from services.ws_gateway.keys import ApiKeys
from services.ws_gateway.openai.answer import AnswerResponse
from services.ws_gateway.openai.shapes import Chat
from tests.services.ws_gateway.agent import ValidKeys
from tests.services.ws_gateway.test_socket import WHO, Transport, opened_on
from tooling.testing.until import until

OTHER = replace(WHO, tenant_id="another")


class NoCache:
    async def listen(self, *_: str) -> Any:
        await asyncio.Event().wait()
        yield


class Agent:
    """Every run is completed, with a large reply."""

    async def facts(self, run_id: UUID, after: int, who: Identity) -> list[Fact]:
        fact = {"run_id": str(run_id), "reply": "x" * 1_000, "n": 1, "session_key": "s"}
        return [Fact(1, RunCompleted.wire_name(), "", fact)]

    async def ask(self, *_: Any, **__: Any) -> httpx.Response:
        raise Transient("no usage")


class Reader:
    """The client of an answer. It takes nothing of the body until `reads` is set."""

    def __init__(self) -> None:
        self.reads = asyncio.Event()
        self.status = 0
        self.body = b""
        self.held = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif b"xxx" in message["body"] and not self.reads.is_set():
            self.held = True
            await self.reads.wait()
        self.body += message.get("body", b"")


async def never() -> Any:
    await asyncio.Event().wait()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setattr(clients, "UNSENT_BYTES", 4_000)
    monkeypatch.setattr(stream, "PIECE_BYTES", 400)
    return Hub(cast(Cache, NoCache()), Clients(cast(ApiKeys, ValidKeys()), asyncio.Event()))


def answer(hub: Hub, who: Identity, kind: str) -> tuple[Reader, asyncio.Task[None]]:
    run_id, agent, reader = uuid7(), cast(Any, Agent()), Reader()
    shown = (
        stream.RunStream(hub, agent, who, run_id, 0)
        if kind == "events"
        else AnswerResponse(
            hub, agent, who, run_id, Chat(run_id, "m", include_usage=False), stream=kind == "parts", kept=True
        )
    )
    return reader, asyncio.create_task(shown({"type": "http"}, never, reader.send))


@pytest.mark.parametrize("kind", ["events", "parts", "whole"])
async def test_what_a_tenants_clients_do_not_read_keeps_a_share_of_the_memory(hub: Hub, kind: str) -> None:
    first, sending = answer(hub, WHO, kind)
    await until(lambda: asyncio.sleep(0, first.held))
    second, ended = answer(hub, WHO, kind)
    async with asyncio.timeout(30):
        await ended
    assert b"xxx" not in second.body
    if kind == "events":
        # The client connects again after its last event.
        assert (second.status, second.body) == (200, b"retry: 1000\n\n")
    else:
        assert b"too slowly" in second.body
        assert second.status == (429 if kind == "whole" else 200)
    other, others = answer(hub, OTHER, kind)
    await until(lambda: asyncio.sleep(0, other.held))
    for reader, task in ((first, sending), (other, others)):
        reader.reads.set()
        async with asyncio.timeout(30):
            await task
        assert reader.body.count(b"x") >= 1_000
    # The share of a part that was read is free.
    again, reading = answer(hub, WHO, kind)
    again.reads.set()
    async with asyncio.timeout(30):
        await reading
    assert again.body.count(b"x") >= 1_000


async def test_what_a_tenants_sockets_do_not_read_keeps_a_share_of_the_memory(hub: Hub) -> None:
    def unread(who: Identity) -> tuple[Transport, Any]:
        shown = opened_on(transport := Transport(), hub, who)
        shown.pause_writing()
        transport.unsent = 1_100
        shown.write(b"x")
        return transport, shown

    kept, first = unread(WHO)
    dropped, second = unread(WHO)
    assert (dropped.ended, second.is_open) == ("aborted", False)
    assert unread(OTHER)[0].ended == kept.ended == ""
    second.connection_lost(None)
    first.resume_writing()
    assert unread(WHO)[0].ended == ""
