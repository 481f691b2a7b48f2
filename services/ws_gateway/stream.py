"""A run as a stream of server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
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
        async with self._hub.listen(self._run_id) as live:
            # From the fact that the client has last: it may have been the run's end.
            facts = await self._read(max(self._after - 1, 0))
            if any(fact.n <= self._after and fact.event in ENDINGS for fact in facts):
                await Response(status_code=204)(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            writer = _Writer(self._read, live, send, Follow(self._after))
            await _until_it_ends(writer, live, facts, receive, send)

    async def _read(self, after: int) -> list[Fact]:
        return await self._agent.facts(self._run_id, after, self._who)


async def _until_it_ends(writer: _Writer, live: Live, facts: list[Fact], receive: Receive, send: Send) -> None:
    """Until the run ends, the client goes, or the hub ends the stream."""
    writing = asyncio.create_task(writer.write(facts))
    leaving = asyncio.create_task(_gone(receive))
    live.end = writing.cancel
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


class _Writer:
    """Writes one stream. `read`: gives the facts after an n."""

    def __init__(self, read: Callable[[int], Awaitable[list[Fact]]], live: Live, send: Send, follow: Follow) -> None:
        self._read = read
        self._live = live
        self._send = send
        self._follow = follow

    async def write(self, facts: list[Fact]) -> None:
        """Until the run ends, is gone, or the client takes nothing any more."""
        try:
            await self._put(b"retry: 1000\n\n")
            await self._facts(facts)
            await self._go_on()
        except NotFound:
            _log.info("a run is gone while it is shown")
        except TimeoutError:
            _log.info("a client that takes nothing is dropped")

    async def _go_on(self) -> None:
        looked = time.monotonic()
        while not self._follow.ended:
            item = await self._live.next(HEARTBEAT_SECONDS)
            if item is None:
                await self._put(b":\n\n")
            if isinstance(item, Delta):
                await self._events(self._follow.delta(item))
                continue
            if isinstance(item, Fact) and not self._follow.misses(item):
                await self._events(self._follow.fact(item))
                looked = time.monotonic()
            elif item is not None or time.monotonic() - looked > LOOK_SECONDS:
                await self._catch_up()
                looked = time.monotonic()

    async def _catch_up(self) -> None:
        failures = 0
        while True:
            try:
                await self._facts(await self._read(self._follow.last))
                return
            except Transient as error:
                _log.warning("facts cannot be read now", error=str(error))
                await self._put(b":\n\n")
                await asyncio.sleep(_BACKOFF_SECONDS[min(failures, len(_BACKOFF_SECONDS) - 1)])
                failures += 1

    async def _facts(self, facts: Iterable[Fact]) -> None:
        for fact in facts:
            await self._events(self._follow.fact(fact))

    async def _events(self, events: Iterable[Event]) -> None:
        if body := b"".join(event.encoded() for event in events):
            await self._put(body)

    async def _put(self, body: bytes) -> None:
        async with asyncio.timeout(SEND_SECONDS):
            await self._send({"type": "http.response.body", "body": body, "more_body": True})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
