"""The vendor adapters by channel type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.channel.vendors.base import Vendor
from services.channel.vendors.dingtalk import DingTalk
from services.channel.vendors.discord import Discord
from services.channel.vendors.feishu import Feishu
from services.channel.vendors.line import Line
from services.channel.vendors.qq import QQ
from services.channel.vendors.slack import Slack
from services.channel.vendors.teams import Teams
from services.channel.vendors.telegram import Telegram
from services.channel.vendors.twilio import Twilio
from services.channel.vendors.webhook import Webhook
from services.channel.vendors.wecom import WeCom
from services.channel.vendors.whatsapp import WhatsApp

_ALL: tuple[Vendor[Any], ...] = (
    DingTalk(),
    Discord(),
    Feishu(),
    Line(),
    QQ(),
    Slack(),
    Teams(),
    Telegram(),
    Twilio(),
    WeCom(),
    Webhook(),
    WhatsApp(),
)

VENDORS: Mapping[str, Vendor[Any]] = {vendor.name: vendor for vendor in _ALL}
