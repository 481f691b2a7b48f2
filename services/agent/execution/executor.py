"""Executes runs: begins, has them answered, ends them. A run that was begun before goes on where its journal ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

import grpc.aio
import msgspec

from infra.clock import utcnow
from infra.errors import InvalidMessage, NotFound, NotYet, RetryLater, describe
from infra.lanes.effects import Effects
from infra.lanes.group import Group
from infra.observe import telemetry
from infra.observe.logs import get_logger
from infra.postgres.tx import Database, Tx, derived_id
from infra.security.crypto import Cipher
from infra.security.subjects import Erased, SubjectKeys
from protos.catalog import AGENT_EVENTS
from protos.messages import agent as public
from services.agent.definitions import store
from services.agent.definitions.store import StoredAgent
from services.agent.execution import children, conversation
from services.agent.execution.agent_loop import Answering, Peers, Reply
from services.agent.execution.budget import Spending
from services.agent.execution.concurrency import model_of, take_place
from services.agent.execution.conversation import Asked
from services.agent.execution.steps import Journal, Scope
from services.agent.execution.watch import Watch
from services.agent.models.library import Models
from services.agent.runs import projections
from services.agent.runs.cancelling import fail
from services.agent.runs.decisions import tell_parent
from services.agent.runs.domain import Complete, Limits, Mismatch, Run, Start, messages_at, remaining
from services.agent.runs.notices import FAILED, Ended, Suspended
from services.agent.runs.publishing import published, stream
from services.agent.runs.replies import say

_log = get_logger("agent.runs")

# Where a peer has an error inside; the run's own time limit ends it.
PEER_PAUSE = timedelta(seconds=5)


@dataclass(frozen=True)
class _Row:
    """The run as its row has it. channel_id: None where it came by the API."""

    id: UUID
    tenant_id: str
    session_key: str
    agent_id: UUID
    subject_id: str
    channel_id: UUID | None
    status: str
    cancel_reason: str | None
    depth: int
    limit_nanos: int | None
    parent_run_id: UUID | None

    @property
    def is_over(self) -> bool:
        return self.status not in projections.STOPPABLE


@dataclass(frozen=True)
class _Begun:
    """A run whose turn it is, with all that is needed to answer."""

    row: _Row
    agent: StoredAgent
    asked: Asked
    scope: Scope


@dataclass(frozen=True)
class _Around:
    """What else the agent knows of a run that is executed."""

    database: Database
    subjects: SubjectKeys
    tenant_id: str
    run_id: UUID

    async def arrived(self, skipped: int) -> Sequence[str]:
        # Nothing is written, so nothing has to be fenced.
        async with self.database.read_only(tenant_id=self.tenant_id) as tx:
            return await conversation.arrived(tx, self.subjects, self.run_id, skipped)

    async def child(self, step: int) -> children.State | None:
        async with self.database.read_only(tenant_id=self.tenant_id) as tx:
            return await children.state(tx, self.subjects, children.child_id(self.run_id, step))

    async def family(self) -> Sequence[UUID]:
        async with self.database.read_only(tenant_id=self.tenant_id) as tx:
            return await children.family(tx, self.run_id)


class Executor:
    """Executes one run at a time per session; the lane sees to that."""

    def __init__(
        self, database: Database, models: Models, peers: Peers, group: Group, watch: Watch, cipher: Cipher
    ) -> None:
        self._database = database
        self._models = models
        self._peers = peers
        self._group = group
        self._watch = watch
        self._cipher = cipher
        self._subjects = SubjectKeys(cipher)

    async def execute(self, run_id: UUID, effects: Effects, tx: Tx) -> None:
        """Raises Transient where the run is to go on later."""
        begun: _Begun | None = None
        try:
            begun = await self._begin(run_id, effects)
            if begun is None:
                return
            outcome: Reply | Ended | Suspended = await self._answer(begun, effects)
        except (Ended, Suspended) as stop:
            outcome = stop
        except (Mismatch, InvalidMessage, NotFound) as error:
            # The journal, or a peer, says that going on makes no sense.
            outcome = Ended("failed", describe(error), FAILED)
        except grpc.aio.AioRpcError as error:
            raise RetryLater(PEER_PAUSE, f"a peer has an error inside: {error.details()}") from error
        await self._end(tx, run_id, begun, outcome)

    async def give_up(self, run_id: UUID, error: str, tx: Tx) -> None:
        """Ends a run that no worker can execute."""
        row = await _lock(tx, run_id)
        if row.is_over:
            return
        try:
            first = await conversation.count(tx, run_id)
            reader = conversation.Reader(tx, self._subjects)
            asked: Asked | None = await conversation.load(tx, reader, run_id, row.session_key, first)
        except Erased:
            asked = None
        await self._fail(tx, row, asked, Ended("failed", error, FAILED))

    async def _begin(self, run_id: UUID, effects: Effects) -> _Begun | None:
        """None where the run is over, or waits. Raises Ended where it cannot begin."""
        async with effects.begin() as tx:
            row = await _lock(tx, run_id)
            if row.is_over:
                return None
            if row.cancel_reason:
                raise Ended("cancelled", row.cancel_reason)
            journal = await tx.load(stream(run_id))
            if journal.suspended:
                return None
            try:
                agent = await store.load(tx, row.agent_id, journal.agent_version)
            except NotFound as error:
                raise Ended("refused", f"there is no {error}") from error
            if not agent.enabled and journal.started_at is None:
                raise Ended("refused", "the agent is disabled")
            if row.status != "running":
                await take_place(tx, run_id, agent.id, agent.definition)
            try:
                reader = conversation.Reader(tx, self._subjects)
                key = await reader.key(row.subject_id)
                messages = await conversation.count(tx, run_id)
                first = messages_at(journal, 0) or messages
                asked = await conversation.load(tx, reader, run_id, row.session_key, first)
            except Erased as error:
                raise Ended("cancelled", "the person was erased") from error
            start = Start(row.session_key, row.agent_id, agent.version, utcnow(), messages)
            await tx.decide(stream(run_id), start)
            await projections.started(tx, run_id, model_of(agent.definition))
            journal = await tx.load(stream(run_id))
        limits = Limits(**agent.definition.limits.model_dump())
        if row.limit_nanos is not None:
            # Inside what the run that asked for this one has left.
            nanos = row.limit_nanos if limits.nanos is None else min(limits.nanos, row.limit_nanos)
            limits = msgspec.structs.replace(limits, nanos=nanos)
        return _Begun(
            row,
            agent,
            asked,
            Scope(run_id, row.tenant_id, row.session_key, row.subject_id, key, limits, row.depth, journal),
        )

    async def _answer(self, begun: _Begun, effects: Effects) -> Reply:
        agent, definition, scope = begun.agent, begun.agent.definition, begun.scope
        if remaining(scope.journal, scope.limits, utcnow()) <= 0:
            raise Ended("failed", f"the limit of {scope.limits.seconds} seconds is reached", FAILED)
        attributes: dict[str, telemetry.Value] = {
            "gen_ai.operation.name": "invoke_agent",
            "gen_ai.agent.id": str(agent.id),
            "gen_ai.agent.name": definition.name,
            "gen_ai.agent.version": str(agent.version),
            "gen_ai.conversation.id": scope.session_key,
            "gen_ai.request.model": definition.model.partition("/")[2],
            "claw.run.id": str(scope.run_id),
            "claw.run.attempt": scope.journal.attempts,
        }
        with telemetry.span(f"invoke_agent {definition.name}", attributes=attributes):
            models = [(name, self._models.model(name, endpoint)) for name, endpoint in agent.models(self._cipher)]
            journal = Journal(scope, effects, self._group, self._watch)
            spending = Spending(
                effects, self._peers.billing, tenant_id=scope.tenant_id, agent_id=agent.id, run_id=scope.run_id
            )
            around = _Around(self._database, self._subjects, scope.tenant_id, scope.run_id)
            answering = Answering(self._peers, definition, models, scope, journal, spending, around)
            return await answering.answer(begun.asked)

    async def _end(self, tx: Tx, run_id: UUID, begun: _Begun | None, outcome: Reply | Ended | Suspended) -> None:
        """In the item's own transaction: the end, what the world hears of it, and the reply on its way."""
        row = await _lock(tx, run_id)
        if row.is_over:
            return
        if row.cancel_reason:
            outcome = Ended("cancelled", row.cancel_reason)
        asked = begun.asked if begun else None
        if isinstance(outcome, Reply):
            assert begun
            if await conversation.count(tx, run_id) > _taken(await tx.load(stream(run_id))):
                # Nobody else would answer it: messages that join a run wait for its row, which is locked now.
                raise NotYet(timedelta(0), "a message came as the run was about to end")
            text, key, context = outcome.text, begun.scope.key, (row.tenant_id, row.subject_id, str(run_id))
            reply = key.seal(text, *context, "reply")
            calls = key.seal(msgspec.json.encode(outcome.calls).decode(), *context, "calls") if outcome.calls else None
            events = await tx.decide(stream(run_id), Complete(row.session_key, reply, calls))
            message = public.RunCompleted(
                run_id=run_id,
                session_key=row.session_key,
                reply=text,
                n=events[0].n,
                tool_calls=published(outcome.calls),
            )
            message_id = derived_id(run_id, "RunCompleted")
            tx.publish(AGENT_EVENTS, message, key=row.session_key, message_id=message_id)
            await projections.completed(tx, run_id, reply, calls)
            if outcome.summary:
                await conversation.keep_summary(tx, begun.scope.key, row.subject_id, row.session_key, outcome.summary)
            if row.parent_run_id:
                await tell_parent(tx, run_id)
            _log.info("run completed", run_id=str(run_id))
        elif isinstance(outcome, Suspended):
            text, command = outcome.notice or "", outcome.command
            if command.reason == "agent":
                child = await children.state(tx, self._subjects, children.child_id(run_id, command.step))
                if child and child.is_over:
                    # It found nobody who waited for it; from here on it finds the run's row locked.
                    raise NotYet(timedelta(0), "another agent answered as the run was about to wait for it")
            await tx.decide(stream(run_id), command)
            await projections.suspended(tx, run_id, command.reason, command.text)
            _log.info("run waits", run_id=str(run_id), reason=command.text)
            for asked_for in outcome.children:
                await children.open_child(tx, self._subjects, run_id, asked_for)
        else:
            await self._fail(tx, row, asked, outcome)
            return
        await _say(tx, row, asked, text)

    async def _fail(self, tx: Tx, row: _Row, asked: Asked | None, outcome: Ended) -> None:
        await fail(tx, row.id, row.session_key, outcome.status, outcome.error)
        level = _log.info if outcome.status == "cancelled" else _log.warning
        level(f"run {outcome.status}", run_id=str(row.id), error=outcome.error)
        await _say(tx, row, asked, outcome.notice)


async def _say(tx: Tx, row: _Row, asked: Asked | None, text: str | None) -> None:
    """To the person, where the run is of a channel."""
    if text and asked and row.channel_id and asked.conversation_id is not None:
        await say(
            tx,
            row.id,
            text,
            session_key=row.session_key,
            channel_id=row.channel_id,
            conversation_id=asked.conversation_id,
            reply_to=asked.reply_to,
        )


def _taken(journal: Run) -> int:
    return max(messages_at(journal, 0), *journal.taken.values(), 0)


async def _lock(tx: Tx, run_id: UUID) -> _Row:
    [row] = await tx.sql(
        "SELECT id, tenant_id, session_key, agent_id, subject_id, channel_id, status, cancel_reason, depth, "
        "limit_nanos, parent_run_id FROM run WHERE id = $1 FOR UPDATE",
        run_id,
    )
    return _Row(*row)
