"""The HTTP routes of memory."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.routing import BaseRoute

from infra.service.api import api
from infra.service.service import Runtime
from services.memory import documents_api, memories_api, search_api


def routes(runtime: Runtime) -> Sequence[BaseRoute]:
    return api(
        "memory", runtime, documents_api.router(runtime), search_api.router(runtime), memories_api.router(runtime)
    )
