"""Tests of provisioning on real brokers: the things that it makes, changes, and refuses to change."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import aio_pika
import httpx
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from infra.bus.kafka import MAX_RECORD_BYTES
from infra.bus.provisioning import DriftRefused, apply, plan
from infra.bus.provisioning.rabbit import queue_arguments
from protos.envelope import Message
from protos.topology import Catalog, Exchange, Queue, Topic
from tooling.testing.stack import Stack


class Happened(Message, frozen=True, kw_only=True):
    """For these tests."""


FACTS = Topic(
    "facts",
    partitions=3,
    retention=timedelta(days=1),
    key="id",
    messages=(Happened,),
    producers=("a",),
    consumers=("b",),
)
WORK = Queue(
    "work",
    exchange=Exchange("jobs", "direct"),
    routing_key="work",
    message=Happened,
    producers=("a",),
    consumer="b",
    retries=(timedelta(milliseconds=200), timedelta(milliseconds=400)),
)
CATALOG = Catalog(topics=(FACTS,), queues=(WORK,))


@pytest.fixture
def brokers(stack: Stack, vhost: str, topic_prefix: str) -> dict[str, str]:
    """Arguments of `plan` and `apply`; each test has topics of its own and shares the virtual host's queues."""
    return {
        "kafka": stack.kafka_bootstrap_servers,
        "rabbit_url": vhost,
        "management_url": stack.rabbitmq_management_url,
        "prefix": f"{topic_prefix}{uuid.uuid4().hex}.",
    }


@pytest.fixture
async def admin(stack: Stack) -> AsyncIterator[Any]:
    client = AIOKafkaAdminClient(bootstrap_servers=stack.kafka_bootstrap_servers)
    await client.start()
    yield client
    await client.close()


@pytest.fixture
async def management(stack: Stack) -> AsyncIterator[httpx.AsyncClient]:
    url = httpx.URL(stack.rabbitmq_management_url)
    auth = (url.username, url.password)
    async with httpx.AsyncClient(base_url=f"{url.scheme}://{url.host}:{url.port}", auth=auth) as client:
        yield client


@pytest.fixture(autouse=True)
def empty_virtual_host(vhost: str, stack: Stack) -> Iterator[None]:
    """Every test begins with an empty virtual host."""
    yield
    url = httpx.URL(stack.rabbitmq_management_url)
    with httpx.Client(auth=(url.username, url.password)) as client:
        base = f"{url.scheme}://{url.host}:{url.port}/api"
        name = vhost.rpartition("/")[2]
        for kind in ("queues", "exchanges"):
            for row in client.get(f"{base}/{kind}/{name}").raise_for_status().json():
                if row["name"] and not row["name"].startswith("amq."):
                    client.delete(f"{base}/{kind}/{name}/{row['name']}").raise_for_status()


async def config_of(admin: Any, topic: str) -> dict[str, str]:
    (response,) = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])
    return {name: value for name, value, *_ in response.resources[0][4]}


async def partitions_of(admin: Any, topic: str) -> int:
    (row,) = await admin.describe_topics([topic])
    return len(row["partitions"])


async def test_everything_of_the_catalog_is_created_and_then_nothing_differs(brokers: dict[str, str]) -> None:
    wanted = {drift.subject for drift in await plan(CATALOG, **brokers)}
    assert wanted == {
        "topic facts",
        "exchange jobs",
        "queue work",
        "queue work.retry.200ms",
        "queue work.retry.400ms",
        "queue work.dlq",
        "binding jobs:work → work",
    }
    assert {drift.subject for drift in await apply(CATALOG, **brokers)} == wanted
    assert await plan(CATALOG, **brokers) == []
    assert await apply(CATALOG, **brokers) == []


async def test_two_processes_may_provision_at_once(brokers: dict[str, str]) -> None:
    await asyncio.gather(apply(CATALOG, **brokers), apply(CATALOG, **brokers))
    assert await plan(CATALOG, **brokers) == []


async def test_a_topic_takes_a_record_of_the_greatest_size_and_stamps_it_with_its_own_clock(
    brokers: dict[str, str],
) -> None:
    await apply(CATALOG, **brokers)
    producer = AIOKafkaProducer(bootstrap_servers=brokers["kafka"], max_request_size=2 * MAX_RECORD_BYTES)
    await producer.start()
    try:
        record = await producer.send_and_wait(
            f"{brokers['prefix']}facts",
            b"x" * MAX_RECORD_BYTES,
            headers=[("h", b"y" * 60_000)],
            timestamp_ms=1,
        )
    finally:
        await producer.stop()
    assert record.timestamp_type == 1
    assert record.timestamp > 1


async def test_another_retention_is_set_and_settings_of_others_stay(brokers: dict[str, str], admin: Any) -> None:
    await apply(CATALOG, **brokers)
    name = f"{brokers['prefix']}facts"
    foreign = {**await own_config(admin, name), "compression.type": "zstd"}
    await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, name, foreign)])

    longer = Catalog(topics=(replace(FACTS, retention=timedelta(days=2)),), queues=(WORK,))
    changed = await apply(longer, **brokers)

    assert {drift.what for drift in changed} == {"retention.ms", "segment.ms"}
    config = await config_of(admin, name)
    assert config["retention.ms"] == str(2 * 86_400_000)
    assert config["compression.type"] == "zstd"


async def own_config(admin: Any, topic: str) -> dict[str, str]:
    (response,) = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])
    return {name: value for name, value, _, source, *_ in response.resources[0][4] if source == 1}


@pytest.mark.parametrize("partitions", [2, 4])
async def test_another_number_of_partitions_is_refused_and_nothing_else_is_changed(
    brokers: dict[str, str], admin: Any, partitions: int
) -> None:
    await admin.create_topics([NewTopic(f"{brokers['prefix']}facts", partitions, 1)])

    with pytest.raises(DriftRefused, match="topic facts: partitions wanted 3, found") as refusal:
        await apply(CATALOG, **brokers)

    assert [drift.what for drift in refusal.value.drifts] == ["partitions"]
    assert await partitions_of(admin, f"{brokers['prefix']}facts") == partitions
    assert (await config_of(admin, f"{brokers['prefix']}facts"))["retention.ms"] != str(86_400_000)
    assert "queue work" in {drift.subject for drift in await plan(CATALOG, **brokers)}


async def test_other_queue_arguments_are_refused_with_what_to_do(brokers: dict[str, str]) -> None:
    await apply(CATALOG, **brokers)
    shorter = Catalog(topics=(FACTS,), queues=(replace(WORK, max_length=10, expires=timedelta(hours=1)),))

    with pytest.raises(DriftRefused, match="RabbitMQ cannot change it") as refusal:
        await apply(shorter, **brokers)

    of_work = {drift.what for drift in refusal.value.drifts if drift.subject == "queue work"}
    assert of_work == {"x-max-length", "x-message-ttl"}


async def test_an_argument_that_is_no_longer_wanted_is_drift(brokers: dict[str, str]) -> None:
    expiring = Catalog(topics=(), queues=(replace(WORK, expires=timedelta(hours=1)),))
    await apply(expiring, **brokers)
    (drift,) = [drift for drift in await plan(CATALOG, **brokers) if drift.what == "x-message-ttl"]
    assert (drift.subject, drift.wanted, drift.found, drift.fixable) == ("queue work", "-", "3600000", False)


async def test_an_exchange_of_another_kind_is_refused(brokers: dict[str, str], vhost: str) -> None:
    async with await aio_pika.connect(vhost) as connection:
        await (await connection.channel()).declare_exchange("jobs", "fanout", durable=True)
    with pytest.raises(DriftRefused, match="exchange jobs: type wanted direct, found fanout"):
        await apply(CATALOG, **brokers)


async def test_a_lost_binding_is_made_again(brokers: dict[str, str], vhost: str) -> None:
    await apply(CATALOG, **brokers)
    async with await aio_pika.connect(vhost) as connection:
        channel = await connection.channel()
        await (await channel.get_queue("work")).unbind("jobs", "work")
    (changed,) = await apply(CATALOG, **brokers)
    assert str(changed) == "binding jobs:work → work: binding wanted bound, found -: is bound"


async def test_what_the_catalog_does_not_know_is_shown_and_left_alone(
    brokers: dict[str, str], vhost: str, admin: Any
) -> None:
    await apply(CATALOG, **brokers)
    await admin.create_topics([NewTopic(f"{brokers['prefix']}old", 1, 1)])
    async with await aio_pika.connect(vhost) as connection:
        channel = await connection.channel()
        await (await channel.declare_queue("stray", durable=True)).bind("jobs", "stray")
        await channel.declare_exchange("forgotten", "direct", durable=True)

        assert await apply(CATALOG, **brokers) == []
        unknown = await plan(CATALOG, **brokers)
        assert [drift.subject for drift in unknown] == [
            "topic old",
            "exchange forgotten",
            "queue stray",
            "binding jobs:stray → stray",
        ]
        assert all(drift.extra and not drift.fixable for drift in unknown)


async def test_a_message_waits_in_its_retry_queue_and_comes_back(brokers: dict[str, str], vhost: str) -> None:
    await apply(CATALOG, **brokers)
    async with await aio_pika.connect(vhost) as connection:
        channel = await connection.channel()
        retry = WORK.retry_queue(WORK.retries[0])
        message = aio_pika.Message(b"again", delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await channel.default_exchange.publish(message, retry, mandatory=True)
        assert (await next_message(await channel.get_queue("work"))).body == b"again"


async def test_a_rejected_message_is_a_dead_letter(brokers: dict[str, str], vhost: str) -> None:
    await apply(CATALOG, **brokers)
    async with await aio_pika.connect(vhost) as connection:
        channel = await connection.channel()
        jobs = await channel.get_exchange("jobs")
        message = aio_pika.Message(b"bad", delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await jobs.publish(message, "work", mandatory=True)
        await (await next_message(await channel.get_queue("work"))).reject(requeue=False)
        dead = await next_message(await channel.get_queue("work.dlq"))
        assert dead.body == b"bad"


async def next_message(queue: aio_pika.abc.AbstractQueue) -> aio_pika.abc.AbstractIncomingMessage:
    async with queue.iterator() as messages, asyncio.timeout(20):
        async for message in messages:
            return message
    raise AssertionError("unreachable")


async def test_a_full_queue_refuses_instead_of_dropping(brokers: dict[str, str], vhost: str) -> None:
    small = Catalog(topics=(), queues=(replace(WORK, max_length=1),))
    await apply(small, **brokers)
    async with await aio_pika.connect(vhost) as connection:
        channel = await connection.channel()
        jobs = await channel.get_exchange("jobs")

        async def fill() -> None:
            # A queue may take a few more than its length before it refuses.
            for _ in range(50):
                await jobs.publish(aio_pika.Message(b"x"), "work", mandatory=True)

        with pytest.raises(aio_pika.exceptions.DeliveryError):
            await fill()


def test_every_queue_hands_over_at_least_once_and_ends_in_its_dead_letters() -> None:
    arguments = queue_arguments(WORK)
    assert list(arguments) == ["work", "work.retry.200ms", "work.retry.400ms", "work.dlq"]
    assert {entry["x-queue-type"] for entry in arguments.values()} == {"quorum"}
    assert arguments["work"]["x-dead-letter-routing-key"] == "work.dlq"
    assert arguments["work"]["x-delivery-limit"] == 20
    for name in ("work", "work.retry.200ms", "work.retry.400ms"):
        assert arguments[name]["x-dead-letter-strategy"] == "at-least-once"
        assert arguments[name]["x-overflow"] == "reject-publish"
