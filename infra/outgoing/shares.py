"""Places that tenants share, such as connections: one tenant never holds all of them."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict, deque
from contextvars import ContextVar

tenant: ContextVar[str] = ContextVar("tenant", default="")
"""For whom this task works; empty for the platform."""


class Shares:
    """A tenant may take a place while it has fewer than are free: one alone gets half of all, two get a third each.
    So there is always one for the next tenant."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._held: Counter[str] = Counter()
        self._waiting: defaultdict[str, deque[asyncio.Future[None]]] = defaultdict(deque)

    async def take(self, tenant: str) -> None:
        """Waits for a place."""
        if tenant not in self._waiting and self.take_now(tenant):
            return
        place = asyncio.get_running_loop().create_future()
        self._waiting[tenant].append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.give(tenant)
            raise

    def take_now(self, tenant: str) -> bool:
        """Takes a place without waiting. Returns False if the tenant gets none now."""
        if not self._may_take(tenant):
            return False
        self._count(tenant, 1)
        return True

    def give(self, tenant: str) -> None:
        """Gives a place back; the tenants that wait get it."""
        self._count(tenant, -1)
        for name, places in list(self._waiting.items()):
            while places and self._may_take(name):
                if not (place := places.popleft()).done():
                    self._count(name, 1)
                    place.set_result(None)
            if not places:
                del self._waiting[name]

    def _may_take(self, tenant: str) -> bool:
        return self._held[tenant] < self._free

    def _count(self, tenant: str, places: int) -> None:
        self._free -= places
        self._held[tenant] += places
        if not self._held[tenant]:
            del self._held[tenant]
