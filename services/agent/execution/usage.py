"""Usage of a step."""

from __future__ import annotations

from uuid import UUID

import msgspec

from services.agent.models.contract import Usage


class Metered(msgspec.Struct, frozen=True):
    """The usage of a step."""

    resource: str
    usage: Usage
    hold_id: UUID | None
    """The hold that the usage record closes; None: the hold stays for another attempt."""
    nanos: int = 0
    """The amount of the hold."""


def usage_id(run_id: UUID, n: int, attempt: int) -> str:
    return f"{run_id}/{n}/{attempt}"
