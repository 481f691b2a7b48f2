"""Each engine killed, paused and wiped under load: nothing accepted is lost, effects happen once and in order."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest

from tests.conftest import make_vhost
from tests.faults.conftest import Load
from tooling.testing.sample.run import SampleServices
from tooling.testing.stack import Stack

NOTES = 150
# Beyond the consumers' session and the relays' lease, which are 6 s and 3 s here.
PAUSE_SECONDS = 8
ENGINES = ["kafka", "rabbitmq", "postgres", "valkey"]


async def under_load(load: Load, hurt: Callable[[], None]) -> None:
    """Sends notes, hurts an engine when a third of them is accepted, and checks all at the end."""
    already = len(load.accepted)
    sending = asyncio.create_task(load.send(NOTES, pause=0.01))
    while len(load.accepted) < already + NOTES // 3:
        await asyncio.sleep(0.01)
    await asyncio.to_thread(hurt)
    await sending
    await load.all_done()


@pytest.mark.parametrize("name", ENGINES)
async def test_an_engine_killed_under_load_loses_and_doubles_nothing(
    services: SampleServices, load: Load, stack: Stack, name: str
) -> None:
    def kill() -> None:
        stack.kill(name)
        stack.wait_ready(name)

    await under_load(load, kill)


@pytest.mark.parametrize("name", ENGINES)
async def test_an_engine_paused_under_load_loses_and_doubles_nothing(
    services: SampleServices, load: Load, stack: Stack, name: str
) -> None:
    def pause() -> None:
        stack.pause(name)
        try:
            time.sleep(PAUSE_SECONDS)
        finally:
            stack.cont(name)
        stack.wait_ready(name)

    await under_load(load, pause)


async def test_kafka_wiped_under_load_is_filled_again_from_the_outboxes(
    services: SampleServices, load: Load, stack: Stack
) -> None:
    def wipe() -> None:
        stack.stop("kafka")
        shutil.rmtree(stack.home / "kafka" / "data")
        stack.start("kafka")
        asyncio.run(services.provision())

    await load.send(20)
    await under_load(load, wipe)


async def test_rabbitmq_wiped_under_load_is_filled_again_from_the_outboxes(
    services: SampleServices, load: Load, stack: Stack
) -> None:
    def wipe() -> None:
        stack.stop("rabbitmq")
        shutil.rmtree(stack.home / "rabbitmq" / "mnesia")
        stack.start("rabbitmq")
        make_vhost(stack, urlsplit(services.engines.rabbitmq).path[1:])
        asyncio.run(services.provision())

    await load.send(20)
    await under_load(load, wipe)
