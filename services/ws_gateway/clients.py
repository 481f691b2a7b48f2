"""The connected clients of this process: their keys are checked again in one sweep, and all end when it stops."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import Context
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from typing import Protocol

from infra.errors import TooManyRequests, Transient
from infra.observe.logs import get_logger
from infra.outgoing.shares import Shares
from infra.security.auth import Identity
from services.ws_gateway.keys import ApiKeys

# An identity is valid for a minute, but a connection may last for days. So its key is checked this often.
CHECK_SECONDS = 5.0
# A connection is ended if its key could not be checked for this long.
UNCHECKED_SECONDS = 300.0
CONCURRENT_CHECKS = 20
TICK_SECONDS = 5.0
PLACES = 12_000
"""For the connections of a process: 10,000 of all tenants fit, and one tenant gets at most half of the places."""

HELD_BYTES = 64 * 1024 * 1024
"""Of messages that clients have sent in part, or that wait for their answers. A tenant alone has a half."""

UNSENT_BYTES = 64 * 1024 * 1024
"""Of large parts of answers that wait for slow clients. A tenant alone has a half."""

_log = get_logger("ws_gateway.clients")


class End(Enum):
    """Why a connection ends: the close code of a WebSocket and its reason.

    The codes are those of RFC 6455 §7.4.1 and its registry; 4401 is our own, after HTTP's 401.
    """

    FAILED = 1011, "internal error"
    RESTARTING = 1012, "the service restarts: connect again"
    TOO_MANY = 1013, "the tenant has too many connections: close some, or connect again later"
    TOO_MUCH = 1013, "the tenant's clients send too much at once: connect again later"
    TOO_SLOW = 1013, "the client reads too slowly: connect again"
    TOO_MUCH_UNREAD = 1013, "the tenant's clients read their answers too slowly: connect again later"
    UNCHECKED = 1013, "the API key cannot be checked now: connect again"
    NOT_ALLOWED = 4401, "the API key was revoked or has expired"


class Client(Protocol):
    """A connection that follows runs."""

    who: Identity
    """The identity of the client. The sweep replaces it by one with the present scopes and a new token."""

    def end(self, reason: End) -> None:
        """Ends the connection soon."""

    def tick(self, now: float) -> None:
        """Called every few seconds."""


@dataclass(eq=False)
class _Key:
    """The clients with the same key."""

    who: Identity
    checked_at: float
    clients: set[Client] = field(default_factory=set)


class Clients:
    """`stopping` is set when the process stops."""

    def __init__(self, keys: ApiKeys, stopping: asyncio.Event) -> None:
        self._keys = keys
        self._stopping = stopping
        self._places = Shares(PLACES)
        self.held = Shares(HELD_BYTES)
        """The bytes that clients have sent and that are not answered."""
        self.unsent = Shares(UNSENT_BYTES)
        """The bytes of large parts of answers that clients have not read."""
        self._by_key: dict[tuple[str, str, str], _Key] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def enter(self, client: Client) -> None:
        """Watches the client until `leave`. Raises TooManyRequests if its tenant has too many connections."""
        if not self._places.take_now(client.who.tenant_id):
            raise TooManyRequests(timedelta(seconds=5), End.TOO_MANY.value[1])
        if not self._by_key:
            # An empty context: they work for all clients, and must not wait for the share of one tenant.
            self._tasks = {
                asyncio.create_task(self._run(work), context=Context())
                for work in (self._check, self._tick, self._stop)
            }
        who = client.who
        key = self._by_key.setdefault(_name(who), _Key(who, time.monotonic()))
        key.clients.add(client)
        if self._stopping.is_set():
            client.end(End.RESTARTING)

    @contextmanager
    def watched(self, client: Client) -> Iterator[None]:
        """Watches the client during the block. Raises TooManyRequests."""
        self.enter(client)
        try:
            yield
        finally:
            self.leave(client)

    def leave(self, client: Client) -> None:
        name = _name(client.who)
        if (key := self._by_key.get(name)) is None or client not in key.clients:
            return
        self._places.give(client.who.tenant_id)
        key.clients.discard(client)
        if not key.clients:
            del self._by_key[name]
        if not self._by_key:
            for task in self._tasks:
                task.cancel()

    async def _run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Ends all connections if the work fails: otherwise a revoked key would keep its connections."""
        try:
            await work()
        except Exception:
            _log.exception("could not watch the connections; all are closed")
            for client in self._all():
                client.end(End.FAILED)

    async def _check(self) -> None:
        """Asks for each key once in a round, however many clients have it."""
        limit = asyncio.Semaphore(CONCURRENT_CHECKS)

        async def check(key: _Key) -> None:
            async with limit:
                await self._check_key(key)

        await asyncio.sleep(CHECK_SECONDS)
        while True:
            # Together: a pause after a round would come on top of the time of its slowest check.
            await asyncio.gather(asyncio.sleep(CHECK_SECONDS), *map(check, self._by_key.values()))

    async def _check_key(self, key: _Key) -> None:
        try:
            renewed = await self._keys.renewed(key.who)
        except Exception as error:
            # One key that cannot be checked must not stop the checks of all others.
            if not isinstance(error, Transient):
                _log.exception("could not check an API key; will retry")
            if time.monotonic() - key.checked_at > UNCHECKED_SECONDS:
                _log.warning("could not check an API key; its connections are closed", error=str(error))
                _end(key, End.UNCHECKED)
            return
        key.checked_at = time.monotonic()
        if not renewed.scopes:
            _log.info("API key was revoked or has expired; its connections are closed", actor=key.who.actor)
            _end(key, End.NOT_ALLOWED)
            return
        key.who = renewed
        for client in key.clients:
            client.who = key.who

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = time.monotonic()
            for client in self._all():
                client.tick(now)

    async def _stop(self) -> None:
        await self._stopping.wait()
        for client in self._all():
            client.end(End.RESTARTING)

    def _all(self) -> list[Client]:
        return [client for key in self._by_key.values() for client in key.clients]


def _end(key: _Key, reason: End) -> None:
    for client in [*key.clients]:
        client.end(reason)


def _name(who: Identity) -> tuple[str, str, str]:
    return who.tenant_id, who.actor, who.key_id
