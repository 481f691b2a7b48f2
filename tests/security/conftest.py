"""The whole system as real processes, once for all tests of this folder."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import httpx
import pytest
import pytest_asyncio

from protos.calls import ROUTES
from tests.conftest import fresh_database, fresh_prefix, fresh_vhost
from tests.security.clients import Clients
from tests.security.furnished import Furnished, furnish
from tests.security.pages import Operation, operations
from tooling.stack.home import SERVICES
from tooling.testing.platform import ANSWER_SECONDS, Platform, running_platform
from tooling.testing.stack import Stack


@pytest.fixture(scope="package")
def engines(stack: Stack) -> Iterator[tuple[str, str, str]]:
    """A fresh database, a fresh virtual host and a fresh prefix."""
    with fresh_database(stack) as database, fresh_vhost(stack) as vhost, fresh_prefix(stack) as prefix:
        yield database, vhost, prefix


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def system(
    stack: Stack, engines: tuple[str, str, str], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Platform]:
    async with running_platform(stack, *engines, tmp_path_factory.mktemp("system")) as system:
        await system.prepare(*SERVICES)
        await system.start(*SERVICES, **environment(system))
        yield system


def environment(system: Platform) -> dict[str, str]:
    """The variables of the services."""
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{system.ports['otlp']}",
        "CLAW_LOG_LEVEL": "debug",
        # A payment provider that does not answer.
        "CLAW_STRIPE_API_BASE": "http://127.0.0.1:9",
        "CLAW_STRIPE_API_KEY": "sk_test_made_up",
        "CLAW_STRIPE_WEBHOOK_SECRET": "whsec_made_up",
    }


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def other(system: Platform) -> Furnished:
    """The tenant whose things no other tenant may see."""
    return await furnish(system)


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def routes(system: Platform) -> list[Operation]:
    """Every route, with those that only other services call."""
    hidden = [
        Operation(route.callee, route.method, route.path, (route.scope,), (), None, {})
        for route in ROUTES
        if route.path.startswith("/internal/")
    ]
    return [*await operations(system), *hidden]


@pytest.fixture(scope="package")
def clients(system: Platform, http: dict[str, httpx.AsyncClient]) -> Clients:
    return Clients(system, http)


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def http(system: Platform) -> AsyncIterator[dict[str, httpx.AsyncClient]]:
    """A client of each service. One request per connection: a service closes one that is idle for some seconds, which a
    slow machine may need, or after a request that it could not read."""
    limits = httpx.Limits(max_keepalive_connections=0)
    async with AsyncExitStack() as stack:
        yield {
            name: await stack.enter_async_context(
                httpx.AsyncClient(base_url=system.url(name), trust_env=False, timeout=ANSWER_SECONDS, limits=limits)
            )
            for name in SERVICES
        }
