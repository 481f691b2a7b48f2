"""The HTTP routes of the gateway: streams of runs, the WebSocket, and agents in OpenAI's shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Header, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Router, WebSocketRoute
from starlette.websockets import WebSocket

from infra.errors import Forbidden, InvalidMessage
from infra.outgoing.shares import Shares
from infra.security.auth import Identities
from infra.service.api import MAX_LARGE_BODIES, Reader, Runner, api, identity, of_a_tenant, place_of_body
from infra.service.refusals import Refusals
from infra.service.service import Runtime
from infra.web.server import hand_over
from services.ws_gateway.agent import Agent, accepted_run
from services.ws_gateway.hub import Hub
from services.ws_gateway.openai import api as openai
from services.ws_gateway.protocol import schema
from services.ws_gateway.socket import Socket
from services.ws_gateway.stream import RunStream

_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "The run's events"}
}
_UPGRADE: dict[int | str, dict[str, Any]] = {
    101: {"description": "The socket is open"},
    426: {"description": "The handshake's headers are missing"},
}
_PASSED_ON = ("content-type", "idempotency-key")
_PASSED_BACK = ("content-type", "retry-after")


def routes(hub: Callable[[Runtime], Hub]) -> Callable[[Runtime], Sequence[BaseRoute]]:
    def build(runtime: Runtime) -> Sequence[BaseRoute]:
        agent = Agent(runtime.settings.agent_url, runtime.identities, runtime.tls)
        shared = hub(runtime)
        refusals = Refusals(runtime)
        sockets = websocket(shared, agent, runtime.identities, refusals)
        large = Shares(MAX_LARGE_BODIES)
        routers = (_router(shared, agent, large), openai.router(shared, agent, runtime.identities, refusals, large))
        http = api("ws_gateway", runtime, *routers, max_body=openai.MAX_BODY_BYTES, routes_check_bodies=True)
        return [sockets, Mount("", openai.in_shape(Router(http)))]

    return build


def websocket(hub: Hub, agent: Agent, identities: Identities, refusals: Refusals) -> BaseRoute:
    async def serve(websocket: WebSocket) -> None:
        who = identity(websocket, identities)
        try:
            of_a_tenant(who)
        except Forbidden:
            await refusals.record_message(who, "GET /ws")
            raise
        await websocket.accept()
        hand_over(websocket, Socket(hub, agent, who, refusals))

    return WebSocketRoute("/ws", serve)


def _router(hub: Hub, agent: Agent, large: Shares) -> APIRouter:
    router = APIRouter()

    @router.get("/api/v1/runs/{run_id}/events", response_class=Response, responses=_STREAM)
    async def run_events(run_id: UUID, who: Reader, last_event_id: Annotated[str | None, Header()] = None) -> Response:
        """The events of a run as server-sent events: from the first, or after `Last-Event-ID`, until the run ends."""
        return RunStream(hub, agent, who, run_id, _after(last_event_id))

    @router.post("/api/v1/agents/{agent_id}/sessions/{key:path}/messages", response_class=Response, responses=_STREAM)
    async def post_message(agent_id: str, key: str, who: Runner, request: Request) -> Response:
        """Sends the message to the agent and streams the events of the run that answers it."""
        headers = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
        # The raw path: a session's key may contain escaped slashes.
        async with place_of_body(request, large):
            answer = await agent.post_message(who, request.scope["raw_path"].decode(), headers, await request.body())
        if answer.status_code != 202:
            back = {name: answer.headers[name] for name in _PASSED_BACK if name in answer.headers}
            return Response(answer.content, answer.status_code, back)
        return RunStream(hub, agent, who, accepted_run(answer), 0)

    @router.get("/ws", status_code=426, response_class=Response, responses=_UPGRADE)
    async def no_socket() -> None:
        """The WebSocket form of the streams: one socket follows many runs, sends messages to agents and cancels runs.
        The [JSON Schema](ws-schema.json) describes the messages of both sides.

        The server sends a ping every 30 seconds and closes a socket that stays silent for 90 seconds. It closes with
        1009 after a message of more than 1 MiB, with 1012 and 1013 if the client should connect again and subscribe
        after the last ids that it has, and with 4401 if the API key was revoked or has expired.
        """
        raise HTTPException(426, "this is a WebSocket", {"Upgrade": "websocket"})

    @router.get("/docs/ws-schema.json", include_in_schema=False)
    async def ws_schema() -> Response:
        return Response(schema(), media_type="application/schema+json")

    return router


def _after(last_event_id: str | None) -> int:
    if last_event_id is None:
        return 0
    if not (last_event_id.isascii() and last_event_id.isdecimal()) or len(last_event_id) > 10:
        raise InvalidMessage("header Last-Event-ID", "is not an id of this stream")
    return int(last_event_id)
