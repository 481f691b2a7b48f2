"""The AsyncAPI 3.0 document of all topics and queues, generated from the catalog, for reading only."""

from __future__ import annotations

from typing import Any

from protos.envelope import Message
from protos.topology import Catalog, Queue, Topic
from tooling.cli.message_schemas import inlined, schema

Json = dict[str, Any]

_HEADERS: Json = {
    "type": "object",
    "description": "CloudEvents 1.0 attributes, trace context and tenant, UTF-8 strings.",
    "properties": {
        name: {"type": "string"}
        for name in (
            "ce_id",
            "ce_source",
            "ce_type",
            "ce_specversion",
            "ce_time",
            "ce_subject",
            "traceparent",
            "tracestate",
            "tenant_id",
            "content-type",
        )
    },
    "required": ["ce_id", "ce_source", "ce_type", "ce_specversion", "ce_time", "content-type"],
}


def asyncapi(catalog: Catalog, version: str) -> Json:
    """The document. Each topic or queue is a channel; each service that sends or receives there is an operation."""
    channels: Json = {}
    operations: Json = {}
    messages: dict[str, type[Message]] = {}

    def add(source: Topic | Queue, channel: Json, used: tuple[type[Message], ...]) -> None:
        names = [message.wire_name() for message in used]
        references = {name: {"$ref": f"#/components/messages/{name}"} for name in names}
        channels[source.name] = {"address": source.name, **channel, "messages": references}
        messages.update(zip(names, used, strict=True))

        def operate(service: str, action: str) -> None:
            operations[f"{service}.{action}.{source.name}"] = {
                "action": action,
                "channel": {"$ref": f"#/channels/{source.name}"},
                "summary": f"{service} {'sends to' if action == 'send' else 'receives from'} {source.name}",
                "messages": [{"$ref": f"#/channels/{source.name}/messages/{name}"} for name in names],
            }

        for producer in source.producers:
            operate(producer, "send")
        for consumer in source.consumers if isinstance(source, Topic) else (source.consumer,):
            operate(consumer, "receive")

    for topic in catalog.topics:
        add(topic, _topic(topic), topic.messages)
    for queue in catalog.queues:
        add(queue, _queue(queue), (queue.message,))
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Clawbus",
            "version": version,
            "description": "Topics (Kafka) carry facts, queues (RabbitMQ) carry work.",
        },
        "defaultContentType": "application/json",
        "channels": channels,
        "operations": operations,
        "components": {
            "schemas": {"headers": _HEADERS},
            "messages": {name: _message(message) for name, message in sorted(messages.items())},
        },
    }


def _topic(topic: Topic) -> Json:
    order = "in order per key, a failed record holds back its key" if topic.ordered else "in no order"
    return {
        "description": f"Kafka topic, key: {topic.key}; handled {order}.",
        "bindings": {
            "kafka": {
                "bindingVersion": "0.5.0",
                "partitions": topic.partitions,
                "topicConfiguration": {
                    "cleanup.policy": ["delete"],
                    "retention.ms": int(topic.retention.total_seconds() * 1000),
                },
            }
        },
    }


def _queue(queue: Queue) -> Json:
    delays = ", ".join(f"{int(delay.total_seconds())} s" for delay in queue.retries)
    expires = f"; expires after {int(queue.expires.total_seconds())} s" if queue.expires else ""
    return {
        "description": f"RabbitMQ queue; retried after {delays}{expires}; then {queue.dead_letter_queue}.",
        "bindings": {
            "amqp": {
                "bindingVersion": "0.3.0",
                "is": "routingKey",
                "exchange": {
                    "name": queue.exchange.name,
                    "type": queue.exchange.kind,
                    "durable": True,
                    "autoDelete": False,
                },
            }
        },
    }


def _message(message: type[Message]) -> Json:
    name = message.wire_name()
    payload = inlined(schema(message))
    return {
        "name": name,
        "title": message.__name__,
        "summary": payload["description"].partition("\n")[0],
        "contentType": "application/json",
        "headers": {"$ref": "#/components/schemas/headers"},
        "payload": {"schemaFormat": "application/schema+json;version=draft-2020-12", "schema": payload},
    }
