"""HTTP of the state of the system: each service is asked, and tells which engines it reaches."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from infra.service.api import Viewer
from infra.service.service import Runtime
from protos.ops.v1 import ops_pb2
from services.log_aggregator.operations_clients import OperationsClients

State = Literal["ready", "degraded", "failed"]


class Component(BaseModel):
    """A service or an engine."""

    name: str
    kind: Literal["service", "engine"]
    state: State
    """A service is degraded while it does not reach one of its engines. An engine is degraded while a part of its
    services does not reach it."""
    version: str | None
    """Of a service that answers."""
    uptime_s: int | None
    """Of a service that answers: seconds since its start."""
    latency_ms: float | None
    """Of an engine: the slowest answer that a service got."""
    unreachable_from: list[str]
    """Of an engine: the services that do not reach it."""


class SystemStatus(BaseModel):
    status: State
    """The worst state of all parts; failed only if a service has failed."""
    parts: list[Component]


def router(runtime: Runtime) -> APIRouter:
    services = OperationsClients(runtime)
    routes = APIRouter(tags=["status"])

    @routes.get("/api/v1/status")
    async def system_status(who: Viewer) -> SystemStatus:
        """Shows the parts of the system. The engines are seen through the services that answer."""
        requests = dict.fromkeys(services.stubs, ops_pb2.CheckHealthRequest())
        replies, silent = await services.ask(None, requests, lambda stub: stub.CheckHealth)
        parts = [_service(name, reply) for name, reply in replies] + [_silent(name) for name in silent]
        engines: dict[str, dict[str, ops_pb2.Dependency]] = {}
        for name, reply in replies:
            for dependency in reply.dependencies:
                engines.setdefault(dependency.name, {})[name] = dependency
        parts.sort(key=lambda part: part.name)
        parts += [_engine(name, seen) for name, seen in sorted(engines.items())]
        states = {part.state for part in parts}
        failed = any(part.state == "failed" for part in parts if part.kind == "service")
        return SystemStatus(status="failed" if failed else "ready" if states == {"ready"} else "degraded", parts=parts)

    return routes


def _service(name: str, reply: ops_pb2.CheckHealthReply) -> Component:
    up = all(dependency.up for dependency in reply.dependencies)
    return Component(
        name=name,
        kind="service",
        state="failed" if not reply.ready else "ready" if up else "degraded",
        version=reply.version,
        uptime_s=reply.uptime_s,
        latency_ms=None,
        unreachable_from=[],
    )


def _silent(name: str) -> Component:
    return Component(
        name=name,
        kind="service",
        state="failed",
        version=None,
        uptime_s=None,
        latency_ms=None,
        unreachable_from=[],
    )


def _engine(name: str, seen: dict[str, ops_pb2.Dependency]) -> Component:
    away = sorted(service for service, dependency in seen.items() if not dependency.up)
    return Component(
        name=name,
        kind="engine",
        state="ready" if not away else "failed" if len(away) == len(seen) else "degraded",
        version=None,
        uptime_s=None,
        latency_ms=max(dependency.latency_ms for dependency in seen.values()),
        unreachable_from=away,
    )
