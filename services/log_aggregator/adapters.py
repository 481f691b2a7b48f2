"""Clients of the engines that the log aggregator uses."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from infra.observe.metrics import Metrics
from infra.service.service import Runtime
from services.log_aggregator.index import Index


def index(runtime: Runtime) -> Index:
    return Index(runtime.settings.opensearch_url.get_secret_value(), runtime.settings.topic_prefix)


def metrics(runtime: Runtime) -> Metrics:
    return runtime.metrics


def opensearch(runtime: Runtime) -> Callable[[], Awaitable[None]]:
    return index(runtime).ping
