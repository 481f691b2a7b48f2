"""The whole system as real processes, once for all tests of this folder."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack

import pytest
import pytest_asyncio

from tests.conftest import fresh_database, fresh_prefix, fresh_vhost
from tooling.stack.home import SERVICES
from tooling.testing.platform import Platform, running_platform
from tooling.testing.stack import Stack


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def system(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Platform]:
    with ExitStack() as engines:
        database = await asyncio.to_thread(engines.enter_context, fresh_database(stack))
        vhost = engines.enter_context(fresh_vhost(stack))
        prefix = engines.enter_context(fresh_prefix(stack))
        async with running_platform(stack, database, vhost, prefix, tmp_path_factory.mktemp("system")) as system:
            await system.prepare(*SERVICES)
            await system.start(
                *SERVICES,
                OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{system.ports['otlp']}",
                CLAW_LOG_LEVEL="debug",
                # A payment provider that does not answer.
                CLAW_STRIPE_API_BASE="http://127.0.0.1:9",
                CLAW_STRIPE_API_KEY="sk_test_made_up",
                CLAW_STRIPE_WEBHOOK_SECRET="whsec_made_up",
            )
            yield system
        await asyncio.to_thread(engines.close)
