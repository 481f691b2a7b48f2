"""The committed AsyncAPI document is well formed, complete, and agrees with the catalog."""

from __future__ import annotations

import json
from typing import Any

import jsonschema

from protos.catalog import CATALOG
from tooling.cli.asyncapi_page import page
from tooling.cli.contracts import ROOT

DOCUMENT: dict[str, Any] = json.loads((ROOT / "protos" / "asyncapi.json").read_text(encoding="utf-8"))

_REFERENCE = {"type": "object", "required": ["$ref"], "properties": {"$ref": {"type": "string", "pattern": "^#/"}}}
# The part of AsyncAPI 3.0 that the document uses; the full schema is on the internet.
SHAPE = {
    "type": "object",
    "required": ["asyncapi", "info", "channels", "operations", "components"],
    "additionalProperties": False,
    "properties": {
        "asyncapi": {"const": "3.0.0"},
        "defaultContentType": {"type": "string"},
        "info": {"type": "object", "required": ["title", "version"]},
        "channels": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "required": ["address", "messages", "bindings"],
                "properties": {
                    "address": {"type": "string"},
                    "messages": {"type": "object", "minProperties": 1, "additionalProperties": _REFERENCE},
                    "bindings": {"type": "object", "minProperties": 1, "maxProperties": 1},
                },
            },
        },
        "operations": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "required": ["action", "channel", "messages"],
                "properties": {
                    "action": {"enum": ["send", "receive"]},
                    "channel": _REFERENCE,
                    "messages": {"type": "array", "minItems": 1, "items": _REFERENCE},
                },
            },
        },
        "components": {
            "type": "object",
            "required": ["messages", "schemas"],
            "properties": {
                "messages": {
                    "type": "object",
                    "additionalProperties": {
                        "type": "object",
                        "required": ["name", "contentType", "headers", "payload"],
                        "properties": {
                            "payload": {
                                "type": "object",
                                "required": ["schemaFormat", "schema"],
                                "maxProperties": 2,
                            }
                        },
                    },
                }
            },
        },
    },
}


def test_the_document_has_the_shape_of_asyncapi_3() -> None:
    jsonschema.Draft202012Validator(SHAPE).validate(DOCUMENT)


def test_every_reference_leads_somewhere() -> None:
    def follow(node: Any) -> None:
        if isinstance(node, dict):
            if "$ref" in node:
                target: Any = DOCUMENT
                for step in node["$ref"].removeprefix("#/").split("/"):
                    target = target[step]
            for value in node.values():
                follow(value)
        elif isinstance(node, list):
            for value in node:
                follow(value)

    follow(DOCUMENT)


def test_every_payload_is_a_json_schema() -> None:
    for message in DOCUMENT["components"]["messages"].values():
        jsonschema.Draft202012Validator.check_schema(message["payload"]["schema"])


def test_it_has_every_topic_and_queue_with_producers_and_consumers() -> None:
    assert DOCUMENT["channels"].keys() == {
        *(topic.name for topic in CATALOG.topics),
        *(queue.name for queue in CATALOG.queues),
    }
    usage = DOCUMENT["channels"]["usage.records"]["bindings"]["kafka"]
    assert (usage["partitions"], usage["topicConfiguration"]["retention.ms"]) == (4, 30 * 86_400_000)
    assert DOCUMENT["operations"]["billing.receive.usage.records"]["action"] == "receive"
    ends = sum(len(topic.producers) + len(topic.consumers) for topic in CATALOG.topics)
    ends += sum(len(queue.producers) + 1 for queue in CATALOG.queues)
    assert len(DOCUMENT["operations"]) == ends


def test_the_page_shows_every_channel_and_field_and_runs_nothing() -> None:
    html = page(DOCUMENT)
    for name, channel in DOCUMENT["channels"].items():
        assert f'<h2 id="{name}">' in html
        for message in channel["messages"]:
            fields = DOCUMENT["components"]["messages"][message]["payload"]["schema"]["properties"]
            assert all(f"<code>{field}</code>" in html for field in fields)
    assert "<script" not in html
    assert "http://" not in html
    assert "https://" not in html
