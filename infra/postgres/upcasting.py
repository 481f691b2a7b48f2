"""Stored events and their older forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

Upcaster = Callable[[dict[str, Any]], dict[str, Any]]


class EventTypes:
    """The event classes of one kind of stream, and how each older form becomes the current one.

    A class carries ``SCHEMA_VERSION`` (1 if absent). `upcasters` maps (class name, older version) to a function
    from that version's fields to the next one's; the chain up to the current version must be complete.

    Raises ValueError for a chain with a gap, at once: found on the first old event it would stop a service.
    """

    def __init__(self, *types: type[Any], upcasters: Mapping[tuple[str, int], Upcaster] | None = None) -> None:
        self._types = {t.__name__: t for t in types}
        self._upcasters = dict(upcasters or {})
        for name, t in self._types.items():
            for version in range(1, schema_version(t)):
                if (name, version) not in self._upcasters:
                    raise ValueError(f"{name}: no upcaster from version {version} to {version + 1}")

    def current(self) -> list[type[Any]]:
        """The event classes. Their older versions are 1 up to before ``SCHEMA_VERSION``."""
        return list(self._types.values())

    def decode(self, name: str, version: int, data: bytes) -> Any:
        """The current form of a stored event.

        Raises ValueError for a name or a version that this code does not know (written by a newer one), and for
        data that does not fit.
        """
        current = self._types.get(name)
        if current is None:
            raise ValueError(f"event type {name}: unknown to this version of the service")
        newest = schema_version(current)
        if version > newest:
            raise ValueError(f"event {name}: version {version} is newer than the {newest} known here")
        if version == newest:
            return msgspec.json.decode(data, type=current)
        fields = msgspec.json.decode(data)
        for older in range(version, newest):
            fields = self._upcasters[name, older](fields)
        return msgspec.convert(fields, current)


def schema_version(event_type: type[Any]) -> int:
    version = getattr(event_type, "SCHEMA_VERSION", 1)
    assert isinstance(version, int)
    return version
