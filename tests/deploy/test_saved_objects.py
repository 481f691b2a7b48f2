"""The saved objects of Kibana and OpenSearch Dashboards: their form and their references.

`tests/services/log_aggregator/index/test_saved_queries.py` runs their queries. Neither product can be installed here.
"""

from __future__ import annotations

import json
import re
from typing import Any, get_args

import pytest

from services.log_aggregator.index.mappings import FIELDS
from tooling.cli.saved_objects import Product, path, render

PRODUCTS = get_args(Product)
# Of an export's objects: each attribute is a string, unless it is listed here.
NOT_STRINGS: dict[str, type] = {
    "columns": list,
    "sort": list,
    "version": int,
    "timeRestore": bool,
    "kibanaSavedObjectMeta": dict,
}
ATTRIBUTES = {
    "index-pattern": {"title", "timeFieldName"},
    "search": {"title", "description", "columns", "sort", "kibanaSavedObjectMeta"},
    "visualization": {"title", "description", "visState", "uiStateJSON", "version", "kibanaSavedObjectMeta"},
    "dashboard": {
        *("title", "description", "panelsJSON", "optionsJSON", "timeRestore", "timeFrom", "timeTo", "version"),
        "kibanaSavedObjectMeta",
    },
}


def lines(product: Product) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path(product).read_text().splitlines()]


@pytest.mark.parametrize("product", PRODUCTS)
def test_the_file_is_as_its_generator_writes_it(product: Product) -> None:
    assert path(product).read_text() == render(product), "run: .venv/bin/python -m tooling.cli.saved_objects"


@pytest.mark.parametrize("product", PRODUCTS)
def test_each_object_has_the_form_of_an_export(product: Product) -> None:
    *objects, summary = lines(product)
    assert (summary["exportedCount"], summary["missingReferences"]) == (len(objects), [])
    for found in objects:
        kind, attributes = found["type"], found["attributes"]
        assert attributes.keys() - {"name"} == ATTRIBUTES[kind]
        for name, value in attributes.items():
            assert isinstance(value, NOT_STRINGS.get(name, str)), f"{found['id']}: {name}"
            if name.endswith(("JSON", "State")):
                json.loads(str(value))
        if "kibanaSavedObjectMeta" in attributes:
            source = json.loads(attributes["kibanaSavedObjectMeta"]["searchSourceJSON"])
            assert source["query"].keys() == {"query", "language"}
            assert source["query"]["language"] == "lucene"
        if product == "kibana":
            assert re.fullmatch(r"8\.\d\.0", found["typeMigrationVersion"])
            assert found["coreMigrationVersion"] == "8.8.0"
        else:
            # The last versions that OpenSearch Dashboards took over from Kibana.
            assert re.fullmatch(r"7\.\d+\.\d", found["migrationVersion"][kind])


@pytest.mark.parametrize("product", PRODUCTS)
def test_each_reference_leads_to_an_object_and_each_object_has_its_own_id(product: Product) -> None:
    *objects, _ = lines(product)
    known = {(found["type"], found["id"]) for found in objects}
    assert len(known) == len(objects)
    for found in objects:
        names = {reference["name"].rpartition(":")[2] for reference in found["references"]}
        assert {(reference["type"], reference["id"]) for reference in found["references"]} <= known, found["id"]
        if found["type"] == "dashboard":
            panels = json.loads(found["attributes"]["panelsJSON"])
            assert {panel["panelRefName"] for panel in panels} == names
            places = [(panel["gridData"]["x"], panel["gridData"]["y"]) for panel in panels]
            assert len(set(places)) == len(places)
        elif found["type"] != "index-pattern":
            source = json.loads(found["attributes"]["kibanaSavedObjectMeta"]["searchSourceJSON"])
            assert {source["indexRefName"]} == names
    assert {found["id"] for found in objects if found["type"] == "dashboard"} == {
        f"clawbus-dashboard-{name}" for name in ("runs", "errors", "dead-letters", "cost", "latency")
    }


@pytest.mark.parametrize("product", PRODUCTS)
def test_charts_use_fields_that_the_index_has(product: Product) -> None:
    for found in lines(product):
        if found.get("type") != "visualization":
            continue
        [view] = [reference["id"] for reference in found["references"]]
        fields = FIELDS[view.removeprefix("clawbus-")]
        nested = fields.get("data", {"properties": {}})["properties"]
        known = set(fields) | {f"data.{name}" for name in nested}
        aggregations = json.loads(found["attributes"]["visState"])["aggs"]
        assert [aggregation["id"] for aggregation in aggregations] == [str(n + 1) for n in range(len(aggregations))]
        used = {aggregation["params"]["field"] for aggregation in aggregations if aggregation["type"] != "count"}
        assert used <= known, found["id"]
