"""Writes the saved objects of Kibana 8.9 and later, 9 included, and of OpenSearch Dashboards.

The objects are data views, searches, charts and dashboards, one JSON object a line, in the form of an export
(``POST /api/saved_objects/_export``). ``.venv/bin/python -m tooling.cli.saved_objects`` writes them again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from services.log_aggregator.index.mappings import FIELDS, Kind
from services.log_aggregator.index.searches import QUERIES, SEARCHES, SavedSearch
from tooling.stack.checkout import CHECKOUT

FOLDER = CHECKOUT / "infra" / "deploy" / "kibana"
Product = Literal["kibana", "opensearch-dashboards"]
Json = dict[str, Any]

# The oldest versions of the forms that Kibana 8.9 writes; later ones migrate them at the import.
_KIBANA_VERSIONS = {"index-pattern": "8.0.0", "search": "8.0.0", "visualization": "8.5.0", "dashboard": "8.9.0"}
_OPENSEARCH_VERSIONS = {"index-pattern": "7.6.0", "search": "7.9.3", "visualization": "7.10.0", "dashboard": "7.9.3"}


class Chart(NamedTuple):
    """A chart or table. metrics: (aggregation, field); count has no field. by: each value of the field apart."""

    name: str
    title: str
    kind: Kind
    query: str
    metrics: tuple[tuple[str, str], ...] = (("count", ""),)
    by: str = ""
    shape: Literal["histogram", "line", "table"] = "histogram"


class Dashboard(NamedTuple):
    name: str
    title: str
    panels: tuple[Chart | SavedSearch, ...]


_STEPS = 'type:"agent.v1.StepCompleted"'
_TOKENS = (("sum", "data.input_tokens"), ("sum", "data.output_tokens"))
_INDEX = "kibanaSavedObjectMeta.searchSourceJSON.index"
_saved = {search.name: search for search in SEARCHES}
DASHBOARDS = (
    Dashboard(
        "runs",
        "Clawbus: runs",
        (
            Chart("runs-over-time", "Begun and ended runs", "events", "type:agent.v1.Run*", by="type"),
            Chart("failed-steps", "Failed steps", "events", f"{_STEPS} AND data.status:failed", by="data.name"),
            _saved["runs"],
        ),
    ),
    Dashboard(
        "errors",
        "Clawbus: errors",
        (
            Chart("errors-over-time", "Errors by service", "logs", QUERIES["errors"], by="service"),
            Chart("errors-by-message", "Errors by message", "logs", QUERIES["errors"], by="message", shape="table"),
            _saved["errors"],
        ),
    ),
    Dashboard(
        "dead-letters",
        "Clawbus: dead letters",
        (
            Chart("dead-letters-over-time", "New dead letters", "logs", QUERIES["dead_letters"], by="service"),
            _saved["dead-letters"],
        ),
    ),
    Dashboard(
        "cost",
        "Clawbus: usage that costs",
        (
            Chart("tokens-by-model", "Tokens by model", "events", "data.resource:*", _TOKENS, "data.resource"),
            Chart("tokens-by-tenant", "Tokens by tenant", "events", "data.resource:*", _TOKENS, "tenant", "table"),
        ),
    ),
    Dashboard(
        "latency",
        "Clawbus: latency",
        (
            Chart(
                "step-time", "Time of steps, ms", "events", _STEPS, (("percentiles", "data.duration_ms"),), shape="line"
            ),
            Chart(
                *("slowest-steps", "Slowest models and tools, ms", "events", _STEPS),
                *((("max", "data.duration_ms"), ("count", "")), "data.name", "table"),
            ),
            Chart("span-time", "Slowest spans, ms", "spans", "*", (("max", "duration_ms"),), "name", "table"),
        ),
    ),
)


def objects(product: Product) -> list[Json]:
    """All objects, and at the end the summary of an export."""
    found = [
        *(_data_view(product, kind) for kind in FIELDS),
        *(_search(product, search) for search in SEARCHES),
        *(_chart(product, panel) for board in DASHBOARDS for panel in board.panels if isinstance(panel, Chart)),
        *(_dashboard(product, board) for board in DASHBOARDS),
    ]
    summary: Json = {"exportedCount": len(found), "missingRefCount": 0, "missingReferences": []}
    if product == "kibana":
        summary |= {"excludedObjects": [], "excludedObjectsCount": 0}
    return [*found, summary]


def render(product: Product) -> str:
    return "".join(json.dumps(found, sort_keys=True) + "\n" for found in objects(product))


def path(product: Product) -> Path:
    return FOLDER / f"{product}.ndjson"


def aggregations(chart: Chart) -> list[Json]:
    """The chart's metrics and buckets, in the form of Kibana's aggregation-based charts."""
    found: list[Json] = []
    for aggregation, field in chart.metrics:
        params: Json = {"field": field} if field else {}
        if aggregation == "percentiles":
            params["percents"] = [50, 95, 99]
        found.append({"type": aggregation, "schema": "metric", "params": params})
    if chart.shape != "table":
        params = {"field": "timestamp", "interval": "auto", "min_doc_count": 1}
        found.append({"type": "date_histogram", "schema": "segment", "params": params})
    if chart.by:
        order = "1" if chart.metrics[0][0] != "percentiles" else "_key"
        params = {"field": chart.by, "size": 20, "order": "desc", "orderBy": order}
        found.append({"type": "terms", "schema": "bucket" if chart.shape == "table" else "group", "params": params})
    return [{"id": str(n), "enabled": True} | aggregation for n, aggregation in enumerate(found, 1)]


def _object(product: Product, kind: str, id_: str, attributes: Json, references: list[Json]) -> Json:
    if product == "kibana":
        versions: Json = {"coreMigrationVersion": "8.8.0", "typeMigrationVersion": _KIBANA_VERSIONS[kind]}
    else:
        versions = {"migrationVersion": {kind: _OPENSEARCH_VERSIONS[kind]}}
    return {"type": kind, "id": f"clawbus-{id_}", "attributes": attributes, "references": references, **versions}


def _data_view(product: Product, kind: Kind) -> Json:
    title = f"clawbus-{kind}-*"
    name = {"name": f"Clawbus: {kind}"} if product == "kibana" else {}
    return _object(product, "index-pattern", kind, {"title": title, "timeFieldName": "timestamp", **name}, [])


def _source(query: str) -> Json:
    """The query of an object. It names its data view by a reference."""
    source = {
        "query": {"query": query, "language": "lucene"},
        "filter": [],
        "indexRefName": _INDEX,
    }
    return {"kibanaSavedObjectMeta": {"searchSourceJSON": json.dumps(source)}}


def _on(kind: Kind) -> list[Json]:
    return [{"name": _INDEX, "type": "index-pattern", "id": f"clawbus-{kind}"}]


def _search(product: Product, search: SavedSearch) -> Json:
    attributes = {
        "title": search.title,
        "description": "",
        "columns": list(search.columns),
        "sort": [["timestamp", "desc"]],
        **_source(search.query),
    }
    return _object(product, "search", f"search-{search.name}", attributes, _on(search.kind))


def _chart(product: Product, chart: Chart) -> Json:
    state = {"title": chart.title, "type": chart.shape, "aggs": aggregations(chart), "params": {}}
    attributes = {
        "title": f"Clawbus: {chart.title}",
        "description": "",
        "visState": json.dumps(state),
        "uiStateJSON": "{}",
        "version": 1,
        **_source(chart.query),
    }
    return _object(product, "visualization", f"chart-{chart.name}", attributes, _on(chart.kind))


def _dashboard(product: Product, board: Dashboard) -> Json:
    panels, references = [], []
    for n, panel in enumerate(board.panels):
        kind = "visualization" if isinstance(panel, Chart) else "search"
        version = _KIBANA_VERSIONS["dashboard"] if product == "kibana" else "2.0.0"
        panels.append(
            {
                "version": version,
                "type": kind,
                "gridData": {"x": n % 2 * 24, "y": n // 2 * 15, "w": 24, "h": 15, "i": str(n)},
                "panelIndex": str(n),
                "embeddableConfig": {},
                "panelRefName": f"panel_{n}",
            }
        )
        name = f"{n}:panel_{n}" if product == "kibana" else f"panel_{n}"
        prefix = "chart" if isinstance(panel, Chart) else "search"
        references.append({"name": name, "type": kind, "id": f"clawbus-{prefix}-{panel.name}"})
    attributes = {
        "title": board.title,
        "description": "",
        "panelsJSON": json.dumps(panels),
        "optionsJSON": json.dumps({"useMargins": True, "hidePanelTitles": False}),
        "timeRestore": True,
        "timeFrom": "now-24h",
        "timeTo": "now",
        "version": 1,
        "kibanaSavedObjectMeta": {
            "searchSourceJSON": json.dumps({"query": {"query": "", "language": "lucene"}, "filter": []})
        },
    }
    return _object(product, "dashboard", f"dashboard-{board.name}", attributes, references)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for product in ("kibana", "opensearch-dashboards"):
        path(product).write_text(render(product))
