"""Ends runs without an answer: cancelled on request, interrupted by a newer message, or failed."""

from __future__ import annotations

from uuid import UUID

from infra.errors import Conflict, NotFound
from infra.lanes import lane as lanes
from infra.postgres.lane_items import AT_ONCE
from infra.postgres.tx import Tx
from services.agent.lanes import RUNS
from services.agent.runs import projections
from services.agent.runs.decisions import resume_parent
from services.agent.runs.domain import Fail
from services.agent.runs.events import Ending
from services.agent.runs.metering import record_seconds
from services.agent.runs.publishing import stream


async def cancel(tx: Tx, run_id: UUID, reason: str) -> None:
    """Cancels the run: at once if no worker executes it, otherwise within a second. Repeating it changes nothing.

    Raises NotFound, Conflict if the run is over.
    """
    rows = await tx.sql(
        # Locks the run: a worker that ends it at the same time waits, and then finds it cancelled.
        """
        SELECT status, session_key, coalesce(item_id, id)
        FROM run
        WHERE id = $1 AND tenant_id = $2
        FOR UPDATE
        """,
        run_id,
        tx.tenant_id,
    )
    if not rows:
        raise NotFound(f"run {run_id}")
    [(status, session_key, item_id)] = rows
    if status == "cancelled":
        return
    if status not in projections.STOPPABLE:
        raise Conflict(f"the run is {status}")
    if status in projections.SUSPENDED or (
        status == "queued" and await lanes.cancel(tx, RUNS, session_key, UUID(str(item_id)))
    ):
        await fail_with_children(tx, run_id, session_key, "cancelled", reason)
        return
    await tx.sql("UPDATE run SET cancel_reason = $2 WHERE id = $1", run_id, reason)
    # A run that pauses before its next attempt ends without the rest of the pause.
    await lanes.postpone(tx, RUNS, session_key, UUID(str(item_id)), AT_ONCE)


async def fail_with_children(tx: Tx, run_id: UUID, session_key: str, status: Ending, error: str) -> None:
    """Ends the run without an answer, and with it those of its children that are not over."""
    await tx.decide(stream(run_id), Fail(session_key, status, error))
    await projections.failed(tx, run_id, status, error)
    await record_seconds(tx, run_id)
    await resume_parent(tx, run_id)
    for (child,) in await tx.sql(
        "SELECT id FROM run WHERE parent_run_id = $1 AND status = ANY($2::text[])", run_id, [*projections.STOPPABLE]
    ):
        await cancel(tx, UUID(str(child)), f"the run that asked for this one is over: {status}")
