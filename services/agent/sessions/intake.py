"""Intake of a message from a channel or the API: one transaction assigns it to a run and queues that run.

Rows are locked in one order: session, run, lane. The executor also locks the run before the lane.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
from opentelemetry import trace

from infra.clock import utcnow, uuid7
from infra.errors import Forbidden, InvalidMessage
from infra.lanes import lane as lanes
from infra.postgres.tx import Tx
from infra.security.audit import audit, audit_refusal
from infra.security.crypto import DataKey
from infra.security.subjects import Erased, SubjectKeys
from services.agent.definitions.approvers import may_decide
from services.agent.definitions.store import load, queue_mode
from services.agent.lanes import RUNS, queue_run
from services.agent.models.contract import AssistantTurn, Image, Tool, ToolTurn, Turn
from services.agent.runs import projections
from services.agent.runs.cancelling import cancel, fail
from services.agent.runs.content import Unsealer
from services.agent.runs.decisions import decision_in, is_unclear, settle, suspension
from services.agent.runs.domain import Fail, Suspension
from services.agent.runs.notices import BUSY, INTERRUPTED, NOT_YOURS, TAKEN_OVER, question_repeated
from services.agent.runs.publishing import stream as run_stream
from services.agent.runs.replies import send_reply
from services.agent.sessions.domain import Accept, Busy, Session, begins_at, decide, evolve
from services.agent.sessions.events import MessageAccepted
from services.agent.sessions.publishing import stream


@dataclass(frozen=True)
class Origin:
    """The place in a channel that a message comes from and that its reply goes to."""

    channel_id: UUID
    conversation_id: str
    vendor_message_id: str


class Context(msgspec.Struct, frozen=True):
    """The context that a caller of the API gives with a message. It replaces the session's own history."""

    history: tuple[Turn, ...]
    """The conversation before the message."""
    system: str | None = None
    """Instructions that are added to the agent's own system prompt."""
    output_schema: dict[str, Any] | None = None
    """JSON Schema of the answer."""
    tools: tuple[Tool, ...] = ()
    """The caller's own tools, which the model may call."""
    must_call: bool = False
    """The model has to call one of these tools."""
    parallel: bool = True
    """The model may call several of them at once."""
    since: tuple[AssistantTurn | ToolTurn, ...] = ()
    """The calls of these tools that the model has already made for the message, and their results."""
    images: tuple[Image, ...] = ()
    """Images of the message."""
    is_complete: bool = True
    """False: there are only images, and the model is shown the session's own history."""


@dataclass(frozen=True)
class Arrival:
    """A message that came in."""

    message_id: UUID
    agent_id: UUID
    session_key: str
    subject_id: str
    text: str
    received_at: datetime
    origin: Origin | None = None
    """None if the message came by the API."""
    idempotency_key: str | None = None
    """Of the API's caller."""
    new_run_id: UUID | None = None
    """Id of the run that the message opens; None: a new id."""
    context: Context | None = None
    """None: the model is shown the session's own history."""
    parent: str = ""
    """The session that this one branched off from, such as a channel's for a thread; empty if there is none."""
    names: tuple[str, ...] = ()
    """Of its author, as approvers are named."""


# One statement, so that messages cost one round trip. It locks nothing that is not locked already: the sessions and the
# positions by `_lock_session` or `lock_arrivals`. A message refers to a run that the statement may insert; the server
# checks this at its end.
_STORE_ARRIVALS = """
WITH opened AS (
    INSERT INTO run (id, tenant_id, session_key, agent_id, subject_id, channel_id, trace_id)
    SELECT * FROM unnest($1::uuid[], $2::text[], $3::text[], $4::uuid[], $5::text[], $6::uuid[], $7::text[])
), said AS (
    INSERT INTO message (tenant_id, message_id, session_key, seq, run_id, subject_id, text, conversation,
                         vendor_message_id, idempotency_key, received_at, decides, context)
    SELECT * FROM unnest($8::text[], $9::uuid[], $10::text[], $11::bigint[], $12::uuid[], $13::text[], $14::bytea[],
                         $15::bytea[], $16::text[], $17::text[], $18::timestamptz[], $19::boolean[], $20::bytea[])
), moved AS (
    UPDATE session
    SET messages = n.messages, run_id = n.run_id, run_messages = n.run_messages, run_waits = n.run_waits
    FROM unnest($21::text[], $22::text[], $23::bigint[], $24::uuid[], $25::int[], $26::boolean[])
        AS n(tenant_id, session_key, messages, run_id, run_messages, run_waits)
    WHERE session.tenant_id = n.tenant_id AND session.session_key = n.session_key
)
UPDATE sequence
SET last = n.last
FROM unnest($27::text[], $28::text[], $29::text[], $30::bigint[]) AS n(tenant_id, name, key, last)
WHERE sequence.tenant_id = n.tenant_id AND sequence.name = n.name AND sequence.key = n.key
"""


class ArrivalRows:
    """The rows of messages that were decided. `write` stores them all."""

    def __init__(self) -> None:
        self.runs: list[tuple[Any, ...]] = []
        """From `run_row`."""
        self.messages: list[tuple[Any, ...]] = []
        """From `message_row`."""
        self.sessions: list[tuple[Any, ...]] = []
        """Tenant, session key, number of messages, and the fields of `Session`."""
        self.positions: list[tuple[str, str, str, int]] = []
        """Tenant, name and key of a sequence, and its last position."""

    async def write(self, tx: Tx) -> None:
        tables = (self.runs, 7), (self.messages, 13), (self.sessions, 6), (self.positions, 4)
        await tx.sql(
            _STORE_ARRIVALS,
            *([row[n] for row in rows] for rows, columns in tables for n in range(columns)),
        )


def run_row(tenant_id: str, arrival: Arrival, run_id: UUID) -> tuple[Any, ...]:
    """A row of `ArrivalRows.runs`, in the trace of now."""
    context = trace.get_current_span().get_span_context()
    return (
        run_id,
        tenant_id,
        arrival.session_key,
        arrival.agent_id,
        arrival.subject_id,
        arrival.origin.channel_id if arrival.origin else None,
        f"{context.trace_id:032x}" if context.is_valid else None,
    )


def message_row(tenant_id: str, arrival: Arrival, event: MessageAccepted, seq: int, key: DataKey) -> tuple[Any, ...]:
    """A row of `ArrivalRows.messages`."""
    origin, context = arrival.origin, (tenant_id, arrival.subject_id, str(arrival.message_id))
    given = msgspec.json.encode(arrival.context).decode() if arrival.context else None
    return (
        tenant_id,
        arrival.message_id,
        arrival.session_key,
        seq,
        event.run_id,
        arrival.subject_id,
        event.text,
        key.seal(origin.conversation_id, *context, "conversation") if origin else None,
        origin.vendor_message_id if origin else None,
        arrival.idempotency_key,
        arrival.received_at,
        event.decides,
        key.seal(given, *context, "context") if given else None,
    )


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
    decision = None if taken_over else decision_in(arrival.text)
    # Only a person in a chat can be asked again. A caller of the API has a call for approvals.
    unclear = not taken_over and arrival.origin is not None and is_unclear(arrival.text)
    asking = await _asking(tx, unfinished, arrival) if decision or unclear else None
    if (decision or unclear) and arrival.parent and not (asking and asking.may_decide):
        # The question stands in the parent session, and the person answers it in a thread.
        of_parent = await _asking(tx, await open_runs(tx, arrival.parent, None, every_run=False), arrival)
        asking = of_parent if of_parent and (asking is None or of_parent.may_decide) else asking
    if asking and not asking.may_decide:
        if unclear:
            # In a room this is an ordinary message.
            asking = None
        elif arrival.origin is None:
            raise Forbidden(f"run {asking.run_id}: the agent's approvers do not include this client")
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
        decides=asking.run_id if asking else None,
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
    tx.append(stream(tx.tenant_id, arrival.session_key), event, event_id=arrival.message_id)
    rows = ArrivalRows()
    if event.opens:
        rows.runs.append(run_row(tx.tenant_id, arrival, event.run_id))
    rows.messages.append(message_row(tx.tenant_id, arrival, event, total + 1, key))
    of_session = tx.tenant_id, arrival.session_key, total + 1, session.run_id, session.messages, session.waits
    rows.sessions.append(of_session)
    await rows.write(tx)
    if event.decides:
        waits = await suspension(tx, event.run_id)
        act = f"subject:{arrival.subject_id}", f"run.{decision}", "run", str(event.run_id)
        about = {"step": str(waits.step), "tool": waits.name}
        if asking and not asking.may_decide:
            audit_refusal(tx, *act, **about)
            await _answer(tx, arrival, event.run_id, NOT_YOURS, arrival.subject_id)
        elif decision:
            await settle(tx, event.run_id, waits.step, decision, arrival.subject_id)
            audit(tx, *act, **about)
        else:
            await _ask_again(tx, arrival, subjects, event.run_id, waits)
        return event.run_id
    not_before = begins_at(session, utcnow())
    if taken_over:
        await fail(tx, event.run_id, arrival.session_key, "cancelled", TAKEN_OVER)
    elif busy:
        await _refuse(tx, arrival, event.run_id)
    elif event.opens:
        if mode == "interrupt":
            for run_id in unfinished:
                await cancel(tx, run_id, INTERRUPTED)
        queue_run(tx, event.run_id, arrival.session_key, not_before=not_before)
    elif session.waits:
        # If a worker already has the item, it waits for the run's row, which this transaction has locked.
        await lanes.postpone(tx, RUNS, arrival.session_key, event.run_id, not_before)
    return event.run_id


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


class Asking(NamedTuple):
    """A run that waits for an approval."""

    run_id: UUID
    may_decide: bool
    """The author of the message may give it."""


async def _asking(tx: Tx, unfinished: Mapping[UUID, OpenRun], arrival: Arrival) -> Asking | None:
    """The first run that waits for an approval of the message's author, or else the first that waits for the approval
    of another person. A run that waits for another agent is neither."""
    others = None
    for run_id, run in unfinished.items():
        if run.status == "waiting":
            waits = (await tx.load(run_stream(run_id))).suspended
            if waits and waits.reason == "approval":
                approvers = (await load(tx, run.agent_id)).definition.approvers
                asked = arrival.subject_id == await _subject(tx, run_id)
                if may_decide(approvers, arrival.names, asked=asked):
                    return Asking(run_id, True)
                others = others or Asking(run_id, False)
    return others


async def _subject(tx: Tx, run_id: UUID) -> str:
    [(subject_id,)] = await tx.sql("SELECT subject_id FROM run WHERE id = $1", run_id)
    return str(subject_id)


async def _ask_again(tx: Tx, arrival: Arrival, subjects: SubjectKeys, run_id: UUID, waits: Suspension) -> None:
    """The answer was unclear: the person is asked the same question again, and the run goes on waiting."""
    subject_id = await _subject(tx, run_id)
    arguments = None
    if waits.arguments:
        unsealer = Unsealer(tx, subjects)
        arguments = await unsealer.open(waits.arguments, subject_id, f"{run_id}/{waits.step}", "arguments")
    await _answer(tx, arrival, run_id, question_repeated(waits.name, arguments), subject_id)


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
        answers=arrival.message_id,
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
