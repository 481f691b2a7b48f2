"""Rate limits and pub/sub over Redis, also while Redis is away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import timedelta
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from infra.errors import TooManyRequests
from infra.stores import cache
from infra.stores.cache import Cache
from tooling.testing.proxy import FaultProxy
from tooling.testing.stack import Stack

# The rights of a service's account in the local stack.
RIGHTS = ("~*", "&*", "+@all", "-@admin", "-@dangerous")


@pytest.fixture(scope="module")
async def account(stack: Stack) -> AsyncIterator[str]:
    """user:password of an account with the rights of a service."""
    name = f"t_{uuid4().hex}"
    async with Redis.from_url(stack.redis_url) as admin:
        await admin.execute_command("ACL", "SETUSER", name, "on", ">pw", *RIGHTS)  # type: ignore[no-untyped-call]
        yield f"{name}:pw"
        await admin.execute_command("ACL", "DELUSER", name)  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
async def proxy(stack: Stack) -> AsyncIterator[FaultProxy]:
    url = urlsplit(stack.redis_url)
    async with FaultProxy(str(url.hostname), url.port or 0) as proxy:
        yield proxy


@pytest.fixture(scope="module")
async def redis(account: str, proxy: FaultProxy) -> AsyncIterator[Redis]:
    async with Redis.from_url(f"redis://{account}@127.0.0.1:{proxy.port}/0") as client:
        yield client


@pytest.fixture
def here(redis: Redis) -> Cache:
    return Cache(redis)


async def test_each_limit_is_counted_alone_and_tells_the_time_to_wait(here: Cache, redis: Redis) -> None:
    address = uuid4().hex
    for _ in range(3):
        await here.limit(address, "login", times=3, seconds=60)
    with pytest.raises(TooManyRequests) as refused:
        await here.limit(address, "login", times=3, seconds=60)
    assert timedelta(seconds=1) <= refused.value.after <= timedelta(seconds=60)
    assert await redis.exists(f"ratelimit:{address}:login")
    await here.limit(address, "search", times=3, seconds=60)
    await here.limit(uuid4().hex, "login", times=3, seconds=60)


async def test_without_redis_nothing_breaks_and_one_line_says_so(
    here: Cache, redis: Redis, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(cache, "PAUSE_SECONDS", 0.0)
    address = uuid4().hex
    await here.limit(address, "anything", times=1, seconds=60)
    proxy.blackhole()
    with capture_logs() as lines:
        for _ in range(3):
            await here.limit(address, "anything", times=1, seconds=60)
        await here.publish("openclaw:test", "x")
        proxy.heal()
        async with asyncio.timeout(30):
            with pytest.raises(TooManyRequests):
                while True:
                    await here.limit(address, "anything", times=1, seconds=60)
    assert [line["event"] for line in lines] == ["Redis does not answer; working without it", "Redis answers again"]


async def test_after_a_failure_the_next_calls_do_not_wait_for_one_each(
    here: Cache, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(cache, "PAUSE_SECONDS", 3600.0)
    proxy.blackhole()
    await here.publish("openclaw:test", "x")
    proxy.heal()
    async with asyncio.timeout(0.1):
        for _ in range(1000):
            await here.publish("openclaw:test", "x")


async def test_a_listener_hears_again_after_the_connection_was_lost(here: Cache, proxy: FaultProxy) -> None:
    name = uuid4().hex
    async with asyncio.timeout(30), aclosing(here.listen(f"openclaw:{name}:*", f"other:{name}")) as heard:
        assert await anext(heard) is None
        await here.publish(f"openclaw:{name}:a", "one")
        assert await anext(heard) == (f"openclaw:{name}:a", b"one")
        proxy.reset()
        assert await anext(heard) is None
        again = asyncio.create_task(anext(heard))
        # The publisher lost its connection too: messages until it is open again are lost.
        while not again.done():
            await here.publish(f"other:{name}", b"\xff")
            await asyncio.sleep(0.05)
        assert await again == (f"other:{name}", b"\xff")


async def test_a_listener_notices_a_connection_that_was_lost_without_notice(
    here: Cache, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SILENCE_SECONDS", 0.2)
    name = uuid4().hex
    async with asyncio.timeout(30), aclosing(here.listen(name)) as heard:
        assert await anext(heard) is None
        proxy.blackhole()
        again = asyncio.create_task(anext(heard))
        await asyncio.sleep(1)
        proxy.heal()
        assert await again is None
        await here.publish(name, "x")
        assert await anext(heard) == (name, b"x")


async def test_messages_that_nobody_waits_for_keep_their_order_and_are_bounded(
    here: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "MOST_WAITING", 3)
    name = uuid4().hex
    async with asyncio.timeout(30), aclosing(here.listen(name)) as heard:
        assert await anext(heard) is None
        for text in (b"1", b"2", b"3", b"too many"):
            here.publish_soon(name, text)
        assert [await anext(heard) for _ in range(3)] == [(name, b"1"), (name, b"2"), (name, b"3")]
        here.publish_soon(name, b"4")
        assert await anext(heard) == (name, b"4")


async def test_messages_that_nobody_waits_for_are_lost_while_redis_is_away_and_sent_later(
    here: Cache, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(cache, "PAUSE_SECONDS", 0.0)
    name = uuid4().hex
    proxy.blackhole()
    here.publish_soon(name, b"lost")
    sending = here._sending
    assert sending
    await sending
    proxy.heal()
    async with asyncio.timeout(30), aclosing(here.listen(name)) as heard:
        assert await anext(heard) is None
        following = asyncio.create_task(anext(heard))
        while not following.done():
            # The connection that was cut is opened again by a later message.
            here.publish_soon(name, b"sent")
            await asyncio.sleep(0.05)
        assert await following == (name, b"sent")
