"""Each adapter names its account by a real call, and registers the webhook if its vendor has a call for that."""

from __future__ import annotations

from typing import Any

import pytest

from infra.errors import EffectFailed, TooLarge
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


# The reference to a file as the vendor's message has it, and its key in the fake.
FILES = {
    "dingtalk": ("code1", "code1"),
    "discord": ("https://cdn.discordapp.com/attachments/1/a.png", "/attachments/1/a.png"),
    "feishu": ("om_1/img_1", "om_1/img_1"),
    "line": ("7", "7"),
    "qq": ("multimedia.nt.qq.com.cn/download?x=1", "/download?x=1"),
    "slack": ("https://files.slack.com/files-pri/T1-F1/a.png", "/files-pri/T1-F1/a.png"),
    "teams": ("token https://smba.trafficmanager.net/token/a", "/token/a"),
    "telegram": ("f1", "f1"),
    "twilio": ("https://api.twilio.com/2010-04-01/Media/ME1", "/2010-04-01/Media/ME1"),
    "webhook": ("", "/files/a.png"),
    "wecom": ("m1", "m1"),
    "whatsapp": ("77", "77"),
}


@pytest.mark.parametrize("name", sorted(VENDORS))
async def test_a_file_is_fetched_and_limited(name: str, outgoing: Outgoing) -> None:
    vendor, (ref, key) = VENDORS[name], FILES[name]
    async with FAKES[name]() as fake:
        given: dict[str, str] = fake.credentials  # type: ignore[attr-defined]
        credentials = vendor.credentials(**given)
        ref = ref or f"{fake.url}{key}"
        with pytest.raises(EffectFailed):
            await vendor.fetch(outgoing, fake.url, credentials, ref, 100)
        fake.files[key] = b"\x89PNG content"
        assert await vendor.fetch(outgoing, fake.url, credentials, ref, 100) == b"\x89PNG content"
        with pytest.raises(TooLarge):
            await vendor.fetch(outgoing, fake.url, credentials, ref, 3)


@pytest.mark.parametrize("name", ["discord", "qq", "slack", "teams", "twilio"])
async def test_no_token_leaves_the_vendor(name: str, outgoing: Outgoing) -> None:
    vendor = VENDORS[name]
    async with FAKES[name]() as fake, FAKES["webhook"]() as other:
        given: dict[str, str] = fake.credentials  # type: ignore[attr-defined]
        for address in (f"{other.url}/a", "https://slack.com.evil.example/a", "https://evilslack.com/a"):
            ref = f"token {address}" if name == "teams" else address
            with pytest.raises(EffectFailed, match="not the vendor's"):
                await vendor.fetch(outgoing, vendor.origin, vendor.credentials(**given), ref, 100)
        assert other.calls == 0
