"""Plugin's public facts."""

from __future__ import annotations

from typing import Literal

from protos.envelope import Message


class PluginChanged(Message, frozen=True, kw_only=True):
    """A tenant's plugin was enabled, disabled or set up anew; whoever caches its tools forgets them.

    tenant_id: null: it changed for all tenants.
    """

    tenant_id: str | None
    plugin: str
    change: Literal["enabled", "disabled", "updated"]
