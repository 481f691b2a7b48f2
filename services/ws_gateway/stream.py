"""A run as a stream of server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import Any
from uuid import UUID

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from infra.errors import NotFound
from infra.observe.logs import get_logger
from infra.security.auth import Identity
from services.ws_gateway.agent import Agent
from services.ws_gateway.domain import Event, Fact, Follow
from services.ws_gateway.hub import Client, Hub
from services.ws_gateway.telling import SEND_SECONDS, happenings

HEARTBEAT = b":\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    # nginx would gather events before it passes them on.
    (b"x-accel-buffering", b"no"),
]
_log = get_logger("ws_gateway.stream")


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
        client, follow = Client(), Follow(self._after)
        async with self._hub.listen(self._run_id, client) as live:
            facts = await self._read(follow.read_from)
            if follow.has_end(facts):
                await Response(status_code=204)(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            happening = happenings(self._read, live, follow, facts)
            if await while_there(_write(happening, send), client, receive):
                # One that takes nothing is left without a proper end.
                with suppress(TimeoutError):
                    async with asyncio.timeout(1):
                        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _read(self, after: int) -> list[Fact]:
        return await self._agent.facts(self._run_id, after, self._who)


async def _write(happening: AsyncGenerator[list[Event]], send: Send) -> None:
    try:
        await put(send, b"retry: 1000\n\n")
        async with aclosing(happening):
            async for events in happening:
                await put(send, b"".join(event.encoded() for event in events) or HEARTBEAT)
    except NotFound:
        _log.info("a run is gone while it is shown")
    except TimeoutError:
        _log.info("a client that takes nothing is dropped")


async def while_there(work: Coroutine[Any, Any, None], client: Client, receive: Receive) -> bool:
    """Does `work` until it is done, the client goes, or the hub ends the stream. False: the client has gone."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_gone(receive))
    client.end = working.cancel
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        is_there = not leaving.done()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
    if not working.cancelled():
        working.result()
    return is_there


async def put(send: Send, body: bytes) -> None:
    """Sends a part of an answer. Raises TimeoutError where the client takes nothing any more."""
    async with asyncio.timeout(SEND_SECONDS):
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
