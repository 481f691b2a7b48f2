"""HTTP of runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query

from infra import lanes, rpc
from infra.api import Paging, Reader, Runner, page
from infra.clock import utcnow
from infra.errors import Conflict, Transient
from infra.service import Runtime
from infra.tx import Tx
from protos.billing.v1 import billing_pb2
from services.agent import adapters
from services.agent.lanes import RUNS
from services.agent.runs import conversation, projections, queries
from services.agent.runs.domain import Fail
from services.agent.runs.ending import CANCELLED
from services.agent.runs.publishing import stream
from services.agent.runs.timeline import timeline
from services.agent.runs.views import Facts, RunView, Status, Timeline


def router(runtime: Runtime) -> APIRouter:
    routes = APIRouter(tags=["runs"])
    subjects = adapters.subjects(runtime)
    billing = adapters.billing(runtime)

    async def charges(tenant_id: str, run_id: UUID) -> billing_pb2.ChargesReply | None:
        """None while billing does not answer: the run is shown all the same."""
        request = billing_pb2.ChargesRequest(run_id=str(run_id))
        try:
            return await billing.Charges(request, metadata=rpc.tenant_metadata(tenant_id), timeout=2)
        except Transient:
            return None

    async def shown(tenant_id: str, read: Callable[[Tx], Awaitable[Sequence[queries.Row]]]) -> list[RunView]:
        async with runtime.request.begin(tenant_id=tenant_id) as tx:
            runs = await read(tx)
            steps = await queries.steps(tx, runs)
            reader = conversation.Reader(tx, subjects)
            replies = [await queries.reply(reader, run) for run in runs]
        charged = await asyncio.gather(*(charges(tenant_id, run.id) for run in runs))
        return [
            queries.view(run, reply, steps[run.id], found)
            for run, reply, found in zip(runs, replies, charged, strict=True)
        ]

    async def one(tenant_id: str, run_id: UUID) -> RunView:
        async def read(tx: Tx) -> Sequence[queries.Row]:
            return [await queries.load(tx, run_id)]

        [found] = await shown(tenant_id, read)
        return found

    @routes.get("/api/v1/runs")
    async def list_runs(
        who: Reader,
        paging: Paging,
        session_key: Annotated[str | None, Query()] = None,
        agent_id: Annotated[UUID | None, Query()] = None,
        status: Annotated[Status | None, Query()] = None,
    ) -> dict[str, Any]:
        """The newest first."""

        async def read(tx: Tx) -> Sequence[queries.Row]:
            return await queries.listed(
                tx,
                session_key=session_key,
                agent_id=agent_id,
                status=status,
                after=paging.after,
                limit=paging.limit + 1,
            )

        return page(await shown(who.tenant_id, read), paging, queries.position)

    @routes.get("/api/v1/runs/{run_id}")
    async def get_run(run_id: UUID, who: Reader) -> RunView:
        return await one(who.tenant_id, run_id)

    @routes.get("/api/v1/runs/{run_id}/timeline")
    async def get_timeline(run_id: UUID, who: Reader) -> Timeline:
        """All that happened in the run, in the order of time, whichever service it was."""
        found = await charges(who.tenant_id, run_id)
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            return await timeline(tx, subjects, run_id, found)

    @routes.post("/api/v1/runs/{run_id}/cancel", status_code=202)
    async def cancel_run(run_id: UUID, who: Runner) -> RunView:
        """One that has not begun is cancelled at once, one under way within a second."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            await _cancel(tx, run_id)
        return await one(who.tenant_id, run_id)

    @routes.get("/internal/runs/{run_id}/events", include_in_schema=False)
    async def get_facts(run_id: UUID, who: Reader, after: Annotated[int, Query(ge=0)] = 0) -> Facts:
        """For the gateway of live streams: what it has missed. The proxy in front does not pass this on."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            return Facts(items=await queries.facts(tx, subjects, run_id, after))

    return routes


async def _cancel(tx: Tx, run_id: UUID) -> None:
    """Raises NotFound, Conflict where the run is over; one that is cancelled already stays so."""
    await tx.sql("SELECT 1 FROM run WHERE id = $1 FOR UPDATE", run_id)
    run = await queries.load(tx, run_id)
    if run.status == "cancelled":
        return
    if run.status not in projections.OPEN:
        raise Conflict(f"the run is {run.status}")
    if run.status == "queued" and await lanes.cancel(tx, RUNS, run.session_key, run_id):
        await tx.decide(stream(run_id), Fail(run.session_key, "cancelled", CANCELLED))
        await projections.failed(tx, run_id, "cancelled", CANCELLED)
        return
    await tx.sql("UPDATE run SET cancel_requested = true WHERE id = $1", run_id)
    # One that waits to try again need not wait on.
    await lanes.postpone(tx, RUNS, run.session_key, run_id, utcnow())
