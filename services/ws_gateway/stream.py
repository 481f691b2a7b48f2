"""A run as a stream of server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import Any
from uuid import UUID

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from infra.auth import Identity
from infra.errors import NotFound, Transient
from infra.logs import get_logger
from services.ws_gateway.agent import Agent
from services.ws_gateway.domain import ENDINGS, Delta, Event, Fact, Follow
from services.ws_gateway.hub import Hub, Live

HEARTBEAT_SECONDS = 20.0
# Without a sign of the run it is looked after: the last fact may have been the one that was missed.
LOOK_SECONDS = 60.0
# A client that takes nothing for so long is gone.
SEND_SECONDS = 30.0
_BACKOFF_SECONDS = (0.5, 1.0, 2.0, 5.0)
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
        async with self._hub.listen(self._run_id) as live:
            # From the fact that the client has last: it may have been the run's end.
            facts = await self._read(max(self._after - 1, 0))
            if any(fact.n <= self._after and fact.event in ENDINGS for fact in facts):
                await Response(status_code=204)(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            happening = happenings(self._read, live, Follow(self._after), facts)
            if await while_there(_write(happening, send), live, receive):
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


async def happenings(
    read: Callable[[int], Awaitable[list[Fact]]], live: Live, follow: Follow, facts: Sequence[Fact] = ()
) -> AsyncGenerator[list[Event]]:
    """What happens in a run until it ends, in its order and each once; an empty list where nothing does for a while.

    read: gives the facts after an n. facts: those that were read already. Raises NotFound where the run is gone.
    """
    found: Sequence[Fact] | None = facts
    looked = time.monotonic()
    while True:
        for fact in found or ():
            if events := follow.fact(fact):
                yield events
        if follow.ended:
            return
        found = None
        item = await live.next(HEARTBEAT_SECONDS)
        if isinstance(item, Delta):
            if events := follow.delta(item):
                yield events
            continue
        if item is None:
            yield []
        if isinstance(item, Fact) and not follow.misses(item):
            found = [item]
            looked = time.monotonic()
        elif item is not None or time.monotonic() - looked > LOOK_SECONDS:
            failures = 0
            while found is None:
                try:
                    found = await read(follow.last)
                except Transient as error:
                    _log.warning("facts cannot be read now", error=str(error))
                    yield []
                    await asyncio.sleep(_BACKOFF_SECONDS[min(failures, len(_BACKOFF_SECONDS) - 1)])
                    failures += 1
            looked = time.monotonic()


async def while_there(work: Coroutine[Any, Any, None], live: Live, receive: Receive) -> bool:
    """Does `work` until it is done, the client goes, or the hub ends the stream. False: the client has gone."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_gone(receive))
    live.end = working.cancel
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
