"""The journal of a run under execution: turns commands into events and hands them to the group write."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Literal

from infra.clock import uuid7
from infra.lanes.effects import Effects, ItemEnded
from infra.postgres.tx import derived_id, publications
from protos.catalog import CHANNEL_OUTBOUND, USAGE_RECORDS
from protos.messages.channel import SendMessage
from services.agent.execution.context import RunContext
from services.agent.execution.conversation import Conversation
from services.agent.execution.group_write import (
    Begun,
    Completion,
    EndedStep,
    GroupWriter,
    MessagesArrived,
    ReplyMessage,
    RunStopped,
    RunWrite,
    Used,
)
from services.agent.execution.load import RunRow
from services.agent.execution.outcome import Reply
from services.agent.execution.usage import MeteredCall, usage_id, usage_record
from services.agent.models.contract import Usage
from services.agent.runs.domain import (
    BeginStep,
    Command,
    EndStep,
    FailAttempt,
    Start,
    TakeMessages,
    decide,
    evolve,
)
from services.agent.runs.events import Event
from services.agent.runs.metering import seconds_used
from services.agent.runs.publishing import RUN
from services.agent.runs.replies import sent_files


class RunJournal:
    """Records one run. Writes that only report a past fact are submitted and not awaited; they are committed in order,
    often in one group with the next write. Writes that begin something are awaited, and with them all before.

    The start of the run is held back, and the end of a step for the rest of the turn of the event loop: with the start
    of the next step, or with the end of the run, they are one write.
    """

    def __init__(self, context: RunContext, effects: Effects, writer: GroupWriter) -> None:
        self._context = context
        self._effects = effects
        self._writer = writer
        self._stream_id = str(context.run_id)
        self._submitted: list[tuple[asyncio.Future[None], RunWrite]] = []
        # A write that may be refused blocks the others: they would continue a version that never comes to be.
        self._turn = asyncio.Lock()
        self._held: RunWrite | None = None
        """The write that is held back; the next one continues it."""

    async def settle(self) -> None:
        """Returns after the commit of all submitted writes. Raises the error of the first that failed."""
        if self._held:
            self._submit(self._held)
        while self._submitted:
            future, write = self._submitted[0]
            try:
                await future
            finally:
                if self._submitted and self._submitted[0][0] is future:
                    del self._submitted[0]
            self._context.messages = write.messages

    def start(self, command: Start, model: str) -> None:
        """The run starts. The next write records it too; it raises RunStopped if the run is to be cancelled."""
        self._held = self._write(command, begins=True)
        self._held.started_model = model

    async def begin(
        self, command: BeginStep, span_id: str | None, lost: MeteredCall | None, expected_messages: int | None
    ) -> None:
        """Commits the start of a step, and the usage of the attempt before if that one was `lost`.

        Raises RunStopped, and MessagesArrived if the run has other than the expected messages.
        """

        def fill(write: RunWrite) -> None:
            write.begun.append(Begun(command.step, command.kind, command.name, command.attempt, span_id))
            if lost:
                self._use(write, command.step, command.attempt - 1, lost)

        await self._write_or_restore(command, fill, expected_messages)

    async def end(
        self,
        command: EndStep,
        metered: MeteredCall | None,
        recorded: Callable[[], None] | None = None,
    ) -> None:
        """Submits the end of a step with its usage, in this turn of the event loop or as a part of the next write.
        `recorded` is called after its commit."""
        async with self._turn:
            write = self._write(command)
            status: Literal["completed", "failed"] = "failed" if command.content is None else "completed"
            write.ended.append(EndedStep(command.step, status, command.duration_ms, command.error))
            if metered:
                self._use(write, command.step, command.attempts, metered)
            if recorded:
                write.recorded.append(recorded)
            self._held = write
            asyncio.get_running_loop().call_soon(self._submit_if_held, write)

    async def fail_attempt(self, command: FailAttempt, lost: MeteredCall | None) -> None:
        """Commits the end of an attempt that another one will follow."""
        async with self._turn:
            write = self._write(command)
            if lost:
                self._use(write, command.step, command.attempt, lost)
            self._submit(write)
        await self.settle()

    async def refuse(self, begin: BeginStep, end: EndStep) -> None:
        """Submits a step that is not made."""
        async with self._turn:
            write = self._write(begin, end)
            write.begun.append(Begun(begin.step, begin.kind, begin.name, begin.attempt, None))
            write.ended.append(EndedStep(end.step, "failed", end.duration_ms, end.error))
            self._submit(write)

    async def take_messages(self, command: TakeMessages) -> None:
        async with self._turn:
            self._submit(self._write(command))

    async def complete(
        self, row: RunRow, conversation: Conversation, reply: Reply, expected_messages: int
    ) -> ItemEnded:
        """Commits the end of the run with its reply, and the end of the lane's item.

        Raises RunStopped, and MessagesArrived if the run has other than the expected messages.
        """
        context, command = self._context, self._context.completion(reply)

        def fill(write: RunWrite) -> None:
            context.publish_end(write.out, context.state.n, reply)
            to_person = self._reply_message(row, conversation, reply)
            write.completion = Completion(
                self._effects.seq, self._effects.may_go_on, command.reply, command.calls, to_person
            )
            if seconds := seconds_used(context.state, context.origin):
                self._record_use(write, Used(seconds, Usage()))

        write = await self._write_or_restore(command, fill, expected_messages)
        return ItemEnded(write.next)

    def _reply_message(self, row: RunRow, conversation: Conversation, reply: Reply) -> ReplyMessage | None:
        if not reply.text or row.channel_id is None or conversation.conversation_id is None:
            return None
        run_id, n = self._context.run_id, self._context.state.n
        delivery_id = derived_id(run_id, "delivery", n)
        message = SendMessage(
            delivery_id=delivery_id,
            channel_id=row.channel_id,
            session_key=row.session_key,
            conversation_id=conversation.conversation_id,
            text=reply.text,
            run_id=run_id,
            reply_to=conversation.reply_to,
            subject_id=row.subject_id,
            files=sent_files(reply.files),
            sender=self._context.origin.sender,
        )
        buffer = self._context.database.collector(row.tenant_id)
        # The group write draws the position, and puts it in place of the 0 in header and body.
        message_id = derived_id(run_id, "SendMessage", n)
        buffer.send(CHANNEL_OUTBOUND, message, key=row.session_key, position=0, message_id=message_id)
        return ReplyMessage(delivery_id, row.session_key, buffer.messages[0])

    async def _write_or_restore(
        self, command: Command, fill: Callable[[RunWrite], None], expected_messages: int | None
    ) -> RunWrite:
        async with self._turn:
            before, held = self._context.state, self._held
            write = self._write(command, begins=True, expected_messages=expected_messages)
            fill(write)
            self._submit(write)
            try:
                await self.settle()
            except (RunStopped, MessagesArrived):
                self._context.state, self._held = before, held
                self._context.messages = write.messages
                if held and held.ended:
                    self._submit(held)
                raise
        return write

    def _write(self, *commands: Command, begins: bool = False, expected_messages: int | None = None) -> RunWrite:
        """A write that continues the one that is held back, with the events of the commands and all messages that they
        publish. Moves the state on."""
        context = self._context
        write = RunWrite(
            lease=self._effects.lease,
            run_id=context.run_id,
            tenant_id=context.tenant_id,
            version=context.state.n,
            out=context.database.collector(context.tenant_id),
            begins=begins,
            expected_messages=expected_messages,
        )
        if self._held:
            write.continue_from(self._held)
        for command in commands:
            for event in decide(command, context.state):
                self._record(write, event)
                context.state = evolve(context.state, event)
        return write

    def _record(self, write: RunWrite, event: Event) -> None:
        event_id = uuid7()
        write.events.append((event_id, event))
        for id_, (topic, key, message) in publications(RUN, self._stream_id, event_id, event):
            write.out.publish(topic, message, key=key, message_id=id_)

    def _submit(self, write: RunWrite) -> None:
        """Submits a write that contains the one that is held back."""
        self._held = None
        self._submitted.append((self._writer.submit(write), write))

    def _submit_if_held(self, write: RunWrite) -> None:
        if self._held is write:
            self._submit(write)

    def _use(self, write: RunWrite, step: int, attempt: int, metered: MeteredCall) -> None:
        id_ = usage_id(self._context.run_id, step, attempt)
        record = usage_record(self._context, id_, metered)
        self._record_use(write, Used(record, metered.usage))

    def _record_use(self, write: RunWrite, used: Used) -> None:
        write.out.publish(USAGE_RECORDS, used.record, key=self._context.tenant_id)
        write.used.append(used)
