"""The services as real processes, one platform per test module."""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import uuid4

import pytest

from tooling.testing.platform import Platform, running_platform
from tooling.testing.stack import Stack


@pytest.fixture
def tenant() -> str:
    """The id of a new tenant. Services that give a tenant more than an id have a fixture of this name of their own."""
    return str(uuid4())


@pytest.fixture(scope="module")
async def platform(
    stack: Stack, database: str, vhost: str, topic_prefix: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Platform]:
    """A module prepares and starts its services with ``await platform.prepare(…)`` and ``await platform.start(…)``."""
    folder = tmp_path_factory.mktemp("platform")
    async with running_platform(stack, database, vhost, topic_prefix, folder) as running:
        yield running
