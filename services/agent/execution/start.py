"""Starts a run or goes on with one: locks its row, checks it, and loads its agent, conversation and limits."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

import msgspec

from infra.clock import utcnow
from infra.errors import NotFound
from infra.postgres.tx import Database, Tx
from infra.security.subjects import Erased, SubjectKeys
from services.agent.definitions import store
from services.agent.definitions.store import StoredAgent
from services.agent.execution import conversation
from services.agent.execution.concurrency import model_of, take_place
from services.agent.execution.context import RunContext
from services.agent.execution.conversation import Conversation
from services.agent.execution.outcome import Ended
from services.agent.runs import projections
from services.agent.runs.content import Unsealer
from services.agent.runs.domain import Limits, Start, messages_at
from services.agent.runs.publishing import stream


@dataclass(frozen=True)
class RunRow:
    """The row of a run under execution, locked in the current transaction."""

    id: UUID
    tenant_id: str
    session_key: str
    agent_id: UUID
    subject_id: str
    channel_id: UUID | None
    """None if the run came by the API."""
    status: str
    cancel_reason: str | None
    depth: int
    limit_nanos: int | None
    parent_run_id: UUID | None

    @property
    def is_over(self) -> bool:
        return self.status not in projections.STOPPABLE


@dataclass(frozen=True)
class StartedRun:
    """A run that is executed now, with everything that the agent loop needs."""

    agent: StoredAgent
    conversation: Conversation
    context: RunContext


async def start(tx: Tx, database: Database, subjects: SubjectKeys, run_id: UUID) -> StartedRun | None:
    """None if the run is over or waits. Raises Ended if it cannot start, NotYet if too many others are running."""
    row = await lock(tx, run_id)
    if row.is_over:
        return None
    if row.cancel_reason:
        raise Ended("cancelled", row.cancel_reason)
    state = await tx.load(stream(run_id))
    if state.suspended:
        return None
    try:
        agent = await store.load(tx, row.agent_id, state.agent_version)
    except NotFound as error:
        raise Ended("refused", f"there is no {error}") from error
    if not agent.enabled and state.started_at is None:
        raise Ended("refused", "the agent is disabled")
    if row.status != "running":
        await take_place(tx, run_id, agent.id, agent.definition)
    try:
        unsealer = Unsealer(tx, subjects)
        key = await unsealer.key(row.subject_id)
        messages = await conversation.count_messages(tx, run_id)
        shown = messages_at(state, 0) or messages
        loaded = await conversation.load(tx, unsealer, run_id, row.session_key, shown)
    except Erased as error:
        raise Ended("cancelled", "the person was erased") from error
    await tx.decide(stream(run_id), Start(row.session_key, row.agent_id, agent.version, utcnow(), messages))
    await projections.started(tx, run_id, model_of(agent.definition))
    context = RunContext(
        database=database,
        subjects=subjects,
        run_id=run_id,
        tenant_id=row.tenant_id,
        session_key=row.session_key,
        agent_id=agent.id,
        subject_id=row.subject_id,
        key=key,
        limits=_limits(agent, row.limit_nanos),
        depth=row.depth,
        state=await tx.load(stream(run_id)),
    )
    return StartedRun(agent, loaded, context)


def _limits(agent: StoredAgent, granted_nanos: int | None) -> Limits:
    """`granted_nanos`: the amount that the parent run has left for this one."""
    limits = Limits(**agent.definition.limits.model_dump())
    if granted_nanos is None:
        return limits
    nanos = granted_nanos if limits.nanos is None else min(limits.nanos, granted_nanos)
    return msgspec.structs.replace(limits, nanos=nanos)


async def lock(tx: Tx, run_id: UUID) -> RunRow:
    """Locks the run's row. It is the first lock of each transaction about a run: run, then stream, then lane."""
    [row] = await tx.sql(
        """
        SELECT id, tenant_id, session_key, agent_id, subject_id, channel_id, status, cancel_reason, depth,
               limit_nanos, parent_run_id
        FROM run
        WHERE id = $1
        FOR UPDATE
        """,
        run_id,
    )
    return RunRow(*row)
