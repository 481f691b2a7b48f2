"""The live items of one run in this process.

A stream gets them through a queue of its own, and so does a socket while it catches up. Sockets that have caught up
share one position in the run: each event is encoded once and written to all of them.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol
from uuid import UUID

import msgspec

from infra.errors import NotFound
from infra.observe.logs import get_logger
from services.ws_gateway.agent import read_until_available
from services.ws_gateway.connection import text_frame
from services.ws_gateway.domain import Delta, Fact, Follow, StreamEvent
from services.ws_gateway.protocol import RunEvent

# A client with more waiting items is dropped. It can connect again and resume after its last event.
MAX_WAITING = 1_000
# After this time without news, a run is read again: its last fact may have been lost on the way.
REREAD_SECONDS = 60.0

_encoder = msgspec.json.Encoder()
_log = get_logger("ws_gateway.feed")


class Missed:
    """Facts may be missing: read the run again."""


Item = Fact | Delta | Missed


class Room:
    """The number of items that may still wait for one client, over all its queues. `on_full` is called once if an item
    has no room."""

    def __init__(self, on_full: Callable[[], object]) -> None:
        self.left = MAX_WAITING
        self.is_full = False
        self.on_full = on_full


class Live:
    """The queue of live items of one run for one client."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._waiting: deque[Item] = deque()
        self._came = asyncio.Event()
        # One place for `Missed`: after a gap in the tail, all runs of the client get one at the same moment.
        room.left += 1

    def next_nowait(self) -> Item | None:
        """The next item; None if none is waiting."""
        if not self._waiting:
            return None
        self._room.left += 1
        return self._waiting.popleft()

    async def next(self, seconds: float) -> Item | None:
        """The next item; None if none arrived within this time."""
        if not self._waiting:
            self._came.clear()
            # `asyncio.timeout` around a queue would take longer than everything else that is done for a delta.
            late = asyncio.get_running_loop().call_later(seconds, self._came.set)
            try:
                await self._came.wait()
            finally:
                late.cancel()
        return self.next_nowait()

    def push(self, item: Item) -> None:
        if self._room.is_full:
            return
        if self._room.left <= 0:
            self._room.is_full = True
            _log.info("client reads too slowly; closed its connection")
            self._room.on_full()
            return
        self._room.left -= 1
        self._waiting.append(item)
        self._came.set()

    def close(self) -> None:
        self._room.left += len(self._waiting) - 1


class Follower(Protocol):
    """A socket that has caught up with a run."""

    def write(self, frame: bytes) -> None: ...
    async def read(self, run_id: UUID, after: int) -> list[Fact]: ...
    def run_ended(self, run_id: UUID) -> None:
        """The last event of the run was written."""

    def run_failed(self, run_id: UUID, error: Exception) -> None:
        """The run cannot be followed any more."""


class Feed:
    def __init__(self, run_id: UUID) -> None:
        self.run_id = run_id
        self.queues: set[Live] = set()
        self._followers: dict[Follower, None] = {}
        # The position of all followers.
        self._follow = Follow(0)
        self._read_at = 0.0
        # Reads missing facts. Items that arrive meanwhile are held.
        self._reading: asyncio.Task[None] | None = None
        self._held: list[Item] = []

    @property
    def is_used(self) -> bool:
        return bool(self.queues or self._followers)

    def push(self, item: Item) -> None:
        # A copy: a client without room leaves.
        for live in [*self.queues]:
            live.push(item)
        if self._followers:
            self._advance(item)

    def join(self, follower: Follower, follow: Follow, facts: Sequence[Fact]) -> bool:
        """Adds a follower whose own position is `follow`, and who has just read `facts`.

        Returns False if its position differs from the position of the others. Then it must wait until `settled`, catch
        up, and try again.
        """
        if not self._followers:
            self._follow, self._read_at = follow, time.monotonic()
        else:
            for fact in facts:
                # The follower may have read facts that the tail has not delivered yet.
                self._advance(fact)
            if not self._reading and self._follow.last < follow.last:
                self._read()
            if self._reading or self._follow.last != follow.last:
                return False
        self._followers[follower] = None
        return True

    def leave(self, follower: Follower) -> None:
        self._followers.pop(follower, None)
        if not self._followers:
            self._stop_reading()

    async def settled(self) -> None:
        """Returns when no read of missing facts is under way."""
        while self._reading:
            await asyncio.wait({self._reading})

    def tick(self, now: float) -> None:
        """Reads the run again after some time without news: its last fact may have been lost on the way."""
        if self._followers and not self._reading and now - self._read_at > REREAD_SECONDS:
            self._read()

    def _advance(self, item: Item) -> None:
        if self._reading:
            self._hold(item)
        elif isinstance(item, Delta):
            self._write(self._follow.delta(item))
        elif isinstance(item, Fact) and not self._follow.misses(item):
            self._read_at = time.monotonic()
            self._write(self._follow.fact(item))
        else:
            self._read()

    def _hold(self, item: Item) -> None:
        if len(self._held) == MAX_WAITING:
            self._held = [Missed()]
        self._held.append(item)

    def _read(self) -> None:
        # Any follower may read: all belong to the tenant of the run.
        reader = next(iter(self._followers))
        self._reading = asyncio.create_task(self._fill_gap(reader))

    async def _fill_gap(self, reader: Follower) -> None:
        try:
            facts = await read_until_available(partial(reader.read, self.run_id), self._follow.last)
        except Exception as error:
            if not isinstance(error, NotFound):
                _log.error("could not read a run's facts; its sockets do not follow it any more", exc_info=error)
            self._stop_reading()
            for follower in self._all_leave():
                follower.run_failed(self.run_id, error)
            return
        self._reading, held, self._held = None, self._held, []
        self._read_at = time.monotonic()
        for item in [*facts, *held]:
            if self._followers:
                self._advance(item)

    def _stop_reading(self) -> None:
        if self._reading and self._reading is not asyncio.current_task():
            self._reading.cancel()
        self._reading, self._held = None, []

    def _write(self, events: Sequence[StreamEvent]) -> None:
        for event in events:
            frame = event_frame(self.run_id, event)
            # A copy: a follower that cannot take the frame leaves.
            for follower in [*self._followers]:
                follower.write(frame)
        if self._follow.ended:
            for follower in self._all_leave():
                follower.run_ended(self.run_id)

    def _all_leave(self) -> list[Follower]:
        followers = [*self._followers]
        self._followers.clear()
        return followers


def event_frame(run_id: UUID, event: StreamEvent) -> bytes:
    message = RunEvent(run_id=run_id, event=event.name, id=event.id, data=event.data)
    return text_frame(_encoder.encode(message))
