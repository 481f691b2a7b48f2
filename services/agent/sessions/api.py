"""HTTP of sessions: messages by the API."""

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
from services.agent.definitions import approvers, store
from services.agent.definitions.models import ToolName
from services.agent.models.contract import AssistantTurn, Image, Tool, ToolCall, ToolTurn, Turn, UserTurn
from services.agent.sessions.domain import Busy
from services.agent.sessions.intake import Arrival, Context, take_in

MAX_TEXT = 100_000
MAX_HISTORY = 1_000
MAX_TOOLS = 128
# Most queued runs of one tenant. Messages from channels are accepted already and are not limited.
MAX_QUEUED = 1_000
RETRY_AFTER = timedelta(seconds=5)


class NewMessage(BaseModel):
    """A message to an agent."""

    model_config = ConfigDict(extra="forbid")

    text: str = Field(min_length=1, max_length=MAX_TEXT)
    idempotency_key: str | None = Field(default=None, min_length=1, max_length=255)
    """Same as the header Idempotency-Key, which takes precedence."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


ImageUrl = Annotated[str, Field(pattern="^(data:image/|https://)")]


class FromUser(_Part):
    role: Literal["user"]
    text: str = Field(min_length=1, max_length=MAX_TEXT)
    images: list[ImageUrl] = []


class Call(_Part):
    """A call of one of the caller's tools, as the model made it."""

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


# Messages of the conversation that the caller has stored.
Earlier = Annotated[FromUser | FromAssistant | FromTool, Field(discriminator="role")]
Since = Annotated[FromAssistant | FromTool, Field(discriminator="role")]


class CallersTool(_Part):
    """A tool of the caller."""

    name: ToolName
    description: str
    parameters: dict[str, Any]
    """JSON Schema of an object."""
    strict: bool = False
    """The arguments have to fit the schema."""


class NewCompletion(_Part):
    """A message with the conversation before it."""

    text: str = Field(min_length=1, max_length=MAX_TEXT)
    history: list[Earlier] = Field(default=[], max_length=MAX_HISTORY)
    system: str | None = Field(default=None, min_length=1)
    """Added to the agent's own system prompt."""
    output_schema: dict[str, Any] | None = None
    """Replaces the agent's own schema for this message."""
    tools: list[CallersTool] = Field(default=[], max_length=MAX_TOOLS)
    """The caller's tools. The run ends with the calls that the model makes of them."""
    must_call: bool = False
    """The model has to call one of the tools."""
    parallel: bool = True
    """The model may call several of the tools at once."""
    since: list[Since] = Field(default=[], max_length=MAX_HISTORY)
    """Calls of the tools that were made for this message already, and their results."""
    images: list[ImageUrl] = []
    """Addresses of the message's images, ``data:`` or ``https:``."""

    def check(self) -> None:
        """Raises InvalidMessage for an invalid JSON Schema."""
        if self.output_schema is not None:
            check_schema("output_schema", self.output_schema)
        for n, tool in enumerate(self.tools):
            # Arguments are checked only for strict tools. Any other schema goes to the model as it is: clients send
            # older drafts, and keywords that the check does not support.
            if tool.strict:
                check_schema(f"tools[{n}].parameters", tool.parameters)
            elif tool.parameters.get("type") != "object":
                raise InvalidMessage(f"tools[{n}].parameters.type", "must be object")

    def context(self) -> Context:
        return Context(
            history=tuple(map(_turn, self.history)),
            system=self.system,
            output_schema=self.output_schema,
            tools=tuple(Tool(tool.name, tool.description, tool.parameters, tool.strict) for tool in self.tools),
            must_call=self.must_call,
            parallel=self.parallel,
            since=tuple(map(_later_turn, self.since)),
            images=_images(self.images),
        )


class Accepted(BaseModel):
    """The run that answers the message. Messages that are answered together share one run."""

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
        """Sends a message to the agent in the session `key`, which the caller chooses. The run holds the answer.

        409 if the agent's queue_mode is reject and the session is busy. While a run waits for an approval, a plain
        yes or no in its session decides it; 403 if the agent's approvers do not include the client.
        """
        arrival = Arrival(
            message_id=uuid7(),
            agent_id=agent_id,
            session_key=f"api_{_digest(agent_id, key)}",
            subject_id=who.actor,
            text=body.text,
            received_at=utcnow(),
            names=approvers.of_identity(who),
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
        """For the gateway: a message in a session of its own. nginx does not pass this path on.

        Requests with the same idempotency key share a session, and so a run.
        """
        # In a thread: a large schema would block the event loop for a while.
        await asyncio.to_thread(body.check)
        arrival = Arrival(
            message_id=uuid7(),
            agent_id=agent_id,
            session_key=f"completion_{_digest(agent_id, idempotency_key or str(uuid7()))}",
            subject_id=who.actor,
            text=body.text,
            received_at=utcnow(),
            names=approvers.of_identity(who),
            idempotency_key=idempotency_key,
            context=body.context(),
        )
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            agent = await store.load(tx, agent_id)
            if not agent.enabled:
                raise Forbidden("the agent is disabled")
            for tool in body.tools:
                if tool.name in agent.definition.tool_names:
                    raise InvalidMessage("tools", f"{tool.name} is the name of one of the agent's own tools")
            return await accept(tx, arrival)

    async def accept(tx: Tx, arrival: Arrival) -> Accepted:
        # Refused before it is accepted: an answer after hours in the queue would be useless.
        if await tx.sql(
            "SELECT 1 FROM run WHERE tenant_id = $1 AND status = 'queued' OFFSET $2 LIMIT 1",
            tx.tenant_id,
            MAX_QUEUED - 1,
        ):
            raise TooManyRequests(RETRY_AFTER, f"{MAX_QUEUED} runs of this tenant are queued already")
        try:
            return Accepted(run_id=await take_in(tx, arrival, subjects), session_key=arrival.session_key)
        except Erased as error:
            raise Forbidden(str(error)) from error
        except Busy as error:
            raise Conflict("the session is busy and its agent rejects messages meanwhile") from error

    return routes


def _turn(said: FromUser | FromAssistant | FromTool) -> Turn:
    return UserTurn(said.text, _images(said.images)) if isinstance(said, FromUser) else _later_turn(said)


def _images(urls: list[str]) -> tuple[Image, ...]:
    return tuple(Image(url=url) for url in urls)


def _later_turn(said: FromAssistant | FromTool) -> AssistantTurn | ToolTurn:
    if isinstance(said, FromTool):
        return ToolTurn(_call(said.call), said.text)
    return AssistantTurn(said.text, tuple(map(_call, said.calls)))


def _call(call: Call) -> ToolCall:
    return ToolCall(call.id, call.name, call.arguments)


def _digest(agent_id: UUID, key: str) -> str:
    return hashlib.blake2b(f"{agent_id}/{key}".encode(), digest_size=16).hexdigest()
