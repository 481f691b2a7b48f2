"""Plugin: its public facts."""

from __future__ import annotations

from typing import Literal

from protos.envelope import Message


class PluginChanged(Message, frozen=True, kw_only=True):
    """A tenant's plugin was enabled, disabled or updated; a process that caches its tools must drop them."""

    tenant_id: str | None
    """Null if it changed for all tenants."""
    plugin: str
    change: Literal["enabled", "disabled", "updated"]
