"""The sample's topic and queue, and a desk and a ledger run in the test's own process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from infra.bus import provisioning
from infra.bus.kafka import KafkaPublisher
from infra.bus.outbox import Publisher, Relay
from infra.bus.rabbit_publisher import RabbitPublisher
from infra.bus.transactional import TransactionalReader
from infra.observe.metrics import Metrics
from infra.postgres.database import Database
from infra.service.redrive import Redriver
from protos.catalog import AUDIT_LOGS
from protos.topology import Catalog, Subscription
from tooling.testing.sample.catalog import SAMPLE
from tooling.testing.stack import Stack


@dataclass
class Buses:
    """Kafka and RabbitMQ with the sample's topology, and how to run the kernel's loops against them."""

    kafka: str
    rabbitmq: str
    prefix: str
    metrics: Metrics = field(default_factory=lambda: Metrics(CollectorRegistry()))

    async def provision(self, stack: Stack, catalog: Catalog) -> None:
        await provisioning.apply(
            catalog,
            kafka=self.kafka,
            rabbit_url=self.rabbitmq,
            management_url=stack.rabbitmq_management_url,
            prefix=self.prefix,
        )

    @asynccontextmanager
    async def relay(
        self, database: Database, publisher: Publisher | None = None, **options: Any
    ) -> AsyncIterator[Relay]:
        own = publisher or KafkaPublisher(self.kafka, prefix=self.prefix)
        relay = Relay(database, own, self.metrics, lease_seconds=3, **options)
        database.on_messages(relay.wake)
        task = asyncio.create_task(relay.run())
        yield relay
        await relay.stop()
        await task
        if publisher is None:
            await own.stop()  # type: ignore[attr-defined]

    @asynccontextmanager
    async def reader(self, database: Database, *subscriptions: Subscription) -> AsyncIterator[TransactionalReader]:
        group = subscriptions[0].group
        reader = TransactionalReader(
            database,
            group,
            subscriptions,
            bootstrap=self.kafka,
            metrics=self.metrics,
            prefix=self.prefix,
            session_ms=6000,
        )
        task = asyncio.create_task(reader.run())
        yield reader
        await reader.stop()
        await task

    @asynccontextmanager
    async def redriver(self, database: Database, *subscriptions: Subscription) -> AsyncIterator[Redriver]:
        redriver = Redriver(database, subscriptions, self.metrics)
        task = asyncio.create_task(redriver.run())
        yield redriver
        await redriver.stop()
        await task

    def rabbit(self) -> RabbitPublisher:
        return RabbitPublisher(self.rabbitmq)


@pytest.fixture(scope="module")
async def buses(stack: Stack, vhost: str, topic_prefix: str) -> Buses:
    buses = Buses(stack.kafka_bootstrap_servers, vhost, topic_prefix)
    await buses.provision(stack, Catalog(topics=(*SAMPLE.topics, AUDIT_LOGS), queues=SAMPLE.queues))
    return buses
