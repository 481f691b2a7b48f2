"""Genuine calls with any other content, and forged calls: an adapter raises only the errors that are answers.

CLAW_MUTATIONS sets the number of calls for each vendor: ``CLAW_MUTATIONS=100000 ./claw test`` with this file.
"""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from infra.clock import utcnow
from infra.errors import InvalidMessage, Unauthenticated
from services.channel.vendors import VENDORS
from services.channel.vendors.base import Ignored, Inbound, Moved, Receipt, Request, Unreadable
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

COUNT = int(os.environ.get("CLAW_MUTATIONS", "300"))
pytestmark = pytest.mark.timeout(180 + COUNT // 50)
# By how much the memory of this process may grow in all calls after the first tenth.
MOST_GROWTH_BYTES = 32 * 1024 * 1024
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


def _changed(content: Any, chance: random.Random) -> Any:
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
        return content | {name: _changed(content[name], chance)}
    if isinstance(content, list):
        at = chance.randrange(len(content))
        return [*content[:at], _changed(content[at], chance), *content[at + 1 :]]
    return chance.choice(STRANGE)


class Memory:
    """The growth of this process's resident memory."""

    def __init__(self) -> None:
        self._begin = 0

    def made(self, n: int) -> None:
        """After call `n` of COUNT, from 0."""
        if n == COUNT // 10:
            self._begin = _resident_bytes()
        elif n == COUNT - 1:
            assert _resident_bytes() - self._begin < MOST_GROWTH_BYTES


def _resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_every_vendor_is_here() -> None:
    assert set(MADE) == set(VENDORS)


@pytest.mark.parametrize("name", sorted(VENDORS))
def test_a_genuine_call_with_any_content_is_read_or_refused(name: str) -> None:
    given, content, make = MADE[name]
    vendor, credentials = VENDORS[name], VENDORS[name].credentials(**given)
    chance = random.Random(name)
    read = 0
    memory = Memory()
    for n in range(COUNT):
        memory.made(n)
        changed = content
        for _ in range(chance.randrange(4)):
            changed = _changed(changed, chance)
        try:
            request = make(changed)
        except UnicodeEncodeError:
            continue  # half a character: no vendor can send that
        try:
            received = vendor.receive(request, credentials, utcnow())
        except (InvalidMessage, Unreadable, Unauthenticated):
            continue
        read += 1
        for item in received.items:
            assert isinstance(item, Inbound | Ignored | Moved | Receipt)
            assert item.ids
            assert all(isinstance(id_, str) for id_ in item.ids)
            if isinstance(item, Inbound):
                texts = (item.conversation, item.person, item.message, item.text)
                assert all(isinstance(text, str) for text in texts)
    assert read


@pytest.mark.parametrize("name", sorted(VENDORS))
def test_a_call_with_any_change_of_its_bytes_or_proof_is_refused(name: str) -> None:
    given, content, make = MADE[name]
    vendor, credentials = VENDORS[name], VENDORS[name].credentials(**given)
    chance = random.Random(name)
    genuine = make(content)
    vendor.receive(genuine, credentials, utcnow())
    # These proofs do not cover the body.
    is_covered = name not in ("telegram", "dingtalk", "teams")
    memory = Memory()
    for n in range(COUNT):
        memory.made(n)
        body, headers, query = genuine.body, dict(genuine.headers), genuine.query
        if is_covered and chance.random() < 0.5:
            at = chance.randrange(len(body))
            body = body[:at] + bytes([body[at] ^ (1 << chance.randrange(8))]) + body[at + 1 :]
        else:
            proofs = [one for one in headers if one not in ("content-type",)]
            if not proofs:
                query = query[: chance.randrange(len(query))]
            else:
                proof = chance.choice(proofs)
                value = headers[proof]
                at = chance.randrange(len(value))
                headers[proof] = value[:at] + chance.choice("0aZ-\xfc") + value[at + 1 :]
                if headers[proof] == value:
                    continue
        forged = genuine._replace(body=body, headers=headers, query=query)
        try:
            received = vendor.receive(forged, credentials, utcnow())
        except (InvalidMessage, Unreadable, Unauthenticated):
            continue
        # Some encodings write the same proof or the same XML in more than one way.
        assert received == vendor.receive(genuine, credentials, utcnow())
