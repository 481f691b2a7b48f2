"""Usage of model calls."""

from __future__ import annotations

from uuid import UUID

import msgspec

from protos.messages.billing import UsageRecorded
from services.agent.execution.context import RunContext
from services.agent.models.contract import Usage


class MeteredCall(msgspec.Struct, frozen=True):
    """The usage of a model call."""

    resource: str
    usage: Usage
    hold_id: UUID | None
    """The hold that the usage record closes; None: the hold stays for another attempt."""
    nanos: int = 0
    """The amount of the hold."""
    estimated: bool = False
    """The provider did not report the usage."""


def usage_id(run_id: UUID, n: int, attempt: int) -> str:
    return f"{run_id}/{n}/{attempt}"


def usage_record(context: RunContext, usage_id: str, metered: MeteredCall) -> UsageRecorded:
    """The record for billing."""
    usage = msgspec.structs.asdict(metered.usage)
    # A call without reported usage still counts as a call, for a person to review. Figures are not invented.
    quantities = {unit: count for unit, count in usage.items() if count is not None} or {"calls": 1}
    return context.origin.record(usage_id, metered.resource, quantities, metered.hold_id, estimated=metered.estimated)
