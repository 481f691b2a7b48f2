"""A real Prometheus scrapes the system, runs every query of the dashboard, and evaluates every alert."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.e2e.test_main_job import Company
from tooling.stack.checkout import CHECKOUT
from tooling.stack.home import SERVICES
from tooling.testing.model_server import ModelServer, Says
from tooling.testing.stack import free_port, run_claw
from tooling.testing.system import System
from tooling.testing.until import until
from tooling.testing.vendors import WebhookStandIn

DEPLOY = CHECKOUT / "infra" / "deploy"
# Without a fault there are no such series.
EMPTY = {"Open dead letters", "Errors of HTTP, part of the requests"}


class Prometheus:
    """A client of the server that the test has started."""

    def __init__(self, api: httpx.AsyncClient) -> None:
        self._api = api

    async def get(self, path: str, **params: str) -> Any:
        """The data of the answer. Raises AssertionError if Prometheus refuses the request, such as a wrong query."""
        answer = (await self._api.get(f"/api/v1/{path}", params=params)).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    async def labels(self, query: str) -> list[dict[str, str]]:
        return [series["metric"] for series in (await self.get("query", query=query))["result"]]


@pytest.fixture
async def prometheus(system: System, prometheus_programs: Path, tmp_path: Path) -> AsyncIterator[Prometheus]:
    """Prometheus with the shipped jobs and alerts; only its targets and its intervals are this test's."""
    configuration = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    # `./claw up` starts no exporter of the machine's metrics.
    configuration["scrape_configs"] = [job for job in configuration["scrape_configs"] if job["job_name"] != "machine"]
    ports = json.loads((system.home / "ports.json").read_text())
    names = {"services": SERVICES, "rabbitmq": ["rabbitmq_prometheus"]}
    for job in configuration["scrape_configs"]:
        job["static_configs"] = [{"targets": [f"127.0.0.1:{ports[name]}" for name in names[job["job_name"]]]}]
    configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    configuration["rule_files"] = [str(DEPLOY / "prometheus" / "alerts.yml")]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    port = free_port()
    server = await asyncio.create_subprocess_exec(
        prometheus_programs / "prometheus",
        f"--config.file={tmp_path / 'prometheus.yml'}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as api:

            async def ready() -> bool:
                assert server.returncode is None, "Prometheus has ended"
                try:
                    return (await api.get("/-/ready")).status_code == 200
                except httpx.TransportError:
                    return False

            await until(ready)
            yield Prometheus(api)
    finally:
        server.terminate()
        await server.wait()


async def test_each_query_of_the_dashboard_has_an_answer_and_each_alert_is_evaluated(
    system: System, models: ModelServer, prometheus: Prometheus
) -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "clawbus.json").read_text())
    panels = {panel["title"]: target["expr"] for panel in dashboard["panels"] for target in panel["targets"]}
    assert panels.keys() > EMPTY
    async with AsyncExitStack() as stack:
        hook = await stack.enter_async_context(WebhookStandIn())
        key = await system.tenant("Measured", credit_nanos=10_000_000_000)
        company = Company(await stack.enter_async_context(system.client(key)))
        path = await company.channel("webhook", await company.agent(models), hook)
        models.rules["gpt-4o-mini"] = lambda asked: Says(f"You said {asked.last_user_text}")
        vendor = await stack.enter_async_context(system.client())
        sent = 0

        async def empty() -> list[str]:
            """The panels without data. Sends a message first, because a rate needs values that grow."""
            nonlocal sent
            body, headers = hook.message(f"hello {sent}", conversation=f"c{sent}")
            assert (await vendor.post(path, content=body, headers=headers)).status_code == 200
            sent += 1
            found = {title: await prometheus.labels(expression) for title, expression in panels.items()}
            return [title for title, series in found.items() if not series and title not in EMPTY]

        async def all_have_data() -> bool:
            return not await empty()

        await until(all_have_data)

        async def all_replied() -> bool:
            return len(hook.ledger) == sent

        await until(all_replied)
    assert await prometheus.get("metadata", metric="claw_dead_letters_open")
    # An alert on an increase does not see the first value of a series, so these begin at 0.
    consumers = {series["consumer"] for series in await prometheus.labels("claw_dead_letters_total")}
    assert {"billing", "runs", "channel.outbound", "outbox"} <= consumers
    verdicts = {series["verdict"] for series in await prometheus.labels("claw_usage_records_total")}
    assert {"held", "conflict"} <= verdicts
    addresses = {status["address"] for status in json.loads(run_claw(system.home, "status", "--json"))}
    targets = (await prometheus.get("targets"))["activeTargets"]
    assert {target["health"] for target in targets} == {"up"}
    services = {target["labels"]["instance"] for target in targets if target["labels"]["job"] == "services"}
    assert len(services) == len(SERVICES)
    assert services <= addresses

    async def evaluated() -> bool:
        groups = (await prometheus.get("rules"))["groups"]
        return {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}

    await until(evaluated)
