"""Kinds of documents in the search index: searchable fields, retention, and the engines' policies for it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Final, Literal

Kind = Literal["logs", "events", "spans", "audit"]
Engine = Literal["elasticsearch", "opensearch"]

KEEP: Final[dict[Kind, timedelta]] = {
    "logs": timedelta(days=30),
    "events": timedelta(days=30),
    "spans": timedelta(days=14),
    "audit": timedelta(days=90),
}

SEARCHED_ONLY = ("text", "linked")
"""Fields that are searched and not stored; the fields that they are made from are stored."""

_KEYWORD = {"type": "keyword", "ignore_above": 1024}
_LONG = {"type": "long"}
_DATE = {"type": "date"}
FIELDS: Final[dict[Kind, dict[str, Any]]] = {
    "logs": {
        "timestamp": _DATE,
        "text": {"type": "text"},
        **dict.fromkeys(("id", "level", "service", "traceId", "spanId", "tenant"), _KEYWORD),
        **dict.fromkeys(("message", "run_id", "channel_id"), _KEYWORD),
    },
    "events": {
        "timestamp": _DATE,
        **dict.fromkeys(("id", "type", "service", "tenant", "trace_id", "run_id", "session_key"), _KEYWORD),
        "data": {
            "dynamic": False,
            "properties": {
                **dict.fromkeys(("agent_id", "channel_id", "channel_type", "kind", "name", "status"), _KEYWORD),
                **dict.fromkeys(("outcome", "reason", "resource"), _KEYWORD),
                **dict.fromkeys(("duration_ms", "attempts", "input_tokens", "cached_tokens", "output_tokens"), _LONG),
            },
        },
    },
    "spans": {
        "timestamp": _DATE,
        "start_ns": _LONG,
        "duration_ms": {"type": "double"},
        **dict.fromkeys(("trace_id", "span_id", "service", "linked", "name", "status"), _KEYWORD),
    },
    "audit": {
        "timestamp": _DATE,
        **dict.fromkeys(("id", "tenant", "actor", "action", "object_kind", "object_id", "outcome"), _KEYWORD),
    },
}


def template(prefix: str, kind: Kind, engine: Engine) -> dict[str, Any]:
    """The index template of a kind. prefix: of the names of all indices."""
    # OpenSearch refuses settings that it does not know, and finds the policy by the name of the index.
    lifecycle = {"index.lifecycle.name": f"{prefix}{kind}"} if engine == "elasticsearch" else {}
    return {
        "index_patterns": [f"{prefix}{kind}-*"],
        "template": {
            "settings": {"number_of_shards": 1, "auto_expand_replicas": "0-1", **lifecycle},
            "mappings": {
                # Fields without a type here are stored but not searched, so that a document cannot create fields.
                "dynamic": False,
                "_source": {"excludes": [*SEARCHED_ONLY]},
                "properties": FIELDS[kind],
            },
        },
    }


def policy(prefix: str, kind: Kind, engine: Engine) -> tuple[str, dict[str, Any]]:
    """Path and body of the policy that deletes the indices of a kind after their time.

    Elasticsearch: index lifecycle management (ILM). OpenSearch: index state management (ISM), which is a plugin.
    """
    # An index has the documents of one day, and counts from its creation.
    age = f"{KEEP[kind].days + 1}d"
    if engine == "elasticsearch":
        body: dict[str, Any] = {"policy": {"phases": {"delete": {"min_age": age, "actions": {"delete": {}}}}}}
        return f"/_ilm/policy/{prefix}{kind}", body
    states = [
        {
            "name": "kept",
            "actions": [],
            "transitions": [{"state_name": "deleted", "conditions": {"min_index_age": age}}],
        },
        {"name": "deleted", "actions": [{"delete": {}}], "transitions": []},
    ]
    return f"/_plugins/_ism/policies/{prefix}{kind}", {
        "policy": {
            "description": f"deletes {kind} after {age}",
            "default_state": "kept",
            "states": states,
            "ism_template": [{"index_patterns": [f"{prefix}{kind}-*"], "priority": 100}],
        }
    }
