"""The processes that the tests kill, pause and starve: the sample's three, and the services on the way of a message."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import httpx
import pytest

from infra.clock import uuid7
from infra.postgres.db import create_engine, sql
from protos.catalog import PLATFORM_EVENTS
from protos.messages.user import TenantCreated
from tests.infra.conftest import PASSWORDS
from tooling.testing.platform import Platform, running_platform
from tooling.testing.sample.run import Engines, SampleServices
from tooling.testing.stack import Stack

DEADLINE_SECONDS = 120
# On the way of a message from its webhook to the bill.
SERVICES_ON_THE_WAY = ("channel", "agent", "billing", "plugin")


class Load:
    """Sends notes as a careful client does: the same id again until the answer is 202. Then checks all of them."""

    def __init__(self, services: SampleServices) -> None:
        self.services = services
        self.accepted: dict[UUID, str] = {}

    async def send(self, count: int, *, books: int = 3, pause: float = 0.0) -> None:
        async with httpx.AsyncClient(base_url=self.services.base_url("front"), timeout=10) as client:
            for n in range(count):
                await self._send(client, uuid7(), f"book {n % books}")
                await asyncio.sleep(pause)

    async def _send(self, client: httpx.AsyncClient, id_: UUID, book: str) -> None:
        note = {"notebook": book, "text": str(id_)}
        async with asyncio.timeout(DEADLINE_SECONDS):
            while True:
                try:
                    response = await client.post("/notes", json=note, headers={"idempotency-key": str(id_)})
                except httpx.TransportError:
                    response = None
                if response is not None and response.status_code == 202:
                    self.accepted[id_] = book
                    return
                assert response is None or response.status_code >= 500, response.text
                await asyncio.sleep(0.1)

    async def all_done(self) -> None:
        """Waits until every accepted note has its effect; then nothing may be lost, doubled or out of order."""
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                while len(await self._query("ledger", "SELECT 1 FROM effect")) < len(self.accepted):
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise AssertionError(await self._where_it_stands()) from None
        effects = await self._query("ledger", "SELECT notebook, number, nth FROM effect")
        assert len(effects) == len(self.accepted)
        assert [row for row in effects if row[1] != row[2]] == []
        events = await self._query("desk", "SELECT convert_from(data, 'UTF8') FROM event")
        assert sorted(event.partition('"text":"')[2][:36] for (event,) in events) == sorted(map(str, self.accepted))
        gaps = "SELECT stream_id FROM event GROUP BY 1 HAVING max(version) <> count(*) OR min(version) <> 1"
        assert await self._query("desk", gaps) == []
        assert await self._query("ledger", "SELECT error FROM dead_letter") == []

    async def _where_it_stands(self) -> str:
        lines = [f"{len(self.accepted)} accepted"]
        for service, statement in (
            ("front", "SELECT bus, count(*), count(published_at) FROM outbox GROUP BY 1"),
            ("front", "SELECT name, expires_at - clock_timestamp() FROM lease"),
            ("desk", "SELECT count(*) FROM event"),
            ("desk", "SELECT bus, count(*), count(published_at) FROM outbox GROUP BY 1"),
            ("ledger", "SELECT count(*) FROM effect"),
            ("ledger", "SELECT partition, next_offset, updated_at FROM consumer_offset ORDER BY 1"),
            ("ledger", "SELECT error FROM dead_letter"),
            ("desk", "SELECT error FROM dead_letter"),
            (
                "desk",
                "SELECT pid, pg_blocking_pids(pid), state, wait_event, clock_timestamp() - state_change, "
                "left(query, 60) FROM pg_stat_activity WHERE datname = current_database() AND state <> 'idle'",
            ),
        ):
            lines.append(f"{service}: {statement}: {await self._query(service, statement)}")
        lines += await self._queues()
        lines += [self.services.last_words(instance) for instance in self.services.processes]
        return "\n".join(lines)

    async def _queues(self) -> list[str]:
        engines = self.services.engines
        vhost = urlsplit(engines.rabbitmq).path[1:]
        async with httpx.AsyncClient(trust_env=False) as client:
            found = (await client.get(f"{engines.rabbitmq_management}/api/queues/{vhost}")).json()
            connections = (await client.get(f"{engines.rabbitmq_management}/api/vhosts/{vhost}/connections")).json()
        names = ("name", "messages_ready", "messages_unacknowledged", "consumers")
        return [
            *(f"queue {[queue.get(name) for name in names]}" for queue in found if queue.get("messages")),
            *(f"connection {[c.get(n) for n in ('name', 'timeout', 'state', 'channels')]}" for c in connections),
        ]

    async def _query(self, service: str, statement: str) -> list[tuple[Any, ...]]:
        engine = create_engine(self.services.url(service), pool_size=1)
        try:
            async with engine.connect() as connection:
                return list(await sql(connection, statement))
        finally:
            await engine.dispose()


@pytest.fixture(scope="module")
async def services(
    stack: Stack, database: str, vhost: str, topic_prefix: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[SampleServices]:
    engines = Engines(database, stack.kafka_bootstrap_servers, vhost, stack.rabbitmq_management_url, stack.redis_url)
    folder: Path = tmp_path_factory.mktemp("services")
    running = SampleServices(engines, folder, PASSWORDS, prefix=topic_prefix)
    await running.prepare()
    try:
        await running.start_all()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def load(services: SampleServices) -> Load:
    """One for the module: each test adds conditions that must hold, and checks all of them again."""
    return Load(services)


@pytest.fixture(scope="module")
async def platform(
    stack: Stack, database: str, vhost: str, topic_prefix: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Platform]:
    folder = tmp_path_factory.mktemp("platform")
    async with running_platform(stack, database, vhost, topic_prefix, folder) as running:
        await running.prepare(*SERVICES_ON_THE_WAY)
        await running.start(*SERVICES_ON_THE_WAY)
        yield running


@pytest.fixture(scope="module")
async def tenant(platform: Platform) -> str:
    id_ = str(uuid7())
    fact = TenantCreated(tenant_id=id_, name="Norrland", currency="USD", credit_nanos=10**12)
    await platform.produce(PLATFORM_EVENTS, fact, key=id_, tenant_id=id_)
    return id_
