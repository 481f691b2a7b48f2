"""The services as real processes, one platform per test module."""

from __future__ import annotations

from collections.abc import AsyncIterator
from importlib import import_module
from uuid import uuid4

import pytest

from infra.postgres.db import create_engine
from infra.service.verification import VerificationResult, verify
from tooling.testing.platform import Platform, running_platform
from tooling.testing.stack import Stack


@pytest.fixture
def tenant() -> str:
    """The id of a new tenant. Services that give a tenant more than an id have a fixture of this name of their own."""
    return str(uuid4())


VERIFIED = (
    *("agent.test_runs", "agent.test_forks", "channel.test_deliveries"),
    *("billing.test_rerate", "billing.test_usage", "memory.test_memories"),
)
"""Modules whose tests write every read model. After them, each one must equal what its source says."""


@pytest.fixture(scope="module")
async def platform(
    request: pytest.FixtureRequest,
    stack: Stack,
    database: str,
    vhost: str,
    topic_prefix: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Platform]:
    """A module prepares and starts its services with ``await platform.prepare(…)`` and ``await platform.start(…)``."""
    folder = tmp_path_factory.mktemp("platform")
    async with running_platform(stack, database, vhost, topic_prefix, folder) as running:
        yield running
    if request.module.__name__.removeprefix("tests.services.") in VERIFIED:
        assert await read_models(running) == []


async def read_models(platform: Platform) -> list[VerificationResult]:
    """The verifications of the services' read models that found differences."""
    wrong = []
    for name in platform.processes:
        engine = create_engine(platform.database_url, schema=name, pool_size=2)
        for model in import_module(f"services.{name}.__main__").service.read_models:
            verified = await verify(engine, name, model)
            if verified.different:
                wrong.append(verified)
        await engine.dispose()
    return wrong
