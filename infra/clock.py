"""Time and ids."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID

from uuid_utils import compat


def uuid7() -> UUID:
    """A new UUIDv7. Ids order nothing: after a clock jumped back they are smaller, and still never repeat."""
    id_: UUID = compat.uuid7()
    return id_


def utcnow() -> datetime:
    """Now, in UTC and aware."""
    return datetime.now(UTC)


def uuid7_time(id_: UUID) -> datetime | None:
    """The millisecond in a UUIDv7; None for another version, or a time beyond the calendar."""
    if id_.version != 7:
        return None
    try:
        return datetime.fromtimestamp((id_.int >> 80) / 1000, UTC)
    except (ValueError, OverflowError):
        return None
