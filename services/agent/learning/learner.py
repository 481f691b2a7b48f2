"""Asks the agent's model once for the facts in a finished run, and hands them to memory. If the model gives no usable
answer, memory gets the message itself and searches it by rules."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import timedelta
from uuid import UUID

import msgspec

from infra.errors import EffectFailed, RetryLater
from infra.lanes.effects import Effects, Outcome
from infra.observe.logs import get_logger
from infra.postgres.database import Database
from infra.postgres.tx import Tx
from infra.security.crypto import Cipher
from infra.security.subjects import SubjectKeys
from protos.memory.v1 import memory_pb2
from services.agent.definitions import store
from services.agent.definitions.store import StoredAgent
from services.agent.execution.budget import Spending
from services.agent.execution.context import RunContext, Services
from services.agent.execution.credit import RunCredit
from services.agent.execution.load import LoadedRun, load_runs
from services.agent.execution.model_calls import lost_usage
from services.agent.execution.outcome import Ended
from services.agent.execution.start import context_of
from services.agent.execution.usage import MeteredCall, usage_record
from services.agent.learning import notes
from services.agent.learning.notes import Said
from services.agent.models.contract import Model, ModelAnswer, ModelFailed, OnText, Prompt
from services.agent.models.library import Models
from services.agent.runs.content import SAID_CHARACTERS
from services.agent.runs.metering import store_usage

# A model that fails for the time being is asked so often, with this pause. Then rules have to do.
ATTEMPTS = 3
PAUSE = timedelta(seconds=30)
MEMORY_SECONDS = 10.0
# A run's own calls end with the run's time. A tenant's server could let this one drip for years.
ANSWER_SECONDS = 300.0
PURPOSE = "learning"
"""The kind of the usage: it is recorded as that of ``learning/<model>``, which has the model's price by default."""

_log = get_logger("agent.learning")


class Learner:
    def __init__(self, database: Database, models: Models, services: Services, cipher: Cipher) -> None:
        self._database = database
        self._models = models
        self._services = services
        self._cipher = cipher
        self._subjects = SubjectKeys(cipher)

    async def learn(self, run_id: UUID, effects: Effects) -> None:
        """Finds facts about the person in the messages of the run and keeps them in memory.

        The model's answer is recorded, and a later attempt of the lane's item uses it. Raises Transient while memory or
        billing is away.
        """
        async with effects.reading() as tx:
            loaded = (await load_runs(tx, self._subjects, [run_id]))[run_id]
            agent = await _agent(tx, loaded)
        row = loaded.row
        key = loaded.keys.get(row.subject_id)
        if key is None or agent is None:
            return
        context = context_of(
            loaded, agent, key, loaded.conversation(len(loaded.messages)), self._database, self._subjects
        )
        if not context.said:
            return
        memory, started = self._services.memory, loaded.state.started_at
        assert started
        listed = await memory.ListMemories(
            memory_pb2.ListMemoriesRequest(subject_id=row.subject_id), metadata=context.metadata, timeout=MEMORY_SECONDS
        )
        known = notes.shown(listed.memories)
        messages = _messages(loaded)
        question = notes.prompt(messages, known, started)
        name, endpoint = agent.models(self._cipher)[0]
        model = self._models.model(name, endpoint)
        call = _Call(context, agent, f"{PURPOSE}/{name}", model, question, effects, self._services)
        answer = await call.answer(known)
        request = memory_pb2.LearnRequest(
            run_id=str(run_id),
            subject_id=row.subject_id,
            channel_id=str(context.channel_id or ""),
            message_id=context.message_id or "",
            said=context.said[:SAID_CHARACTERS],
        )
        request.said_at.FromDatetime(started)
        found = answer and notes.read(answer.text, messages, answer.known)
        if found:
            request.model = name
            request.facts.extend(found[0])
            request.merges.extend(found[1])
        reply = await memory.Learn(request, metadata=context.metadata, timeout=MEMORY_SECONDS)
        _log.info(
            "memories learned from a run", run_id=str(run_id), by=request.model or "rules", memories=reply.learned
        )


class _Recorded(msgspec.Struct, frozen=True):
    """The model's answer, with the ids of the notes that it was shown: a later attempt may find others."""

    text: str
    ids: dict[int, str]

    @property
    def known(self) -> dict[int, memory_pb2.PersonalMemory]:
        return {number: memory_pb2.PersonalMemory(id=id_) for number, id_ in self.ids.items()}


@dataclass
class _Call:
    """The one call of the model for a run: credit, attempts, usage."""

    context: RunContext
    agent: StoredAgent
    resource: str
    model: Model
    prompt: Prompt
    effects: Effects
    services: Services
    _attempt: int = 0
    _written_bytes: int = 0
    _used: MeteredCall | None = field(default=None)
    """Of the attempt that ended last."""

    async def answer(self, known: dict[int, memory_pb2.PersonalMemory]) -> _Recorded | None:
        """None if the model gives no answer or must not be asked. Raises Transient."""
        context = self.context
        sealing = context.tenant_id, context.subject_id, str(context.run_id), PURPOSE
        ids = {number: memory.id for number, memory in known.items()}

        async def call(_: str) -> bytes:
            text = await self._ask()
            return context.key.seal(msgspec.json.encode(_Recorded(text, ids)).decode(), *sealing)

        key = f"{PURPOSE}/{context.run_id}"
        outcome = await self.effects.run(
            key, call, kind="repeatable", result=bytes, before=self._before, after=self._after
        )
        if outcome.result is None:
            _log.warning(
                "could not find facts by the model; used the rules", run_id=str(context.run_id), error=outcome.error
            )
            return None
        return msgspec.json.decode(context.key.open(outcome.result, *sealing), type=_Recorded)

    async def _ask(self) -> str:
        context = self.context
        # Behind the run's own steps.
        context.last_step = max(context.state.steps, default=0)
        spending = Spending(
            self.effects,
            self.services.billing,
            tenant_id=context.tenant_id,
            agent_id=context.agent_id,
            run_id=context.run_id,
        )
        credit = RunCredit(context, self.services.billing, self.agent.definition.budget, spending)
        try:
            hold = await credit.reserve(self.resource, self.prompt)
        except Ended as refusal:
            raise EffectFailed(refusal.error) from refusal

        async def count(text: str) -> None:
            self._written_bytes += len(text.encode())

        try:
            answer = await self._answered(count)
        except ModelFailed as error:
            if self._written_bytes or error.usage:
                self._used = lost_usage(self.resource, self.prompt, self._written_bytes, error.usage)
            if error.transient and self._attempt < ATTEMPTS:
                await self._record_failed()
                raise RetryLater(error.after or PAUSE, error.reason) from error
            await credit.release(hold)
            raise EffectFailed(error.reason) from error
        self._used = MeteredCall(self.resource, answer.usage, hold.id, hold.nanos)
        return answer.text

    async def _answered(self, on_text: OnText) -> ModelAnswer:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await self.model.answer(self.prompt, on_text)
        except TimeoutError as error:
            reason = f"{self.resource}: the answer did not end within {ANSWER_SECONDS:g} seconds"
            raise ModelFailed(reason, transient=False) from error

    async def _before(self, tx: Tx, attempt: int, lost: bool) -> None:
        self._attempt = attempt
        if lost:
            # The process of the attempt before died. The provider may have begun an answer.
            await _record(tx, self.context, attempt - 1, lost_usage(self.resource, self.prompt, 0))

    async def _record_failed(self) -> None:
        if self._used:
            async with self.effects.begin() as tx:
                await _record(tx, self.context, self._attempt, self._used)

    async def _after(self, tx: Tx, outcome: Outcome[bytes]) -> None:
        if self._used:
            await _record(tx, self.context, outcome.attempt, self._used)


async def _agent(tx: Tx, loaded: LoadedRun) -> StoredAgent | None:
    """The version of the agent that made the run."""
    agent, version = loaded.agent, loaded.state.agent_version
    return agent if agent is None or version in (None, agent.version) else await store.load(tx, agent.id, version)


def _messages(loaded: LoadedRun) -> list[Said]:
    """The person's messages, as far as they fit into the published part."""
    found: list[Said] = []
    left = SAID_CHARACTERS
    for message in loaded.messages:
        text = loaded.keys.open(message.text, message.subject_id, str(message.id), "text") or ""
        if text[:left]:
            found.append(Said(str(message.id), text[:left]))
        left = max(0, left - len(text))
    return found


async def _record(tx: Tx, context: RunContext, attempt: int, metered: MeteredCall) -> None:
    """Reports the usage, as one of the run's, and counts it for the agent's budget."""
    usage_id = f"{PURPOSE}/{context.run_id}/{attempt}"
    record = usage_record(context, usage_id, metered)
    await store_usage(tx, context.run_id, record)
    # The true cost of the run was known before this call, and is asked for again.
    await tx.sql("UPDATE run SET budget_settled = false WHERE id = $1", context.run_id)
