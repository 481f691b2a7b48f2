"""The calls to the agent service: list agents, start and cancel a run, read a run's usage."""

from __future__ import annotations

from datetime import datetime
from urllib.parse import quote
from uuid import UUID

import msgspec

from infra.errors import Transient
from infra.observe.logs import get_logger
from infra.security.auth import Identity
from services.ws_gateway.agent import Agent
from services.ws_gateway.openai.conversation import CompletionRequest
from services.ws_gateway.openai.errors import of_problem, unknown_model
from services.ws_gateway.openai.shapes import UNREPORTED, Usage

_PAGE = 200
_log = get_logger("ws_gateway.openai")


class ListedAgent(msgspec.Struct):
    """The fields of an agent that a client sees."""

    id: UUID
    name: str
    enabled: bool
    created_at: datetime


class _Page(msgspec.Struct):
    items: list[ListedAgent]
    next: str | None


class _Accepted(msgspec.Struct):
    run_id: UUID


class _Run(msgspec.Struct):
    usage: Usage


async def list_all(agent: Agent, who: Identity) -> list[ListedAgent]:
    """All agents of the tenant. Raises Failure, Transient."""
    found: list[ListedAgent] = []
    cursor = ""
    while True:
        answer = await agent.ask(who, "GET", f"/api/v1/agents?short=true&limit={_PAGE}{cursor}", "/api/v1/agents")
        if answer.status_code != 200:
            raise of_problem(answer.status_code, answer.headers, answer.content)
        page = msgspec.json.decode(answer.content, type=_Page)
        found += page.items
        if page.next is None:
            return found
        cursor = f"&cursor={quote(page.next)}"


async def find(agent: Agent, who: Identity, model: str) -> ListedAgent:
    """The agent with this id. Raises Failure, also for another tenant's agent, and Transient."""
    try:
        agent_id = UUID(model)
    except ValueError:
        raise unknown_model(model) from None
    answer = await agent.ask(who, "GET", f"/api/v1/agents/{agent_id}", "/api/v1/agents/{agent_id}")
    if answer.status_code == 404:
        raise unknown_model(model)
    if answer.status_code != 200:
        raise of_problem(answer.status_code, answer.headers, answer.content)
    return msgspec.json.decode(answer.content, type=ListedAgent)


async def start_run(agent: Agent, who: Identity, model: str, conversation: CompletionRequest, key: str | None) -> UUID:
    """Starts the run that answers. The same idempotency key gets the same run. Raises Failure, Transient."""
    try:
        agent_id = UUID(model)
    except ValueError:
        raise unknown_model(model) from None
    answer = await agent.ask(
        who,
        "POST",
        f"/internal/agents/{agent_id}/completions",
        "/internal/agents/{agent_id}/completions",
        body=msgspec.json.encode(conversation),
        headers={"content-type": "application/json"} | ({"idempotency-key": key} if key else {}),
    )
    if answer.status_code == 404:
        raise unknown_model(model)
    if answer.status_code != 202:
        raise of_problem(answer.status_code, answer.headers, answer.content)
    return msgspec.json.decode(answer.content, type=_Accepted).run_id


async def usage(agent: Agent, who: Identity, run_id: UUID) -> Usage:
    """The usage of an ended run. If it cannot be read, it counts as not reported: the answer must not fail for it."""
    try:
        answer = await agent.ask(who, "GET", f"/api/v1/runs/{run_id}", "/api/v1/runs/{run_id}")
    except Transient as error:
        _log.warning("could not read the usage of a run; the answer has none", run_id=str(run_id), error=str(error))
        return UNREPORTED
    if answer.status_code != 200:
        _log.warning(
            "could not read the usage of a run; the answer has none", run_id=str(run_id), status=answer.status_code
        )
        return UNREPORTED
    return msgspec.json.decode(answer.content, type=_Run).usage


async def cancel(agent: Agent, who: Identity, run_id: UUID) -> None:
    """Cancels a run whose client has gone. If that fails, the run finishes without a reader."""
    try:
        await agent.ask(who, "POST", f"/api/v1/runs/{run_id}/cancel", "/api/v1/runs/{run_id}/cancel")
    except Transient as error:
        _log.warning("could not cancel an abandoned run; it will finish", run_id=str(run_id), error=str(error))
