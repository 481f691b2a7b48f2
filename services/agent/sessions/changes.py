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


async def change(tx: Tx, subjects: SubjectKeys, changed: MessageChanged, sequence: str) -> None:
    """Raises Transient if the message has not been handled yet. `sequence` names the positions.

    Locks session, run, lane, as the intake of a message does.
    """
    assert tx.tenant_id
    rows = await tx.sql(
        """
        SELECT s.run_id, s.run_messages, s.run_waits, q.last
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
    session = Session(*rows[0][:3])
    found = await tx.sql(
        """
        SELECT run_id, subject_id, text, decides, changed
        FROM message
        WHERE tenant_id = $1 AND message_id = $2
        """,
        tx.tenant_id,
        changed.message_id,
    )
    # None: it was dropped, because its person was erased.
    for row in found:
        message = _Stored(*row)
        try:
            key = await subjects.key(tx, tx.tenant_id, message.subject_id)
        except Erased:
            return
        # Locks the run: a worker that begins it at the same time waits, and then reads the changed message.
        [run] = await tx.sql(
            "SELECT status, status = 'queued' AND started_at IS NULL FROM run WHERE id = $1 FOR UPDATE", message.run_id
        )
        if changed.deleted:
            await _delete(tx, changed, message, _Run(*run), session, key)
        else:
            await _edit(tx, subjects, changed, message, _Run(*run), session, key)


async def _edit(
    tx: Tx,
    subjects: SubjectKeys,
    changed: MessageChanged,
    message: _Stored,
    run: _Run,
    session: Session,
    key: DataKey,
) -> None:
    assert tx.tenant_id
    context = tx.tenant_id, message.subject_id, str(changed.message_id), "text"
    # A decision was taken by its first text.
    if message.decides or changed.order <= message.changed or key.open(message.text, *context) == changed.text:
        return
    text = message.text
    if not changed.has_files and await _has_not_begun(tx, changed.session_key, message.run_id, run, session):
        text = key.seal(changed.text, *context)
    elif run.status in projections.STOPPABLE:
        await intake.take_in(tx, _correction(tx, changed), subjects)
    await tx.sql(
        "UPDATE message SET text = $3, changed = $4 WHERE tenant_id = $1 AND message_id = $2",
        tx.tenant_id,
        changed.message_id,
        text,
        changed.order,
    )


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
    withdrawn = MessageWithdrawn(message_id=changed.message_id, run_id=message.run_id, leaves=leaves)
    tx.append(stream(tx.tenant_id, changed.session_key), withdrawn)
    await _remove_text(tx, changed.message_id)
    await _forget_summary(tx, changed)
    if leaves:
        await tx.sql("DELETE FROM message WHERE tenant_id = $1 AND message_id = $2", tx.tenant_id, changed.message_id)
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
            changed.message_id,
            key.seal(DELETED_TEXT, tx.tenant_id, message.subject_id, str(changed.message_id), "text"),
        )
        await _publish_deletion(tx, changed, message, key)


async def _forget_summary(tx: Tx, changed: MessageChanged) -> None:
    """If the summary covers the message, the next run makes a new one. A run that has begun may have read the message:
    it keeps no summary."""
    await tx.sql(
        """
        UPDATE session
        SET message_deleted_at = clock_timestamp()
        WHERE tenant_id = $1 AND session_key = $2
        """,
        tx.tenant_id,
        changed.session_key,
    )
    await tx.sql(
        """
        UPDATE session
        SET summary = NULL, summary_subject = NULL, summary_about = '{}', summary_seq = 0
        WHERE tenant_id = $1 AND session_key = $2
            AND summary_seq >= (SELECT seq FROM message WHERE tenant_id = $1 AND message_id = $3)
        """,
        tx.tenant_id,
        changed.session_key,
        changed.message_id,
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
        message_id=changed.message_id,
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
