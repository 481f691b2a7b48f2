"""Executes runs: load, start, agent loop, end. A run that another worker began goes on at the end of its journal."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from uuid import UUID

import grpc.aio

from infra.clock import utcnow
from infra.errors import InvalidMessage, NotFound, RetryLater, describe
from infra.lanes.effects import Effects, ItemEnded
from infra.observe import logs, telemetry
from infra.observe.logs import get_logger
from infra.postgres.database import Database
from infra.postgres.tx import Tx
from infra.security.crypto import Cipher
from infra.security.subjects import SubjectKeys
from services.agent.execution import finish
from services.agent.execution.agent_loop import AgentLoop
from services.agent.execution.budget import Spending
from services.agent.execution.context import Services
from services.agent.execution.credit import RunCredit
from services.agent.execution.files import RunFiles
from services.agent.execution.group_write import GroupWriter, MessagesArrived, RunStopped
from services.agent.execution.load import RunLoader
from services.agent.execution.model_calls import ModelCalls
from services.agent.execution.outcome import Ended, Reply, Suspended
from services.agent.execution.start import StartedRun, start
from services.agent.execution.steps import Steps, UnrecordedResults
from services.agent.execution.tools import Tools
from services.agent.execution.watch import Watch
from services.agent.models.library import Models
from services.agent.runs.domain import Mismatch
from services.agent.runs.limits import remaining
from services.agent.runs.notices import CANCELLED, FAILED
from services.agent.runs.progress import ProgressReporter

# Pause after an internal error of another service. The run's own time limit ends the attempts.
SERVICE_ERROR_PAUSE = timedelta(seconds=5)

_log = get_logger("agent.runs")


class Executor:
    """Executes runs of many sessions at the same time. The lane executes only one run of a session at a time."""

    def __init__(
        self,
        database: Database,
        models: Models,
        services: Services,
        writer: GroupWriter,
        watch: Watch,
        cipher: Cipher,
    ) -> None:
        self._database = database
        self._models = models
        self._services = services
        self._writer = writer
        self._watch = watch
        self._cipher = cipher
        self._subjects = SubjectKeys(cipher)
        self._loader = RunLoader(database, self._subjects)
        self._unrecorded = UnrecordedResults()

    async def execute(self, run_id: UUID, effects: Effects, tx: Tx) -> ItemEnded | None:
        """Executes the run until it ends or waits. Raises Transient if it is to go on later.

        A run that simply answers is ended by the group write. All other outcomes are written in `tx`, which ends the
        lane's item.
        """
        started: StartedRun | None = None
        logs.work_on(run_id=str(run_id))
        try:
            loaded = await self._loader.load(run_id)
            if loaded.row.channel_id:
                logs.work_on(channel_id=str(loaded.row.channel_id))
            started = await start(loaded, self._database, self._subjects, effects, self._writer)
            if started is None:
                return None
            answered = await self._answer(started, effects)
            if isinstance(answered, ItemEnded):
                return answered
            outcome: Reply | Ended | Suspended = answered
        except (Ended, Suspended) as stop:
            outcome = stop
        except RunStopped:
            outcome = Ended("cancelled", CANCELLED)
        except (Mismatch, InvalidMessage, NotFound) as error:
            # Another attempt would meet the same journal or the same refusal of another service.
            outcome = Ended("failed", describe(error), FAILED)
        except Exception as error:
            if started:
                # The lane is given back next, and then these writes would be refused.
                await started.journal.settle()
            if isinstance(error, grpc.aio.AioRpcError):
                text = f"internal error of another service: {error.details()}"
                raise RetryLater(SERVICE_ERROR_PAUSE, text) from error
            raise
        if started:
            await _settle(started)
        await finish.finish(tx, self._subjects, self._services.cache, run_id, started, outcome)
        return None

    async def give_up(self, run_id: UUID, error: str, tx: Tx) -> None:
        """Ends a run that no worker can execute."""
        await finish.give_up(tx, self._subjects, run_id, error)

    async def _answer(self, started: StartedRun, effects: Effects) -> ItemEnded | Reply:
        """ItemEnded: the run and the lane's item are ended. Reply: `finish` still has to end them."""
        agent, definition, context, journal = started.agent, started.agent.definition, started.context, started.journal
        if remaining(context.state, context.limits, utcnow()) <= 0:
            raise Ended("failed", f"the limit of {context.limits.seconds} seconds is reached", FAILED)
        attributes: dict[str, telemetry.Value] = {
            "gen_ai.operation.name": "invoke_agent",
            "gen_ai.agent.id": str(agent.id),
            "gen_ai.agent.name": definition.name,
            "gen_ai.agent.version": str(agent.version),
            "gen_ai.conversation.id": context.session_key,
            "gen_ai.request.model": definition.model.partition("/")[2],
            "claw.run.id": str(context.run_id),
            "claw.run.attempt": context.state.attempts,
        }
        services = self._services
        if context.channel_id:
            context.progress = ProgressReporter(services.cache, context.run_id, context.session_key)
        told = context.progress.told() if context.progress else nullcontext()
        with telemetry.span(f"invoke_agent {definition.name}", attributes=attributes), told:
            steps = Steps(context, effects, journal, self._watch, self._unrecorded)
            spending = Spending(
                effects, services.billing, tenant_id=context.tenant_id, agent_id=agent.id, run_id=context.run_id
            )
            credit = RunCredit(context, services.billing, definition.budget, spending)
            models = [(name, self._models.model(name, endpoint)) for name, endpoint in agent.models(self._cipher)]
            model_calls = ModelCalls(context, steps, credit, models, services.cache, services.objects)
            files = RunFiles(context, services.objects)
            tools = Tools(context, definition, steps, credit, services.plugin, files)
            loop = AgentLoop(
                context, definition, steps, model_calls, tools, services.memory, partial(_complete, started)
            )
            try:
                return await loop.answer(started.conversation)
            except Ended:
                await credit.release_seconds()
                raise


async def _complete(started: StartedRun, reply: Reply, expected_messages: int) -> ItemEnded | Reply:
    """Ends the run in the group write. A reply that other rows depend on is left to `finish`.

    Raises MessagesArrived if the run has other than the expected messages.
    """
    row, journal = started.row, started.journal
    if row.parent_run_id or reply.summary:
        await journal.settle()
        if started.context.messages != expected_messages:
            raise MessagesArrived
        return reply
    ended = await journal.complete(row, started.conversation, reply, expected_messages)
    _log.info("run completed", **row.log_fields)
    return ended


async def _settle(started: StartedRun) -> None:
    """Commits the last writes before the outcome. If the run was stopped meanwhile, `finish` finds it so."""
    try:
        await started.journal.settle()
    except RunStopped:
        await started.journal.settle()
