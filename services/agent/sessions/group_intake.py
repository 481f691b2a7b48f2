"""Intake of many messages from channels at once: a few statements look and lock, a pure `decide` for each in order, one
write for all.

A message is decided here if its conversation is in order and its session has no unfinished run, besides those that this
group opens. All others need more reads: they are taken in one by one afterwards, in the same transaction.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from uuid import UUID

from infra.clock import utcnow, uuid7
from infra.postgres.tx import Tx
from infra.security.crypto import DataKey
from infra.security.subjects import SubjectKeys
from services.agent.definitions.queue_modes import QueueMode
from services.agent.definitions.store import queue_modes
from services.agent.lanes import queue_run
from services.agent.runs.decisions import decision_in, is_unclear
from services.agent.sessions.domain import Accept, Session, begins_at, decide, evolve
from services.agent.sessions.intake import (
    INSERT_MESSAGES,
    INSERT_RUNS,
    UPDATE_SESSIONS,
    Arrival,
    message_row,
    run_row,
)
from services.agent.sessions.publishing import stream

# Modes in which a second message of a session needs nothing but the state of the session.
_SIMPLE_MODES: tuple[QueueMode, ...] = ("collect", "steer", "followup")

_LOCK_SEQUENCES = """
-- Locks the positions of the conversations, in the order of their names, before their sessions.
INSERT INTO sequence AS s (tenant_id, name, key, last)
SELECT tenant_id, $1, key, 0 FROM unnest($2::text[], $3::text[]) AS n(tenant_id, key) ORDER BY 1, 3
ON CONFLICT (tenant_id, name, key) DO UPDATE SET last = s.last
RETURNING tenant_id, key, last
"""
_LOCK_SESSIONS = """
-- Locks the sessions, in the order of their names, before their runs. A new one remembers how far its parent was. It
-- looks for early messages here, because this statement sees all that another transaction has stored before it gave the
-- positions free. `_LOCK_SEQUENCES` has waited for that transaction, and does not see its rows.
INSERT INTO session AS s (tenant_id, session_key, parent_key, parent_seq)
SELECT tenant_id, key, nullif(parent, ''),
       (SELECT messages FROM session p WHERE p.tenant_id = n.tenant_id AND p.session_key = n.parent)
FROM unnest($1::text[], $2::text[], $3::text[]) AS n(tenant_id, key, parent)
ORDER BY 1, 2
ON CONFLICT (tenant_id, session_key) DO UPDATE SET messages = s.messages
RETURNING tenant_id, session_key, messages, run_id, run_messages, run_waits, taken_over_by IS NOT NULL, EXISTS (
    SELECT FROM early_message e WHERE e.tenant_id = s.tenant_id AND e.name = $4 AND e.key = s.session_key
)
"""
_LOCK_RUNS = """
-- Locks the unfinished runs of the sessions, in the order of their ids, as group writes do.
SELECT r.tenant_id, r.session_key
FROM run r JOIN unnest($1::text[], $2::text[]) AS n(tenant_id, session_key) USING (tenant_id, session_key)
WHERE r.status IN ('queued', 'running', 'waiting')
ORDER BY r.id
FOR UPDATE OF r
"""
_MOVE_SEQUENCES = """
UPDATE sequence
SET last = n.last
FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[]) AS n(tenant_id, name, key, last)
WHERE sequence.tenant_id = n.tenant_id AND sequence.name = n.name AND sequence.key = n.key
"""


class Incoming(NamedTuple):
    """A message of the group."""

    tenant_id: str
    position: int
    """In its conversation; 0 if it has none."""
    arrival: Arrival
    trace: Callable[[], object]
    """Makes the span of this message in its own trace; a context manager."""


@dataclass
class _Session:
    """A locked session, as the messages of the group change it."""

    messages: int
    state: Session
    last: int = 0
    """Position of the last message that was handled."""
    is_simple: bool = True
    changed: bool = False
    agent_id: UUID | None = None
    """Of the last run that this group has opened."""


async def take_group(
    tx: Tx,
    subjects: SubjectKeys,
    sequence: str,
    group: Sequence[Incoming],
    take_one: Callable[[Incoming], Awaitable[None]],
) -> None:
    """Takes the messages in, in their order. `take_one` takes in a single message; `sequence` names the positions."""
    sessions = await _lock(tx, sequence, group)
    keys = await subjects.keys(tx, {(one.tenant_id, one.arrival.subject_id) for one in group})
    modes = await queue_modes(tx, {one.arrival.agent_id for one in group})
    others = []
    for one in group:
        session = sessions[one.tenant_id, one.arrival.session_key]
        key = keys[one.tenant_id, one.arrival.subject_id]
        mode = modes.get((one.tenant_id, one.arrival.agent_id), "followup")
        in_order = one.position == 0 or one.position <= session.last + 1
        # A run that waits for more messages is postponed by each of them, and a busy session may refuse or interrupt.
        follows_simply = not session.changed or (mode in _SIMPLE_MODES and not session.state.waits)
        # In a thread, the run that waits for a yes or no may be one of the parent session.
        may_decide = bool(one.arrival.parent) and (
            decision_in(one.arrival.text) is not None or is_unclear(one.arrival.text)
        )
        if not (session.is_simple and in_order and key and follows_simply) or may_decide:
            # The later messages of the session have to follow this one.
            session.is_simple = False
            others.append(one)
            continue
        with one.trace():  # type: ignore[attr-defined]
            _take(tx, one, session, mode, key)
    for (tenant_id, session_key), session in sessions.items():
        if session.changed:
            state = session.state
            row = tenant_id, session_key, session.messages, state.run_id, state.messages, state.waits
            tx.buffer(UPDATE_SESSIONS, *row)
            tx.buffer(_MOVE_SEQUENCES, tenant_id, sequence, session_key, session.last)
    # The other messages are decided by these rows.
    await tx.flush()
    for one in others:
        with one.trace():  # type: ignore[attr-defined]
            await take_one(one)
            # The next message may cancel the run of this one, and finds it by its rows.
            await tx.flush()


def _take(tx: Tx, one: Incoming, session: _Session, mode: QueueMode, key: DataKey) -> None:
    """Decides which run answers the message, and collects its rows."""
    arrival = one.arrival
    tx.tenant_id = one.tenant_id
    command = Accept(
        message_id=arrival.message_id,
        subject_id=arrival.subject_id,
        text=key.seal(arrival.text, one.tenant_id, arrival.subject_id, str(arrival.message_id), "text"),
        at=arrival.received_at,
        mode=mode,
        new_run_id=uuid7(),
        # The only unfinished runs of the session are those that this group has opened.
        joinable=session.changed and session.agent_id == arrival.agent_id,
        steerable=False,
        busy=session.changed,
    )
    [event] = decide(command, session.state)
    session.state = evolve(session.state, event)
    session.messages += 1
    session.last = max(session.last, one.position)
    session.changed = True
    tx.append(stream(one.tenant_id, arrival.session_key), event, event_id=arrival.message_id)
    if event.opens:
        session.agent_id = arrival.agent_id
        tx.buffer(INSERT_RUNS, *run_row(one.tenant_id, arrival, event.run_id))
        queue_run(tx, event.run_id, arrival.session_key, not_before=begins_at(session.state, utcnow()))
    tx.buffer(INSERT_MESSAGES, *message_row(one.tenant_id, arrival, event, session.messages, key))


async def _lock(tx: Tx, sequence: str, group: Sequence[Incoming]) -> dict[tuple[str, str], _Session]:
    """Locks all rows that the messages of the group are decided by: positions, then sessions, then runs."""
    # The parent of a session is that of its first message here.
    by_name = {(one.tenant_id, one.arrival.session_key): one.arrival.parent for one in reversed(group)}
    names = sorted(by_name)
    tenants, keys, parents = [name[0] for name in names], [name[1] for name in names], [by_name[name] for name in names]
    positions = {
        (tenant_id, key): last for tenant_id, key, last in await tx.sql(_LOCK_SEQUENCES, sequence, tenants, keys)
    }
    sessions = {}
    for tenant_id, key, messages, run_id, run_messages, waits, taken_over, has_early in await tx.sql(
        _LOCK_SESSIONS, tenants, keys, parents, sequence
    ):
        sessions[tenant_id, key] = _Session(
            messages,
            Session(run_id, run_messages, waits),
            positions[tenant_id, key],
            is_simple=not has_early and not taken_over,
        )
    for tenant_id, key in await tx.sql(_LOCK_RUNS, tenants, keys):
        sessions[tenant_id, key].is_simple = False
    return sessions
