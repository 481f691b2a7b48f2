"""A message comes in, from a channel or by the API: one transaction settles which run answers it, and queues that run.

Rows are locked in one order, session, run, lane; the executor locks run before lane, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import msgspec
from opentelemetry import trace

from infra import lanes
from infra.clock import utcnow, uuid7
from infra.errors import InvalidMessage
from infra.subjects import Erased, SubjectKeys
from infra.tx import Tx
from protos.catalog import AGENT_TASKS
from protos.messages.agent import RunRequested
from services.agent.definitions.store import queue_mode
from services.agent.lanes import RUNS, RunItem
from services.agent.models.contract import Answered, Said
from services.agent.sessions.domain import Accept, Session, begins_at, decide, evolve
from services.agent.sessions.publishing import stream


@dataclass(frozen=True)
class Origin:
    """Where in a channel a message is from, so that the reply finds its way back."""

    channel_id: UUID
    conversation_id: str
    vendor_message_id: str


class Context(msgspec.Struct, frozen=True):
    """What was said before, by the caller's word: it stands for the session's own past. system: what the caller adds to
    the agent's own system prompt.
    """

    history: tuple[Said | Answered, ...]
    system: str | None = None


@dataclass(frozen=True)
class Arrival:
    """A message that came in. origin: None where it came by the API, which may give an idempotency_key.

    context: None where the session's past is to be shown to the model.
    """

    message_id: UUID
    agent_id: UUID
    session_key: str
    subject_id: str
    text: str
    received_at: datetime
    origin: Origin | None = None
    idempotency_key: str | None = None
    context: Context | None = None


async def take_in(tx: Tx, arrival: Arrival, subjects: SubjectKeys) -> UUID:
    """Stores a message and returns the run that will answer it; for a known idempotency_key the run it made before.

    Raises InvalidMessage where that key came with another text or context, Erased where the person's key was destroyed.
    """
    assert tx.tenant_id
    total, session = await _lock_session(tx, tx.tenant_id, arrival.session_key)
    key = await subjects.key(tx, tx.tenant_id, arrival.subject_id)
    if arrival.idempotency_key is not None and (known := await _known(tx, arrival, subjects)):
        return known
    context = tx.tenant_id, arrival.subject_id, str(arrival.message_id)
    text = key.seal(arrival.text, *context, "text")
    new_run_id = uuid7()
    [event] = decide(
        Accept(
            message_id=arrival.message_id,
            subject_id=arrival.subject_id,
            text=text,
            at=arrival.received_at,
            mode=await queue_mode(tx, arrival.agent_id),
            new_run_id=new_run_id,
            joinable=await _is_queued(tx, session.run_id, arrival.agent_id),
            busy=await _is_busy(tx, tx.tenant_id, arrival.session_key),
        ),
        session,
    )
    session = evolve(session, event)
    tx.append(stream(tx.tenant_id, arrival.session_key), event, event_id=arrival.message_id)
    if event.opens:
        await _open_run(tx, arrival, event.run_id)
    origin = arrival.origin
    await tx.sql(
        "INSERT INTO message (tenant_id, message_id, session_key, seq, run_id, subject_id, text, conversation, "
        "vendor_message_id, idempotency_key, received_at, context) "
        "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
        tx.tenant_id,
        arrival.message_id,
        arrival.session_key,
        total + 1,
        event.run_id,
        arrival.subject_id,
        text,
        key.seal(origin.conversation_id, *context, "conversation") if origin else None,
        origin.vendor_message_id if origin else None,
        arrival.idempotency_key,
        arrival.received_at,
        key.seal(msgspec.json.encode(arrival.context).decode(), *context, "context") if arrival.context else None,
    )
    await tx.sql(
        "UPDATE session SET messages = messages + 1, run_id = $3, run_messages = $4, run_waits = $5 "
        "WHERE tenant_id = $1 AND session_key = $2",
        tx.tenant_id,
        arrival.session_key,
        session.run_id,
        session.messages,
        session.waits,
    )
    not_before = begins_at(session, utcnow())
    if event.opens:
        item = RunItem(event.run_id)
        tx.enqueue(RUNS, lane=arrival.session_key, item=item, item_id=event.run_id, not_before=not_before)
        hint = RunRequested(run_id=event.run_id, session_key=arrival.session_key)
        tx.publish(AGENT_TASKS, hint, key=arrival.session_key)
    elif session.waits:
        # Too late is as well: then a worker has the item and waits for the run's row, which this transaction holds.
        await lanes.postpone(tx, RUNS, arrival.session_key, event.run_id, not_before)
    return event.run_id


async def _lock_session(tx: Tx, tenant_id: str, session_key: str) -> tuple[int, Session]:
    """Takes the turn of this session. Returns how many messages it has had, and its state."""
    await tx.sql(
        "INSERT INTO session (tenant_id, session_key) VALUES ($1, $2) ON CONFLICT DO NOTHING", tenant_id, session_key
    )
    [(total, run_id, messages, waits)] = await tx.sql(
        "SELECT messages, run_id, run_messages, run_waits FROM session "
        "WHERE tenant_id = $1 AND session_key = $2 FOR UPDATE",
        tenant_id,
        session_key,
    )
    return total, Session(run_id, messages, waits)


async def _known(tx: Tx, arrival: Arrival, subjects: SubjectKeys) -> UUID | None:
    rows = await tx.sql(
        "SELECT message_id, run_id, subject_id, text, context FROM message "
        "WHERE tenant_id = $1 AND session_key = $2 AND idempotency_key = $3",
        tx.tenant_id,
        arrival.session_key,
        arrival.idempotency_key,
    )
    if not rows:
        return None
    assert tx.tenant_id
    [(message_id, run_id, subject_id, sealed, sealed_context)] = rows
    try:
        key = await subjects.key(tx, tx.tenant_id, subject_id)
        context = tx.tenant_id, subject_id, str(message_id)
        known = key.open(sealed_context, *context, "context") if sealed_context else None
        same = key.open(sealed, *context, "text") == arrival.text and arrival.context == (
            msgspec.json.decode(known, type=Context) if known else None
        )
    except Erased:
        same = True  # nobody can tell any more, and it must not be answered twice
    if not same:
        raise InvalidMessage("idempotency_key", "was used before with another body")
    return UUID(str(run_id))


async def _is_queued(tx: Tx, run_id: UUID | None, agent_id: UUID) -> bool:
    """True while the run has not begun; its row is locked, so that it does not begin without this message."""
    rows = (
        await tx.sql("SELECT status, agent_id, cancel_requested FROM run WHERE id = $1 FOR UPDATE", run_id)
        if run_id
        else ()
    )
    return bool(rows) and tuple(rows[0]) == ("queued", agent_id, False)


async def _is_busy(tx: Tx, tenant_id: str, session_key: str) -> bool:
    return bool(
        await tx.sql(
            "SELECT 1 FROM run WHERE tenant_id = $1 AND session_key = $2 "
            "AND status IN ('queued', 'running', 'waiting') LIMIT 1",
            tenant_id,
            session_key,
        )
    )


async def _open_run(tx: Tx, arrival: Arrival, run_id: UUID) -> None:
    context = trace.get_current_span().get_span_context()
    await tx.sql(
        "INSERT INTO run (id, tenant_id, session_key, agent_id, subject_id, channel_id, trace_id) "
        "VALUES ($1, $2, $3, $4, $5, $6, $7)",
        run_id,
        tx.tenant_id,
        arrival.session_key,
        arrival.agent_id,
        arrival.subject_id,
        arrival.origin.channel_id if arrival.origin else None,
        f"{context.trace_id:032x}" if context.is_valid else None,
    )
