"""Usage of model calls."""

from __future__ import annotations

from uuid import UUID

import msgspec

from infra.clock import utcnow
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


def usage_id(run_id: UUID, n: int, attempt: int) -> str:
    return f"{run_id}/{n}/{attempt}"


def usage_record(context: RunContext, usage_id: str, metered: MeteredCall, *, estimated: bool) -> UsageRecorded:
    """The record for billing."""
    usage = msgspec.structs.asdict(metered.usage)
    return UsageRecorded(
        tenant_id=context.tenant_id,
        usage_id=usage_id,
        resource=metered.resource,
        # A call without reported usage still counts as a call, for a person to review. Figures are not invented.
        quantities={unit: count for unit, count in usage.items() if count is not None} or {"calls": 1},
        occurred_at=utcnow(),
        estimated=estimated,
        run_id=context.run_id,
        hold_id=metered.hold_id,
        agent_id=context.agent_id,
        channel_id=context.channel_id,
        session_key=context.session_key,
    )
