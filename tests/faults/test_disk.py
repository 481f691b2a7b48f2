"""The disk of all engines loses its power under load, and is full for a while: each note that was accepted has its
effect, once and in order.

After a cut, data that was not synced is gone, as it is on a real machine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

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


FULL_SECONDS = 10


def start(machine: Disk) -> None:
    run_claw(machine.folder, "up", "--only", ",".join(DEFAULT_ENGINES))


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    """The disk of a stack of its own."""
    with private_home() as home:
        home.chmod(0o755)
        with disk(tmp_path_factory.mktemp("disk") / "image", home, megabytes=4096) as made:
            try:
                start(made)
                yield made
            finally:
                run_claw(home, "down", "--wipe")


@pytest.fixture(scope="module")
def stack(machine: Disk) -> Stack:
    """In place of the suite's stack."""
    return Stack(machine.folder)


async def test_a_power_cut_loses_and_doubles_nothing(services: SampleServices, load: Load, machine: Disk) -> None:
    def lose_power() -> None:
        machine.cut_power()
        end_all(machine.folder, kill=True)
        machine.unmount()
        machine.mount()
        start(machine)

    await under_load(load, lose_power)


async def test_a_full_disk_loses_and_doubles_nothing(services: SampleServices, load: Load, machine: Disk) -> None:
    def fill() -> None:
        with machine.full():
            time.sleep(FULL_SECONDS)
        start(machine)

    await under_load(load, fill)
