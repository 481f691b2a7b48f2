"""Live items reach each stream once while streams begin and end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import msgspec

from infra.clock import uuid7
from infra.stores.cache import Cache
from protos.messages.agent import RunMessageDeleted
from protos.pubsub import RUN_DELTAS
from services.ws_gateway.clients import Clients
from services.ws_gateway.domain import Delta
from services.ws_gateway.feed import Room
from services.ws_gateway.handlers import pass_on
from services.ws_gateway.hub import Hub

ROOM = Room(lambda: None)


class Stubborn:
    """A Redis whose listeners end only at the second cancellation."""

    def __init__(self) -> None:
        self.listeners: list[asyncio.Queue[Any]] = []

    async def listen(self, pattern: str) -> AsyncIterator[Any]:
        mine: asyncio.Queue[Any] = asyncio.Queue()
        self.listeners.append(mine)
        cancelled = False
        while True:
            try:
                yield await mine.get()
            except asyncio.CancelledError:
                if cancelled:
                    raise
                cancelled = True

    def publish(self, channel: str, delta: Delta) -> None:
        for listener in self.listeners:
            listener.put_nowait((channel, msgspec.json.encode(delta)))


async def test_a_listener_that_lingers_hands_nothing_on_a_second_time() -> None:
    cache = Stubborn()
    hub = Hub(cast(Cache, cache), cast(Clients, None))
    run_id, other = uuid7(), uuid7()

    async def first() -> None:
        with hub.listen(other, ROOM):
            while not cache.listeners:
                await asyncio.sleep(0)

    leaving = asyncio.create_task(first())
    while not cache.listeners or hub._feeds:
        await asyncio.sleep(0)
    # The first stream ends, but its listener does not end at once. The second stream begins.
    with hub.listen(run_id, ROOM) as live:
        while len(cache.listeners) < 2:
            await asyncio.sleep(0)
        cache.publish(f"{RUN_DELTAS}{run_id}", Delta(1, 1, 1, "once"))
        assert await live.next(5) == Delta(1, 1, 1, "once")
        await leaving
        cache.publish(f"{RUN_DELTAS}{run_id}", Delta(1, 1, 2, "after it"))
        assert await live.next(5) == Delta(1, 1, 2, "after it")
    while hub._ending:
        await asyncio.wait(hub._ending)


async def test_a_deleted_message_is_no_fact_of_a_stream() -> None:
    hub = Hub(cast(Cache, None), cast(Clients, None))
    deleted = RunMessageDeleted(
        run_id=uuid7(), session_key="s", message_id=uuid7(), subject_id="person-1", channel_id=uuid7(), said=""
    )
    await pass_on.handler(deleted, {"ce_time": "2026-12-01T00:00:00Z"}, hub=hub)
