"""Executes runs: start, agent loop, finish. A run that another worker began goes on at the end of its journal."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

import grpc.aio

from infra.clock import utcnow
from infra.errors import InvalidMessage, NotFound, RetryLater, describe
from infra.lanes.effects import Effects
from infra.lanes.group import Group
from infra.observe import telemetry
from infra.postgres.tx import Database, Tx
from infra.security.crypto import Cipher
from infra.security.subjects import SubjectKeys
from services.agent.execution import finish
from services.agent.execution.agent_loop import AgentLoop
from services.agent.execution.budget import Spending
from services.agent.execution.context import Services
from services.agent.execution.credit import Credit
from services.agent.execution.model_calls import ModelCalls
from services.agent.execution.outcome import Ended, Reply, Suspended
from services.agent.execution.start import StartedRun, start
from services.agent.execution.steps import Steps
from services.agent.execution.tools import Tools
from services.agent.execution.watch import Watch
from services.agent.models.library import Models
from services.agent.runs.domain import Mismatch, remaining
from services.agent.runs.notices import FAILED

# Pause after an internal error of another service. The run's own time limit ends the attempts.
SERVICE_ERROR_PAUSE = timedelta(seconds=5)


class Executor:
    """Executes runs of many sessions at the same time. The lane executes only one run of a session at a time."""

    def __init__(
        self, database: Database, models: Models, services: Services, group: Group, watch: Watch, cipher: Cipher
    ) -> None:
        self._database = database
        self._models = models
        self._services = services
        self._group = group
        self._watch = watch
        self._cipher = cipher
        self._subjects = SubjectKeys(cipher)

    async def execute(self, run_id: UUID, effects: Effects, tx: Tx) -> None:
        """`tx` ends the lane's item. Raises Transient if the run is to go on later."""
        started: StartedRun | None = None
        try:
            async with effects.begin() as own_tx:
                started = await start(own_tx, self._database, self._subjects, run_id)
            if started is None:
                return
            outcome: Reply | Ended | Suspended = await self._answer(started, effects)
        except (Ended, Suspended) as stop:
            outcome = stop
        except (Mismatch, InvalidMessage, NotFound) as error:
            # Another attempt would meet the same journal or the same refusal of another service.
            outcome = Ended("failed", describe(error), FAILED)
        except grpc.aio.AioRpcError as error:
            raise RetryLater(SERVICE_ERROR_PAUSE, f"internal error of another service: {error.details()}") from error
        await finish.finish(tx, self._subjects, run_id, started, outcome)

    async def give_up(self, run_id: UUID, error: str, tx: Tx) -> None:
        """Ends a run that no worker can execute."""
        await finish.give_up(tx, self._subjects, run_id, error)

    async def _answer(self, started: StartedRun, effects: Effects) -> Reply:
        agent, definition, context = started.agent, started.agent.definition, started.context
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
        with telemetry.span(f"invoke_agent {definition.name}", attributes=attributes):
            steps = Steps(context, effects, self._group, self._watch)
            spending = Spending(
                effects, services.billing, tenant_id=context.tenant_id, agent_id=agent.id, run_id=context.run_id
            )
            credit = Credit(context, services.billing, definition.budget, spending)
            models = [(name, self._models.model(name, endpoint)) for name, endpoint in agent.models(self._cipher)]
            model_calls = ModelCalls(context, steps, credit, models, services.cache)
            tools = Tools(context, definition, steps, credit, services.plugin)
            loop = AgentLoop(context, definition, steps, model_calls, tools, services.memory)
            return await loop.answer(started.conversation)
