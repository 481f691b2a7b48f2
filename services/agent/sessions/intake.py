"""Intake of a message from a channel or the API: one transaction assigns it to a run and queues that run.

Rows are locked in one order: session, run, lane. The executor also locks the run before the lane.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

import msgspec

from infra.clock import uuid7
from infra.errors import Forbidden, InvalidMessage
from infra.lanes import lane as lanes
from infra.postgres.tx import Tx
from infra.security.audit import audit, audit_refusal
from infra.security.crypto import DataKey
from infra.security.subjects import Erased, SubjectKeys
from services.agent.definitions.approvers import may_decide
from services.agent.definitions.store import load, queue_mode
from services.agent.lanes import RUNS, queue_run
from services.agent.runs import projections
from services.agent.runs.cancelling import cancel, fail_with_children
from services.agent.runs.content import Unsealer
from services.agent.runs.decisions import decision_in, is_unclear, settle, suspension
from services.agent.runs.domain import Fail, Suspension
from services.agent.runs.family import asked_runs
from services.agent.runs.notices import (
    BUSY,
    INTERRUPTED,
    NEXT,
    NOT_YOURS,
    TAKEN_OVER,
    TOO_EARLY,
    UNCLEAR,
    question_repeated,
)
from services.agent.runs.publishing import stream as run_stream
from services.agent.runs.replies import send_reply
from services.agent.sessions.arrivals import Arrival, ArrivalRows, Context, message_row, run_row
from services.agent.sessions.domain import Accept, Busy, Session, begins_after, decide, evolve
from services.agent.sessions.events import MessageAccepted
from services.agent.sessions.publishing import stream


async def take_in(tx: Tx, arrival: Arrival, subjects: SubjectKeys) -> UUID:
    """Stores a message and returns the run that answers it. A known idempotency_key returns the run of its first use.

    Raises InvalidMessage if that key came with another text or context before, Erased if the person was erased, Busy
    if the session is busy and its agent rejects messages meanwhile.
    """
    assert tx.tenant_id
    total, session, taken_over = await _lock_session(tx, tx.tenant_id, arrival.session_key, arrival.parent)
    key = await subjects.key(tx, tx.tenant_id, arrival.subject_id)
    if arrival.idempotency_key is not None and (known := await _known(tx, arrival, subjects)):
        return known
    text = key.seal(arrival.text, tx.tenant_id, arrival.subject_id, str(arrival.message_id), "text")
    # A message for the person who has taken the session over gets a run of its own, which is cancelled.
    mode = "followup" if taken_over else await queue_mode(tx, arrival.agent_id)
    unfinished = await open_runs(tx, arrival.session_key, session.run_id, every_run=mode == "interrupt")
    last = unfinished.get(session.run_id) if session.run_id else None
    asking = None if taken_over else await _answered_question(tx, unfinished, arrival)
    command = Accept(
        message_id=arrival.message_id,
        subject_id=arrival.subject_id,
        text=text,
        at=arrival.received_at,
        mode=mode,
        new_run_id=arrival.new_run_id or uuid7(),
        joinable=last == OpenRun("queued", arrival.agent_id, False),
        steerable=last in (OpenRun("running", arrival.agent_id, False), OpenRun("waiting", arrival.agent_id, False)),
        busy=await _is_busy(tx, arrival.session_key),
        decides=asking.question.asked_by if asking else None,
        in_album=arrival.in_album,
    )
    busy = False
    try:
        [event] = decide(command, session)
    except Busy:
        if arrival.origin is None:
            raise
        # A person in a chat gets a notice. The message is stored with a run that is refused.
        busy = True
        [event] = decide(replace(command, mode="followup"), session)
    session = evolve(session, event)
    await _store(tx, arrival, event, session, total + 1, key)
    if asking:
        await _settle_question(tx, arrival, subjects, asking)
        return event.run_id
    after = begins_after(session, in_album=arrival.in_album)
    if taken_over:
        await fail_with_children(tx, event.run_id, arrival.session_key, "cancelled", TAKEN_OVER)
    elif busy:
        await _refuse(tx, arrival, event.run_id)
    elif event.opens:
        if mode == "interrupt":
            for run_id in unfinished:
                await cancel(tx, run_id, INTERRUPTED)
        queue_run(tx, event.run_id, arrival.session_key, after=after)
    elif session.waits:
        # If a worker already has the item, it waits for the run's row, which this transaction has locked.
        await lanes.postpone(tx, RUNS, arrival.session_key, event.run_id, after)
    return event.run_id


async def _store(tx: Tx, arrival: Arrival, event: MessageAccepted, session: Session, number: int, key: DataKey) -> None:
    """Stores the message, which is the session's message with this number, and the run that it opens."""
    assert tx.tenant_id
    tx.append(stream(tx.tenant_id, arrival.session_key), event, event_id=arrival.message_id)
    rows = ArrivalRows()
    if event.opens:
        rows.runs.append(run_row(tx.tenant_id, arrival, event.run_id))
    rows.messages.append(message_row(tx.tenant_id, arrival, event, number, key))
    rows.sessions.append((tx.tenant_id, arrival.session_key, number, session.run_id, session.messages, session.waits))
    await rows.write(tx)


async def _lock_session(tx: Tx, tenant_id: str, session_key: str, parent: str) -> tuple[int, Session, bool]:
    """Locks the session, so that its messages take turns. Returns how many messages it has, its state, and whether a
    person has taken it over.

    A new session with a parent remembers how far the parent was when it branched off.
    """
    await tx.sql(
        """
        INSERT INTO session (tenant_id, session_key, parent_key, parent_seq)
        SELECT $1, $2, nullif($3, ''), (SELECT messages FROM session WHERE tenant_id = $1 AND session_key = $3)
        ON CONFLICT DO NOTHING
        """,
        tenant_id,
        session_key,
        parent,
    )
    [(total, run_id, messages, waits, taken_over)] = await tx.sql(
        # Locks the session until the commit: its next message waits.
        """
        SELECT messages, run_id, run_messages, run_waits, taken_over_by IS NOT NULL
        FROM session
        WHERE tenant_id = $1 AND session_key = $2
        FOR UPDATE
        """,
        tenant_id,
        session_key,
    )
    return total, Session(run_id, messages, waits), taken_over


async def _known(tx: Tx, arrival: Arrival, subjects: SubjectKeys) -> UUID | None:
    rows = await tx.sql(
        """
        SELECT message_id, run_id, subject_id, text, context
        FROM message
        WHERE tenant_id = $1 AND session_key = $2 AND idempotency_key = $3
        """,
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
        same = True  # The text cannot be compared any more, and the message must not be answered twice.
    if not same:
        raise InvalidMessage("idempotency_key", "was used before with another body")
    return UUID(str(run_id))


class OpenRun(NamedTuple):
    """An unfinished run of the session."""

    status: str
    agent_id: UUID
    cancelled: bool


async def open_runs(tx: Tx, session_key: str, last: UUID | None, *, every_run: bool) -> dict[UUID, OpenRun]:
    """The session's unfinished runs: the last one and those that wait, or all. Locks their rows in the order of ids.

    The locks keep these runs from starting or ending without this message.
    """
    rows = await tx.sql(
        """
        SELECT id, status, agent_id, cancel_reason IS NOT NULL
        FROM run
        WHERE tenant_id = $1 AND session_key = $2 AND status IN ('queued', 'running', 'waiting')
            AND ($4 OR status = 'waiting' OR id = $3)
        ORDER BY id
        FOR UPDATE
        """,
        tx.tenant_id,
        session_key,
        last,
        every_run,
    )
    return {
        UUID(str(id_)): OpenRun(status, UUID(str(agent_id)), cancelled) for id_, status, agent_id, cancelled in rows
    }


class OpenQuestion(NamedTuple):
    """A run that waits for an approval, and the run of the session that asked it, perhaps by others: often itself."""

    run_id: UUID
    asked_by: UUID


class Asking(NamedTuple):
    """The question that a message answers."""

    question: OpenQuestion
    may_decide: bool
    """The author of the message may give the approval."""
    next: OpenQuestion | None = None
    """The author's question before this one."""


async def _answered_question(tx: Tx, unfinished: Mapping[UUID, OpenRun], arrival: Arrival) -> Asking | None:
    """The run whose question the message answers; None for an ordinary message.

    Raises Forbidden if it is another person's question, and the message came by the API.
    """
    # Only a person in a chat can be asked again. A caller of the API has a call for approvals.
    unclear = arrival.origin is not None and is_unclear(arrival.answer)
    if not unclear and not decision_in(arrival.answer):
        return None
    asking = await _asking(tx, unfinished, arrival)
    if arrival.thread_run_id and not (asking and asking.may_decide):
        # The question of the parent session began this thread. Other questions there are not meant.
        runs = await open_runs(tx, arrival.parent, None, every_run=False)
        of_thread = {id_: run for id_, run in runs.items() if id_ == arrival.thread_run_id}
        of_parent = await _asking(tx, of_thread, arrival)
        asking = of_parent if of_parent and (asking is None or of_parent.may_decide) else asking
    if asking and not asking.may_decide:
        if unclear:
            # In a room this is an ordinary message.
            return None
        if arrival.origin is None:
            raise Forbidden(f"run {asking.question.run_id}: the agent's approvers do not include this client")
    return asking


async def _settle_question(tx: Tx, arrival: Arrival, subjects: SubjectKeys, asking: Asking) -> None:
    """Applies the decision in the message, or tells its author why it does not count."""
    decision, run_id = decision_in(arrival.answer), asking.question.run_id
    waits = await suspension(tx, run_id)
    act = f"subject:{arrival.subject_id}", f"run.{decision}", "run", str(run_id)
    about = {"step": str(waits.step), "tool": waits.name}
    if not asking.may_decide:
        audit_refusal(tx, *act, **about)
        await _answer(tx, arrival, asking.question.asked_by, NOT_YOURS, arrival.subject_id)
    elif decision and arrival.origin and arrival.received_at <= waits.at:
        # Meant for an earlier question, or for none: the person has not seen this one.
        await _ask_again(tx, arrival, subjects, asking.question, waits, TOO_EARLY)
    elif decision:
        await settle(tx, run_id, waits.step, decision, arrival.subject_id)
        audit(tx, *act, **about)
        if arrival.origin and asking.next:
            waits = await suspension(tx, asking.next.run_id)
            await _ask_again(tx, arrival, subjects, asking.next, waits, NEXT)
    else:
        await _ask_again(tx, arrival, subjects, asking.question, waits, UNCLEAR)


async def _asking(tx: Tx, unfinished: Mapping[UUID, OpenRun], arrival: Arrival) -> Asking | None:
    """The question that was asked last, of those that the message's author may answer, or else of those of other
    persons. A run that waits for another agent has the questions of that agent's run."""
    asked: list[tuple[bool, datetime, OpenQuestion]] = []
    for asked_by, run in unfinished.items():
        if run.status != "waiting":
            continue
        for run_id in (asked_by, *await asked_runs(tx, asked_by)):
            waits = (await tx.load(run_stream(run_id))).suspended
            if waits and waits.reason == "approval":
                agent_id, subject_id = await _agent_and_subject(tx, run_id)
                # In a channel with a rule of its own the newest form of that rule counts: the answer carries it.
                rule = arrival.context.approvers if arrival.context else ()
                approvers = rule or (await load(tx, agent_id)).definition.approvers
                is_asker = arrival.subject_id == subject_id
                mine = may_decide(approvers, arrival.names, asked=is_asker)
                asked.append((mine, waits.at, OpenQuestion(run_id, asked_by)))
    if not asked:
        return None
    (mine, _, question), *others = sorted(asked, reverse=True)
    return Asking(question, mine, others[0][2] if mine and others and others[0][0] else None)


async def _agent_and_subject(tx: Tx, run_id: UUID) -> tuple[UUID, str]:
    [(agent_id, subject_id)] = await tx.sql("SELECT agent_id, subject_id FROM run WHERE id = $1", run_id)
    return UUID(str(agent_id)), str(subject_id)


async def _ask_again(
    tx: Tx, arrival: Arrival, subjects: SubjectKeys, question: OpenQuestion, waits: Suspension, reason: str
) -> None:
    """The person is asked the same question again, and the run goes on waiting."""
    _, subject_id = await _agent_and_subject(tx, question.run_id)
    arguments = None
    if waits.arguments:
        unsealer = Unsealer(tx, subjects)
        arguments = await unsealer.open(waits.arguments, subject_id, f"{question.run_id}/{waits.step}", "arguments")
    await _answer(tx, arrival, question.asked_by, question_repeated(reason, waits.name, arguments), subject_id)


async def _answer(tx: Tx, arrival: Arrival, run_id: UUID, text: str, subject_id: str) -> None:
    """Sends a text to the message's conversation while the run goes on waiting. It is erased with `subject_id`."""
    assert arrival.origin
    await send_reply(
        tx,
        run_id,
        text,
        subject_id=subject_id,
        session_key=arrival.session_key,
        channel_id=arrival.origin.channel_id,
        conversation_id=arrival.origin.conversation_id,
        reply_to=arrival.origin.vendor_message_id,
        occasion=arrival.message_id,
    )


async def _is_busy(tx: Tx, session_key: str) -> bool:
    return bool(
        await tx.sql(
            """
            SELECT 1
            FROM run
            WHERE tenant_id = $1 AND session_key = $2 AND status IN ('queued', 'running')
            LIMIT 1
            """,
            tx.tenant_id,
            session_key,
        )
    )


async def _refuse(tx: Tx, arrival: Arrival, run_id: UUID) -> None:
    error = "the session is busy and its agent rejects messages meanwhile"
    assert arrival.origin
    await tx.decide(run_stream(run_id), Fail(arrival.session_key, "refused", error))
    await projections.failed(tx, run_id, "refused", error)
    await send_reply(
        tx,
        run_id,
        BUSY,
        subject_id=arrival.subject_id,
        session_key=arrival.session_key,
        channel_id=arrival.origin.channel_id,
        conversation_id=arrival.origin.conversation_id,
        reply_to=arrival.origin.vendor_message_id,
    )
