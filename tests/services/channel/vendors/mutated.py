"""Genuine calls of every vendor with any other content."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec

from services.channel.vendors.base import Request
from tooling.testing.vendors import (
    DingTalkStandIn,
    DiscordStandIn,
    FeishuStandIn,
    LineStandIn,
    QQStandIn,
    SlackStandIn,
    TeamsStandIn,
    TelegramStandIn,
    TwilioStandIn,
    WebhookStandIn,
    WeComStandIn,
    WhatsAppStandIn,
)
from tooling.testing.vendors.teams import published

URL = "https://bus.example/webhooks/x"
STRANGE: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    10**30,
    "",
    "\0",
    "x" * 5_000,
    "\ud83d",
    "\u202e<!channel>",
    [],
    {},
    [[]],
    [None],
    {"a": {"b": []}},
)


def _json(sign: Callable[[Any], tuple[bytes, dict[str, str]]]) -> Callable[[Any], Request]:
    def call(content: Any) -> Request:
        body, headers = sign(content)
        return Request("POST", "", headers, body, URL)

    return call


def _vendors() -> dict[str, tuple[dict[str, str], Any, Callable[[Any], Request]]]:
    """By name: the credentials, the content of a genuine call, and how a call with any content is made."""
    telegram, slack, hook = TelegramStandIn(), SlackStandIn(), WebhookStandIn()
    discord, line, meta = DiscordStandIn(), LineStandIn(), WhatsAppStandIn()
    feishu, dingtalk, qq, teams = FeishuStandIn(), DingTalkStandIn(), QQStandIn(), TeamsStandIn()
    twilio, wecom = TwilioStandIn(), WeComStandIn()

    def content(call: tuple[bytes, dict[str, str]]) -> Any:
        return msgspec.json.decode(call[0])

    def encoded(sign: Callable[[bytes], tuple[bytes, dict[str, str]]]) -> Callable[[Any], Any]:
        return lambda given: sign(msgspec.json.encode(given))

    def form(given: Any) -> tuple[bytes, dict[str, str]]:
        fields = given if isinstance(given, dict) else {}
        return twilio.signed(URL, {str(name): str(value).replace("\ud83d", "") for name, value in fields.items()})

    def xml(given: Any) -> Request:
        fields = given if isinstance(given, dict) else {}
        plain = {name: str(value).replace("\ud83d", "").replace("\0", "") for name, value in fields.items()}
        body, query = wecom.call(wecom.message(**plain))
        return Request("POST", query, {}, body, URL)

    def with_keys(given: Any) -> Request:
        body, headers = teams.signed(given)
        return Request("POST", "", headers, body, URL, published(teams))

    signed: dict[str, tuple[Any, Any, Callable[[Any], tuple[bytes, dict[str, str]]]]] = {
        "telegram": (telegram, content(telegram.update("hi", topic=3)), telegram.signed),
        "slack": (slack, content(slack.event("hi", thread_ts="1.000001", files=[{"name": "a"}])), slack.signed),
        "webhook": (hook, content(hook.message("hi")), hook.signed),
        "discord": (discord, discord.command(), discord.signed),
        "line": (line, content(line.call(line.event(), line.event())), encoded(line.signed)),
        "whatsapp": (meta, content(meta.call(meta.message())), encoded(meta.signed)),
        "feishu": (feishu, feishu.event(), feishu.call),
        "dingtalk": (dingtalk, dingtalk.message(), dingtalk.signed),
        "qq": (qq, qq.event(), qq.signed),
        "twilio": (twilio, {"MessageSid": "SM1", "From": "+1", "Body": "hi", "NumMedia": "0"}, form),
    }
    found = {name: (fake.credentials, given, _json(sign)) for name, (fake, given, sign) in signed.items()}
    found["webhook"][0]["reply_url"] = "http://127.0.0.1:9/"
    found["wecom"] = (wecom.credentials, {"Content": "hi", "MsgType": "text", "MsgId": "1", "AgentID": "7"}, xml)
    found["teams"] = (teams.credentials, teams.activity(), with_keys)
    return found


MADE = _vendors()


def changed(content: Any, chance: random.Random) -> Any:
    """The content with something else at a random place: another value, or one more or one less field."""
    if chance.random() < 0.1 or not content:
        return chance.choice(STRANGE)
    if isinstance(content, dict):
        name = chance.choice(list(content))
        match chance.randrange(5):
            case 0:
                return {other: value for other, value in content.items() if other != name}
            case 1:
                return content | {f"new {name}": chance.choice(STRANGE)}
        return content | {name: changed(content[name], chance)}
    if isinstance(content, list):
        at = chance.randrange(len(content))
        return [*content[:at], changed(content[at], chance), *content[at + 1 :]]
    return chance.choice(STRANGE)
