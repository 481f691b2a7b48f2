from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from infra.outgoing.client import Outgoing


@pytest.fixture
async def outgoing() -> AsyncIterator[Outgoing]:
    client = Outgoing(allow_private=True)
    yield client
    await client.close()
