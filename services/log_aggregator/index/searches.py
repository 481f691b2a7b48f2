"""Saved searches of logs and events in Lucene's syntax: for ``GET /api/v1/logs``, Kibana and OpenSearch Dashboards."""

from __future__ import annotations

from typing import Any, Final, Literal, NamedTuple

from services.log_aggregator.index.mappings import Kind

Name = Literal["errors", "dead_letters"]
Field = Literal["trace", "run", "tenant", "channel"]

QUERIES: Final[dict[Name, str]] = {
    "errors": "level:(error OR fatal)",
    # All lines about new dead letters say so.
    "dead_letters": 'text:"dead letter" OR text:"dead letters"',
}
FIELDS: Final[dict[Field, str]] = {
    "trace": "traceId",
    "run": "run_id",
    "tenant": "tenant",
    "channel": "channel_id",
}


class SavedSearch(NamedTuple):
    """A saved search."""

    name: str
    title: str
    kind: Kind
    query: str
    columns: tuple[str, ...]


def clause(query: str) -> dict[str, Any]:
    """The query as a clause for the engine, in the form in which Kibana sends it too."""
    return {"query_string": {"query": query, "analyze_wildcard": True}}


_LINE = ("level", "service", "message")
SEARCHES: Final = (
    *(
        SavedSearch(f"logs-by-{field}", f"Clawbus: log lines by {field}", "logs", f"{name}:*", (name, *_LINE))
        for field, name in FIELDS.items()
    ),
    SavedSearch("errors", "Clawbus: errors", "logs", QUERIES["errors"], ("service", "message", "traceId")),
    SavedSearch(
        "dead-letters", "Clawbus: dead letters", "logs", QUERIES["dead_letters"], ("service", "message", "traceId")
    ),
    SavedSearch(
        "runs", "Clawbus: events of runs", "events", "type:agent.v1.*", ("type", "run_id", "tenant", "data.status")
    ),
    SavedSearch(
        "audit", "Clawbus: audited acts", "audit", "*", ("actor", "action", "object_kind", "object_id", "outcome")
    ),
)
