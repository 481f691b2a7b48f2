"""A run that is at work tells it, with the answer so far."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

import msgspec
from redis.asyncio import Redis

from infra.clock import uuid7
from infra.stores.cache import Cache
from protos.pubsub import RUN_PROGRESS
from services.agent.runs.progress import MAX_CHARACTERS, ProgressReporter
from tests.services.agent.conftest import MODEL, Tenant, World
from tooling.testing.model_server import Fails, Says
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


async def news_of_a_run(world: World, tenant: Tenant, **fields: Any) -> AsyncGenerator[dict[str, Any], None]:
    """The news of a run of an agent with these fields, which begins when the caller listens."""
    agent = await tenant.agent(**fields)
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


async def news_of_the_end(
    world: World, tenant: Tenant, go: asyncio.Event, act: Callable[[str], Coroutine[Any, Any, None]], **fields: Any
) -> dict[str, Any]:
    """As `news_of_a_run`. At the first news it sets `go` and calls `act` with the run's id."""
    async with aclosing(news_of_a_run(world, tenant, **fields)) as heard, asyncio.TaskGroup() as tasks:
        async for news in heard:
            if news["over"]:
                break
            if not go.is_set():
                go.set()
                tasks.create_task(act(news["run_id"]))
    return news


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


async def test_a_run_that_is_interrupted_before_its_next_attempt_tells_its_end(world: World, tenant: Tenant) -> None:
    go = asyncio.Event()
    world.models.script(MODEL, Says("half an answer", cut_after=1, waits=go), Fails(429, retry_after=100))

    async def interrupt(run_id: str) -> None:
        async def pauses() -> bool:
            events = (await tenant.call("GET", f"/api/v1/runs/{run_id}/state"))["events"]
            return [event["type"] for event in events].count("AttemptFailed") == 2

        await world.platform.until(pauses)
        await tenant.receive((await tenant.run(run_id))["agent_id"], "another question")

    news = await news_of_the_end(world, tenant, go, interrupt, queue_mode="interrupt")
    runs = await tenant.runs(2)
    assert [(run["id"] == news["run_id"], run["status"]) for run in runs] == [(True, "cancelled"), (False, "completed")]


async def test_a_run_that_is_cancelled_while_it_waits_for_another_agent_tells_its_end(
    world: World, tenant: Tenant
) -> None:
    other = await tenant.agent()
    asked = {"agent_id": other, "name": "ask", "description": "Knows."}
    go, never = asyncio.Event(), asyncio.Event()
    world.models.script(MODEL, Says(calls=(("ask", '{"message":"Hi"}'),), waits=go), Says("too late", waits=never))

    async def cancel(run_id: str) -> None:
        async def waits() -> bool:
            return bool((await tenant.run(run_id))["waiting"])

        await world.platform.until(waits)
        await tenant.call("POST", f"/api/v1/runs/{run_id}/cancel")

    try:
        await news_of_the_end(world, tenant, go, cancel, agents=[asked])
    finally:
        never.set()
    assert {run["status"] for run in await tenant.runs(2)} == {"cancelled"}
