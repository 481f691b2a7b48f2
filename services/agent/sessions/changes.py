"""A person edits or deletes a message that an agent has, or is about to answer.

The text is replaced, or the message taken back, while its run has not begun. A run that has begun gets the new text as
a further message. After the answer an edit changes nothing: the answer was given to the former text.
"""

from __future__ import annotations

from typing import NamedTuple
from uuid import UUID

from msgspec.structs import replace

from infra.errors import Transient
from infra.lanes import lane as lanes
from infra.postgres import event_store
from infra.postgres.tx import Tx
from infra.security.crypto import DataKey
from infra.security.subjects import Erased, SubjectKeys
from protos.catalog import AGENT_EVENTS
from protos.messages.agent import RunMessageDeleted
from protos.messages.channel import MessageChanged
from services.agent.lanes import RUNS
from services.agent.runs import projections
from services.agent.runs.cancelling import cancel
from services.agent.runs.content import SAID_CHARACTERS
from services.agent.runs.notices import DELETED
from services.agent.sessions import intake
from services.agent.sessions.arrivals import Arrival, Origin
from services.agent.sessions.domain import Session, begins_after
from services.agent.sessions.events import MessageWithdrawn
from services.agent.sessions.publishing import SESSION, stream

DELETED_TEXT = "[The person has deleted this message.]"
# More words than a decision has: an edit never approves a tool call.
_CORRECTION = "[The person has edited an earlier message. It now reads:]\n"


class _Stored(NamedTuple):
    id: UUID
    run_id: UUID
    subject_id: str
    text: bytes
    decides: bool
    changed: int
    """The order of the last change."""


class _Run(NamedTuple):
    status: str
    is_new: bool
    """It has never begun. One that goes on after a pause is queued, too."""
    never_began: bool
    """It is over, and has never begun: a person had taken the session over, or it was cancelled before."""


async def change(tx: Tx, subjects: SubjectKeys, changed: MessageChanged, sequence: str) -> None:
    """Raises Transient if the message has not been handled yet. `sequence` names the positions.

    Locks session, run, lane, as the intake of a message does.
    """
    assert tx.tenant_id
    rows = await tx.sql(
        """
        SELECT s.run_id, s.run_messages, s.run_waits, q.last, s.taken_over_by IS NOT NULL
        FROM session s JOIN sequence q ON q.tenant_id = s.tenant_id AND q.name = $3 AND q.key = s.session_key
        WHERE s.tenant_id = $1 AND s.session_key = $2
        FOR UPDATE OF s
        """,
        tx.tenant_id,
        changed.session_key,
        sequence,
    )
    if not rows or rows[0][3] < changed.position:
        raise Transient("the message of the change has not been handled yet")
    session, taken_over = Session(*rows[0][:3]), rows[0][4]
    try:
        key = await subjects.key(tx, tx.tenant_id, changed.subject_id)
    except Erased:
        return
    messages = await _messages(tx, changed, key)
    if not messages:
        return  # It was dropped, because its person was erased.
    if changed.deleted:
        for message in messages:
            await _delete(tx, changed, message, await _lock_run(tx, message.run_id), session, key)
        return
    original, message = messages[0], messages[-1]
    if original.decides or changed.order <= original.changed:
        return  # A decision was taken by its first text.
    text = changed.text if message is original else _CORRECTION + changed.text
    context = tx.tenant_id, message.subject_id, str(message.id), "text"
    if key.open(message.text, *context) == text:
        return
    run = await _lock_run(tx, message.run_id)
    # A run that ended before it began has answered nothing: later runs are shown the new text.
    is_unread = run.never_began or await _has_not_begun(tx, changed.session_key, message.run_id, run, session)
    if is_unread and not (changed.has_files and message is original):
        await tx.sql(
            "UPDATE message SET text = $3 WHERE tenant_id = $1 AND message_id = $2",
            tx.tenant_id,
            message.id,
            key.seal(text, *context),
        )
        if run.never_began:
            await _forget_summary(tx, changed.session_key, message.id)
    elif is_unread or run.status in projections.STOPPABLE or taken_over:
        await intake.take_in(tx, _correction(tx, changed), subjects)
    await tx.sql(
        "UPDATE message SET changed = $3 WHERE tenant_id = $1 AND message_id = $2",
        tx.tenant_id,
        original.id,
        changed.order,
    )


async def _messages(tx: Tx, changed: MessageChanged, key: DataKey) -> list[_Stored]:
    """The message, and then the further messages with its edits, in order. Empty if it is not stored."""
    rows = await tx.sql(
        """
        SELECT m.message_id, m.run_id, m.subject_id, m.text, m.decides, m.changed
        FROM message o JOIN message m
            ON m.tenant_id = o.tenant_id AND m.session_key = o.session_key AND m.subject_id = o.subject_id
            AND m.seq >= o.seq AND m.vendor_message_id = o.vendor_message_id
        WHERE o.tenant_id = $1 AND o.message_id = $2
        ORDER BY m.seq
        """,
        tx.tenant_id,
        changed.message_id,
    )
    stored = [_Stored(*row) for row in rows]
    assert tx.tenant_id
    edits = [
        one
        for one in stored[1:]
        if key.open(one.text, tx.tenant_id, one.subject_id, str(one.id), "text").startswith(_CORRECTION)
    ]
    return [*stored[:1], *edits]


async def _lock_run(tx: Tx, run_id: UUID) -> _Run:
    """A worker that begins the run at the same time waits, and then reads the changed message."""
    [run] = await tx.sql(
        """
        SELECT status, status = 'queued' AND started_at IS NULL, status <> ALL($2::text[]) AND started_at IS NULL
        FROM run
        WHERE id = $1
        FOR UPDATE
        """,
        run_id,
        [*projections.STOPPABLE],
    )
    return _Run(*run)


async def _has_not_begun(tx: Tx, session_key: str, run_id: UUID, run: _Run, session: Session) -> bool:
    """True if no worker has the run. None gets it before this transaction ends: its lane is locked."""
    return run.is_new and await lanes.postpone(tx, RUNS, session_key, run_id, begins_after(session))


def _correction(tx: Tx, changed: MessageChanged) -> Arrival:
    assert tx.cause
    return Arrival(
        message_id=tx.cause.id,
        agent_id=changed.agent_id,
        session_key=changed.session_key,
        subject_id=changed.subject_id,
        text=_CORRECTION + changed.text,
        received_at=changed.changed_at,
        origin=Origin(changed.channel_id, changed.conversation_id, changed.vendor_message_id),
    )


async def _delete(tx: Tx, changed: MessageChanged, message: _Stored, run: _Run, session: Session, key: DataKey) -> None:
    assert tx.tenant_id
    leaves = False
    if not message.decides and await _has_not_begun(tx, changed.session_key, message.run_id, run, session):
        [(others,)] = await tx.sql("SELECT count(*) - 1 FROM message WHERE run_id = $1 AND NOT decides", message.run_id)
        leaves = others > 0
        if not leaves:
            await cancel(tx, message.run_id, DELETED)
    withdrawn = MessageWithdrawn(message_id=message.id, run_id=message.run_id, leaves=leaves)
    tx.append(stream(tx.tenant_id, changed.session_key), withdrawn)
    await _remove_text(tx, message.id)
    await _forget_summary(tx, changed.session_key, message.id)
    if leaves:
        await tx.sql("DELETE FROM message WHERE tenant_id = $1 AND message_id = $2", tx.tenant_id, message.id)
        await tx.sql(
            """
            UPDATE session SET run_messages = run_messages - 1
            WHERE tenant_id = $1 AND session_key = $2 AND run_id = $3
            """,
            tx.tenant_id,
            changed.session_key,
            message.run_id,
        )
    else:
        await tx.sql(
            """
            UPDATE message SET text = $3, context = NULL, changed = 9223372036854775807
            WHERE tenant_id = $1 AND message_id = $2
            """,
            tx.tenant_id,
            message.id,
            key.seal(DELETED_TEXT, tx.tenant_id, message.subject_id, str(message.id), "text"),
        )
        await _publish_deletion(tx, changed, message, key)


async def _forget_summary(tx: Tx, session_key: str, message_id: UUID) -> None:
    """The message was changed or deleted. If the summary covers it, the next run makes a new one. A run that has begun
    may have read its former text: it keeps no summary."""
    await tx.sql(
        """
        UPDATE session
        SET message_deleted_at = clock_timestamp()
        WHERE tenant_id = $1 AND session_key = $2
        """,
        tx.tenant_id,
        session_key,
    )
    await tx.sql(
        """
        UPDATE session
        SET summary = NULL, summary_subject = NULL, summary_about = '{}', summary_seq = 0
        WHERE tenant_id = $1 AND session_key = $2
            AND summary_seq >= (SELECT seq FROM message WHERE tenant_id = $1 AND message_id = $3)
        """,
        tx.tenant_id,
        session_key,
        message_id,
    )


async def _publish_deletion(tx: Tx, changed: MessageChanged, message: _Stored, key: DataKey) -> None:
    """Tells memory the words of the person in the other messages of the run."""
    assert tx.tenant_id
    rows = await tx.sql(
        """
        SELECT message_id, subject_id, text
        FROM message
        WHERE run_id = $1 AND NOT decides AND changed < 9223372036854775807
        ORDER BY seq
        """,
        message.run_id,
    )
    said = ""
    if {subject_id for _, subject_id, _ in rows} == {message.subject_id}:
        texts = [key.open(text, tx.tenant_id, message.subject_id, str(id_), "text") for id_, _, text in rows]
        said = "\n".join(texts)[:SAID_CHARACTERS]
    deleted = RunMessageDeleted(
        run_id=message.run_id,
        session_key=changed.session_key,
        message_id=message.id,
        subject_id=message.subject_id,
        channel_id=changed.channel_id,
        said=said,
    )
    tx.publish(AGENT_EVENTS, deleted, key=changed.session_key)


async def _remove_text(tx: Tx, message_id: UUID) -> None:
    """Removes the text from the fact of the message, which has the message's id."""
    rows = await tx.sql("SELECT event_id, type, schema_version, data FROM event WHERE event_id = $1", message_id)
    emptied = {id_: replace(SESSION.events.decode(*stored), text=b"") for id_, *stored in rows}
    await event_store.rewrite(await tx.connection(), emptied)
