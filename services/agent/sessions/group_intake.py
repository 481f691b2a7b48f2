"""Intake of many messages from channels at once: one statement looks and locks, a pure `decide` for each in order, one
statement writes.

A message is decided here if its conversation is in order and its session has no unfinished run, besides those that this
group opens. All others need more reads: they are taken in one by one afterwards, in the same transaction.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from uuid import UUID

from infra.clock import uuid7
from infra.postgres.tx import Tx
from infra.security.crypto import DataKey
from infra.security.subjects import Subject, SubjectKeys
from services.agent.definitions.queue_modes import QueueMode
from services.agent.definitions.store import mode_of
from services.agent.lanes import queue_run
from services.agent.runs.decisions import decision_in, is_unclear
from services.agent.sessions.arrivals import Arrival, ArrivalRows, message_row, run_row
from services.agent.sessions.domain import Accept, Session, begins_after, decide, evolve
from services.agent.sessions.publishing import stream

# Modes in which a second message of a session needs nothing but the state of the session.
_SIMPLE_MODES: tuple[QueueMode, ...] = ("collect", "steer", "followup")

# Locks positions, then sessions, then runs, each kind in the order of its keys.
_LOCK_ARRIVALS = """
SELECT * FROM lock_arrivals($1, $2::text[], $3::text[], $4::text[], $5::uuid[], $6::text[])
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
    sessions, modes, keys = await _lock(tx, subjects, sequence, group)
    rows = ArrivalRows()
    others = []
    for one, mode in zip(group, modes, strict=True):
        session = sessions[one.tenant_id, one.arrival.session_key]
        key = keys[one.tenant_id, one.arrival.subject_id]
        in_order = one.position == 0 or one.position <= session.last + 1
        # A run that waits for more messages is postponed by each of them, and a busy session may refuse or interrupt.
        follows_simply = not session.changed or (mode in _SIMPLE_MODES and not session.state.waits)
        # The run that waits for a yes or no may be the one of the parent session whose message began the thread.
        may_decide = one.arrival.thread_run_id is not None and (
            decision_in(one.arrival.answer) is not None or is_unclear(one.arrival.answer)
        )
        if not (session.is_simple and in_order and key and follows_simply) or may_decide:
            # The later messages of the session have to follow this one.
            session.is_simple = False
            others.append(one)
            continue
        with one.trace():  # type: ignore[attr-defined]
            _take(tx, rows, one, session, mode, key)
    for (tenant_id, session_key), session in sessions.items():
        if session.changed:
            state = session.state
            row = tenant_id, session_key, session.messages, state.run_id, state.messages, state.waits
            rows.sessions.append(row)
            rows.positions.append((tenant_id, sequence, session_key, session.last))
    if rows.messages:
        await rows.write(tx)
        # The other messages are decided by these rows.
        await tx.flush()
    for one in others:
        with one.trace():  # type: ignore[attr-defined]
            await take_one(one)
            # The next message may cancel the run of this one, and finds it by its rows.
            await tx.flush()


def _take(tx: Tx, rows: ArrivalRows, one: Incoming, session: _Session, mode: QueueMode, key: DataKey) -> None:
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
        in_album=arrival.in_album,
    )
    [event] = decide(command, session.state)
    session.state = evolve(session.state, event)
    session.messages += 1
    session.last = max(session.last, one.position)
    session.changed = True
    tx.append(stream(one.tenant_id, arrival.session_key), event, event_id=arrival.message_id)
    if event.opens:
        session.agent_id = arrival.agent_id
        rows.runs.append(run_row(one.tenant_id, arrival, event.run_id))
        queue_run(tx, event.run_id, arrival.session_key, after=begins_after(session.state, in_album=arrival.in_album))
    rows.messages.append(message_row(one.tenant_id, arrival, event, session.messages, key))


async def _lock(
    tx: Tx, subjects: SubjectKeys, sequence: str, group: Sequence[Incoming]
) -> tuple[dict[tuple[str, str], _Session], list[QueueMode], dict[Subject, DataKey | None]]:
    """Locks all rows that the messages of the group are decided by. Returns the sessions by tenant and key, the queue
    mode for each message, and the keys of the persons, made if they do not exist; None for a destroyed one."""
    sessions: dict[tuple[str, str], _Session] = {}
    modes: list[QueueMode] = []
    keys: dict[Subject, DataKey | None] = {}
    unknown: set[Subject] = set()
    found = await tx.sql(
        _LOCK_ARRIVALS,
        sequence,
        [one.tenant_id for one in group],
        [one.arrival.session_key for one in group],
        [one.arrival.parent for one in group],
        [one.arrival.agent_id for one in group],
        [one.arrival.subject_id for one in group],
    )
    for one, (last, messages, run_id, run_messages, waits, is_simple, definition, has_key, wrapped) in zip(
        group, found, strict=True
    ):
        name = one.tenant_id, one.arrival.session_key
        if name not in sessions:
            sessions[name] = _Session(messages, Session(run_id, run_messages, waits), last, is_simple)
        modes.append(mode_of(definition))
        subject = one.tenant_id, one.arrival.subject_id
        if not has_key:
            unknown.add(subject)
        elif subject not in keys:
            keys[subject] = subjects.opened(subject, wrapped)
    if unknown:
        keys |= await subjects.keys(tx, unknown)
    return sessions, modes, keys
