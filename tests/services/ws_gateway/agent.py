"""A stand-in for the agent: the routes that the gateway uses, and the committed facts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import msgspec
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from infra.clock import utcnow, uuid7
from infra.errors import Conflict, InvalidMessage, NotFound, Transient
from infra.observe.metrics import Metrics
from infra.security.auth import IDENTITY_HEADER, Identity
from infra.web.http import Health, create_app
from infra.web.server import serve_http
from protos.catalog import AGENT_EVENTS
from protos.messages.agent import RunCompleted, RunFailed, RunStarted, StepCompleted, StepStarted
from services.agent.sessions.completions import MAX_BODY_BYTES
from tooling.testing import keys
from tooling.testing.platform import Platform

SESSION = "telegram:1:42"


def run_facts(run_id: UUID) -> list[Any]:
    """A run's facts, from its start to its reply."""
    where: dict[str, Any] = {"run_id": run_id, "session_key": SESSION}
    step: dict[str, Any] = {"step": 1, "kind": "model", "name": "scripted/answer"}
    return [
        RunStarted(**where, agent_id=uuid7(), attempt=1, n=1),
        StepStarted(**where, **step, attempt=1, n=2),
        StepCompleted(**where, **step, status="completed", attempts=1, duration_ms=7, n=3),
        RunCompleted(**where, reply="Grüße\nfrom two lines", n=4),
    ]


def failed(run_id: UUID, n: int, status: Any) -> RunFailed:
    return RunFailed(run_id=run_id, session_key=SESSION, status=status, error="out of quota", n=n)


@dataclass(frozen=True)
class Completion:
    """A requested completion and its run."""

    run_id: UUID
    agent_id: UUID
    key: str | None
    body: dict[str, Any]


class Agent:
    """`committed` has the facts of each run, `reads` the `after` of each read. While `hold` is clear, answers to reads
    are delayed, and while `accepting` is clear, answers to completions. `agents` has the agents of each tenant,
    `completions` the requests that no test has read yet, `cancelled` the runs with a cancellation."""

    def __init__(self) -> None:
        self.tenants: dict[UUID, str] = {}
        self._identities = keys.identities("agent")
        self.committed: dict[UUID, list[Any]] = {}
        self.reads: list[tuple[UUID, int]] = []
        self.posted: list[tuple[str, dict[str, str], bytes]] = []
        self.cancelled: list[UUID] = []
        self.away = False
        self.pages = 0
        """How many pages of agents were read."""
        self.hold = asyncio.Event()
        self.hold.set()
        self.accepting = asyncio.Event()
        self.accepting.set()
        self.answer: tuple[int, dict[str, Any]] = (202, {})
        self.agents: dict[str, list[dict[str, Any]]] = {}
        self.completions: asyncio.Queue[Completion] = asyncio.Queue()
        self.keys: dict[str, Completion] = {}
        self.usage: dict[UUID, dict[str, int | None]] = {}

    def new_run(self, tenant: str) -> UUID:
        run_id = uuid7()
        self.tenants[run_id] = tenant
        self.committed[run_id] = []
        return run_id

    def new_agent(self, tenant: str, *, enabled: bool = True) -> str:
        id_ = str(uuid7())
        view = {"id": id_, "name": "Helper", "enabled": enabled, "created_at": "2026-01-02T03:04:05Z", "model": "x/y"}
        self.agents.setdefault(tenant, []).append(view)
        return id_

    async def was_read(self, run_id: UUID, times: int = 1) -> None:
        async with asyncio.timeout(30):
            while len([read for read, _ in self.reads if read == run_id]) < times:
                await asyncio.sleep(0.02)

    def _who(self, request: Request) -> Identity:
        return self._identities.verify(request.headers[IDENTITY_HEADER], request.method, request.url.path)

    async def facts(self, request: Request) -> Response:
        run_id = UUID(request.path_params["id"])
        after = int(request.query_params["after"])
        who = self._who(request)
        assert "read" in who.scopes
        if self.away:
            self.reads.append((run_id, after))
            raise Transient("shutting down")
        if self.tenants.get(run_id) != who.tenant_id:
            raise NotFound(f"run {run_id}")
        items = [
            {"n": fact.n, "type": fact.wire_name(), "time": utcnow().isoformat(), "data": msgspec.to_builtins(fact)}
            for fact in self.committed[run_id]
            if fact.n > after
        ]
        self.reads.append((run_id, after))
        await self.hold.wait()
        return JSONResponse({"items": items})

    async def message(self, request: Request) -> Response:
        assert "run" in self._who(request).scopes
        path: str = request.scope["raw_path"].decode()
        self.posted.append((path, dict(request.headers), await request.body()))
        status, body = self.answer
        if status == 502:
            return Response("Bad Gateway", status)
        return JSONResponse(body, status, {"retry-after": "3"} if status == 503 else None)

    async def list_agents(self, request: Request) -> Response:
        """One agent a page, as if the limit were one, with the fields of a short list only."""
        assert request.query_params["short"] == "true"
        self.pages += 1
        who = self._who(request)
        assert "read" in who.scopes
        n = int(request.query_params.get("cursor", "0"))
        names = ("id", "name", "enabled", "created_at")
        mine = [{name: agent[name] for name in names} for agent in self.agents.get(who.tenant_id, [])]
        more = str(n + 1) if n + 1 < len(mine) else None
        return JSONResponse({"items": mine[n : n + 1], "next": more})

    async def show(self, request: Request) -> Response:
        who = self._who(request)
        assert "read" in who.scopes
        for agent in self.agents.get(who.tenant_id, []):
            if agent["id"] == request.path_params["id"]:
                return JSONResponse(agent)
        raise NotFound("agent")

    async def complete(self, request: Request) -> Response:
        who = self._who(request)
        assert "run" in who.scopes
        agent_id = request.path_params["id"]
        if self.away:
            raise Transient("shutting down")
        if agent_id not in [agent["id"] for agent in self.agents.get(who.tenant_id, [])]:
            raise NotFound(f"agent {agent_id}")
        key, body = request.headers.get("idempotency-key"), await request.json()
        known = self.keys.get(key) if key else None
        if known and known.body != body:
            raise InvalidMessage("idempotency_key", "was used before with another body")
        if not known:
            known = Completion(self.new_run(who.tenant_id), UUID(agent_id), key, body)
            if key:
                self.keys[key] = known
        self.completions.put_nowait(known)
        await self.accepting.wait()
        return JSONResponse({"run_id": str(known.run_id)}, 202)

    async def run(self, request: Request) -> Response:
        assert "read" in self._who(request).scopes
        unreported = {"input_tokens": None, "cached_tokens": None, "output_tokens": None}
        return JSONResponse({"usage": self.usage.get(UUID(request.path_params["id"]), unreported)})

    async def cancel(self, request: Request) -> Response:
        run_id = UUID(request.path_params["id"])
        who = self._who(request)
        assert "run" in who.scopes
        if self.tenants.get(run_id) != who.tenant_id:
            raise NotFound(f"run {run_id}")
        if any(isinstance(fact, RunCompleted) for fact in self.committed[run_id]):
            raise Conflict("the run is completed")
        self.cancelled.append(run_id)
        return JSONResponse({"id": str(run_id)}, 202)


@asynccontextmanager
async def stand_in(port: int) -> AsyncIterator[Agent]:
    agent = Agent()
    routes = [
        Route("/internal/runs/{id}/events", agent.facts),
        Route("/api/v1/agents/{id}/sessions/{key:path}/messages", agent.message, methods=["POST"]),
        Route("/api/v1/agents", agent.list_agents),
        Route("/api/v1/agents/{id}", agent.show),
        Route("/internal/agents/{id}/completions", agent.complete, methods=["POST"]),
        Route("/api/v1/runs/{id}", agent.run),
        Route("/api/v1/runs/{id}/cancel", agent.cancel, methods=["POST"]),
    ]
    server = await serve_http(
        create_app(routes, Health("agent", "1"), Metrics(CollectorRegistry()), max_body=MAX_BODY_BYTES), port
    )
    yield agent
    await server.stop()


async def happen(platform: Platform, agent: Agent, *facts: Any, heard: bool = True) -> None:
    """Commits the facts and publishes them, as the agent and its relay do; unless `heard`, they do not reach Kafka."""
    for fact in facts:
        agent.committed[fact.run_id].append(fact)
        if heard:
            await platform.produce(AGENT_EVENTS, fact, key=SESSION, tenant_id="acme")


class ValidKeys:
    """Keys that stay valid: each client keeps its scopes."""

    async def renewed(self, who: Identity) -> Identity:
        return who
