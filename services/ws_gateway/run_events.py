"""The events of a run for one client: past facts from the agent, live facts from the hub, and gaps filled again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence

from services.ws_gateway.agent import Read, read_until_available
from services.ws_gateway.domain import Delta, Fact, Follow, StreamEvent
from services.ws_gateway.feed import REREAD_SECONDS, Live

HEARTBEAT_SECONDS = 20.0


async def run_events(
    read: Read, live: Live, follow: Follow, facts: Sequence[Fact] = ()
) -> AsyncGenerator[list[StreamEvent], None]:
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
