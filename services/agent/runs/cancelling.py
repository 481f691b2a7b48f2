"""Ends runs before their time: on request, or because a newer message is more important."""

from __future__ import annotations

from uuid import UUID

from infra import lanes
from infra.clock import utcnow
from infra.errors import Conflict, NotFound
from infra.tx import Tx
from services.agent.lanes import RUNS
from services.agent.runs import projections
from services.agent.runs.domain import Fail
from services.agent.runs.publishing import stream
from services.agent.runs.settling import tell_parent


async def cancel(tx: Tx, run_id: UUID, reason: str) -> None:
    """One that nobody executes is over at once, another within a second; one that is cancelled already stays so.

    Raises NotFound, Conflict where the run is over.
    """
    rows = await tx.sql(
        "SELECT status, session_key, coalesce(item_id, id) FROM run WHERE id = $1 AND tenant_id = $2 FOR UPDATE",
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
        await tx.decide(stream(run_id), Fail(session_key, "cancelled", reason))
        await projections.failed(tx, run_id, "cancelled", reason)
        await tell_parent(tx, run_id)
        for (child,) in await tx.sql(
            "SELECT id FROM run WHERE parent_run_id = $1 AND status = ANY($2::text[])", run_id, [*projections.STOPPABLE]
        ):
            await cancel(tx, UUID(str(child)), "the run that asked for it was cancelled")
        return
    await tx.sql("UPDATE run SET cancel_reason = $2 WHERE id = $1", run_id, reason)
    # One that waits to try again need not wait on.
    await lanes.postpone(tx, RUNS, session_key, UUID(str(item_id)), utcnow())
