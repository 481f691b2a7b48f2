"""Checks that the machine gives a stack the access, disk and memory that it needs."""

from __future__ import annotations

import os
import pwd
import shutil
import tempfile
from pathlib import Path

import psutil

from tooling.stack.checkout import unreadable
from tooling.stack.engines.base import EngineError, cache_path

# The user who runs the stack if root starts it.
USER = "clawbus"

# Below this Kafka and PostgreSQL soon stop in the middle of a write.
LEAST_DISK_MB = 1_000
# The memory of all engines after their start.
LEAST_MEMORY_MB = 2_500


def check_access(home: Path) -> None:
    """Raises EngineError if this process's user, who runs the engines, may not read or write something they need."""
    user = user_name(os.getuid())
    if closed := unreadable():
        raise EngineError(
            f"the user {user}, who runs the engines, cannot read {closed}: open it to this user (chmod a+rX), or run "
            "./claw from a clone of your own"
        )
    inside = list(home.iterdir()) if os.access(home, os.R_OK | os.X_OK) else []
    for path in (home, *inside):
        if not _is_writable(path):
            owner = user_name(_existing(path).stat().st_uid)
            other = "as root" if owner == USER else f"as the user {owner}"
            advice = f"run ./claw {other}, or set CLAW_HOME to a folder of your own"
            raise EngineError(f"the user {user}, who runs the engines, cannot write {path}: {advice}")
    for path, variable in ((cache_path(), "XDG_CACHE_HOME"), (Path(tempfile.gettempdir()), "TMPDIR")):
        if not _is_writable(path):
            advice = f"set {variable} to a folder that this user can write"
            raise EngineError(f"the user {user}, who runs the engines, cannot write {path}: {advice}")


def _is_writable(path: Path) -> bool:
    existing = _existing(path)
    return os.access(existing, os.W_OK | (os.X_OK if existing.is_dir() else 0))


def _existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    while not os.path.lexists(path):
        path = path.parent
    return path


def user_name(uid: int) -> str:
    """The user's name, or `number …` for a user without a name."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"number {uid}"


def check_machine(home: Path) -> None:
    """Raises EngineError if the disk is so full that the engines would break."""
    free = shutil.disk_usage(home).free // 1_000_000
    if free < LEAST_DISK_MB:
        raise EngineError(
            f"only {free} MB are free on the disk of {home}, and {LEAST_DISK_MB} MB are needed: delete something"
        )


def available_memory_mb() -> int:
    return int(psutil.virtual_memory().available) // 1_000_000
