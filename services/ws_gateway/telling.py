"""A run told to one client: what the agent has, then what the hub hears, and from the agent again what was missed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable

from infra.errors import Transient
from infra.logs import get_logger
from services.ws_gateway.domain import Delta, Event, Fact, Follow
from services.ws_gateway.hub import Live

HEARTBEAT_SECONDS = 20.0
# Without a sign of the run it is looked after: the last fact may have been the one that was missed.
LOOK_SECONDS = 60.0
# A client that takes nothing for so long is gone.
SEND_SECONDS = 30.0
_BACKOFF_SECONDS = (0.5, 1.0, 2.0, 5.0)
_log = get_logger("ws_gateway.telling")


class Teller:
    """`read`: gives the facts after an n; `tell`: takes the next events; `quiet`: called now and then while there are
    none."""

    def __init__(
        self,
        read: Callable[[int], Awaitable[list[Fact]]],
        live: Live,
        follow: Follow,
        tell: Callable[[list[Event]], Awaitable[None]],
        quiet: Callable[[], Awaitable[None]],
    ) -> None:
        self._read = read
        self._live = live
        self._follow = follow
        self._tell = tell
        self._quiet = quiet

    async def until_the_end(self, facts: Iterable[Fact]) -> None:
        """Tells these facts and what comes, until the run ends. Raises NotFound where the run is gone, and what `tell`
        raises."""
        await self._facts(facts)
        looked = time.monotonic()
        while not self._follow.ended:
            item = await self._live.next(HEARTBEAT_SECONDS)
            if item is None:
                await self._quiet()
            if isinstance(item, Delta):
                await self._events(self._follow.delta(item))
                continue
            if isinstance(item, Fact) and not self._follow.misses(item):
                await self._events(self._follow.fact(item))
                looked = time.monotonic()
            elif item is not None or time.monotonic() - looked > LOOK_SECONDS:
                await self._facts(await self.read(self._follow.last))
                looked = time.monotonic()

    async def read(self, after: int) -> list[Fact]:
        """The run's facts after an n, as soon as the agent gives them. Raises NotFound."""
        failures = 0
        while True:
            try:
                return await self._read(after)
            except Transient as error:
                _log.warning("facts cannot be read now", error=str(error))
                await self._quiet()
                await asyncio.sleep(_BACKOFF_SECONDS[min(failures, len(_BACKOFF_SECONDS) - 1)])
                failures += 1

    async def _facts(self, facts: Iterable[Fact]) -> None:
        for fact in facts:
            await self._events(self._follow.fact(fact))

    async def _events(self, events: list[Event]) -> None:
        if events:
            await self._tell(events)
