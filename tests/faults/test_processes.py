"""Each process killed at each boundary, and stopped beyond its lease: nothing lost, effects once, in order."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from tests.faults.conftest import Load
from tooling.testing.sample.run import SampleServices

BOUNDARIES = [
    ("front", "before_commit"),
    ("front", "after_commit"),
    ("front", "after_publish_before_mark"),
    ("desk", "after_append"),
    ("desk", "after_effect_before_commit"),
    ("desk", "before_commit"),
    ("desk", "after_commit"),
    ("desk", "after_commit_before_ack"),
    ("desk", "after_publish_before_mark"),
    ("ledger", "after_effect_before_commit"),
    ("ledger", "after_commit_of_batch"),
]


@pytest.mark.parametrize(("name", "boundary"), BOUNDARIES)
async def test_a_process_killed_at_a_boundary_loses_and_doubles_nothing(
    services: SampleServices, load: Load, tmp_path: Path, name: str, boundary: str
) -> None:
    services.processes[name].terminate()
    services.wait(name)
    once = tmp_path / "once"
    once.touch()
    services.start(name, CLAW_FAILPOINT=boundary, CLAW_FAILPOINT_ONCE=str(once))
    await services.ready(name)
    sending = asyncio.create_task(load.send(12))
    code = await asyncio.to_thread(services.wait, name)
    assert code == -signal.SIGKILL
    services.start(name)
    await services.ready(name)
    await sending
    await load.all_done()


@pytest.mark.parametrize("name", ["desk", "ledger"])
async def test_a_process_stopped_beyond_its_lease_is_replaced_and_harmless_when_it_wakes(
    services: SampleServices, load: Load, name: str
) -> None:
    second = f"{name}-2"
    services.start(second)
    try:
        await services.ready(second)
        await load.send(20)
        services.processes[name].send_signal(signal.SIGSTOP)
        await load.send(20)
        # Everything done while the first one is stopped: its lease or its partitions have gone to the second.
        await load.all_done()
        sending = asyncio.create_task(load.send(40, pause=0.02))
        services.processes[name].send_signal(signal.SIGCONT)
        await sending
        await load.all_done()
    finally:
        services.processes[name].send_signal(signal.SIGCONT)
        services.processes[second].terminate()
        services.wait(second)
    await load.send(6)
    await load.all_done()
