"""Time, ids, and waiting for an event at most so long."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from uuid import UUID

from uuid_utils import compat


def uuid7() -> UUID:
    """A new UUIDv7. Do not order by it: after the clock was set back, new ids are smaller. They still never repeat."""
    id_: UUID = compat.uuid7()
    return id_


def time_of(id_: UUID) -> datetime:
    """The time at which a UUIDv7 was made, in UTC."""
    return datetime.fromtimestamp((id_.int >> 80) / 1000, UTC)


def utcnow() -> datetime:
    """The current time in UTC, with its time zone."""
    return datetime.now(UTC)


async def wait_at_most(seconds: float, event: asyncio.Event) -> bool:
    """Waits until `event` is set, but not longer than `seconds`. Returns whether it is set."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
