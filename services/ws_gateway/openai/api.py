"""The HTTP routes in OpenAI's shapes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Header, Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from infra.errors import Forbidden, TooLarge, TooManyRequests
from infra.observe.logs import get_logger
from infra.outgoing.shares import Shares
from infra.security.auth import Identities, Identity
from infra.service.api import Reader, Runner, identity, place_of_body
from infra.service.refusals import Refusals
from infra.web import http
from infra.web.json_text import check_beside, check_json
from services.ws_gateway.agent import Agent
from services.ws_gateway.hub import Hub
from services.ws_gateway.openai import agents, errors, references
from services.ws_gateway.openai.agents import ListedAgent
from services.ws_gateway.openai.answer import AnswerResponse
from services.ws_gateway.openai.errors import CompletionError
from services.ws_gateway.openai.requests import MAX_MESSAGES, ChatRequest, ResponsesRequest
from services.ws_gateway.openai.shapes import Chat, Responses

_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}, "description": "The answer, or its parts"}
}
_Key = Annotated[str | None, Header(pattern="^[!-~]{1,255}$")]

_log = get_logger("ws_gateway.openai")


MAX_BODY_BYTES = 20 * 1024 * 1024
"""Of a body with its images."""
MAX_BODIES_WITH_IMAGES = 2
"""Of bodies that are larger than others may be, as many are in memory at once, each of them several times. The others
wait, and a tenant alone has one."""
# JSON may escape the slashes.
_IMAGE = re.compile(rb"data:image/[a-z]+;base64,[A-Za-z0-9+/=\\]*")


def _route_class(large: Shares, identities: Identities, refusals: Refusals) -> type[APIRoute]:
    """`large`: held while a large body is read and sent to the agent."""
    with_images = Shares(MAX_BODIES_WITH_IMAGES)

    class Route(APIRoute):
        """Answers all errors in OpenAI's shape, including those of the framework."""

        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handled(request: Request) -> Response:
                has_images = int(request.headers.get("content-length", 0)) > http.MAX_BODY_BYTES
                try:
                    async with place_of_body(request, with_images if has_images else large):
                        # A request of its own: the server keeps the first one until the answer has ended, and would
                        # keep its body.
                        inner = Request(request.scope, request.receive)
                        await check_beside(await inner.body(), _check_body)
                        return await recorded(inner)
                except ClientDisconnect:
                    raise
                except Exception as error:
                    failure = errors.of(error)
                    if failure.status >= 500:
                        _log.error("request failed", status=failure.status, exc_info=True)
                    return failure.response()

            async def recorded(request: Request) -> Response:
                try:
                    return await handle(request)
                except (Forbidden, CompletionError) as error:
                    if isinstance(error, Forbidden) or error.status == 404:
                        await refusals.record(request.scope, identity(request, identities), error)
                    raise

            return handled

    return Route


def _check_body(body: bytes) -> None:
    """Raises TooLarge, InvalidMessage. Only images make a body large: the work to decode the rest grows with it."""
    if len(body) > http.MAX_BODY_BYTES and len(_IMAGE.sub(b"", body)) > http.MAX_BODY_BYTES:
        raise TooLarge(f"body: larger than the limit of {http.MAX_BODY_BYTES} bytes without its images")
    check_json(body)


def router(hub: Hub, agent: Agent, identities: Identities, refusals: Refusals, large: Shares) -> APIRouter:
    """`large`: places for large bodies."""
    route_class = _route_class(large, identities, refusals)
    routes = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=route_class)

    @routes.get("/models")
    async def list_models(who: Reader) -> dict[str, Any]:
        """The tenant's enabled agents as models. `name` is the name of the agent."""
        found = await agents.list_all(agent, who)
        return {"object": "list", "data": [_model(view, who) for view in found if view.enabled]}

    @routes.get("/models/{model}")
    async def get_model(model: str, who: Reader) -> dict[str, Any]:
        view = await agents.find(agent, who, model)
        if not view.enabled:
            raise errors.unknown_model(model)
        return _model(view, who)

    async def start(body: ChatRequest | ResponsesRequest, who: Identity, key: str | None) -> UUID:
        # In a thread: the check of large schemas would block the event loop.
        conversation = await asyncio.to_thread(body.to_conversation)
        return await agents.start_run(agent, who, body.model, conversation, key)

    @routes.post("/chat/completions", response_class=Response, responses=_ANSWER)
    async def complete(body: ChatRequest, who: Runner, idempotency_key: _Key = None) -> Response:
        """Lets the agent answer the last message. The same Idempotency-Key gets the answer of the same run."""
        run_id = await start(body, who, idempotency_key)
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        shape = Chat(run_id, body.model, include_usage=include_usage, old=bool(body.functions))
        return AnswerResponse(
            hub, agent, who, run_id, shape, stream=bool(body.stream), kept=idempotency_key is not None
        )

    @routes.post("/responses", response_class=Response, responses=_ANSWER)
    async def respond(body: ResponsesRequest, who: Runner, idempotency_key: _Key = None) -> Response:
        """Lets the agent answer the last message. The same Idempotency-Key gets the answer of the same run."""
        if isinstance(body.input, list) and len(body.input) <= MAX_MESSAGES:
            body.input = await references.resolved(agent, who, body.input)
        run_id = await start(body, who, idempotency_key)
        shape = Responses(run_id, body.model, body.echoed())
        return AnswerResponse(
            hub, agent, who, run_id, shape, stream=bool(body.stream), kept=idempotency_key is not None
        )

    return routes


def in_shape(app: ASGIApp) -> ASGIApp:
    """The application with OpenAI's shape also for errors that no route of this package answers: an unknown path or
    method, and more requests than a tenant may send."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except (HTTPException, TooManyRequests) as error:
            if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
                raise
            await errors.of(error).response()(scope, receive, send)

    return serve


def _model(view: ListedAgent, who: Identity) -> dict[str, Any]:
    created = int(view.created_at.timestamp())
    return {"id": str(view.id), "object": "model", "created": created, "owned_by": who.tenant_id, "name": view.name}
