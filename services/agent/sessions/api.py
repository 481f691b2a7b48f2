"""HTTP of sessions: messages that come by the API."""

from __future__ import annotations

import asyncio
import hashlib
from datetime import timedelta
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Header, Path
from pydantic import BaseModel, ConfigDict, Field

from infra.clock import utcnow, uuid7
from infra.errors import Conflict, Forbidden, InvalidMessage, TooManyRequests
from infra.postgres.tx import Tx
from infra.security.subjects import Erased
from infra.service.api import Runner
from infra.service.service import Runtime
from infra.web.json_schema import check_schema
from services.agent import adapters
from services.agent.definitions import store
from services.agent.definitions.models import ToolName
from services.agent.models.contract import Answered, Returned, Said, Tool, ToolCall, Turn
from services.agent.sessions.domain import Busy
from services.agent.sessions.intake import Arrival, Context, take_in

MAX_TEXT = 100_000
MAX_HISTORY = 1_000
MAX_TOOLS = 128
# Of one tenant; what its channels bring is taken in all the same, for it is accepted already.
MAX_QUEUED = 1_000
RETRY_AFTER = timedelta(seconds=5)


class NewMessage(BaseModel):
    """A message to an agent. idempotency_key: as the header Idempotency-Key, which wins."""

    model_config = ConfigDict(extra="forbid")

    text: str = Field(min_length=1, max_length=MAX_TEXT)
    idempotency_key: str | None = Field(default=None, min_length=1, max_length=255)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class FromUser(_Part):
    role: Literal["user"]
    text: str = Field(min_length=1, max_length=MAX_TEXT)


class Call(_Part):
    """Of one of the caller's tools, as the model made it."""

    id: str = Field(min_length=1)
    name: ToolName
    arguments: str = Field(max_length=MAX_TEXT)


class FromAssistant(_Part):
    role: Literal["assistant"]
    text: str = Field(max_length=MAX_TEXT)
    calls: list[Call] = []


class FromTool(_Part):
    role: Literal["tool"]
    text: str = Field(max_length=MAX_TEXT)
    call: Call


# Messages of a conversation that the caller keeps.
Earlier = Annotated[FromUser | FromAssistant | FromTool, Field(discriminator="role")]
Since = Annotated[FromAssistant | FromTool, Field(discriminator="role")]


class CallersTool(_Part):
    """A tool that the caller has. parameters: JSON Schema of an object; strict: the arguments have to fit it."""

    name: ToolName
    description: str
    parameters: dict[str, Any]
    strict: bool = False


class NewCompletion(_Part):
    """A message with all that was said before it. system: added to the agent's own system prompt.

    output_schema: as the agent's own, in whose place it stands for this message. tools: whose calls are the run's
    outcome; must_call: it has to be one; parallel: it may be several. since: such calls and what came of them, where
    the message is not answered yet.
    """

    text: str = Field(min_length=1, max_length=MAX_TEXT)
    history: list[Earlier] = Field(default=[], max_length=MAX_HISTORY)
    system: str | None = Field(default=None, min_length=1)
    output_schema: dict[str, Any] | None = None
    tools: list[CallersTool] = Field(default=[], max_length=MAX_TOOLS)
    must_call: bool = False
    parallel: bool = True
    since: list[Since] = Field(default=[], max_length=MAX_HISTORY)

    def check(self) -> None:
        """Raises InvalidMessage for a schema that is none."""
        if self.output_schema is not None:
            check_schema("output_schema", self.output_schema)
        for n, tool in enumerate(self.tools):
            check_schema(f"tools[{n}].parameters", tool.parameters)

    def context(self) -> Context:
        return Context(
            history=tuple(map(_turn, self.history)),
            system=self.system,
            output_schema=self.output_schema,
            tools=tuple(Tool(tool.name, tool.description, tool.parameters, tool.strict) for tool in self.tools),
            must_call=self.must_call,
            parallel=self.parallel,
            since=tuple(map(_later_turn, self.since)),
        )


class Accepted(BaseModel):
    """The run that will answer the message; messages that are answered together share one."""

    run_id: UUID
    session_key: str


def router(runtime: Runtime) -> APIRouter:
    routes = APIRouter(tags=["messages"])
    subjects = adapters.subjects(runtime)

    @routes.post("/api/v1/agents/{agent_id}/sessions/{key}/messages", status_code=202)
    async def send_message(
        agent_id: UUID,
        key: Annotated[str, Path(min_length=1, max_length=200)],
        body: NewMessage,
        who: Runner,
        idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
    ) -> Accepted:
        """Writes to the agent in the session `key`, which is yours to choose. The answer comes by the run.

        409 where the agent's queue_mode is reject and the session is busy. While a run waits for an approval, a
        plain yes or no in its session decides it.
        """
        arrival = Arrival(
            message_id=uuid7(),
            agent_id=agent_id,
            session_key=f"api_{_digest(agent_id, key)}",
            subject_id=who.actor,
            text=body.text,
            received_at=utcnow(),
            idempotency_key=idempotency_key or body.idempotency_key,
        )

        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            await store.load(tx, agent_id)
            return await accept(tx, arrival)

    @routes.post("/internal/agents/{agent_id}/completions", status_code=202, include_in_schema=False)
    async def complete(
        agent_id: UUID,
        body: NewCompletion,
        who: Runner,
        idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
    ) -> Accepted:
        """For the gateway: a message in a session of its own. The proxy in front does not pass this on.

        The same idempotency key is the same session, and so the same run.
        """
        # Not on the loop: large schemas take a while.
        await asyncio.to_thread(body.check)
        arrival = Arrival(
            message_id=uuid7(),
            agent_id=agent_id,
            session_key=f"completion_{_digest(agent_id, idempotency_key or str(uuid7()))}",
            subject_id=who.actor,
            text=body.text,
            received_at=utcnow(),
            idempotency_key=idempotency_key,
            context=body.context(),
        )
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            agent = await store.load(tx, agent_id)
            if not agent.enabled:
                raise Forbidden("the agent is disabled")
            for tool in body.tools:
                if tool.name in agent.definition.tool_names:
                    raise InvalidMessage("tools", f"{tool.name} is a tool of the agent's own")
            return await accept(tx, arrival)

    async def accept(tx: Tx, arrival: Arrival) -> Accepted:
        # Before anything is accepted: what waits for hours helps nobody.
        if await tx.sql(
            "SELECT 1 FROM run WHERE tenant_id = $1 AND status = 'queued' OFFSET $2 LIMIT 1",
            tx.tenant_id,
            MAX_QUEUED - 1,
        ):
            raise TooManyRequests(RETRY_AFTER, f"{MAX_QUEUED} runs of this tenant wait for their turn already")
        try:
            return Accepted(run_id=await take_in(tx, arrival, subjects), session_key=arrival.session_key)
        except Erased as error:
            raise Forbidden(str(error)) from error
        except Busy as error:
            raise Conflict("the session is busy, and this agent rejects messages then") from error

    return routes


def _turn(said: FromUser | FromAssistant | FromTool) -> Turn:
    return Said(said.text) if isinstance(said, FromUser) else _later_turn(said)


def _later_turn(said: FromAssistant | FromTool) -> Answered | Returned:
    if isinstance(said, FromTool):
        return Returned(_call(said.call), said.text)
    return Answered(said.text, tuple(map(_call, said.calls)))


def _call(call: Call) -> ToolCall:
    return ToolCall(call.id, call.name, call.arguments)


def _digest(agent_id: UUID, key: str) -> str:
    return hashlib.blake2b(f"{agent_id}/{key}".encode(), digest_size=16).hexdigest()
