"""The HTTP routes of the agent: those of agents, sessions and runs."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.routing import BaseRoute

from infra.service.api import api
from infra.service.service import Runtime
from services.agent.definitions import api as definitions
from services.agent.runs import api as runs
from services.agent.sessions import api as sessions
from services.agent.sessions import completions, takeover
from services.agent.sessions.requeue import let_fail


def routes(runtime: Runtime) -> Sequence[BaseRoute]:
    return api(
        "agent",
        runtime,
        definitions.router(runtime),
        sessions.router(runtime),
        completions.router(runtime),
        takeover.router(runtime),
        runs.router(runtime, let_fail),
        max_body=completions.MAX_BODY_BYTES,
    )
