"""Each engine killed and paused, and a bus damaged and wiped, under load: nothing accepted is lost, and effects happen
once and in order."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest

from tests.conftest import make_vhost
from tests.faults.conftest import DEADLINE_SECONDS, Load
from tooling.testing.sample.catalog import SAMPLE_EVENTS
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


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


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


async def test_kafka_with_cut_logs_is_noticed_and_when_wiped_is_filled_again_from_the_outboxes(
    services: SampleServices, load: Load, stack: Stack
) -> None:
    topic = services.prefix + SAMPLE_EVENTS.name

    def cut_and_wipe() -> None:
        stack.stop("kafka")
        for segment in (stack.home / "kafka" / "data").glob(f"{topic}-*/*.log"):
            os.truncate(segment, segment.stat().st_size // 2)
        stack.start("kafka")
        wait_for(lambda: "OffsetNotInLog" in services.last_words("ledger"))
        stack.stop("kafka")
        shutil.rmtree(stack.home / "kafka" / "data")
        stack.start("kafka")
        asyncio.run(services.provision())

    await load.send(20)
    await under_load(load, cut_and_wipe)


async def test_rabbitmq_with_a_flipped_bit_does_not_start_and_when_wiped_is_filled_again_from_the_outboxes(
    services: SampleServices, load: Load, stack: Stack
) -> None:
    log, nodes = stack.home / "log" / "rabbitmq.log", stack.home / "rabbitmq" / "mnesia"

    def flip_and_wipe() -> None:
        stack.stop("rabbitmq")
        [journal] = [file for file in nodes.glob("*/quorum/*/*.wal") if file.stat().st_size]
        with journal.open("r+b") as file:
            file.seek(journal.stat().st_size // 2)
            [byte] = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
        seen = log.stat().st_size
        stack.begin("rabbitmq")
        wait_for(lambda: b"wal_checksum_validation_failure" in log.read_bytes()[seen:])
        stack.stop("rabbitmq")
        shutil.rmtree(nodes)
        stack.start("rabbitmq")
        make_vhost(stack, urlsplit(services.engines.rabbitmq).path[1:])
        asyncio.run(services.provision())

    await load.send(20)
    await under_load(load, flip_and_wipe)
