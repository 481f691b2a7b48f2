"""The vendor adapters by channel type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.channel.vendors.base import Vendor
from services.channel.vendors.slack import Slack
from services.channel.vendors.telegram import Telegram
from services.channel.vendors.webhook import Webhook

_ALL: tuple[Vendor[Any], ...] = (
    Slack(),
    Telegram(),
    Webhook(),
)

VENDORS: Mapping[str, Vendor[Any]] = {vendor.name: vendor for vendor in _ALL}
