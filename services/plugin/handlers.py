"""What plugin receives."""

from __future__ import annotations

import msgspec

from infra.postgres.tx import Tx
from infra.stores.cache import Cache
from protos.catalog import PLUGIN_EVENT
from protos.messages.plugin import PluginChanged

CONFIG_CHANGED = "openclaw:config:changed"
"""The Redis channel on which plugin tells each process that a tenant's plugins have changed."""


@PLUGIN_EVENT.worker(prefetch=50)
async def pass_on(event: PluginChanged, tx: Tx, cache: Cache) -> None:
    """One instance takes the broadcast, and wakes all processes that keep tools at hand by the cache's pub/sub.

    Plugin itself keeps none: what a tenant has switched off is off at once, in every instance.
    """

    async def tell() -> None:
        await cache.publish(CONFIG_CHANGED, msgspec.json.encode(event))

    tx.after_commit(tell)
