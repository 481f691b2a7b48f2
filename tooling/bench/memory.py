"""Memory of processes with all of their children."""

from __future__ import annotations

from contextlib import suppress

import psutil

from tooling.testing.platform import Platform
from tooling.testing.stack import Stack

MIB = 2**20


def own(pid: int) -> float:
    """MiB that only this process or its descendants have (USS). Pages that they share with others are not counted."""
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        return sum(map(_own, (root, *root.children(recursive=True)))) / MIB
    return 0.0


def _own(process: psutil.Process) -> int:
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
        return int(process.memory_full_info().uss)
    return 0


def of_services(platform: Platform) -> dict[str, float]:
    """MiB of each service that runs, by name."""
    return {name: own(process.pid) for name, process in platform.processes.items() if process.poll() is None}


def of_engines(stack: Stack) -> dict[str, float]:
    """MiB of each engine, by name."""
    return {name: own(pid) for name, pid in stack.pids().items()}
