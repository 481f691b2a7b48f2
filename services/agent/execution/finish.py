"""Writes the outcome of an execution: the run's last events, its published result, and the reply to the person."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from uuid import UUID

import msgspec

from infra.errors import NotYet
from infra.observe.logs import get_logger
from infra.postgres.tx import Tx, derived_id
from infra.security.subjects import Erased, SubjectKeys
from infra.stores.cache import Cache
from services.agent.execution.children import open_child
from services.agent.execution.context import RunContext
from services.agent.execution.conversation import Conversation, keep_summary
from services.agent.execution.load import RunRow, load_runs
from services.agent.execution.outcome import Ended, Reply, Suspended
from services.agent.execution.start import StartedRun, lock
from services.agent.runs import projections
from services.agent.runs.content import StoredFile
from services.agent.runs.decisions import resume_parent
from services.agent.runs.domain import Run, messages_at
from services.agent.runs.family import child_id, child_state, first_asker
from services.agent.runs.metering import record_seconds
from services.agent.runs.notices import FAILED
from services.agent.runs.progress import tell_end
from services.agent.runs.publishing import stream
from services.agent.runs.replies import send_reply
from services.agent.sessions.requeue import fail_run, lock_session

_log = get_logger("agent.runs")


async def finish(
    tx: Tx,
    subjects: SubjectKeys,
    cache: Cache,
    run_id: UUID,
    started: StartedRun | None,
    outcome: Reply | Ended | Suspended,
) -> None:
    """Writes the outcome in the transaction that ends the lane's item. `started`: None if the run did not start.

    Raises NotYet if the run has to go on instead: a message or another agent's answer has come meanwhile.
    """
    if isinstance(outcome, Ended):
        await lock_session(tx, run_id)
    row = await lock(tx, run_id)
    if row.is_over:
        return
    if row.cancel_reason:
        outcome = Ended("cancelled", row.cancel_reason)
    loaded = started.conversation if started else None
    match outcome:
        case Reply():
            assert started
            await _complete(tx, row, started.context, outcome)
            await _send(tx, row, loaded, outcome.text, outcome.files)
        case Suspended():
            assert started
            await _suspend(tx, subjects, row, started.context.approvers, outcome)
            if row.parent_run_id:
                await _tell_asker(tx, subjects, row, outcome.notice)
            else:
                await _send(tx, row, loaded, outcome.notice)
        case Ended():
            await _fail(tx, row, loaded, outcome)
            if outcome.notice is None and row.channel_id:
                tx.after_commit(partial(tell_end, cache, row.id, row.session_key))


async def give_up(tx: Tx, subjects: SubjectKeys, run_id: UUID, error: str) -> None:
    """Ends a run that no worker can execute. The person gets a notice; the dead letter of the item holds the reason."""
    await lock_session(tx, run_id)
    row = await lock(tx, run_id)
    if row.is_over:
        return
    loaded = (await load_runs(tx, subjects, [run_id]))[run_id]
    try:
        conversation: Conversation | None = loaded.conversation(len(loaded.messages))
    except Erased:
        conversation = None
    await _fail(tx, row, conversation, Ended("failed", error, FAILED))


async def _complete(tx: Tx, row: RunRow, context: RunContext, reply: Reply) -> None:
    [(messages,)] = await tx.sql("SELECT count(*) FROM message WHERE run_id = $1 AND NOT decides", row.id)
    if messages > _answered_messages(await tx.load(stream(row.id))):
        # This run has to answer the new message, too. A later one cannot join: joining needs the row, locked here.
        raise NotYet(timedelta(0), "a message came as the run was about to end")
    command = context.completion(reply)
    events = await tx.decide(stream(row.id), command)
    context.publish_end(tx, events[0].n, reply)
    await projections.completed(tx, row.id, command.reply, command.calls)
    await record_seconds(tx, row.id)
    if reply.summary:
        await keep_summary(tx, context.key, row.subject_id, row.session_key, row.id, reply.summary)
    if row.parent_run_id:
        await resume_parent(tx, row.id)
    _log.info("run completed", **row.log_fields)


async def _suspend(
    tx: Tx, subjects: SubjectKeys, row: RunRow, approvers: tuple[str, ...], suspended: Suspended
) -> None:
    """`approvers`: the channel's; empty: the agent's."""
    command = suspended.command
    if command.reason == "agent":
        child = await child_state(tx, subjects, child_id(row.id, command.step))
        if child and child.is_over:
            # When the child ended, this run did not wait yet, so the child did not resume it. A child that ends from
            # now on waits for the lock on this run's row.
            raise NotYet(timedelta(0), "another agent answered as the run was about to wait for it")
    # By the clock of the times at which channels receive messages, so that an early answer is known as such.
    [(now,)] = await tx.sql("SELECT clock_timestamp()")
    await tx.decide(stream(row.id), msgspec.structs.replace(command, at=now))
    await projections.suspended(tx, row.id, command.reason, command.text)
    _log.info("run suspended", reason=command.text, **row.log_fields)
    for child_run in suspended.children:
        await open_child(tx, subjects, row.id, approvers, child_run)


async def _tell_asker(tx: Tx, subjects: SubjectKeys, row: RunRow, text: str | None) -> None:
    """Sends the text to the chat of the run that asked first, if it came from a channel."""
    if not text:
        return
    asker = await first_asker(tx, row.id)
    loaded = (await load_runs(tx, subjects, [asker]))[asker]
    try:
        conversation = loaded.conversation(len(loaded.messages))
    except Erased:
        return
    n = (await tx.load(stream(row.id))).n
    await _send(tx, loaded.row, conversation, text, occasion=derived_id(row.id, "notice", n))


async def _fail(tx: Tx, row: RunRow, loaded: Conversation | None, outcome: Ended) -> None:
    await fail_run(tx, row.id, row.session_key, outcome.status, outcome.error)
    levels = {"cancelled": _log.info, "failed": _log.error}
    levels.get(outcome.status, _log.warning)(f"run {outcome.status}", error=outcome.error, **row.log_fields)
    await _send(tx, row, loaded, outcome.notice)


async def _send(
    tx: Tx,
    row: RunRow,
    loaded: Conversation | None,
    text: str | None,
    files: tuple[StoredFile, ...] = (),
    occasion: UUID | None = None,
) -> None:
    """Sends the text to the person if the run came from a channel. `occasion`: as `send_reply`."""
    if text and loaded and row.channel_id and loaded.conversation_id is not None:
        await send_reply(
            tx,
            row.id,
            text,
            subject_id=row.subject_id,
            session_key=row.session_key,
            channel_id=row.channel_id,
            conversation_id=loaded.conversation_id,
            reply_to=loaded.reply_to,
            occasion=occasion,
            files=files,
        )


def _answered_messages(state: Run) -> int:
    """How many of its messages the run has been shown."""
    return max(messages_at(state, 0), *state.taken.values(), 0)
