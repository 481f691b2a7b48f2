"""A run as a stream of server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from datetime import timedelta
from typing import Any
from uuid import UUID

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from infra.errors import InvalidMessage, NotFound, TooManyRequests
from infra.observe.logs import get_logger
from infra.security.auth import Identity
from services.ws_gateway.agent import Agent
from services.ws_gateway.clients import Clients, End
from services.ws_gateway.connection import SEND_SECONDS
from services.ws_gateway.domain import ENDINGS, Fact, Follow, StreamEvent
from services.ws_gateway.feed import Room
from services.ws_gateway.hub import Hub
from services.ws_gateway.run_events import run_events

HEARTBEAT = b":\n\n"
# As much as a connection buffers. Larger parts are sent in pieces of this size, and take a share of the tenant's.
PIECE_BYTES = 64 * 1024
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    # Without this, nginx would buffer events.
    (b"x-accel-buffering", b"no"),
]
_log = get_logger("ws_gateway.stream")


class RunStream(Response):
    """Streams the events of a run after the id `after`, past and new, until the run ends.

    An error before the first byte is a problem (404: the run does not exist or belongs to another tenant). The status
    is 204 if the client has the run's end already, which tells a browser not to reconnect. That includes any id behind
    the end; an id that a running run does not have is an error.
    """

    def __init__(self, hub: Hub, agent: Agent, who: Identity, run_id: UUID, after: int) -> None:
        super().__init__()
        self._hub = hub
        self._agent = agent
        self._client = StreamClient(hub.clients, who)
        self._run_id = run_id
        self._after = after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Listens before it reads: events during the read are not lost, and duplicates are dropped.
        client, follow = self._client, Follow(self._after)
        with self._hub.listen(self._run_id, client.room) as live:
            facts = await self._read(follow.read_from)
            if not follow.is_known(facts):
                # A foreign id. Waiting for a later event of an ended run would never end.
                facts = await self._read(0)
                if not any(fact.event in ENDINGS for fact in facts):
                    raise InvalidMessage("header Last-Event-ID", "is not an id of this stream")
            if follow.has_end(facts):
                await Response(status_code=204)(scope, receive, send)
                return
            with self._hub.clients.watched(client):
                await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
                batches = run_events(self._read, live, follow, facts)
                if await until_disconnect(_write(client, batches, send), client, receive):
                    # A client that does not read does not get a proper end.
                    with suppress(TimeoutError):
                        async with asyncio.timeout(1):
                            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _read(self, after: int) -> list[Fact]:
        return await self._agent.facts(self._run_id, after, self._client.who)


async def _write(client: StreamClient, batches: AsyncGenerator[list[StreamEvent]], send: Send) -> None:
    try:
        await client.send_part(send, b"retry: 1000\n\n")
        async with aclosing(batches):
            async for events in batches:
                await client.send_part(send, b"".join(event.encoded() for event in events) or HEARTBEAT)
    except NotFound:
        _log.info("run no longer exists; its stream ends")
    except TimeoutError:
        _log.info("client does not read its stream; the connection is dropped")
    except TooManyRequests:
        _log.info("the tenant's clients do not read; a stream ends early")


class StreamClient:
    """The client of one stream. `stop` ends the stream."""

    def __init__(self, clients: Clients, who: Identity) -> None:
        self.who = who
        self._unsent = clients.unsent
        self.room = Room(self._stop)
        self._ended = False
        self._stream: asyncio.Task[None] | None = None

    def run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        self._stream = asyncio.create_task(work)
        if self._ended:
            self._stream.cancel()
        return self._stream

    async def send_part(self, send: Send, body: bytes, start: Message | None = None) -> None:
        """Sends a part of the answer, after its `start`. Raises TimeoutError if the client does not read, and, before
        the start, TooManyRequests for a large part while the tenant's clients leave too much unread."""
        size = len(body) if len(body) > PIECE_BYTES else 0
        if size and not self._unsent.take_now(self.who.tenant_id, size):
            raise TooManyRequests(timedelta(seconds=5), End.TOO_MUCH_UNREAD.value[1])
        try:
            if start:
                await send(start)
            for n in range(0, len(body), PIECE_BYTES):
                async with asyncio.timeout(SEND_SECONDS):
                    piece = body[n : n + PIECE_BYTES]
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
        finally:
            self._unsent.give(self.who.tenant_id, size)

    def end(self, reason: End) -> None:
        self._stop()

    def tick(self, now: float) -> None:
        pass

    def _stop(self) -> None:
        self._ended = True
        if self._stream:
            self._stream.cancel()


async def until_disconnect(work: Coroutine[Any, Any, None], client: StreamClient, receive: Receive) -> bool:
    """Runs `work` until it is done, the client disconnects, or the stream is ended. Returns False if the client has
    disconnected."""
    working = client.run(work)
    leaving = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        connected = not leaving.done()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
    if not working.cancelled():
        working.result()
    return connected


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
