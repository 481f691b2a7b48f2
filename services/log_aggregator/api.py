"""HTTP of the log aggregator."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.routing import BaseRoute

from infra.service.api import api
from infra.service.service import Runtime
from services.log_aggregator import audit_api, deadletters_api, search_api, status_api


def routes(runtime: Runtime) -> Sequence[BaseRoute]:
    routers = (module.router(runtime) for module in (audit_api, search_api, deadletters_api, status_api))
    return api("log_aggregator", runtime, *routers)
