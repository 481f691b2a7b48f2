"""What is live in this process: facts from the tail, deltas from Redis, and the streams that wait for them."""

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

# A client that is so far behind is dropped; it comes again and goes on from its last event.
MAX_WAITING = 1_000

_log = get_logger("ws_gateway.hub")


class Missed:
    """Something may have been missed: read again."""


class Client:
    """Whoever watches runs: one, or many. `room`: how much more may wait for it."""

    def __init__(self) -> None:
        self.room = MAX_WAITING
        self.dropped = False
        # Called when it is to go before its runs end.
        self.end: Callable[[], object] = lambda: None


class Live:
    """A client's end of the hub, for one run."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._waiting: deque[Fact | Delta | Missed] = deque()
        self._came = asyncio.Event()
        # All its runs may miss something at the same moment, however many there are.
        client.room += 1

    async def next(self, seconds: float) -> Fact | Delta | Missed | None:
        """None: nothing came in that time."""
        if not self._waiting:
            self._came.clear()
            # Not `asyncio.timeout` around a queue, which takes longer than all else that a delta needs here.
            late = asyncio.get_running_loop().call_later(seconds, self._came.set)
            try:
                await self._came.wait()
            finally:
                late.cancel()
            if not self._waiting:
                return None
        self.client.room += 1
        return self._waiting.popleft()

    def put(self, item: Fact | Delta | Missed) -> None:
        if self.client.dropped:
            return
        if self.client.room <= 0:
            self.client.dropped = True
            _log.info("a client that does not keep up is dropped")
            self.client.end()
            return
        self.client.room -= 1
        self._waiting.append(item)
        self._came.set()

    def close(self) -> None:
        self.client.room += len(self._waiting) - 1


class Hub:
    """`stopping`: set when the process is to end; all streams end then, and their clients go elsewhere."""

    def __init__(self, cache: Cache, stopping: asyncio.Event) -> None:
        self._cache = cache
        self.stopping = stopping
        self._streams: dict[str, set[Live]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def listen(self, run_id: UUID, client: Client) -> AsyncIterator[Live]:
        """Everything of the run that comes during the block."""
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
                # Nobody is left: Redis need not tell us anything.
                await asyncio.gather(*(_cancelled(task) for task in self._tasks))

    def fact(self, fact: Fact) -> None:
        for live in [*self._streams.get(str(fact.data["run_id"]), ())]:
            live.put(fact)

    def missed(self) -> None:
        """To all: facts may have been missed."""
        for live in self._all():
            live.put(Missed())

    async def _deltas(self) -> None:
        async with aclosing(self._cache.listen(f"{RUN_DELTAS}*")) as messages:
            async for message in messages:
                if asyncio.current_task() not in self._tasks:
                    # Another one has taken over, while redis-py took the cancelling of this one for a lost connection.
                    return
                if message is None:
                    continue
                channel, data = message
                if streams := self._streams.get(channel.removeprefix(RUN_DELTAS)):
                    try:
                        delta = msgspec.json.decode(data, type=Delta)
                    except msgspec.DecodeError as error:
                        _log.warning("delta not understood", error=str(error))
                        continue
                    for live in [*streams]:
                        live.put(delta)

    async def _end_all(self) -> None:
        await self.stopping.wait()
        for live in self._all():
            live.client.end()

    def _all(self) -> list[Live]:
        return [live for streams in self._streams.values() for live in streams]


async def _cancelled(task: asyncio.Task[None]) -> None:
    """Ends it. Once is not enough: redis-py takes a cancelling while it connects for a lost connection, and goes on;
    what was left running would hand each delta on a second time."""
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=0.5)
