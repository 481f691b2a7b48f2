"""The cache as its users see it, also while it is away."""

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

# As the local stack gives them to a service.
RIGHTS = ("~*", "&*", "+@all", "-@admin", "-@dangerous")


@pytest.fixture(scope="module")
async def account(stack: Stack) -> AsyncIterator[str]:
    """user:password of somebody who may do what services may."""
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


def test_keys_have_the_published_patterns_and_lifetimes() -> None:
    assert [
        cache.session("u1", "s1"),
        cache.quota("u1", "tokens"),
        cache.blacklist("5e88", timedelta(minutes=7)),
        cache.code("email", "a@example.com"),
        cache.device("u1", "d1"),
    ] == [
        ("session:u1:s1", timedelta(hours=24)),
        ("quota:u1:tokens", timedelta(minutes=5)),
        ("blacklist:5e88", timedelta(minutes=7)),
        ("code:email:a@example.com", timedelta(minutes=5)),
        ("device:u1:d1", timedelta(seconds=90)),
    ]


async def test_what_is_put_is_there_for_its_time(here: Cache, redis: Redis) -> None:
    key = cache.quota(uuid4().hex, "tokens")
    assert await here.get(key) is None
    await here.put(key, "12")
    assert await here.get(key) == b"12"
    assert 0 < await redis.pttl(key.name) <= 300_000
    await here.forget(key)
    assert await here.get(key) is None


async def test_a_hash_is_extended_by_what_is_put(here: Cache, redis: Redis) -> None:
    key = cache.device(uuid4().hex, "d1")
    assert await here.get_hash(key) == {}
    await here.put_hash(key, {"seen": "1", "model": "x"})
    await here.put_hash(key, {"seen": "2"})
    assert await here.get_hash(key) == {b"seen": b"2", b"model": b"x"}
    assert 0 < await redis.pttl(key.name) <= 90_000


async def test_one_of_two_has_the_lock(here: Cache, redis: Redis) -> None:
    resource = uuid4().hex
    async with here.lock(resource) as first:
        async with here.lock(resource) as second:
            assert (first, second) == (True, False)
        assert 0 < await redis.pttl(f"lock:{resource}") <= 30_000
    async with here.lock(resource) as again:
        assert again


async def test_a_lock_that_ran_out_is_not_taken_from_the_next_holder(here: Cache, redis: Redis) -> None:
    resource = uuid4().hex
    async with here.lock(resource):
        await redis.set(f"lock:{resource}", "another's")
    assert await redis.get(f"lock:{resource}") == b"another's"
    await redis.delete(f"lock:{resource}")


async def test_a_limit_binds_each_by_itself_and_says_when_to_come_again(here: Cache, redis: Redis) -> None:
    address = uuid4().hex
    for _ in range(3):
        await here.limit(address, "login", times=3, seconds=60)
    with pytest.raises(TooManyRequests) as refused:
        await here.limit(address, "login", times=3, seconds=60)
    assert timedelta(seconds=1) <= refused.value.after <= timedelta(seconds=60)
    assert await redis.exists(f"ratelimit:{address}:login")
    await here.limit(address, "search", times=3, seconds=60)
    await here.limit(uuid4().hex, "login", times=3, seconds=60)


async def test_without_redis_nothing_breaks_and_it_is_said_once(
    here: Cache, redis: Redis, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(cache, "PAUSE_SECONDS", 0.0)
    key = cache.quota(uuid4().hex, "tokens")
    await here.put(key, "1")
    proxy.blackhole()
    with capture_logs() as lines:
        assert await here.get(key) is None
        assert await here.get_hash(key) == {}
        await here.put(key, "2")
        await here.put_hash(key, {"a": "1"})
        await here.forget(key)
        async with here.lock("anything") as held:
            assert held
        await here.limit("somebody", "anything", times=0, seconds=60)
        await here.publish("openclaw:test", "x")
        proxy.heal()
        async with asyncio.timeout(30):
            while await here.get(key) is None:
                await here.put(key, "3")
    assert [line["event"] for line in lines] == ["Redis is away, working without it", "Redis is back"]


async def test_after_a_failure_the_next_calls_do_not_wait_for_one_each(
    here: Cache, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(cache, "PAUSE_SECONDS", 3600.0)
    proxy.blackhole()
    assert await here.get(cache.quota("u", "t")) is None
    proxy.heal()
    async with asyncio.timeout(0.1):
        for _ in range(1000):
            assert await here.get(cache.quota("u", "t")) is None


async def test_a_listener_hears_again_after_the_connection_was_lost(here: Cache, proxy: FaultProxy) -> None:
    name = uuid4().hex
    async with asyncio.timeout(30), aclosing(here.listen(f"openclaw:{name}:*", f"other:{name}")) as heard:
        assert await anext(heard) is None
        await here.publish(f"openclaw:{name}:a", "one")
        assert await anext(heard) == (f"openclaw:{name}:a", b"one")
        proxy.reset()
        assert await anext(heard) is None
        again = asyncio.create_task(anext(heard))
        # The publisher's connection was lost too, and what is published meanwhile is nobody's.
        while not again.done():
            await here.publish(f"other:{name}", b"\xff")
            await asyncio.sleep(0.05)
        assert await again == (f"other:{name}", b"\xff")


async def test_a_listener_notices_a_connection_that_died_without_a_word(
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
