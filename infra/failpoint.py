"""Named points at which a test can kill a process, so that crash tests hit every boundary and not a random one."""

from __future__ import annotations

import os
import signal
from collections import Counter
from functools import cache

_passed: Counter[str] = Counter()


@cache
def _armed() -> str | None:
    """Read once: a run of five steps passes many points."""
    return os.environ.get("CLAW_FAILPOINT")


def failpoint(name: str) -> None:
    """Kills this process by SIGKILL if CLAW_FAILPOINT is `name`; otherwise does nothing.

    CLAW_FAILPOINT_ONCE names a file: the process is killed only if the file exists, and the file is removed before, so
    that a restarted process passes. CLAW_FAILPOINT_PASS = n kills the process when it passes for the n-th time.
    CLAW_FAILPOINT_SIGNAL names another signal: SIGSTOP.
    """
    if _armed() != name:
        return
    _passed[name] += 1
    if _passed[name] != int(os.environ.get("CLAW_FAILPOINT_PASS", _passed[name])):
        return
    marker = os.environ.get("CLAW_FAILPOINT_ONCE")
    if marker is not None:
        try:
            os.unlink(marker)
        except FileNotFoundError:
            return
    os.kill(os.getpid(), signal.Signals[os.environ.get("CLAW_FAILPOINT_SIGNAL", "SIGKILL")])
