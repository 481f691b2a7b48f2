"""HTTP of log lines and traces, from the search index."""

from __future__ import annotations

from datetime import UTC
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Path, Query

from infra.service.api import Paging, Viewer, page
from infra.service.service import Runtime
from infra.web.times import Time
from services.log_aggregator import adapters
from services.log_aggregator.access import RequestedTenant
from services.log_aggregator.index import searches

# OpenSearch returns at most this many documents at once.
MAX_SPANS = 10_000
_LINE = ("timestamp", "level", "service", "traceId", "spanId", "message", "data")
_TRACE_ID = r"^[0-9a-f]{32}$"


def router(runtime: Runtime) -> APIRouter:
    index = adapters.index(runtime)
    routes = APIRouter(tags=["logs and traces"])

    @routes.get("/api/v1/logs")
    async def search_lines(
        who: Viewer,
        tenant: RequestedTenant,
        paging: Paging,
        q: Annotated[str | None, Query(min_length=1, max_length=500)] = None,
        trace_id: Annotated[str | None, Query(pattern=_TRACE_ID)] = None,
        run_id: UUID | None = None,
        channel_id: UUID | None = None,
        search: searches.Name | None = None,
        service: Annotated[str | None, Query(min_length=1, max_length=100)] = None,
        since: Time | None = None,
        until: Time | None = None,
    ) -> dict[str, Any]:
        """Lists log lines, newest first. A tenant sees its own.

        until: exclusive. q: required words, "phrases", and -excluded words.
        """
        values: dict[searches.Field, object] = {
            "tenant": who.tenant_id,
            "trace": trace_id,
            "run": run_id,
            "channel": channel_id,
        }
        terms = {"service": service} | {searches.FIELDS[field]: value for field, value in values.items()}
        must: list[dict[str, Any]] = [{"term": {field: str(value)}} for field, value in terms.items() if value]
        if tenant and not who.tenant_id:
            # Also lines of work for the tenant, which it does not see.
            worked_for = {"match_phrase": {"text": f"for_tenant {tenant}"}}
            must.append({"bool": {"should": [{"term": {searches.FIELDS["tenant"]: tenant}}, worked_for]}})
        if search:
            must.append(searches.clause(searches.QUERIES[search]))
        # OpenSearch takes no offset of more than 18 hours.
        bounds = {name: time.astimezone(UTC).isoformat() for name, time in (("gte", since), ("lt", until)) if time}
        if bounds:
            must.append({"range": {"timestamp": bounds}})
        if q:
            query = {"query": q, "fields": ["text"], "default_operator": "and", "flags": "AND|NOT|PHRASE|WHITESPACE"}
            must.append({"simple_query_string": query})
        sort = [{"timestamp": "desc"}, {"id": "desc"}]
        after = paging.after_time(UUID)
        last = after and (after[0].astimezone(UTC).isoformat(), str(after[1]))
        found = await index.search("logs", must, sort, paging.limit + 1, last)
        lines = page(found, paging, lambda line: f"{line['timestamp']} {line['id']}")
        return lines | {"items": [{name: line[name] for name in _LINE} for line in lines["items"]]}

    @routes.get("/api/v1/traces/{trace_id}")
    async def trace(trace_id: Annotated[str, Path(pattern=_TRACE_ID)], who: Viewer) -> dict[str, Any]:
        """Lists the spans of a trace by start time, and the spans of batches that are linked to it.

        A tenant sees a trace that has an event of that tenant. The list is empty for other traces, and for traces that
        have not arrived yet.
        """
        if who.tenant_id:
            own = [{"term": {"tenant": who.tenant_id}}, {"term": {"trace_id": trace_id}}]
            if not await index.search("events", own, [], 1):
                return {"items": [], "next": None}
        wanted = [{"term": {"trace_id": trace_id}}, {"term": {"linked": trace_id}}]
        found = await index.search("spans", [{"bool": {"should": wanted}}], [{"start_ns": "asc"}], MAX_SPANS)
        # A batch may also be linked to traces of other tenants.
        spans = [
            span | {"links": [link for link in span["links"] if trace_id in (link[0], span["trace_id"])]}
            for span in found
        ]
        return {"items": spans, "next": None}

    return routes
