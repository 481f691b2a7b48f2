"""CPU time of processes with all of their children."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import psutil

from tooling.testing.platform import Platform
from tooling.testing.stack import Stack


def seconds(pid: int) -> float:
    """User and system time of the process, of its living descendants, and of those that have ended."""
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        return sum(map(_own, (root, *root.children(recursive=True))))
    return 0.0


def _own(process: psutil.Process) -> float:
    with suppress(psutil.NoSuchProcess):
        times = process.cpu_times()
        # The times of ended children are in their parent, so no process is counted twice.
        return float(times.user + times.system + times.children_user + times.children_system)
    return 0.0


def of_all(stack: Stack, platform: Platform) -> dict[str, float]:
    """CPU seconds so far of each service of the platform and each engine of the stack, by name."""
    pids: Mapping[str, int] = {
        **stack.pids(),
        **{name: process.pid for name, process in platform.processes.items() if process.poll() is None},
    }
    return {name: seconds(pid) for name, pid in pids.items()}


def difference(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """CPU seconds between two readings. A process that was not there before counts from its start."""
    return {name: max(0.0, used - before.get(name, 0.0)) for name, used in after.items()}
