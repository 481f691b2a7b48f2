"""Work that a service does again and again, beside its messages."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod

from infra.clock import wait_at_most
from infra.errors import describe
from infra.observe.logs import get_logger


class Periodic(ABC):
    """Runs until stopped. A turn that fails is logged, and the next one comes as usual."""

    pause: float
    """Seconds between two turns."""
    failure: str
    """The log line of a turn that failed."""

    def __init__(self) -> None:
        self._stopping = asyncio.Event()

    async def stop(self) -> None:
        """Ends the loop after its turn."""
        self._stopping.set()

    async def run(self) -> None:
        while not self._stopping.is_set():
            try:
                await self.tick()
            except Exception as error:
                get_logger(type(self).__module__).warning(f"{self.failure}; will retry", error=describe(error))
            await wait_at_most(self.pause, self._stopping)

    @abstractmethod
    async def tick(self) -> None:
        """One turn."""
