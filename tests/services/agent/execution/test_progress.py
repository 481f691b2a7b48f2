"""A run that is at work tells it, with the answer so far."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from redis.asyncio import Redis

from infra.clock import uuid7
from infra.stores.cache import Cache
from protos.pubsub import RUN_PROGRESS
from services.agent.execution.progress import MAX_CHARACTERS, ProgressReporter
from tests.services.agent.conftest import MODEL, Tenant, World
from tooling.testing.model_server import Says
from tooling.testing.stack import Stack


async def test_a_run_tells_that_it_is_at_work_and_what_it_has_written(stack: Stack) -> None:
    run_id = uuid7()
    redis, other = Redis.from_url(stack.redis_url), Redis.from_url(stack.redis_url)
    try:
        progress = ProgressReporter(Cache(redis), run_id, "session")
        with progress.told():
            texts: list[str] = []
            async with aclosing(Cache(other).listen(RUN_PROGRESS)) as heard:
                async for message in heard:
                    news = msgspec.json.decode(message[1]) if message else {}
                    if news.get("run_id") != str(run_id):
                        continue
                    assert news["session_key"] == "session"
                    texts.append(news["text"])
                    for _ in range(4):
                        progress.write("x" * (MAX_CHARACTERS // 2))
                    assert len(progress.text) == MAX_CHARACTERS
                    if news["text"]:
                        break
        assert texts[0] == ""
        assert texts[-1] == "x" * MAX_CHARACTERS
    finally:
        await redis.aclose()
        await other.aclose()


async def news_of_a_run(world: World, tenant: Tenant) -> AsyncGenerator[dict[str, Any], None]:
    """The news of a run, which begins when the caller listens."""
    agent = await tenant.agent()
    redis = Redis.from_url(world.platform.stack.redis_url)
    try:
        async with aclosing(Cache(redis).listen(RUN_PROGRESS)) as heard:
            async for message in heard:
                if message is None:
                    await tenant.receive(agent, "question")
                    continue
                news = msgspec.json.decode(message[1])
                if news["session_key"] == f"{tenant.id}-c":
                    yield news
    finally:
        await redis.aclose()


async def test_a_run_of_a_channel_tells_what_its_model_writes(world: World, tenant: Tenant) -> None:
    text = "An answer of several pieces. " * 40
    world.models.script(MODEL, Says(text, stalls_after=200))
    try:
        async with aclosing(news_of_a_run(world, tenant)) as told:
            async for news in told:
                if news["text"]:
                    break
    finally:
        world.models.release()
    assert text.startswith(news["text"])
    [run] = await tenant.runs(1)
    assert news["run_id"] == run["id"]


async def test_a_run_that_is_cancelled_tells_its_end(world: World, tenant: Tenant) -> None:
    go = asyncio.Event()
    world.models.script(MODEL, Says("too late", waits=go))
    told: list[bool] = []
    try:
        async with aclosing(news_of_a_run(world, tenant)) as heard:
            async for news in heard:
                told.append(news["over"])
                if told == [False]:
                    await tenant.call("POST", f"/api/v1/sessions/{tenant.id}-c/takeover")
                if news["over"]:
                    break
    finally:
        go.set()
    assert told[-1]
    assert [run["status"] for run in await tenant.runs(1)] == ["cancelled"]
