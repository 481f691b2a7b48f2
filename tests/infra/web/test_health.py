"""Liveness, readiness and the dependencies' state, over real HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from infra.observe.metrics import Metrics
from infra.web import health as health_module
from infra.web.health import Health
from infra.web.http import create_app
from infra.web.server import serve_http

ALIVE = ("/health", "/healthz", "/api/health")
READY = ("/readyz", "/api/health/dependencies")


class Dependency:
    """A dependency that can be up, down or silent, and counts its checks."""

    def __init__(self) -> None:
        self.state = "up"
        self.asked = 0

    async def check(self) -> None:
        self.asked += 1
        if self.state == "down":
            raise ConnectionError("refused")
        if self.state == "silent":
            await asyncio.Event().wait()


@pytest.fixture
def health() -> Health:
    return Health("billing", "1.2.3")


@pytest.fixture(autouse=True)
def uncached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_module, "CACHE_SECONDS", 0.0)
    monkeypatch.setattr(health_module, "CHECK_SECONDS", 0.05)


@pytest.fixture
async def client(health: Health) -> AsyncIterator[httpx.AsyncClient]:
    server = await serve_http(create_app([], health, Metrics(CollectorRegistry())), 0)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as client:
        yield client
    await server.stop()


async def statuses(client: httpx.AsyncClient, paths: tuple[str, ...]) -> set[int]:
    return {(await client.get(path)).status_code for path in paths}


async def test_dependencies_have_exactly_the_required_shape(client: httpx.AsyncClient, health: Health) -> None:
    health.add_check("postgres", Dependency().check)
    health.add_check("kafka", Dependency().check)
    body = (await client.get("/api/health/dependencies")).json()
    assert list(body) == ["status", "version", "uptime", "dependencies"]
    assert (body["status"], body["version"], type(body["uptime"])) == ("ok", "1.2.3", int)
    assert list(body["dependencies"]) == ["postgres", "kafka"]
    for dependency in body["dependencies"].values():
        assert list(dependency) == ["status", "latency"]
        assert dependency["status"] == "up"
        assert dependency["latency"] >= 0


@pytest.mark.parametrize("state", ["down", "silent"])
async def test_a_failed_dependency_makes_the_process_unready_and_not_dead(
    client: httpx.AsyncClient, health: Health, state: str
) -> None:
    postgres = Dependency()
    health.add_check("postgres", postgres.check)
    health.add_check("kafka", Dependency().check)
    postgres.state = state
    assert await statuses(client, READY) == {503}
    assert await statuses(client, ALIVE) == {200}
    body = (await client.get("/readyz")).json()
    assert body["status"] == "degraded"
    assert {name: d["status"] for name, d in body["dependencies"].items()} == {"postgres": "down", "kafka": "up"}
    postgres.state = "up"
    assert await statuses(client, READY) == {200}


async def test_without_a_bus_it_is_degraded_and_still_ready(client: httpx.AsyncClient, health: Health) -> None:
    kafka = Dependency()
    kafka.state = "down"
    health.add_check("postgres", Dependency().check)
    health.add_check("kafka", kafka.check, needed=False)
    assert await statuses(client, READY) == {200}
    assert (await client.get("/readyz")).json()["status"] == "degraded"


async def test_checks_run_side_by_side(client: httpx.AsyncClient, health: Health) -> None:
    together = asyncio.Barrier(3)
    for name in ("postgres", "kafka", "rabbitmq"):

        async def check() -> None:
            await together.wait()

        health.add_check(name, check)
    assert await statuses(client, READY) == {200}


async def test_many_probes_ask_a_dependency_once(
    client: httpx.AsyncClient, health: Health, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_module, "CACHE_SECONDS", 60.0)
    postgres = Dependency()
    health.add_check("postgres", postgres.check)
    await asyncio.gather(*(client.get("/readyz") for _ in range(20)))
    assert postgres.asked == 1


async def test_a_drain_makes_the_process_unready_and_not_dead(client: httpx.AsyncClient, health: Health) -> None:
    health.drain()
    assert (await client.get("/readyz")).json()["status"] == "draining"
    assert await statuses(client, READY) == {503}
    assert await statuses(client, ALIVE) == {200}


async def test_a_stuck_part_makes_the_process_dead_and_is_named(client: httpx.AsyncClient, health: Health) -> None:
    moving = [True]
    health.add_probe("consumer billing", lambda: moving[0])
    assert (await client.get("/api/health")).json() == {"status": "ok", "version": "1.2.3", "uptime": 0}
    moving[0] = False
    assert await statuses(client, ALIVE) == {503}
    body = (await client.get("/healthz")).json()
    assert (body["status"], body["stuck"]) == ("stuck", ["consumer billing"])


async def test_only_a_dependency_that_has_answered_before_is_logged_as_an_error(health: Health) -> None:
    postgres = Dependency()
    health.add_check("postgres", postgres.check)
    with capture_logs() as lines:
        for state in ("down", "down", "up", "down"):
            postgres.state = state
            await health.ready()
    assert [(line["log_level"], line["event"]) for line in lines] == [
        ("warning", "dependency does not answer yet"),
        ("info", "dependency answers again"),
        ("error", "dependency does not answer"),
    ]
