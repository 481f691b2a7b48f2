"""The events of a run for one client: past facts from the agent, live facts from the hub, and gaps filled again."""

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
# After this time without news, the run is read again: its last fact may have been lost on the way.
REREAD_SECONDS = 60.0
# A client that does not read for this long is dropped.
SEND_SECONDS = 30.0
_BACKOFF_SECONDS = (0.5, 1.0, 2.0, 5.0)
_log = get_logger("ws_gateway.run_events")

Read = Callable[[int], Awaitable[list[Fact]]]
"""Reads a run's facts after an n. Raises NotFound, Transient."""


async def run_events(
    read: Read, live: Live, follow: Follow, facts: Sequence[Fact] = ()
) -> AsyncGenerator[list[Event], None]:
    """The run's events until its end, in order and each once. An empty list is due for a heartbeat.

    `facts` were read already. Raises NotFound if the run no longer exists.
    """
    pending: Sequence[Fact] = facts
    read_at = time.monotonic()
    while True:
        for fact in pending:
            if events := follow.fact(fact):
                yield events
        if follow.ended:
            return
        pending = ()
        item = await live.next(HEARTBEAT_SECONDS)
        if isinstance(item, Delta):
            if events := follow.delta(item):
                yield events
            continue
        if item is None:
            yield []
        if isinstance(item, Fact) and not follow.misses(item):
            pending = [item]
            read_at = time.monotonic()
        elif item is not None or time.monotonic() - read_at > REREAD_SECONDS:
            reading = asyncio.create_task(read_until_available(read, follow.last))
            try:
                while not (await asyncio.wait({reading}, timeout=HEARTBEAT_SECONDS))[0]:
                    yield []
                pending = reading.result()
            finally:
                reading.cancel()
            read_at = time.monotonic()


async def read_until_available(read: Read, after: int) -> list[Fact]:
    """The run's facts after an n. Retries until the agent answers. Raises NotFound."""
    for pause in chain(_BACKOFF_SECONDS, repeat(_BACKOFF_SECONDS[-1])):
        try:
            return await read(after)
        except Transient as error:
            _log.warning(f"could not read a run's facts; will retry in {pause:g} s", error=str(error))
            await asyncio.sleep(pause)
    raise AssertionError("unreachable: the loop has no end")
