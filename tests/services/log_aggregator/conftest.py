"""The log aggregator as a real process, with an OpenSearch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from opensearchpy import OpenSearch

from tooling.testing.platform import Platform


@pytest.fixture(scope="module")
async def aggregator(platform: Platform) -> AsyncIterator[Platform]:
    """Starts the service. Its indices are deleted after the module."""
    await platform.prepare("log_aggregator")
    await platform.start("log_aggregator")
    yield platform
    platform.stop("log_aggregator")
    url = platform.stack.engines["opensearch"]["url"]
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=30) as client:
        found = await client.get(f"/_cat/indices/{platform.prefix}*", params={"h": "index", "format": "json"})
        for index in found.json():
            await client.delete(f"/{index['index']}")
        await client.delete(f"/_index_template/{platform.prefix}*")


@pytest.fixture
def search(aggregator: Platform) -> Iterator[OpenSearch]:
    """OpenSearch's official client."""
    url = urlsplit(aggregator.stack.engines["opensearch"]["url"])
    # A new index has no shard for a moment, and the answer is 503.
    client = OpenSearch([{"host": url.hostname, "port": url.port}], max_retries=1000)
    yield client
    client.close()
