"""The HTTP routes of the user service."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.routing import BaseRoute

from infra.service.api import api
from infra.service.service import Runtime
from services.user import api_keys, erasing, members, tenants


def routes(runtime: Runtime) -> Sequence[BaseRoute]:
    return api(
        "user",
        runtime,
        tenants.router(runtime),
        erasing.router(runtime),
        api_keys.router(runtime),
        members.router(runtime),
    )
