"""Clients of the engines that the log aggregator uses."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from infra.observe.metrics import Metrics
from infra.service.service import Runtime
from infra.stores.objects import Objects
from services.log_aggregator.audit.lines import AuditLines
from services.log_aggregator.audit.stored_heads import BUCKET, StoredHeads
from services.log_aggregator.index.search_index import SearchIndex


def index(runtime: Runtime) -> SearchIndex:
    return SearchIndex(runtime.settings.opensearch_url.get_secret_value(), runtime.settings.topic_prefix)


def stored_heads(runtime: Runtime) -> StoredHeads:
    settings = runtime.settings
    secret = settings.s3_secret_key.get_secret_value()
    objects = Objects(settings.s3_endpoint, settings.s3_access_key, secret, BUCKET)
    return StoredHeads(objects, AuditLines(runtime.worker, runtime.cipher), settings.topic_prefix)


def metrics(runtime: Runtime) -> Metrics:
    # An alert on a rate does not see the first value of a series.
    runtime.metrics.runs.labels("failed")
    return runtime.metrics


def opensearch(runtime: Runtime) -> Callable[[], Awaitable[None]]:
    return index(runtime).ping
