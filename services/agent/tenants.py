"""The erasure of a tenant: its runs end first, so that the model calls under way are still billed."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from uuid import UUID

from infra.errors import Conflict, NotYet
from infra.lanes.effects import Effects
from infra.service.service import Runtime
from infra.service.tenant_erasure import Before, EraseTenant
from services.agent import adapters
from services.agent.runs import cancelling, projections

RUNS_AT_ONCE = 100
WAIT = timedelta(seconds=1)
WAIT_AT_MOST = timedelta(minutes=5)
"""A worker that hangs must not keep the tenant's data."""


def end_work(runtime: Runtime) -> Before:
    objects = adapters.objects(runtime)

    async def end(item: EraseTenant, effects: Effects) -> None:
        await _cancel_runs(item.tenant_id, effects)
        async with effects.begin() as tx:
            # Runs are deleted in no order, and these columns refer to runs.
            await tx.sql(
                """
                UPDATE run
                SET parent_run_id = NULL, forked_from = NULL
                WHERE tenant_id = $1 AND (parent_run_id IS NOT NULL OR forked_from IS NOT NULL)
                """,
                item.tenant_id,
            )
            people = await tx.sql("SELECT DISTINCT subject_id FROM run WHERE tenant_id = $1", item.tenant_id)
        if objects:
            # Files that agents made for people.
            for (subject_id,) in people:
                for path in await objects.paths(f"{subject_id}/attachments/{item.tenant_id}/"):
                    await objects.delete(path)

    return end


async def _cancel_runs(tenant_id: str, effects: Effects) -> None:
    """Raises NotYet while workers still execute runs."""
    async with effects.begin() as tx:
        tx.tenant_id = tenant_id
        rows = await tx.sql(
            """
            SELECT id
            FROM run
            WHERE tenant_id = $1 AND status = ANY($2::text[])
              AND (SELECT asked_at FROM erased_tenant WHERE tenant_id = $1) > clock_timestamp() - $3::interval
            ORDER BY id
            LIMIT $4
            """,
            tenant_id,
            [*projections.STOPPABLE],
            WAIT_AT_MOST,
            RUNS_AT_ONCE,
        )
        for (run_id,) in rows:
            # A child is over when its parent is.
            with suppress(Conflict):
                await cancelling.cancel(tx, UUID(str(run_id)), "the tenant was erased")
    if rows:
        raise NotYet(WAIT, "runs of the tenant are being cancelled")
