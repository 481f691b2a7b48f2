"""The usage records of a run: how they are stored, and the seconds for which the run is charged."""

from __future__ import annotations

from uuid import UUID

import msgspec

from infra.clock import utcnow
from infra.postgres.tx import Tx, derived_id
from protos.catalog import USAGE_RECORDS
from protos.messages.billing import UsageRecorded
from services.agent.runs.domain import Run
from services.agent.runs.publishing import stream

RESOURCE = "agent/run"


def seconds_hold(run_id: UUID) -> UUID:
    """The id of the hold for the seconds of a run. It follows from the run alone, so the record can name it."""
    return derived_id(run_id, "seconds")


def seconds_used(
    state: Run, *, run_id: UUID, tenant_id: str, agent_id: UUID, channel_id: UUID | None, session_key: str
) -> UsageRecorded | None:
    """The record of the seconds in which the run's steps were made; a begun second counts. None if there was no step.

    A run ends once, so the id follows from the run alone.
    """
    if not state.busy_ms:
        return None
    return UsageRecorded(
        tenant_id=tenant_id,
        usage_id=f"{run_id}/seconds",
        resource=RESOURCE,
        quantities={"run_seconds": -(-state.busy_ms // 1000)},
        occurred_at=utcnow(),
        run_id=run_id,
        hold_id=seconds_hold(run_id),
        agent_id=agent_id,
        channel_id=channel_id,
        session_key=session_key,
    )


async def record_seconds(tx: Tx, run_id: UUID) -> None:
    """Records the seconds of a run, in the transaction of its end."""
    [(tenant_id, agent_id, channel_id, session_key)] = await tx.sql(
        "SELECT tenant_id, agent_id, channel_id, session_key FROM run WHERE id = $1", run_id
    )
    record = seconds_used(
        await tx.load(stream(run_id)),
        run_id=run_id,
        tenant_id=tenant_id,
        agent_id=agent_id,
        channel_id=channel_id,
        session_key=session_key,
    )
    if record:
        await store_usage(tx, run_id, record)


async def store_usage(tx: Tx, run_id: UUID, record: UsageRecorded) -> None:
    """Publishes the record and keeps it as one of the run's, so the run's cost is known when billing has rated it."""
    tx.publish(USAGE_RECORDS, record, key=record.tenant_id)
    await tx.sql(
        """
        INSERT INTO run_usage (tenant_id, run_id, usage_id, resource, quantities, estimated, occurred_at)
        VALUES ($1, $2, $3, $4, $5, $6, $7)
        ON CONFLICT DO NOTHING
        """,
        record.tenant_id,
        run_id,
        record.usage_id,
        record.resource,
        msgspec.json.encode(record.quantities).decode(),
        record.estimated,
        record.occurred_at,
    )
