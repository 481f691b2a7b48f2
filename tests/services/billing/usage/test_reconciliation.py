"""Every usage record that a service committed has a verdict, or the reconciliation shows that it is missing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from prometheus_client import CollectorRegistry

from infra.bus.kafka import KafkaPublisher
from infra.bus.outbox import Relay
from infra.clock import utcnow, uuid7
from infra.observe.metrics import Metrics
from infra.postgres.database import Database
from infra.postgres.schema import prepare_database
from infra.service import operations
from infra.web.health import Health
from infra.web.rpc import Server
from protos.catalog import SERVICES, USAGE_RECORDS
from protos.messages.billing import UsageRecorded
from services.billing.usage import retention
from tests.services.billing.conftest import Billing
from tooling.testing import keys
from tooling.testing.platform import PASSWORDS, Platform


@pytest.fixture(scope="module")
async def producers(platform: Platform) -> AsyncIterator[None]:
    """The parts of the other services that a reconciliation needs: their outboxes and their operations gRPC."""
    others = [name for name in SERVICES if name != "billing"]
    await prepare_database(platform.database_url, {name: PASSWORDS for name in others})
    servers = []
    for name in others:
        server = Server(name, keys.callers(name), Metrics(CollectorRegistry()))
        add, servicer = operations.servicer(platform.database(name), Health(name, "1.0"))
        add(servicer, server.grpc)
        await server.start(int(platform.grpc(name).rpartition(":")[2]))
        servers.append(server)
    yield
    for server in servers:
        await server.stop()


@asynccontextmanager
async def relay(platform: Platform, database: Database) -> AsyncIterator[None]:
    publisher = KafkaPublisher(platform.stack.kafka_bootstrap_servers, prefix=platform.prefix)
    running = Relay(database, publisher, Metrics(CollectorRegistry()), lease_seconds=3)
    task = asyncio.create_task(running.run())
    yield
    await running.stop()
    await task
    await publisher.stop()


async def test_every_record_of_every_producer_gets_a_verdict_and_a_lost_one_is_reported(
    billing: Billing, producers: None
) -> None:
    platform = billing.platform
    ours, theirs = await billing.tenant(), await billing.tenant()

    async def produce(service: str, tenant_id: str, *usage_ids: str, **quantities: int) -> None:
        async with platform.database(service).begin(tenant_id=tenant_id) as tx:
            for usage_id in usage_ids:
                record = UsageRecorded(
                    tenant_id=tenant_id,
                    usage_id=usage_id,
                    resource="openai/gpt-4o-mini",
                    quantities=quantities,
                    occurred_at=utcnow(),
                )
                tx.publish(USAGE_RECORDS, record, key=tenant_id)

    async def numbers(tenant: Any = None) -> dict[str, int]:
        client = tenant.http if tenant else billing.operator
        response = await client.get("/api/v1/billing/reconciliation")
        assert response.status_code == 200, response.text
        found: dict[str, int] = response.json()
        return found

    await produce("agent", ours.id, "a", "b", "a", input_tokens=1, output_tokens=1)
    await produce("memory", ours.id, "c", input_tokens=1)
    await produce("plugin", ours.id, "d", input_tokens=1, cached_tokens=2, output_tokens=1)
    await produce("agent", ours.id, "", input_tokens=1)
    await produce("agent", theirs.id, "a", input_tokens=1, output_tokens=1)
    nothing = {"counted": 0, "duplicate": 0, "rejected": 0, "held": 0}
    assert await numbers(ours) == nothing | {"produced": 6, "pending": 6, "difference": 0}

    async def done() -> bool:
        return (await numbers(theirs))["counted"] == 1 and (await numbers(ours))["pending"] == 1

    async with (
        relay(platform, platform.database("agent")),
        relay(platform, platform.database("memory")),
        relay(platform, platform.database("plugin")),
    ):
        await platform.until(done)
    told = {"produced": 6, "counted": 2, "duplicate": 1, "rejected": 0, "held": 2}
    # The record without a usage_id is a dead letter: it has no verdict, but it is not lost.
    assert await numbers(ours) == told | {"pending": 1, "difference": 0}
    assert await numbers(theirs) == nothing | {"produced": 1, "counted": 1, "pending": 0, "difference": 0}
    assert (await numbers())["produced"] == 7
    await theirs.sql("UPDATE dead_letter SET state = 'discarded' WHERE key = $1", ours.id)
    assert await numbers(ours) == told | {"rejected": 1, "pending": 0, "difference": 0}

    # Records that the outboxes will delete soon are left out on both sides, by the time in the message's id.
    long_ago = UUID(int=uuid7().int - (int(timedelta(days=40) / timedelta(milliseconds=1)) << 80))
    await theirs.use("old", message_id=long_ago, input_tokens=1, output_tokens=1)
    await theirs.verdict("old")
    assert await numbers(theirs) == nothing | {"produced": 1, "counted": 1, "pending": 0, "difference": 0}
    # So they may be deleted here too. Only the old one is.
    await theirs.sql(
        """
        UPDATE usage
        SET occurred_at = occurred_at - interval '60 days', rated_at = rated_at - interval '60 days'
        WHERE tenant_id = $1 AND usage_id = 'old'
        """,
        theirs.id,
    )
    async with platform.database("billing").begin(tenant_id=theirs.id) as tx:
        assert await retention.delete(tx, theirs.id, retention.kept_since(utcnow())) == 1
    assert await numbers(theirs) == nothing | {"produced": 1, "counted": 1, "pending": 0, "difference": 0}

    await produce("agent", theirs.id, "lost", input_tokens=1, output_tokens=1)
    async with platform.database("agent").begin() as tx:
        await tx.sql("UPDATE outbox SET published_at = now() WHERE published_at IS NULL")
    assert await numbers(theirs) == nothing | {"produced": 2, "counted": 1, "pending": 0, "difference": 1}
