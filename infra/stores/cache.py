"""Redis: rate limits and pub/sub. It is a cache and a wire, never the truth.

While Redis is away, limits do not bind and messages do not arrive; everything else goes on. One line is logged when it
goes away and one when it is back. So no decision that must be right may depend on Redis.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from contextvars import Context
from datetime import timedelta
from typing import Any, TypeVar

from limits import RateLimitItemPerSecond, WindowStats
from limits.aio.storage import RedisStorage
from limits.aio.strategies import MovingWindowRateLimiter
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from infra.errors import TooManyRequests, describe
from infra.observe.logs import get_logger

T = TypeVar("T")

LIMITS = "ratelimit:"
"""The beginning of all keys."""
TIMEOUT_SECONDS = 1.0
"""The time limit of each call."""
PAUSE_SECONDS = 0.5
"""After a failed call, no call is tried for this time: a request of many calls must not wait for each time-out."""
SILENCE_SECONDS = 15.0
"""After this time without a message a listener sends a ping; after as long again it opens a new connection."""
MOST_WAITING = 10_000
"""Messages of `publish_soon` that wait for Redis."""

_log = get_logger("infra.stores.cache")


class _Window(RateLimitItemPerSecond):
    """Leaves amount and window out of the key; the library would put them into it."""

    def key_for(self, *identifiers: bytes | str | float) -> str:
        return ":".join(str(part) for part in identifiers)


class Cache:
    """Rate limits and pub/sub of a process over a Redis client. The caller closes the client."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        storage = RedisStorage(
            "async+redis://",
            implementation="redispy",
            key_prefix=LIMITS.removesuffix(":"),
            connection_pool=redis.connection_pool,  # type: ignore[arg-type]  # typed for numbers and texts only
        )
        self._limiter = MovingWindowRateLimiter(storage)
        self._away_since: float | None = None
        self._waiting: list[tuple[str, bytes]] = []
        self._sending: asyncio.Task[None] | None = None

    async def limit(self, who: str, what: str, *, times: int, seconds: int) -> None:
        """Counts one use of `what` (an endpoint) by `who` (an address, a tenant, an account).

        Raises TooManyRequests, with the time to wait, if this use exceeds `times` in any period of `seconds`.
        """
        window = _Window(times, seconds)
        if await self._or(True, lambda: self._limiter.hit(window, who, what)):
            return
        full = WindowStats(time.time() + seconds, 0)
        stats = await self._or(full, lambda: self._limiter.get_window_stats(window, who, what))
        after = timedelta(seconds=max(1, math.ceil(stats.reset_time - time.time())))
        raise TooManyRequests(after, f"more than {times} in {seconds} s")

    async def publish(self, channel: str, data: bytes | str) -> None:
        """Sends `data` to the processes that listen to `channel` at this moment; the message is not kept."""
        await self._or(None, lambda: self._redis.publish(channel, data))

    def publish_soon(self, channel: str, data: bytes) -> None:
        """As `publish`, but the caller does not wait: all messages that come in the meantime are sent together, in
        their order. While too many wait, new ones are dropped."""
        if len(self._waiting) >= MOST_WAITING:
            return
        self._waiting.append((channel, data))
        if self._sending is None:
            # An empty context: the task works for many callers and belongs to the trace of none.
            self._sending = asyncio.create_task(self._send_waiting(), name="cache publisher", context=Context())

    async def _send_waiting(self) -> None:
        while self._waiting:
            messages, self._waiting = self._waiting, []
            async with self._redis.pipeline(transaction=False) as together:
                for channel, data in messages:
                    together.publish(channel, data)
                await self._or(None, together.execute)
        self._sending = None

    async def listen(self, *patterns: str) -> AsyncGenerator[tuple[str, bytes] | None]:
        """(channel, data) of each message on a channel that fits one of `patterns` (``claw:run:*``).

        None each time it begins to listen, at first and after a lost connection: messages published before that moment
        were missed. Never ends by itself; close it with `aclosing`.
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
        """The result of `call`, or `fallback` if Redis does not answer in time."""
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
            _log.warning("Redis does not answer; working without it", error=describe(error))
        if self._away_since and not error:
            _log.info("Redis answers again")
        self._away_since = time.monotonic() if error else None


async def cancel_listener(task: asyncio.Task[None]) -> None:
    """Cancels a task that listens, until it has ended. One cancellation is not enough: while redis-py connects, it
    mistakes the cancellation for a lost connection and continues."""
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=0.5)


async def _messages(pubsub: PubSub) -> AsyncGenerator[dict[str, Any]]:
    """Raises TimeoutError if the other side does not answer a ping: a connection can be lost without notice."""
    asked = False
    while True:
        message = await pubsub.get_message(timeout=SILENCE_SECONDS)
        if message is not None:
            asked = False
            yield message
        elif asked:
            raise TimeoutError("no answer to a ping")
        else:
            await pubsub.ping()
            asked = True
