"""Messages about changes of a plugin."""

from __future__ import annotations

from typing import Literal

from infra.postgres.tx import Tx
from protos.catalog import PLATFORM_EVENTS, PLUGIN_EVENT
from protos.messages.plugin import PluginChanged


def changed(tx: Tx, plugin: str, change: Literal["enabled", "disabled", "updated"]) -> None:
    """Publishes the change as a fact, and sends it to the processes that cache tools."""
    fact = PluginChanged(tenant_id=tx.tenant_id, plugin=plugin, change=change)
    tx.publish(PLATFORM_EVENTS, fact, key=tx.tenant_id or "")
    tx.send(PLUGIN_EVENT, fact)
