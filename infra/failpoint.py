"""Named places where a process can be made to die, so that crash tests hit every boundary and not a random one."""

from __future__ import annotations

import os
import signal


def failpoint(name: str) -> None:
    """Kills this process by SIGKILL where CLAW_FAILPOINT names this place; otherwise does nothing.

    With CLAW_FAILPOINT_ONCE naming a file that exists, the file is removed first and without it nothing
    happens, so a restarted process passes.
    """
    if os.environ.get("CLAW_FAILPOINT") != name:
        return
    marker = os.environ.get("CLAW_FAILPOINT_ONCE")
    if marker is not None:
        try:
            os.unlink(marker)
        except FileNotFoundError:
            return
    os.kill(os.getpid(), signal.SIGKILL)
