"""HTTP of runs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query

from infra.errors import Conflict, Forbidden, InvalidMessage, Transient
from infra.postgres.tx import Tx
from infra.security.audit import audit
from infra.security.auth import Identity
from infra.security.reads import record_reads
from infra.service.api import Paging, Reader, Runner, Writer, page
from infra.service.service import Runtime
from infra.stores.cache import Cache
from infra.web import rpc
from protos.billing.v1 import billing_pb2
from services.agent import adapters
from services.agent.definitions import approvers, store
from services.agent.runs import queries
from services.agent.runs.cancelling import cancel
from services.agent.runs.content import Unsealer, seal_result
from services.agent.runs.decisions import settle, suspension
from services.agent.runs.domain import Suspension
from services.agent.runs.events import Decision
from services.agent.runs.forking import fork
from services.agent.runs.notices import CANCELLED
from services.agent.runs.progress import tell_end
from services.agent.runs.state import state_at
from services.agent.runs.timeline import timeline
from services.agent.runs.views import Approval, Facts, ForkFrom, RunState, RunView, Status, StepResolution, Timeline


def router(runtime: Runtime, let_fail: Callable[[Tx, UUID], Awaitable[Suspension]]) -> APIRouter:
    """`let_fail`: lets an indeterminate run fail. The sessions do that: they give its later messages to a new run."""
    routes = APIRouter(tags=["runs"])
    subjects = adapters.subjects(runtime)
    billing = adapters.billing(runtime)
    cache = Cache(runtime.cache)

    async def charges(tenant_id: str, run_id: UUID) -> billing_pb2.ChargesReply | None:
        """None if billing does not answer. The run is shown without its cost then."""
        request = billing_pb2.ChargesRequest(run_id=str(run_id))
        try:
            return await billing.Charges(request, metadata=rpc.tenant_metadata(tenant_id), timeout=2)
        except Transient:
            return None

    async def costs(tenant_id: str, run_ids: Sequence[UUID]) -> queries.Costs | None:
        """None if billing does not answer. The runs are shown without their costs then."""
        if not run_ids:
            return None
        request = billing_pb2.ChargesRequest(run_ids=[str(id_) for id_ in run_ids])
        try:
            reply = await billing.Charges(request, metadata=rpc.tenant_metadata(tenant_id), timeout=2)
        except (Transient, InvalidMessage):
            # Invalid for a process of billing that still has the version before: it asks for one run.
            return None
        return queries.Costs({cost.run_id: cost for cost in reply.costs}, reply.currency or None)

    async def shown(who: Identity, read: Callable[[Tx], Awaitable[Sequence[queries.StoredRun]]]) -> list[RunView]:
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            runs = await read(tx)
            made = await queries.steps(tx, runs)
            unsealer = Unsealer(tx, subjects)
            replies = [await queries.reply(unsealer, run) for run in runs]
            calls = [await queries.calls(unsealer, run) for run in runs]
            waits = [await queries.waiting(tx, unsealer, run) for run in runs]
            await _record(tx, who, runs)
        charged = await costs(who.tenant_id, [run.id for run in runs])
        return [
            queries.view(run, reply, called, made[run.id], charged, waiting)
            for run, reply, called, waiting in zip(runs, replies, calls, waits, strict=True)
        ]

    async def one(who: Identity, run_id: UUID) -> RunView:
        async def read(tx: Tx) -> Sequence[queries.StoredRun]:
            return [await queries.load(tx, run_id)]

        [found] = await shown(who, read)
        return found

    @routes.get("/api/v1/runs")
    async def list_runs(
        who: Reader,
        paging: Paging,
        session_key: Annotated[str | None, Query()] = None,
        agent_id: Annotated[UUID | None, Query()] = None,
        status: Annotated[Status | None, Query()] = None,
    ) -> dict[str, Any]:
        """The newest first. A page of long answers has fewer than `limit`."""
        more = False

        async def read(tx: Tx) -> Sequence[queries.StoredRun]:
            nonlocal more
            runs, more = await queries.listed(
                tx,
                session_key=session_key,
                agent_id=agent_id,
                status=status,
                after=paging.after,
                limit=paging.limit,
            )
            return runs

        runs = await shown(who, read)
        return page(runs, paging, queries.position, more=more)

    @routes.get("/api/v1/runs/{run_id}")
    async def get_run(run_id: UUID, who: Reader) -> RunView:
        return await one(who, run_id)

    @routes.get("/api/v1/runs/{run_id}/timeline")
    async def get_timeline(run_id: UUID, who: Reader) -> Timeline:
        """Everything that happened in the run in all services, in the order of time."""
        found = await charges(who.tenant_id, run_id)
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            await _record(tx, who, [await queries.load(tx, run_id)])
            return await timeline(tx, subjects, run_id, found)

    @routes.get("/api/v1/runs/{run_id}/state")
    async def get_state(run_id: UUID, who: Reader, at: Annotated[int | None, Query(ge=1)] = None) -> RunState:
        """The state of the run after its event `at`; without it, after the last one."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            return await state_at(tx, run_id, at)

    @routes.post("/api/v1/runs/{run_id}/cancel", status_code=202)
    async def cancel_run(run_id: UUID, who: Runner) -> RunView:
        """A queued or waiting run is cancelled at once, a running one within a second."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            await cancel(tx, run_id, CANCELLED)
            run = await queries.load(tx, run_id)
            if run.channel_id:
                tx.after_commit(partial(tell_end, cache, run_id, run.session_key))
            audit(tx, who.actor, "run.cancel", "run", str(run_id))
        return await one(who, run_id)

    @routes.post("/api/v1/runs/{run_id}/approval", status_code=202)
    async def approve_call(run_id: UUID, body: Approval, who: Runner) -> RunView:
        """Approves or denies the tool call that the run waits for. 409 if it waits for no approval, 403 if the agent's
        approvers do not include the client."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            waits = await suspension(tx, run_id)
            run = await queries.load(tx, run_id)
            listed = (await store.load(tx, run.agent_id)).definition.approvers
            if not approvers.may_decide(listed, approvers.of_identity(who), asked=run.subject_id == who.actor):
                raise Forbidden(f"run {run_id}: the agent's approvers do not include this client")
            if body.step not in (None, waits.step):
                raise Conflict(f"the run waits for step {waits.step} now")
            decision: Decision = "approve" if body.approved else "deny"
            await settle(tx, run_id, waits.step, decision, who.actor)
            audit(tx, who.actor, f"run.{decision}", "run", str(run_id), step=str(waits.step), tool=waits.name)
        return await one(who, run_id)

    @routes.post("/api/v1/runs/{run_id}/resolution", status_code=202)
    async def resolve_run(run_id: UUID, body: StepResolution, who: Writer) -> RunView:
        """Decides about an indeterminate run, in which it is not known whether a tool took effect: call the tool again,
        go on with the given result, or let the run fail. 409 if the run is not indeterminate."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            if body.action == "fail":
                waits = await let_fail(tx, run_id)
            else:
                waits = await suspension(tx, run_id)
                content = None
                if body.action == "skip":
                    content = await seal_result(tx, subjects, run_id, waits.step, body.result)
                await settle(tx, run_id, waits.step, body.action, who.actor, content)
            audit(tx, who.actor, f"run.{body.action}", "run", str(run_id), step=str(waits.step), tool=waits.name)
        return await one(who, run_id)

    @routes.post("/api/v1/runs/{run_id}/fork", status_code=202)
    async def fork_run(run_id: UUID, body: ForkFrom, who: Runner) -> RunView:
        """Forks a run that is over: a new run takes its first steps without making them again, and answers its
        messages. 409 if the run is not over or was forked before."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            new = await fork(tx, subjects, run_id, body.step)
            audit(tx, who.actor, "run.fork", "run", str(run_id), new_run=str(new))
        return await one(who, new)

    @routes.get("/internal/runs/{run_id}/events", include_in_schema=False)
    async def get_facts(run_id: UUID, who: Reader, after: Annotated[int, Query(ge=0)] = 0) -> Facts:
        """For the gateway of live streams: the events that it has missed. nginx does not pass this path on."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            await _record(tx, who, [await queries.load(tx, run_id)])
            return Facts(items=await queries.facts(tx, subjects, run_id, after))

    return routes


async def _record(tx: Tx, who: Identity, runs: Sequence[queries.StoredRun]) -> None:
    """Records that the client reads the conversations of the runs, except its own ones."""
    await record_reads(tx, who, "session", [run.session_key for run in runs if run.subject_id != who.actor])
