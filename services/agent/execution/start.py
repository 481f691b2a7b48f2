"""Starts a run, or goes on with one: checks whether it may be executed and records its start."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

import msgspec

from infra.clock import utcnow
from infra.lanes.effects import Effects
from infra.postgres.database import Database
from infra.postgres.tx import Tx
from infra.security.crypto import DataKey
from infra.security.subjects import Erased, SubjectKeys
from services.agent.definitions import store
from services.agent.definitions.store import StoredAgent
from services.agent.execution.concurrency import has_limits, model_of, take_place
from services.agent.execution.context import RunContext
from services.agent.execution.conversation import Conversation
from services.agent.execution.group_write import GroupWriter
from services.agent.execution.journal import RunJournal
from services.agent.execution.load import LoadedRun, RunRow
from services.agent.execution.outcome import Ended
from services.agent.runs import projections
from services.agent.runs.domain import Run, Start, messages_at
from services.agent.runs.limits import Limits
from services.agent.runs.publishing import stream


@dataclass(frozen=True)
class StartedRun:
    """A run that is executed now, with everything that the agent loop needs."""

    row: RunRow
    agent: StoredAgent
    conversation: Conversation
    context: RunContext
    journal: RunJournal


async def start(
    loaded: LoadedRun, database: Database, subjects: SubjectKeys, effects: Effects, writer: GroupWriter
) -> StartedRun | None:
    """None if the run is over or waits. Raises Ended if it cannot start, NotYet if too many others are running."""
    row, state = loaded.row, loaded.state
    if row.is_over:
        return None
    if row.cancel_reason:
        raise Ended("cancelled", row.cancel_reason)
    if state.suspended:
        return None
    agent = loaded.agent
    if agent is None:
        raise Ended("refused", f"there is no agent {row.agent_id}")
    if state.agent_version not in (None, agent.version):
        async with database.read_only(tenant_id=row.tenant_id) as tx:
            agent = await store.load(tx, row.agent_id, state.agent_version)
    if not agent.enabled and state.started_at is None:
        raise Ended("refused", "the agent is disabled")
    key = loaded.keys.get(row.subject_id)
    messages = len(loaded.messages)
    try:
        if key is None:
            raise Erased(row.subject_id)
        conversation = loaded.conversation(messages_at(state, 0) or messages)
    except Erased as error:
        raise Ended("cancelled", "the person was erased") from error
    context = context_of(loaded, agent, key, conversation, database, subjects)
    journal = RunJournal(context, effects, writer)
    command = Start(row.session_key, row.agent_id, agent.version, utcnow(), messages)
    if row.status == "running" or not has_limits(agent.definition):
        journal.start(command, model_of(agent.definition))
    else:
        async with effects.begin() as tx:
            context.state = await _start_in_place(tx, row.id, agent, command)
    return StartedRun(row, agent, conversation, context, journal)


def context_of(
    loaded: LoadedRun,
    agent: StoredAgent,
    key: DataKey,
    conversation: Conversation,
    database: Database,
    subjects: SubjectKeys,
) -> RunContext:
    """`key`: of the run's subject."""
    row, state = loaded.row, loaded.state
    said = conversation.text if loaded.only_speaker == row.subject_id else ""
    shown = loaded.messages[: messages_at(state, 0) or len(loaded.messages)]
    return RunContext(
        database=database,
        subjects=subjects,
        run_id=row.id,
        tenant_id=row.tenant_id,
        session_key=row.session_key,
        agent_id=agent.id,
        subject_id=row.subject_id,
        key=key,
        limits=_limits(agent, row.limit_nanos),
        depth=row.depth,
        state=state,
        messages=len(loaded.messages),
        said=said,
        message_id=str(shown[-1].id) if said else None,
        learns=bool(said) and agent.definition.learning == "model",
        channel_id=row.channel_id,
        approvers=conversation.approvers,
        tag=agent.definition.tag,
    )


async def _start_in_place(tx: Tx, run_id: UUID, agent: StoredAgent, command: Start) -> Run:
    """Starts a run whose agent limits how many run at the same time. Raises NotYet if all places are taken."""
    row = await lock(tx, run_id)
    if row.cancel_reason or row.is_over:
        raise Ended("cancelled", row.cancel_reason or "")
    await take_place(tx, run_id, agent.id, agent.definition)
    await tx.decide(stream(run_id), command)
    await projections.started(tx, run_id, model_of(agent.definition))
    return await tx.load(stream(run_id))


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
