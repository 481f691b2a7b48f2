"""The catalog has the agreed topics and queues, and the services subscribe exactly to them."""

from __future__ import annotations

from datetime import timedelta

import pytest

from protos.catalog import CATALOG, CHANNEL_TYPES, SERVICES
from tooling.cli.map import existing_services, flows
from tooling.cli.message_schemas import messages
from tooling.testing.sample.catalog import SAMPLE

ALL = SERVICES

TOPICS = {
    "agent.events": (8, 7, ("agent",), ("ws_gateway", "memory", "log_aggregator", "notification")),
    "agent.tasks": (4, 1, ("agent",), ("agent",)),
    "usage.records": (4, 30, ALL, ("billing", "log_aggregator")),
    "audit.logs": (2, 90, ALL, ("log_aggregator",)),
    "channel.events": (4, 7, ("channel",), ("agent", "billing", "log_aggregator", "notification")),
    "platform.events": (2, 30, ALL, ALL),
    "service.logs": (2, 3, ALL, ("log_aggregator",)),
}
QUEUES = {
    **{f"channel.inbound.{type_}": ("channel.inbound", "topic", "agent") for type_ in CHANNEL_TYPES},
    "channel.changes": ("channel.changes", "direct", "agent"),
    "channel.answers": ("channel.answers", "direct", "agent"),
    "channel.outbound": ("channel.outbound", "direct", "channel"),
    "notification.email": ("notification", "topic", "notification"),
    "notification.push": ("notification", "topic", "notification"),
    "document.index": ("document", "direct", "memory"),
    "plugin.event": ("plugin", "fanout", "plugin"),
}


def test_topics_have_the_agreed_names_partitions_retention_and_ends() -> None:
    assert {
        topic.name: (topic.partitions, topic.retention.days, topic.producers, topic.consumers)
        for topic in CATALOG.topics
    } == TOPICS


def test_queues_have_the_agreed_names_exchanges_and_consumers() -> None:
    assert {
        queue.name: (queue.exchange.name, queue.exchange.kind, queue.consumer) for queue in CATALOG.queues
    } == QUEUES


@pytest.mark.parametrize("name", ["notification.email", "notification.push"])
def test_a_notification_is_retried_three_times_and_expires_after_a_day(name: str) -> None:
    queue = CATALOG.queue(name)
    assert [delay.total_seconds() for delay in queue.retries] == [10, 60, 600]
    assert queue.expires == timedelta(days=1)


def test_no_name_is_used_twice_and_every_queue_has_a_dead_letter_queue() -> None:
    names = [topic.name for topic in CATALOG.topics]
    for queue in CATALOG.queues:
        names += [queue.name, queue.dead_letter_queue, *map(queue.retry_queue, queue.retries)]
    assert len(set(names)) == len(names)


def test_a_message_reaches_one_queue_of_its_exchange() -> None:
    bindings = [(queue.exchange.name, queue.routing_key) for queue in CATALOG.queues]
    assert len(set(bindings)) == len(bindings)


def test_every_message_of_the_catalog_has_a_schema() -> None:
    used = {message for topic in CATALOG.topics for message in topic.messages}
    used |= {queue.message for queue in CATALOG.queues}
    assert used <= set(messages().values())


def test_services_subscribe_to_the_topics_and_queues_of_the_catalog_and_to_no_others() -> None:
    """The sample's services are checked too, against their own catalog, so that the test never checks nothing."""
    sample = {f"sample_{name}": f"tooling.testing.sample.{name}" for name in ("front", "desk", "ledger")}
    for catalog, packages in ((CATALOG, existing_services()), (SAMPLE, sample)):
        for flow in flows(catalog, packages):
            for consumer in flow.consumers:
                wanted = "code" if consumer.service in packages else "declared"
                assert consumer.state == wanted, f"{consumer.service} reads {flow.name}: {consumer.state}"
            for producer in flow.producers:
                assert producer.state != "undeclared", f"{producer.service} names {flow.name}"
