"""A run that came from a channel tells its progress while it is at work."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import msgspec
from redis.asyncio import Redis

from infra.stores.cache import Cache
from protos.pubsub import RUN_PROGRESS
from tests.services.agent.conftest import MODEL, Tenant, World
from tooling.testing.model_server import Says


async def test_a_run_of_a_channel_tells_that_it_is_at_work_and_what_it_has_written(
    world: World, tenant: Tenant
) -> None:
    agent = await tenant.agent()
    waits = asyncio.Event()
    world.models.script(MODEL, Says("An answer of several pieces.", waits=waits, stalls_after=6))
    redis = Redis.from_url(world.platform.stack.redis_url)
    texts: list[str] = []
    try:
        async with aclosing(Cache(redis).listen(RUN_PROGRESS)) as heard:
            async for message in heard:
                if message is None:
                    await tenant.receive(agent, "question")
                    continue
                news = msgspec.json.decode(message[1])
                if news["session_key"] != f"{tenant.id}-c":
                    continue
                texts.append(news["text"])
                waits.set()
                if news["text"]:
                    break
    finally:
        await redis.aclose()
        world.models.release()
    assert texts[0] == ""
    assert "An answer of several pieces.".startswith(texts[-1])
    [run] = await tenant.runs(1)
    assert news["run_id"] == run["id"]
