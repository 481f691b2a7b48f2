"""HTTP for the gateway: a message with the conversation before it, which the caller has stored."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Header
from pydantic import BaseModel, ConfigDict, Field

from infra.clock import utcnow, uuid7
from infra.errors import Forbidden, InvalidMessage
from infra.security.subjects import Erased
from infra.service.api import Runner
from infra.service.service import Runtime
from infra.web.json_schema import StepBudget, check_schema
from services.agent import adapters
from services.agent.definitions import approvers, store
from services.agent.definitions.models import ToolName
from services.agent.models.contract import (
    AssistantTurn,
    Image,
    Sampling,
    Tool,
    ToolCall,
    ToolTurn,
    Turn,
    UserTurn,
)
from services.agent.sessions import images
from services.agent.sessions.accepting import MAX_TEXT, AcceptedRun, accept, digest
from services.agent.sessions.arrivals import Arrival, Context

MAX_HISTORY = 1_000
MAX_TOOLS = 128
MAX_BODY_BYTES = 24 * 1024 * 1024
"""A message may have images. The gateway's own limit is lower, so that it refuses in the client's terms."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


ImageUrl = Annotated[str, Field(pattern="^(data:image/|https://)")]


class FromUser(_Part):
    role: Literal["user"]
    text: str = Field(min_length=1, max_length=MAX_TEXT)
    images: list[ImageUrl] = []


class CallerToolCall(_Part):
    """A call of one of the caller's tools, as the model made it."""

    id: str = Field(min_length=1)
    name: ToolName
    arguments: str = Field(max_length=MAX_TEXT)


class FromAssistant(_Part):
    role: Literal["assistant"]
    text: str = Field(max_length=MAX_TEXT)
    calls: list[CallerToolCall] = []


class FromTool(_Part):
    role: Literal["tool"]
    text: str = Field(max_length=MAX_TEXT)
    call: CallerToolCall


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


class GivenSampling(_Part):
    """The fields of `Sampling`."""

    max_output_tokens: int | None = Field(default=None, ge=1)
    stop: tuple[str, ...] = ()
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    reasoning_effort: str | None = None


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
    sampling: GivenSampling = GivenSampling()

    def check(self) -> None:
        """Raises InvalidMessage for an invalid JSON Schema."""
        budget = StepBudget()
        if self.output_schema is not None:
            check_schema("output_schema", self.output_schema, budget)
        for n, tool in enumerate(self.tools):
            # Arguments are checked only for strict tools. Any other schema goes to the model as it is: clients send
            # older drafts, and keywords that the check does not support.
            if tool.strict:
                check_schema(f"tools[{n}].parameters", tool.parameters, budget)
            elif tool.parameters.get("type") != "object":
                raise InvalidMessage(f"tools[{n}].parameters.type", "must be object")

    def image_urls(self) -> Iterator[tuple[str, str]]:
        """The addresses of all images, each after the name of its field."""
        for n, said in enumerate(self.history):
            if isinstance(said, FromUser):
                yield from ((f"history[{n}].images[{m}]", url) for m, url in enumerate(said.images))
        yield from ((f"images[{n}]", url) for n, url in enumerate(self.images))

    def context(self, stored: Mapping[str, Image]) -> Context:
        """`stored`: the stored images by their addresses."""
        return Context(
            history=tuple(_turn(said, stored) for said in self.history),
            system=self.system,
            output_schema=self.output_schema,
            tools=tuple(Tool(tool.name, tool.description, tool.parameters, tool.strict) for tool in self.tools),
            must_call=self.must_call,
            parallel=self.parallel,
            since=tuple(map(_later_turn, self.since)),
            images=_images(self.images, stored),
            sampling=Sampling(**self.sampling.model_dump()),
        )


def router(runtime: Runtime) -> APIRouter:
    routes = APIRouter()
    subjects = adapters.subjects(runtime)
    objects = adapters.objects(runtime)

    @routes.post("/internal/agents/{agent_id}/completions", status_code=202, include_in_schema=False)
    async def complete(
        agent_id: UUID,
        body: NewCompletion,
        who: Runner,
        idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
    ) -> AcceptedRun:
        """For the gateway: a message in a session of its own. nginx does not pass this path on.

        Requests with the same idempotency key share a session, and so a run.
        """
        # In a thread: a large schema would block the event loop for a while.
        await asyncio.to_thread(body.check)
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            agent = await store.load(tx, agent_id)
            try:
                # Before the images: those that are stored after an erasure would stay.
                await subjects.key(tx, who.tenant_id, who.actor)
            except Erased as error:
                raise Forbidden(str(error)) from error
        if not agent.enabled:
            raise Forbidden("the agent is disabled")
        for tool in body.tools:
            if tool.name in agent.definition.tool_names:
                raise InvalidMessage("tools", f"{tool.name} is the name of one of the agent's own tools")
        stored = await images.store(objects, who, body.image_urls()) if objects else {}
        arrival = Arrival(
            message_id=uuid7(),
            agent_id=agent_id,
            session_key=f"completion_{digest(agent_id, idempotency_key or str(uuid7()))}",
            subject_id=who.actor,
            text=body.text,
            received_at=utcnow(),
            names=approvers.of_identity(who),
            idempotency_key=idempotency_key,
            context=body.context(stored),
        )
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            return await accept(tx, arrival, subjects)

    return routes


def _turn(said: FromUser | FromAssistant | FromTool, stored: Mapping[str, Image]) -> Turn:
    return UserTurn(said.text, _images(said.images, stored)) if isinstance(said, FromUser) else _later_turn(said)


def _images(urls: list[str], stored: Mapping[str, Image]) -> tuple[Image, ...]:
    return tuple(stored.get(url) or Image(url=url) for url in urls)


def _later_turn(said: FromAssistant | FromTool) -> AssistantTurn | ToolTurn:
    if isinstance(said, FromTool):
        return ToolTurn(_call(said.call), said.text)
    return AssistantTurn(said.text, tuple(map(_call, said.calls)))


def _call(call: CallerToolCall) -> ToolCall:
    return ToolCall(call.id, call.name, call.arguments)
