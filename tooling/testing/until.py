"""Waiting for a condition, in tests, campaigns and benches."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def until(ask: Callable[[], Awaitable[T | None]], *, seconds: float = 150) -> T:
    """Calls `ask` until its answer is true and returns it. Raises TimeoutError with the last answer."""
    deadline = time.monotonic() + seconds
    while not (answer := await ask()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"still {answer!r} after {seconds} s")
        await asyncio.sleep(0.05)
    return answer
