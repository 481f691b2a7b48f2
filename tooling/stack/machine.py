"""Does the machine have what a stack needs?"""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil

from tooling.stack.engines.base import EngineError

# Below this Kafka and PostgreSQL soon stop in the middle of a write.
LEAST_DISK_MB = 1_000
# What the engines take when all have started.
LEAST_MEMORY_MB = 2_500


def check_machine(home: Path) -> None:
    """Raises EngineError if the disk is so full that the engines would break."""
    free = shutil.disk_usage(home).free // 1_000_000
    if free < LEAST_DISK_MB:
        raise EngineError(f"only {free} MB are free on the disk of {home}; {LEAST_DISK_MB} MB are needed. Make room")


def available_memory_mb() -> int:
    return int(psutil.virtual_memory().available) // 1_000_000
