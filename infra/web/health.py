"""Health: is the process alive, is it ready, and do its dependencies answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from infra.errors import describe
from infra.observe.logs import get_logger

CHECK_SECONDS = 2.0
CACHE_SECONDS = 1.0
"""Dependencies are checked at most once in this time, however many probes ask."""


class Health:
    """Not alive only if a restart helps. Not ready while a needed dependency is down or the process drains."""

    def __init__(self, service: str, version: str) -> None:
        self._service = service
        self._version = version
        self._started = time.monotonic()
        self._draining = False
        self._checks: dict[str, Callable[[], Awaitable[None]]] = {}
        self._needed: set[str] = set()
        self._probes: dict[str, Callable[[], bool]] = {}
        self._lock = asyncio.Lock()
        self._asked = -CACHE_SECONDS
        self._dependencies: dict[str, dict[str, Any]] = {}
        self._log = get_logger("infra.web.health")

    def add_check(self, name: str, check: Callable[[], Awaitable[None]], *, needed: bool = True) -> None:
        """Adds a dependency. `check` makes a real round trip and raises if it fails; it has two seconds.

        needed: false if the process can serve without it, such as a bus, whose messages wait in the outbox.
        """
        self._checks[name] = check
        if needed:
            self._needed.add(name)

    def add_probe(self, name: str, alive: Callable[[], bool]) -> None:
        """Adds a part of this process. `alive` is false if only a restart will help (a consumer without progress)."""
        self._probes[name] = alive

    def drain(self) -> None:
        """Reports not ready from now on, so that this process gets no new requests."""
        self._draining = True

    def is_draining(self) -> bool:
        return self._draining

    def alive(self) -> tuple[bool, dict[str, Any]]:
        """(alive, ``{"status","version","uptime"}``): status ``ok``, or ``stuck`` with the list ``stuck`` of parts."""
        stuck = [name for name, alive in self._probes.items() if not alive()]
        body = self._summary("stuck" if stuck else "ok")
        return not stuck, body | {"stuck": stuck} if stuck else body

    async def ready(self) -> tuple[bool, dict[str, Any]]:
        """(ready, ``{"status","version","uptime","dependencies":{name: {"status","latency"}}}``).

        status: ``ok``, ``degraded`` (a dependency is down) or ``draining``; a dependency's: ``up`` or ``down``;
        latency in milliseconds, uptime in seconds.
        """
        async with self._lock:
            if time.monotonic() - self._asked >= CACHE_SECONDS:
                results = await asyncio.gather(*(self._ask(name) for name in self._checks))
                self._dependencies = dict(zip(self._checks, results, strict=True))
                self._asked = time.monotonic()
        down = {name for name, dependency in self._dependencies.items() if dependency["status"] == "down"}
        status = "draining" if self._draining else "degraded" if down else "ok"
        ready = not self._draining and not down & self._needed
        return ready, self._summary(status) | {"dependencies": self._dependencies}

    async def _ask(self, name: str) -> dict[str, Any]:
        began = time.perf_counter()
        was = self._dependencies.get(name, {}).get("status", "not asked")
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                await self._checks[name]()
            status = "up"
            if was == "down":
                self._log.info("dependency answers again", dependency=name)
        except Exception as error:
            status = "down"
            reason = f"no answer in {CHECK_SECONDS:g} s" if isinstance(error, TimeoutError) else describe(error)
            if was == "up":
                self._log.error("dependency does not answer", dependency=name, error=reason)
            elif was == "not asked":
                # Usual in the first seconds of a process, before it has connected.
                self._log.warning("dependency does not answer yet", dependency=name, error=reason)
        return {"status": status, "latency": round((time.perf_counter() - began) * 1000, 1)}

    def _summary(self, status: str) -> dict[str, Any]:
        return {"status": status, "version": self._version, "uptime": int(time.monotonic() - self._started)}
