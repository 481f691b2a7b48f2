"""A run told to one client: what the agent has, then what the hub hears, and from the agent again what was missed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from itertools import chain, repeat

from infra.errors import Transient
from infra.observe.logs import get_logger
from services.ws_gateway.domain import Delta, Event, Fact, Follow
from services.ws_gateway.hub import Live

HEARTBEAT_SECONDS = 20.0
# Without a sign of the run it is looked after: the last fact may have been the one that was missed.
LOOK_SECONDS = 60.0
# A client that takes nothing for so long is gone.
SEND_SECONDS = 30.0
_BACKOFF_SECONDS = (0.5, 1.0, 2.0, 5.0)
_log = get_logger("ws_gateway.telling")

Read = Callable[[int], Awaitable[list[Fact]]]
"""Gives a run's facts after an n. Raises NotFound, Transient."""


async def happenings(
    read: Read, live: Live, follow: Follow, facts: Sequence[Fact] = ()
) -> AsyncGenerator[list[Event], None]:
    """What happens in a run until it ends, in its order and each once; an empty list where nothing does for a while.

    facts: those that were read already. Raises NotFound where the run is gone.
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
            reading = asyncio.create_task(persistently(read, follow.last))
            try:
                while not (await asyncio.wait({reading}, timeout=HEARTBEAT_SECONDS))[0]:
                    yield []
                found = reading.result()
            finally:
                reading.cancel()
            looked = time.monotonic()


async def persistently(read: Read, after: int) -> list[Fact]:
    """The run's facts after an n, as soon as the agent gives them. Raises NotFound."""
    for pause in chain(_BACKOFF_SECONDS, repeat(_BACKOFF_SECONDS[-1])):
        try:
            return await read(after)
        except Transient as error:
            _log.warning("facts cannot be read now", error=str(error))
            await asyncio.sleep(pause)
    raise AssertionError("without an end")
