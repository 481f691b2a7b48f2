"""Forks a run that is over: a new run takes its first steps and goes on from there."""

from __future__ import annotations

from typing import Any, Literal
from uuid import UUID

from infra.clock import uuid7
from infra.errors import Conflict, InvalidMessage, NotFound
from infra.observe.spans import current_ids
from infra.postgres.tx import Tx
from infra.security.crypto import DataKey
from infra.security.subjects import Erased, SubjectKeys
from services.agent.lanes import queue_run
from services.agent.runs import projections
from services.agent.runs.domain import BeginStep, EndStep, Fork, Run, TakeMessages, completed_in_a_row
from services.agent.runs.publishing import stream


async def fork(tx: Tx, subjects: SubjectKeys, run_id: UUID, step: int | None) -> UUID:
    """Opens a run with this run's steps up to `step` (None: all steps completed in a row). Returns its id.

    This run's messages belong to the new run from now on. Raises NotFound, Conflict if the run is not over or was
    forked before, InvalidMessage (``step``).
    """
    rows = await tx.sql(
        """
        SELECT session_key, agent_id, subject_id, channel_id, status
        FROM run
        WHERE id = $1 AND tenant_id = $2
        FOR UPDATE
        """,
        run_id,
        tx.tenant_id,
    )
    if not rows:
        raise NotFound(f"run {run_id}")
    [(session_key, agent_id, subject_id, channel_id, status)] = rows
    if status in projections.STOPPABLE:
        raise Conflict(f"the run is {status}: cancel it first")
    assert tx.tenant_id
    try:
        key = await subjects.key(tx, tx.tenant_id, subject_id)
    except Erased as error:
        raise Conflict("the person was erased") from error
    new = uuid7()
    await tx.sql(
        """
        INSERT INTO run (id, tenant_id, session_key, agent_id, subject_id, channel_id, trace_id, forked_from)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
        """,
        new,
        tx.tenant_id,
        session_key,
        agent_id,
        subject_id,
        channel_id,
        current_ids()[0],
        run_id,
    )
    if not await tx.sql("UPDATE message SET run_id = $2 WHERE run_id = $1 RETURNING 1", run_id, new):
        raise Conflict("another run has been forked from it and has its messages")
    state = await tx.load(stream(run_id))
    completed = completed_in_a_row(state)
    last = completed if step is None else step
    if not 0 <= last <= completed:
        raise InvalidMessage("step", f"must be at most {completed}, the last of the steps that were completed in a row")
    await _copy(tx, key, tx.tenant_id, subject_id, run_id, new, session_key, state, last)
    queue_run(tx, new, session_key)
    return new


async def _copy(
    tx: Tx,
    key: DataKey,
    tenant_id: str,
    subject_id: str,
    old: UUID,
    new: UUID,
    session_key: str,
    state: Run,
    last: int,
) -> None:
    target = stream(new)

    async def write(command: Any) -> None:
        await tx.decide(target, command)

    await write(Fork(session_key, old, state.messages, state.agent_version))
    for n in range(1, last + 1):
        step = state.steps[n]
        if n in state.taken:
            await write(TakeMessages(session_key, n, state.taken[n]))
        content = step.content
        if content is not None:
            opened = key.open(content, tenant_id, subject_id, f"{old}/{n}", "content")
            content = key.seal(opened, tenant_id, subject_id, f"{new}/{n}", "content")
        await write(BeginStep(session_key, n, step.kind, step.name, step.attempt, step.digest, step.code))
        await write(EndStep(session_key, n, step.attempt, 0, content, step.error))
        status: Literal["completed", "failed"] = "completed" if content else "failed"
        projections.step_not_made(tx, new, n, step.kind, step.name, status, step.attempt, step.error)
