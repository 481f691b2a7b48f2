"""The disk of all engines loses its power under load, and is full for a while: each note that was accepted has its
effect, once and in order.

After a cut, data that was not synced is gone, as it is on a real machine.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.conftest import Load
from tests.faults.test_engines import under_load
from tooling.stack.supervisor import end_all
from tooling.testing.disk import Disk, disk
from tooling.testing.sample.run import SampleServices
from tooling.testing.stack import DEFAULT_ENGINES, Stack, private_home, run_claw

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a disk"),
    # Each cut starts four engines.
    pytest.mark.timeout(600),
]


FULL_SECONDS = 5


def start(machine: Disk, engines: Sequence[str] = DEFAULT_ENGINES) -> None:
    run_claw(machine.folder, "up", "--only", ",".join(engines))


def lose_power(machine: Disk) -> None:
    machine.cut_power()
    end_all(machine.folder, kill=True)
    machine.unmount()
    machine.mount()


@contextmanager
def machine_with(image: Path, engines: Sequence[str]) -> Iterator[Disk]:
    """The disk of a stack of its own, whose engines have started for the first time."""
    with private_home() as home:
        home.chmod(0o755)
        with disk(image, home, megabytes=4096) as made:
            try:
                start(made, engines)
                yield made
            finally:
                run_claw(home, "down", "--wipe")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    with machine_with(tmp_path_factory.mktemp("disk") / "image", DEFAULT_ENGINES) as made:
        # RabbitMQ syncs some of its own files only minutes after its first start.
        os.sync()
        yield made


@pytest.fixture(scope="module")
def stack(machine: Disk) -> Stack:
    """In place of the suite's stack."""
    return Stack(machine.folder)


async def test_a_power_cut_loses_and_doubles_nothing(services: SampleServices, load: Load, machine: Disk) -> None:
    def lose_and_start() -> None:
        lose_power(machine)
        start(machine)
        # `./claw up` of a whole system does the same. RabbitMQ can forget the binding of a queue in a power cut.
        asyncio.run(services.provision())

    await under_load(load, lose_and_start)


async def test_a_full_disk_loses_and_doubles_nothing(services: SampleServices, load: Load, machine: Disk) -> None:
    def fill() -> None:
        with machine.full():
            time.sleep(FULL_SECONDS)
        start(machine)
        # `./claw up` of a whole system does the same. Kafka forgets topics if it starts on a full disk.
        asyncio.run(services.provision())

    await under_load(load, fill)


def test_kafka_starts_after_a_power_cut_right_after_its_first_start(tmp_path: Path) -> None:
    with machine_with(tmp_path / "image", ["kafka"]) as machine:
        lose_power(machine)
        start(machine, ["kafka"])
