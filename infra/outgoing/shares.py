"""Places that tenants share, such as connections: one tenant never holds all of them."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar

from infra.observe import logs

tenant: ContextVar[str] = ContextVar("tenant", default="")
"""For whom this task works; empty for the platform."""


def work_for(tenant_id: str) -> None:
    """From now on this task takes the tenant's share of places, and its log lines have the field ``for_tenant``."""
    tenant.set(tenant_id)
    logs.work_for(tenant_id)


class Shares:
    """A tenant may take a place while it has fewer than are free: one alone gets half of all, two get a third each.
    So there is always one for the next tenant."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._held: Counter[str] = Counter()
        self._waiting: defaultdict[str, deque[asyncio.Future[None]]] = defaultdict(deque)

    @asynccontextmanager
    async def place(self, tenant: str) -> AsyncIterator[None]:
        """Waits for a place, and holds it for the length of the block."""
        await self.take(tenant)
        try:
            yield
        finally:
            self.give(tenant)

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

    def take_now(self, tenant: str, places: int = 1) -> bool:
        """Takes places without waiting. Returns False if the tenant does not get all of them now."""
        if not self._may_take(tenant, places):
            return False
        self._count(tenant, places)
        return True

    def give(self, tenant: str, places: int = 1) -> None:
        """Gives places back; the tenants that wait get them."""
        self._count(tenant, -places)
        for name, queue in list(self._waiting.items()):
            while queue and self._may_take(name):
                if not (place := queue.popleft()).done():
                    self._count(name, 1)
                    place.set_result(None)
                    # The others come first next time.
                    self._waiting[name] = self._waiting.pop(name)
            if not queue:
                del self._waiting[name]

    def _may_take(self, tenant: str, places: int = 1) -> bool:
        # As if it took them one by one.
        return self._held[tenant] + places - 1 < self._free - (places - 1)

    def _count(self, tenant: str, places: int) -> None:
        self._free -= places
        self._held[tenant] += places
        if not self._held[tenant]:
            del self._held[tenant]


class Held:
    """The places that one holder has of its tenant's share."""

    __slots__ = ("_places", "_shares", "_tenant")

    def __init__(self, shares: Shares, tenant: str) -> None:
        self._shares = shares
        self._tenant = tenant
        self._places = 0

    def resize(self, places: int) -> bool:
        """Takes or gives back so many that it has `places`. Returns False and changes nothing if it does not get all of
        them now."""
        if places < self._places:
            self._shares.give(self._tenant, self._places - places)
        elif places > self._places and not self._shares.take_now(self._tenant, places - self._places):
            return False
        self._places = places
        return True
