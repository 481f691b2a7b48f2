"""Redis: a cache and a wire, never the truth.

While it is away nothing breaks: what is read is not there, what is written is not kept, locks are granted, limits do
not bind, messages do not arrive. One line is logged when it goes and one when it is back. So nothing may be decided
by it that must be right.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

from limits import RateLimitItemPerSecond, WindowStats
from limits.aio.storage import RedisStorage
from limits.aio.strategies import MovingWindowRateLimiter
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from infra.clock import uuid7
from infra.errors import TooManyRequests, describe
from infra.observe.logs import get_logger

T = TypeVar("T")

# Pub/sub.
CONFIG_CHANGED = "openclaw:config:changed"
SKILL_SYNCED = "openclaw:skill:synced"
USER_SUSPENDED = "openclaw:user:suspended"
QUOTA_EXHAUSTED = "openclaw:quota:exhausted"

LOCK_SECONDS = 30
HEARTBEAT = timedelta(seconds=30)
# A call takes no longer. After one that failed none is tried for the pause, so that a request of many calls is not
# made to wait for each.
TIMEOUT_SECONDS = 1.0
PAUSE_SECONDS = 0.5
# After so long without a word a listener asks, and after as long again it connects anew.
SILENCE_SECONDS = 15.0

_RELEASE = "if redis.call('get', KEYS[1]) == ARGV[1] then redis.call('del', KEYS[1]) end"
_log = get_logger("infra.stores.cache")


class Key(NamedTuple):
    """A key and how long what is kept there is kept."""

    name: str
    ttl: timedelta


def session(user_id: str, session_id: str) -> Key:
    """A hash."""
    return Key(f"session:{user_id}:{session_id}", timedelta(hours=24))


def quota(user_id: str, type_: str) -> Key:
    return Key(f"quota:{user_id}:{type_}", timedelta(minutes=5))


def blacklist(token_hash: str, rest_of_life: timedelta) -> Key:
    """A token that was withdrawn before it ran out. `token_hash`: never the token itself."""
    return Key(f"blacklist:{token_hash}", rest_of_life)


def code(type_: str, identifier: str) -> Key:
    """A code that was sent to somebody, to be given back."""
    return Key(f"code:{type_}:{identifier}", timedelta(minutes=5))


def device(user_id: str, device_id: str) -> Key:
    """A hash, written anew at each heartbeat."""
    return Key(f"device:{user_id}:{device_id}", 3 * HEARTBEAT)


class _Window(RateLimitItemPerSecond):
    """The library would put the amount and the window into the key, too."""

    def key_for(self, *identifiers: bytes | str | float) -> str:
        return ":".join(str(part) for part in identifiers)


class Cache:
    """What a process keeps in Redis. It does not close the client."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        storage = RedisStorage(
            "async+redis://",
            implementation="redispy",
            key_prefix="ratelimit",
            connection_pool=redis.connection_pool,  # type: ignore[arg-type]  # typed for numbers and texts only
        )
        self._limiter = MovingWindowRateLimiter(storage)
        self._away_since: float | None = None

    async def get(self, key: Key) -> bytes | None:
        return await self._or(None, lambda: self._redis.get(key.name))

    async def put(self, key: Key, value: bytes | str) -> None:
        await self._or(None, lambda: self._redis.set(key.name, value, px=key.ttl))

    async def get_hash(self, key: Key) -> dict[bytes, bytes]:
        """Empty where there is none."""
        none: dict[bytes, bytes] = {}
        return await self._or(none, lambda: self._redis.hgetall(key.name))

    async def put_hash(self, key: Key, fields: Mapping[str, str]) -> None:
        """Sets these fields beside those that are there; all of them last for the key's time from now."""
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.hset(key.name, items=[part for pair in fields.items() for part in pair])
        pipeline.pexpire(key.name, key.ttl)
        await self._or(None, pipeline.execute)

    async def forget(self, key: Key) -> None:
        await self._or(None, lambda: self._redis.delete(key.name))

    @asynccontextmanager
    async def lock(self, resource: str) -> AsyncIterator[bool]:
        """True for the one that has ``lock:<resource>``, which it loses after 30 s or when the block ends.

        A hint that saves doing something twice: after a pause of the process, and while Redis is away, two have it.
        """
        name, token = f"lock:{resource}", str(uuid7())
        held = bool(await self._or(True, lambda: self._redis.set(name, token, nx=True, ex=LOCK_SECONDS)))
        try:
            yield held
        finally:
            if held:
                # Not where it has run out and is another's by now.
                await self._or(None, lambda: self._redis.eval(_RELEASE, 1, name, token))

    async def limit(self, who: str, what: str, *, times: int, seconds: int) -> None:
        """Counts one use by `who` (an address, a tenant, an account) of `what` (an endpoint).

        Raises TooManyRequests saying when to come again, where it is one more than `times` in any `seconds`.
        """
        window = _Window(times, seconds)
        if await self._or(True, lambda: self._limiter.hit(window, who, what)):
            return
        full = WindowStats(time.time() + seconds, 0)
        stats = await self._or(full, lambda: self._limiter.get_window_stats(window, who, what))
        after = timedelta(seconds=max(1, math.ceil(stats.reset_time - time.time())))
        raise TooManyRequests(after, f"more than {times} in {seconds} s")

    async def publish(self, channel: str, data: bytes | str) -> None:
        """Tells whoever listens at this moment."""
        await self._or(None, lambda: self._redis.publish(channel, data))

    async def listen(self, *patterns: str) -> AsyncGenerator[tuple[str, bytes] | None]:
        """(channel, data) of what is published to channels that fit one of `patterns` (``openclaw:delta:*``).

        None each time it begins to listen, at first and after a loss of the connection: what was published before
        has not been heard. Never ends by itself; close it with `aclosing`.
        """
        while True:
            pubsub = self._redis.pubsub()
            try:
                await pubsub.psubscribe(*patterns)
                async with aclosing(_messages(pubsub)) as messages:
                    async for message in messages:
                        self._note(None)
                        if message["type"] == "pmessage":
                            yield message["channel"].decode(), message["data"]
                        elif message["type"] == "psubscribe" and message["data"] == len(patterns):
                            yield None
            except (RedisError, OSError) as error:
                self._note(error)
                await asyncio.sleep(PAUSE_SECONDS)
            finally:
                await pubsub.aclose()  # type: ignore[no-untyped-call]

    async def _or(self, fallback: T, call: Callable[[], Awaitable[Any]]) -> T:
        if self._away_since and time.monotonic() - self._away_since < PAUSE_SECONDS:
            return fallback
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                result: T = await call()
        except (RedisError, OSError) as error:
            self._note(error)
            return fallback
        self._note(None)
        return result

    def _note(self, error: Exception | None) -> None:
        if error and not self._away_since:
            _log.warning("Redis is away, working without it", error=describe(error))
        if self._away_since and not error:
            _log.info("Redis is back")
        self._away_since = time.monotonic() if error else None


async def _messages(pubsub: PubSub) -> AsyncGenerator[dict[str, Any]]:
    """Raises TimeoutError where the other side gives no sign of life: the connection may be gone without a word."""
    asked = False
    while True:
        message = await pubsub.get_message(timeout=SILENCE_SECONDS)
        if message is not None:
            asked = False
            yield message
        elif asked:
            raise TimeoutError("no sign of life")
        else:
            await pubsub.ping()
            asked = True
