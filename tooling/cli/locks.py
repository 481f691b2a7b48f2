"""Locks by which commands of one stack wait for each other. A lock ends with its process."""

from __future__ import annotations

import fcntl

from rich.console import Console


def take(lock: int, others: str, console: Console) -> None:
    """Locks this open file or folder, and says if that must wait for another of `others`."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        console.print(f"Waiting for another {others} of this stack to end.")
        fcntl.flock(lock, fcntl.LOCK_EX)
