"""A run as a stream of server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any
from uuid import UUID

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from infra.auth import Identity
from infra.errors import NotFound
from infra.logs import get_logger
from services.ws_gateway.agent import Agent
from services.ws_gateway.domain import Event, Fact, Follow
from services.ws_gateway.hub import Client, Hub
from services.ws_gateway.telling import SEND_SECONDS, Teller

_log = get_logger("ws_gateway.stream")
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    # nginx would gather events before it passes them on.
    (b"x-accel-buffering", b"no"),
]


class RunStream(Response):
    """The facts of a run with a higher n than `after`, and what comes from now on, until the run ends.

    An error before the first byte is a problem (404: no such run, or another tenant's); 204 where the client has the
    run's end already, which tells a browser not to come again.
    """

    def __init__(self, hub: Hub, agent: Agent, who: Identity, run_id: UUID, after: int) -> None:
        super().__init__()
        self._hub = hub
        self._agent = agent
        self._who = who
        self._run_id = run_id
        self._after = after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Listening comes first: what happens during the read is heard, and what is in both is dropped.
        client = Client()
        async with self._hub.listen(self._run_id, client) as live:
            follow = Follow(self._after)
            # From the fact that the client has last: it may have been the run's end.
            facts = await self._read(max(self._after - 1, 0))
            if follow.has_end(facts):
                await Response(status_code=204)(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            body = _Body(send)
            teller = Teller(self._read, live, follow, body.events, body.comment)
            await _until_it_ends(_write(body, teller, facts), client, receive, send)

    async def _read(self, after: int) -> list[Fact]:
        return await self._agent.facts(self._run_id, after, self._who)


async def _until_it_ends(write: Coroutine[Any, Any, None], client: Client, receive: Receive, send: Send) -> None:
    """Until the run ends, the client goes, or the hub ends the stream."""
    writing = asyncio.create_task(write)
    leaving = asyncio.create_task(_gone(receive))
    client.end = writing.cancel
    try:
        await asyncio.wait((writing, leaving), return_when=asyncio.FIRST_COMPLETED)
        is_there = not leaving.done()
    finally:
        for task in (writing, leaving):
            task.cancel()
        await asyncio.gather(writing, leaving, return_exceptions=True)
    if not writing.cancelled():
        writing.result()
    if is_there:
        # One that takes nothing is left without a proper end.
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _write(body: _Body, teller: Teller, facts: list[Fact]) -> None:
    """Until the run ends, is gone, or the client takes nothing any more."""
    try:
        await body.put(b"retry: 1000\n\n")
        await teller.until_the_end(facts)
    except NotFound:
        _log.info("a run is gone while it is shown")
    except TimeoutError:
        _log.info("a client that takes nothing is dropped")


class _Body:
    """What a stream sends."""

    def __init__(self, send: Send) -> None:
        self._send = send

    async def events(self, events: list[Event]) -> None:
        await self.put(b"".join(event.encoded() for event in events))

    async def comment(self) -> None:
        await self.put(b":\n\n")

    async def put(self, body: bytes) -> None:
        async with asyncio.timeout(SEND_SECONDS):
            await self._send({"type": "http.response.body", "body": body, "more_body": True})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
