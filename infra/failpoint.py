"""Named places where a process can be made to die, so that crash tests hit every boundary and not a random one."""

from __future__ import annotations

import os
import signal
from collections import Counter

_passed: Counter[str] = Counter()


def failpoint(name: str) -> None:
    """Kills this process by SIGKILL where CLAW_FAILPOINT names this place; otherwise does nothing.

    With CLAW_FAILPOINT_ONCE naming a file that exists, the file is removed first and without it nothing
    happens, so a restarted process passes. With CLAW_FAILPOINT_PASS the process passes so many times less one.
    CLAW_FAILPOINT_SIGNAL names another signal: SIGSTOP.
    """
    if os.environ.get("CLAW_FAILPOINT") != name:
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
