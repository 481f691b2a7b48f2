"""Passes live facts (from the tail) and deltas (from Redis) to the streams of this process."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from uuid import UUID

import msgspec

from infra.observe.logs import get_logger
from infra.stores.cache import Cache
from protos.pubsub import RUN_DELTAS
from services.ws_gateway.domain import Delta, Fact

# A client with more waiting items is dropped. It can connect again and resume after its last event.
MAX_WAITING = 1_000

_log = get_logger("ws_gateway.hub")


class Missed:
    """Facts may be missing: read the run again."""


class Client:
    """A connection that follows one or more runs. `room` is the number of items that may still wait for it."""

    def __init__(self) -> None:
        self.room = MAX_WAITING
        self.dropped = False
        # Called to end the connection before its runs have ended.
        self.end: Callable[[], object] = lambda: None


class Live:
    """The queue of live items of one run for one client."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._waiting: deque[Fact | Delta | Missed] = deque()
        self._came = asyncio.Event()
        # One place for `Missed`: after a gap in the tail, all runs of the client get one at the same moment.
        client.room += 1

    async def next(self, seconds: float) -> Fact | Delta | Missed | None:
        """The next item; None if none arrived within this time."""
        if not self._waiting:
            self._came.clear()
            # `asyncio.timeout` around a queue would take longer than everything else that is done for a delta.
            late = asyncio.get_running_loop().call_later(seconds, self._came.set)
            try:
                await self._came.wait()
            finally:
                late.cancel()
            if not self._waiting:
                return None
        self.client.room += 1
        return self._waiting.popleft()

    def push(self, item: Fact | Delta | Missed) -> None:
        if self.client.dropped:
            return
        if self.client.room <= 0:
            self.client.dropped = True
            _log.info("client does not keep up; the connection is dropped")
            self.client.end()
            return
        self.client.room -= 1
        self._waiting.append(item)
        self._came.set()

    def close(self) -> None:
        self.client.room += len(self._waiting) - 1


class Hub:
    """`stopping` is set when the process ends. All streams end then, and their clients connect elsewhere."""

    def __init__(self, cache: Cache, stopping: asyncio.Event) -> None:
        self._cache = cache
        self.stopping = stopping
        self._streams: dict[str, set[Live]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def listen(self, run_id: UUID, client: Client) -> AsyncIterator[Live]:
        """All live items of the run during the block."""
        if not self._streams:
            self._tasks = [asyncio.create_task(self._deltas()), asyncio.create_task(self._end_all())]
        live = Live(client)
        self._streams.setdefault(str(run_id), set()).add(live)
        try:
            yield live
        finally:
            streams = self._streams[str(run_id)]
            streams.remove(live)
            live.close()
            if not streams:
                del self._streams[str(run_id)]
            if not self._streams:
                # No stream is left, so Redis does not need to send us anything.
                await asyncio.gather(*(_cancelled(task) for task in self._tasks))

    def fact(self, fact: Fact) -> None:
        for live in [*self._streams.get(str(fact.data["run_id"]), ())]:
            live.push(fact)

    def missed(self) -> None:
        """Tells all streams that facts may be missing."""
        for live in self._all():
            live.push(Missed())

    async def _deltas(self) -> None:
        async with aclosing(self._cache.listen(f"{RUN_DELTAS}*")) as messages:
            async for message in messages:
                if asyncio.current_task() not in self._tasks:
                    # Another task has taken over: redis-py mistook the cancellation of this one for a lost connection.
                    return
                if message is None:
                    continue
                channel, data = message
                if streams := self._streams.get(channel.removeprefix(RUN_DELTAS)):
                    try:
                        delta = msgspec.json.decode(data, type=Delta)
                    except msgspec.DecodeError as error:
                        _log.warning("delta is invalid; it is skipped", error=str(error))
                        continue
                    for live in [*streams]:
                        live.push(delta)

    async def _end_all(self) -> None:
        await self.stopping.wait()
        for live in self._all():
            live.client.end()

    def _all(self) -> list[Live]:
        return [live for streams in self._streams.values() for live in streams]


async def _cancelled(task: asyncio.Task[None]) -> None:
    """Cancels the task until it ends. One cancellation is not enough: while redis-py connects, it mistakes the
    cancellation for a lost connection and continues. The task would pass each delta on a second time."""
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=0.5)
