"""Gives a failed run's later messages, which had joined it after its start, to a new run."""

from __future__ import annotations

from uuid import UUID

from infra.clock import uuid7
from infra.errors import Conflict
from infra.observe.spans import current_ids
from infra.postgres.tx import Tx
from services.agent.lanes import queue_run
from services.agent.runs.cancelling import fail_with_children
from services.agent.runs.decisions import suspension
from services.agent.runs.domain import Suspension
from services.agent.runs.events import Ending
from services.agent.runs.publishing import stream as run_stream
from services.agent.sessions.events import MessagesRequeued
from services.agent.sessions.publishing import stream


async def lock_session(tx: Tx, run_id: UUID) -> None:
    """Locks the session of the run. Intake locks the session before the run, so this comes before the run's lock."""
    await tx.sql(
        """
        SELECT FROM session s JOIN run r ON r.tenant_id = s.tenant_id AND r.session_key = s.session_key
        WHERE r.id = $1
        FOR UPDATE OF s
        """,
        run_id,
    )


async def let_fail(tx: Tx, run_id: UUID) -> Suspension:
    """An operator lets an indeterminate run fail. A new run answers the messages that had joined it.

    Raises NotFound, Conflict if the run is not indeterminate.
    """
    await lock_session(tx, run_id)
    waits = await suspension(tx, run_id)
    if waits.reason != "indeterminate":
        raise Conflict(f"run {run_id} waits for an approval: deny it, or cancel the run")
    [(session_key,)] = await tx.sql("SELECT session_key FROM run WHERE id = $1", run_id)
    await fail_run(tx, run_id, session_key, "failed", f"given up by an operator: {waits.text}")
    return waits


async def fail_run(tx: Tx, run_id: UUID, session_key: str, status: Ending, error: str) -> None:
    """Ends the run without an answer. If it failed, a new run answers the messages that had joined it.

    The session and the run are locked.
    """
    state = await tx.load(run_stream(run_id))
    await fail_with_children(tx, run_id, session_key, status, error)
    if status == "failed" and state.messages:
        # Otherwise no run would answer the messages that came after its start.
        await requeue_later_messages(tx, run_id, state.messages)


async def requeue_later_messages(tx: Tx, run_id: UUID, first: int) -> UUID | None:
    """Opens and queues a run for the messages of the failed run after its first `first`. Returns the new run's id.

    None if there are no such messages that their persons have not deleted. The session and the failed run are locked.
    """
    assert tx.tenant_id
    later = await tx.sql(
        """
        SELECT message_id, subject_id
        FROM (
            SELECT message_id, subject_id, seq, changed
            FROM message
            WHERE run_id = $1 AND NOT decides
            ORDER BY seq
            OFFSET $2
        ) later
        WHERE changed < 9223372036854775807
        ORDER BY seq
        """,
        run_id,
        first,
    )
    if not later:
        return None
    new = uuid7()
    trace_id, _ = current_ids()
    [(session_key,)] = await tx.sql(
        """
        INSERT INTO run (id, tenant_id, session_key, agent_id, subject_id, channel_id, trace_id)
        SELECT $2, tenant_id, session_key, agent_id, $3, channel_id, $4
        FROM run
        WHERE id = $1
        RETURNING session_key
        """,
        run_id,
        new,
        later[0][1],
        trace_id,
    )
    await tx.sql(
        "UPDATE message SET run_id = $3 WHERE tenant_id = $1 AND message_id = ANY($2::uuid[])",
        tx.tenant_id,
        [message_id for message_id, _ in later],
        new,
    )
    requeued = MessagesRequeued(failed_run_id=run_id, run_id=new, messages=len(later))
    tx.append(stream(tx.tenant_id, session_key), requeued)
    await tx.sql(
        """
        UPDATE session
        SET run_id = $3, run_messages = $4, run_waits = false
        WHERE tenant_id = $1 AND session_key = $2
        """,
        tx.tenant_id,
        session_key,
        new,
        len(later),
    )
    queue_run(tx, new, session_key)
    return new
