"""Passes live facts (from the tail) and deltas (from Redis) to the feeds of this process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from contextvars import Context
from uuid import UUID

import msgspec

from infra.observe.logs import get_logger
from infra.stores.cache import Cache, cancel_listener
from protos.pubsub import RUN_DELTAS
from services.ws_gateway.clients import TICK_SECONDS, Clients
from services.ws_gateway.domain import Delta, Fact
from services.ws_gateway.feed import Feed, Live, Missed, Room

_delta = msgspec.json.Decoder(Delta)
_log = get_logger("ws_gateway.hub")


class Hub:
    """The feeds and the clients of this process. Without a feed it does not listen to Redis."""

    def __init__(self, cache: Cache, clients: Clients) -> None:
        self.clients = clients
        self._cache = cache
        self._feeds: dict[str, Feed] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        # Tasks that do not end at the first cancellation are kept until they have ended.
        self._ending: set[asyncio.Task[None]] = set()

    def feed(self, run_id: UUID) -> Feed:
        """The feed of a run. Must be given back by `release`."""
        if not self._feeds:
            # An empty context: they work for the feeds of all tenants.
            self._tasks = {asyncio.create_task(work, context=Context()) for work in (self._deltas(), self._tick())}
        return self._feeds.setdefault(str(run_id), Feed(run_id))

    def release(self, feed: Feed) -> None:
        """Removes the feed if no stream and no socket uses it."""
        if feed.is_used or self._feeds.pop(str(feed.run_id), None) is None or self._feeds:
            return
        for task in self._tasks:
            # A task that continued would pass each delta on a second time.
            ending = asyncio.create_task(cancel_listener(task))
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)
        self._tasks = set()

    @contextmanager
    def listen(self, run_id: UUID, room: Room) -> Iterator[Live]:
        """A queue of all live items of the run during the block."""
        feed, live = self.feed(run_id), Live(room)
        feed.queues.add(live)
        try:
            yield live
        finally:
            feed.queues.discard(live)
            live.close()
            self.release(feed)

    def fact(self, fact: Fact) -> None:
        if feed := self._feeds.get(str(fact.data["run_id"])):
            feed.push(fact)

    def missed(self) -> None:
        """Tells all feeds that facts may be missing."""
        for feed in self._feeds.values():
            feed.push(Missed())

    async def _deltas(self) -> None:
        async with aclosing(self._cache.listen(f"{RUN_DELTAS}*")) as messages:
            async for message in messages:
                if asyncio.current_task() not in self._tasks:
                    # Another task has taken over: redis-py mistook the cancellation of this one for a lost connection.
                    return
                if message is None:
                    continue
                channel, data = message
                if feed := self._feeds.get(channel.removeprefix(RUN_DELTAS)):
                    try:
                        delta = _delta.decode(data)
                    except msgspec.DecodeError as error:
                        _log.warning("skipped an invalid delta of an answer", error=str(error))
                        continue
                    feed.push(delta)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = time.monotonic()
            for feed in [*self._feeds.values()]:
                feed.tick(now)
