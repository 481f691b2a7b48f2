"""HTTP of the gateway: streams of runs, and agents in OpenAI's shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any
from uuid import UUID

import msgspec
from fastapi import APIRouter, Header, Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from infra.api import Reader, Runner, api
from infra.auth import IDENTITY_HEADER
from infra.errors import InvalidMessage
from infra.service import Runtime
from services.ws_gateway.agent import Agent
from services.ws_gateway.hub import Hub
from services.ws_gateway.openai import api as openai
from services.ws_gateway.stream import RunStream

_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "The run's events"}
}
_PASSED_ON = (IDENTITY_HEADER, "content-type", "idempotency-key")
_PASSED_BACK = ("content-type", "retry-after")


class _Accepted(msgspec.Struct):
    run_id: UUID


def routes(hub: Callable[[Runtime], Hub]) -> Callable[[Runtime], Sequence[BaseRoute]]:
    def build(runtime: Runtime) -> Sequence[BaseRoute]:
        shared, agent = hub(runtime), Agent(runtime.settings.agent_url, runtime.identities)
        return api("ws_gateway", runtime, _router(shared, agent), openai.router(shared, agent))

    return build


def _router(hub: Hub, agent: Agent) -> APIRouter:
    router = APIRouter()

    @router.get("/api/v1/runs/{run_id}/events", response_class=Response, responses=_STREAM)
    async def run_events(run_id: UUID, who: Reader, last_event_id: Annotated[str | None, Header()] = None) -> Response:
        """A run as server-sent events: from the first, or behind `Last-Event-ID`, until the run ends."""
        return RunStream(hub, agent, who, run_id, _after(last_event_id))

    @router.post("/api/v1/agents/{agent_id}/sessions/{key:path}/messages", response_class=Response, responses=_STREAM)
    async def post_message(agent_id: str, key: str, who: Runner, request: Request) -> Response:
        """Hands the message to the agent and shows the run that will answer it."""
        headers = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
        # As it came: a session's key may hold escaped slashes.
        answer = await agent.post_message(request.scope["raw_path"].decode(), headers, await request.body())
        if answer.status_code != 202:
            back = {name: answer.headers[name] for name in _PASSED_BACK if name in answer.headers}
            return Response(answer.content, answer.status_code, back)
        return RunStream(hub, agent, who, msgspec.json.decode(answer.content, type=_Accepted).run_id, 0)

    return router


def _after(last_event_id: str | None) -> int:
    if last_event_id is None:
        return 0
    if not (last_event_id.isascii() and last_event_id.isdecimal()) or len(last_event_id) > 10:
        raise InvalidMessage("header Last-Event-ID", "is none that this stream gave")
    return int(last_event_id)
