"""Each adapter names its account by a real call, and registers the webhook if its vendor has a call for that."""

from __future__ import annotations

from typing import Any

import pytest

from infra.outgoing.client import Outgoing
from services.channel.vendors import VENDORS
from services.channel.vendors.base import AccountRefused
from tooling.testing import vendors as fakes
from tooling.testing.vendors.server import StandIn

FAKES: dict[str, type[StandIn]] = {
    "dingtalk": fakes.DingTalkStandIn,
    "discord": fakes.DiscordStandIn,
    "feishu": fakes.FeishuStandIn,
    "line": fakes.LineStandIn,
    "qq": fakes.QQStandIn,
    "slack": fakes.SlackStandIn,
    "teams": fakes.TeamsStandIn,
    "telegram": fakes.TelegramStandIn,
    "twilio": fakes.TwilioStandIn,
    "webhook": fakes.WebhookStandIn,
    "wecom": fakes.WeComStandIn,
    "whatsapp": fakes.WhatsAppStandIn,
}
NAMES = {
    "discord": "ada",
    "feishu": "Ada",
    "line": "Ada",
    "qq": "ada",
    "slack": "ada in Example",
    "telegram": "@ada_bot",
    "twilio": "Example",
    "wecom": "Ada",
    "whatsapp": "+1 555",
}
# The field of the credentials that proves this side to the vendor.
SECRETS = {
    "dingtalk": "app_secret",
    "discord": "bot_token",
    "feishu": "app_secret",
    "line": "channel_access_token",
    "qq": "secret",
    "slack": "bot_token",
    "teams": "app_password",
    "telegram": "bot_token",
    "twilio": "auth_token",
    "wecom": "secret",
    "whatsapp": "access_token",
}


def test_every_vendor_is_here() -> None:
    assert set(FAKES) == set(VENDORS)


@pytest.mark.parametrize("name", sorted(VENDORS))
async def test_the_account_is_named(name: str, outgoing: Outgoing) -> None:
    vendor = VENDORS[name]
    async with FAKES[name]() as fake:
        given: dict[str, str] = fake.credentials  # type: ignore[attr-defined]
        identity = await vendor.identify(outgoing, fake.url, vendor.credentials(**given))
        assert identity == NAMES.get(name, identity) != ""
        assert fake.refusals == []
        assert fake.ledger == []


@pytest.mark.parametrize("name", sorted(SECRETS))
async def test_wrong_credentials_are_refused(name: str, outgoing: Outgoing) -> None:
    vendor = VENDORS[name]
    async with FAKES[name]() as fake:
        given: dict[str, Any] = fake.credentials | {SECRETS[name]: "wrong"}  # type: ignore[attr-defined]
        with pytest.raises(AccountRefused):
            await vendor.identify(outgoing, fake.url, vendor.credentials(**given))


@pytest.mark.parametrize("name", sorted(VENDORS))
async def test_the_webhook_is_registered(name: str, outgoing: Outgoing) -> None:
    vendor, url = VENDORS[name], f"https://claw.example/webhooks/{name}/x"
    async with FAKES[name]() as fake:
        given: dict[str, str] = fake.credentials  # type: ignore[attr-defined]
        done = await vendor.register(outgoing, fake.url, vendor.credentials(**given), url)
        assert fake.webhook == (url if done else "")
        assert done == (name in ("discord", "line", "telegram", "twilio", "whatsapp"))
        assert fake.refusals == []
