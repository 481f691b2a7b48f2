"""Every query of Kibana's saved objects, run against documents that the service wrote to a real OpenSearch."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, get_args
from uuid import uuid4

import pytest
from opensearchpy import OpenSearch
from opensearchpy.exceptions import TransportError
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from infra.clock import utcnow
from protos.catalog import AGENT_EVENTS, AUDIT_LOGS, SERVICE_LOGS, USAGE_RECORDS
from protos.envelope import Message
from protos.messages.agent import RunFailed, RunStarted, StepCompleted
from protos.messages.audit import ActAudited
from protos.messages.billing import UsageRecorded
from services.log_aggregator.index import mappings, searches
from services.log_aggregator.index.mappings import FIELDS, Kind
from tests.services.log_aggregator.test_search import exporter, found, line, log
from tooling.cli.saved_objects import Product, path
from tooling.testing.platform import Platform


@dataclass(frozen=True)
class Written:
    """Documents of one tenant that the service has indexed."""

    ids: dict[str, str]
    """Name in this module → id in the index."""
    tenant: str
    run_id: str
    channel_id: str


@pytest.fixture(scope="module")
async def written(aggregator: Platform) -> Written:
    """Lines, events, usage and an act of a tenant, and a span of a service with the tenant's id as its name."""
    tenant, run_id, channel_id = str(uuid4()), uuid4(), uuid4()
    lines = {
        "done": line("run completed", trace_id=uuid4().hex, data={"tenant": tenant, "run_id": str(run_id)}),
        "vendor": line("no answer", level="error", data={"tenant": tenant, "channel_id": str(channel_id)}),
        "dead": line("records stored as dead letters; see ./claw dlq list", tenant=tenant, level="error"),
        "fatal": line("out of memory", tenant=tenant, level="fatal"),
    }
    on: dict[str, Any] = {"run_id": run_id, "session_key": "opaque"}
    step: dict[str, Any] = {**on, "attempts": 1}
    events: dict[str, Message] = {
        "started": RunStarted(agent_id=uuid4(), attempt=1, n=1, **on),
        "model": StepCompleted(step=1, kind="model", name="m1", status="completed", duration_ms=120, n=2, **step),
        "tool": StepCompleted(step=2, kind="tool", name="t1", status="failed", duration_ms=300, n=3, **step),
        "failed": RunFailed(status="failed", error="x", n=4, **on),
    }
    used = UsageRecorded(
        tenant_id=tenant,
        usage_id=str(uuid4()),
        resource="openai/m1",
        quantities={"input_tokens": 7, "output_tokens": 5, "calls": 1},
        occurred_at=utcnow(),
    )
    act = ActAudited(
        tenant_id=tenant,
        at=utcnow(),
        actor="operator",
        action="agent.create",
        object_kind="agent",
        object_id="a",
        outcome="done",
        details={"secret": "not indexed"},
    )
    ids = {name: await aggregator.produce(SERVICE_LOGS, one, key="agent") for name, one in lines.items()}
    for name, one in events.items():
        ids[name] = await aggregator.produce(AGENT_EVENTS, one, key="opaque", tenant_id=tenant)
    ids["usage"] = await aggregator.produce(USAGE_RECORDS, used, key=tenant, tenant_id=tenant)
    ids["act"] = await aggregator.produce(AUDIT_LOGS, act, key=tenant, tenant_id=tenant)
    provider = TracerProvider(resource=Resource.create({"service.name": tenant}))
    provider.add_span_processor(SimpleSpanProcessor(exporter(aggregator)))
    with provider.get_tracer("test").start_as_current_span("charge") as span:
        context = span.get_span_context()
    names = {name: str(id_) for name, id_ in ids.items()}
    names["span"] = f"{context.trace_id:032x}-{context.span_id:016x}"
    return Written(names, tenant, str(run_id), str(channel_id))


LINES, STEPS = {"done", "vendor", "dead", "fatal"}, {"model", "tool"}
DEAD = "records stored as dead letters; see ./claw dlq list"
# Of each saved search and chart: the documents that it finds, and the figures of the chart.
FINDS: dict[str, tuple[set[str], dict[str, float]]] = {
    "search-logs-by-trace": ({"done"}, {}),
    "search-logs-by-run": ({"done"}, {}),
    "search-logs-by-tenant": (LINES, {}),
    "search-logs-by-channel": ({"vendor"}, {}),
    "search-errors": (LINES - {"done"}, {}),
    "search-dead-letters": ({"dead"}, {}),
    "search-runs": ({"started", "failed"} | STEPS, {}),
    "search-audit": ({"act"}, {}),
    "chart-runs-over-time": ({"started", "failed"}, {"agent.v1.RunStarted": 1, "agent.v1.RunFailed": 1}),
    "chart-failed-steps": ({"tool"}, {"t1": 1}),
    "chart-errors-over-time": (LINES - {"done"}, {"agent": 3}),
    "chart-errors-by-message": (LINES - {"done"}, {"no answer": 1, DEAD: 1, "out of memory": 1}),
    "chart-dead-letters-over-time": ({"dead"}, {"agent": 1}),
    "chart-tokens-by-model": ({"usage"}, {"openai/m1": 7}),
    "chart-tokens-by-tenant": ({"usage"}, {"its tenant": 7}),
    "chart-step-time": (STEPS, {"percentiles": 3}),
    "chart-slowest-steps": (STEPS, {"m1": 120, "t1": 300}),
    "chart-span-time": ({"span"}, {}),
}


def asked(attributes: dict[str, Any], only: dict[str, Any]) -> dict[str, Any]:
    """The search that Kibana and OpenSearch Dashboards make of an object, for the documents `only`."""
    query = json.loads(attributes["kibanaSavedObjectMeta"]["searchSourceJSON"])["query"]["query"]
    body: dict[str, Any] = {"query": {"bool": {"filter": [searches.clause(query), only]}}, "size": 100, "aggs": {}}
    metrics: dict[str, Any] = {}
    terms: dict[str, Any] | None = None
    for aggregation in json.loads(attributes.get("visState", '{"aggs": []}'))["aggs"]:
        kind, params = aggregation["type"], aggregation["params"]
        if kind == "terms":
            terms = {"terms": {"field": params["field"], "size": params["size"]}}
        elif kind == "date_histogram":
            body["aggs"]["time"] = {kind: {"field": params["field"], "fixed_interval": "30d"}}
        elif kind != "count":
            metrics[aggregation["id"]] = {kind: params}
    body["aggs"] |= {"by": {**terms, "aggs": metrics}} if terms else metrics
    return body


def figures(answer: dict[str, Any], tenant: str) -> dict[str, float]:
    """Term → the first metric of a chart, or its number of documents."""
    aggregations = answer.get("aggregations", {})
    if "by" in aggregations:
        return {
            bucket["key"].replace(tenant, "its tenant"): bucket["1"]["value"] if "1" in bucket else bucket["doc_count"]
            for bucket in aggregations["by"]["buckets"]
        }
    # Of two documents, the engine's percentiles are an estimate.
    return {"percentiles": sum(120 <= value <= 300 for value in aggregations["1"]["values"].values())}


@pytest.mark.parametrize("product", get_args(Product))
async def test_every_saved_query_finds_the_documents_that_the_service_wrote(
    aggregator: Platform, search: OpenSearch, written: Written, product: Product
) -> None:
    lines = map(json.loads, path(product).read_text().splitlines())
    objects = {saved["id"]: saved for saved in lines if "id" in saved}
    with_query = {id_ for id_, saved in objects.items() if saved["type"] in ("search", "visualization")}
    assert with_query == {f"clawbus-{name}" for name in FINDS}
    for name, (wanted, numbers) in FINDS.items():
        saved = objects[f"clawbus-{name}"]
        [view] = [reference["id"] for reference in saved["references"]]
        index = aggregator.prefix + objects[view]["attributes"]["title"]
        only = {"term": {"service" if view == "clawbus-spans" else "tenant": written.tenant}}
        body = asked(saved["attributes"], only)

        async def hits(
            index: str = index, body: dict[str, Any] = body, least: int = len(wanted)
        ) -> dict[str, Any] | None:
            try:
                answer: dict[str, Any] = search.search(index=index, body=body, params={"ignore_unavailable": "true"})
            except TransportError as error:
                if error.status_code != 503:
                    raise
                # The index is new and has no shard yet.
                return None
            return answer if len(answer["hits"]["hits"]) >= least else None

        answer = await aggregator.until(hits)
        assert answer is not None
        assert {hit["_id"] for hit in answer["hits"]["hits"]} == {written.ids[one] for one in wanted}, name
        if numbers:
            assert figures(answer, written.tenant) == numbers, name
        assert "not indexed" not in json.dumps(answer)


async def test_lines_are_found_by_run_channel_and_saved_query(aggregator: Platform, written: Written) -> None:
    for params, names in (
        ({"run_id": written.run_id}, {"run completed"}),
        ({"channel_id": written.channel_id}, {"no answer"}),
        ({"search": "errors"}, {"no answer", DEAD, "out of memory"}),
        ({"search": "dead_letters"}, {DEAD}),
        ({"search": "errors", "q": "memory"}, {"out of memory"}),
    ):
        items = await found(aggregator, written.tenant, len(names), **params)
        assert {item["message"] for item in items} == names
    async with aggregator.client("log_aggregator", written.tenant) as client:
        for field, value in (("run_id", "x"), ("search", "all"), ("channel_id", "*")):
            answer = await client.get("/api/v1/logs", params={field: value})
            assert (answer.status_code, [error["field"] for error in answer.json()["errors"]]) == (422, [field])


async def test_ended_runs_and_used_connections_are_measured(aggregator: Platform, written: Written) -> None:
    async with aggregator.client("log_aggregator") as client:

        async def counted() -> str | None:
            text = (await client.get("/metrics")).text
            return text if 'claw_runs_total{status="failed"}' in text else None

        text = await aggregator.until(counted)
    assert text is not None
    for pool in ("worker", "request"):
        [ratio] = re.findall(rf'claw_db_pool_used_ratio{{pool="{pool}"}} (\S+)', text)
        assert 0 <= float(ratio) <= 1


async def test_a_line_with_thousands_of_fields_adds_none_to_the_index(
    aggregator: Platform, search: OpenSearch, tenant: str
) -> None:
    wide = {f"field{n}": {"deep": {str(n): n}} for n in range(2000)}
    await log(aggregator, line("wide", data={"tenant": tenant, **wide}))
    await found(aggregator, tenant, 1)
    for index in search.indices.get_mapping(index=f"{aggregator.prefix}clawbus-logs-*").values():
        assert index["mappings"]["properties"].keys() == FIELDS["logs"].keys()


def test_each_engine_gets_a_template_and_a_policy_that_it_knows() -> None:
    kinds: dict[Kind, str] = {"logs": "31d", "events": "31d", "audit": "91d"}
    for kind, age in kinds.items():
        assert mappings.policy("clawbus-", kind, "elasticsearch") == (
            f"/_ilm/policy/clawbus-{kind}",
            {"policy": {"phases": {"delete": {"min_age": age, "actions": {"delete": {}}}}}},
        )
        template = mappings.template("clawbus-", kind, "elasticsearch")
        assert template["template"]["settings"]["index.lifecycle.name"] == f"clawbus-{kind}"
        where, policy = mappings.policy("clawbus-", kind, "opensearch")
        assert where == f"/_plugins/_ism/policies/clawbus-{kind}"
        kept, deleted = policy["policy"]["states"]
        assert kept["transitions"] == [{"state_name": "deleted", "conditions": {"min_index_age": age}}]
        assert deleted["actions"] == [{"delete": {}}]
        template = mappings.template("clawbus-", kind, "opensearch")
        assert policy["policy"]["ism_template"][0]["index_patterns"] == template["index_patterns"]
        assert "index.lifecycle.name" not in template["template"]["settings"]
