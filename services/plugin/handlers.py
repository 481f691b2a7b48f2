"""Handlers of the messages that plugin receives."""

from __future__ import annotations

import msgspec

from infra.postgres.tx import Tx
from infra.stores.cache import Cache
from protos.catalog import PLUGIN_EVENT
from protos.messages.plugin import PluginChanged
from protos.pubsub import CONFIG_CHANGED


@PLUGIN_EVENT.worker(prefetch=50)
async def pass_on(event: PluginChanged, tx: Tx, cache: Cache) -> None:
    """Forwards the change by the cache's pub/sub to all processes that cache tools.

    Plugin itself does not cache tools: a tool that a tenant disables is disabled at once in every instance.
    """

    async def publish() -> None:
        await cache.publish(CONFIG_CHANGED, msgspec.json.encode(event))

    tx.after_commit(publish)
