"""HTTP of the log aggregator."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.routing import BaseRoute

from infra.service.api import api
from infra.service.service import Runtime
from services.log_aggregator import audit_api, deadletters_api, search_api


def routes(runtime: Runtime) -> Sequence[BaseRoute]:
    routers = (audit_api.router(runtime), search_api.router(runtime), deadletters_api.router(runtime))
    return api("log_aggregator", runtime, *routers)
