"""Independent judges: an adapter accepts the signatures of the vendors' SDKs and of other libraries, and these accept
the signatures of our stand-ins. So an error that an adapter and its stand-in have in common is found.

Slack's and Standard Webhooks' judges stand in test_slack.py and test_webhook.py.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qsl, urlencode

import msgspec
import pytest
import telegram
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey
from twilio.request_validator import RequestValidator
from wechatpy.enterprise.crypto import WeChatCrypto
from wechatpy.enterprise.exceptions import InvalidCorpIdException
from wechatpy.exceptions import InvalidSignatureException

from infra.errors import Unauthenticated
from infra.outgoing.client import Outgoing
from services.channel.vendors.items import Inbound
from services.channel.vendors.telegram import MAX_TEXT
from tests.services.channel.vendors.conftest import Adapter, Call, assert_every_change_is_refused
from tooling.testing.vendors import DiscordStandIn, QQStandIn, TelegramStandIn, TwilioStandIn, WeComStandIn

URL = "https://bus.example/webhooks/twilio/token?a=1"


async def test_twilios_validator(outgoing: Outgoing) -> None:
    fake = TwilioStandIn()
    adapter, judge = Adapter("twilio", fake, outgoing), RequestValidator(fake.token)
    given = {"A": "", "MessageSid": "SM1", "AccountSid": fake.sid, "From": "+49 1", "To": "+1", "Body": "größer & 😀"}
    signed = {"x-twilio-signature": judge.compute_signature(URL, given)}

    def receive(call: Call) -> object:
        return adapter.receive(call, url=URL)

    assert_every_change_is_refused((urlencode(given).encode(), signed), ("x-twilio-signature",), receive)
    body, headers = fake.message(URL, "hi & bye")
    fields = dict(parse_qsl(body.decode(), keep_blank_values=True))
    assert judge.validate(URL, fields, headers["x-twilio-signature"])
    assert not judge.validate(URL, fields | {"Body": "other"}, headers["x-twilio-signature"])


async def test_libsodium_for_discord_and_qq(outgoing: Outgoing) -> None:
    discord, qq = DiscordStandIn(), QQStandIn()
    seed = (qq.secret * 32)[:32].encode()
    keys = {"discord": SigningKey.generate(), "qq": SigningKey(seed)}
    content: dict[str, Any] = {"discord": {"type": 1}, "qq": qq.event()}
    for name, fake in (("discord", discord), ("qq", qq)):
        adapter, key = Adapter(name, fake, outgoing), keys[name]
        body = msgspec.json.encode(content[name])
        theirs = VerifyKey(key.verify_key.encode())
        if name == "discord":
            theirs = VerifyKey(bytes.fromhex(discord.credentials["public_key"]))
            changed = {"public_key": key.verify_key.encode().hex()}
            adapter.credentials = msgspec.structs.replace(adapter.credentials, **changed)
        timestamp = str(int(time.time()))
        signature = key.sign(timestamp.encode() + body).signature
        headers = {"x-signature-timestamp": timestamp, "x-signature-ed25519": signature.hex()}
        assert_every_change_is_refused((body, headers), ("x-signature-timestamp",), adapter.receive)
        for at in range(64):
            wrong = (signature[:at] + bytes([signature[at] ^ 1]) + signature[at + 1 :]).hex()
            with pytest.raises(Unauthenticated):
                adapter.receive((body, headers | {"x-signature-ed25519": wrong}))
        body, headers = fake.signed(content[name])
        proof = bytes.fromhex(headers["x-signature-ed25519"])
        theirs.verify(headers["x-signature-timestamp"].encode() + body, proof)
        with pytest.raises(BadSignatureError):
            theirs.verify(headers["x-signature-timestamp"].encode() + body + b" ", proof)
    # QQ's handshake: the answer is signed with the same key.
    asked = {"op": 13, "d": {"plain_token": "Arq0D5A61EgUu4OxUvOp", "event_ts": "1725442341"}}
    answer = msgspec.json.decode(Adapter("qq", qq, outgoing).receive(qq.signed(asked)).ack.body)
    keys["qq"].verify_key.verify(b"1725442341Arq0D5A61EgUu4OxUvOp", bytes.fromhex(answer["signature"]))


async def test_wechatpys_crypto_for_wecom(outgoing: Outgoing) -> None:
    fake = WeComStandIn()
    adapter, judge = Adapter("wecom", fake, outgoing), WeChatCrypto(fake.token, fake.aes_key, fake.corp_id)
    now = str(int(time.time()))
    for text in ("hi", "größer 😀" * 50, ""):
        body = judge.encrypt_message(fake.message(text or " ", MsgType="text").decode(), "n1", now).encode()
        signature = body.partition(b"<MsgSignature><![CDATA[")[2].partition(b"]")[0].decode()
        query = urlencode({"msg_signature": signature, "timestamp": now, "nonce": "n1"})
        item = adapter.one((body, {}), query=query)
        assert isinstance(item, Inbound)
        assert item.text == (text or " ")
    encrypted = body.partition(b"<Encrypt><![CDATA[")[2].partition(b"]")[0]
    start = body.index(encrypted)
    for at in range(start, start + len(encrypted)):
        wrong = body[:at] + (b"A" if body[at : at + 1] != b"A" else b"B") + body[at + 1 :]
        with pytest.raises(Unauthenticated):
            adapter.receive((wrong, {}), query=query)
    for changed in ({"msg_signature": "0" * 40}, {"timestamp": str(int(now) - 1)}, {"nonce": "n2"}):
        given = {"msg_signature": signature, "timestamp": now, "nonce": "n1"} | changed
        with pytest.raises(Unauthenticated):
            adapter.receive((body, {}), query=urlencode(given))
    # The other way round.
    content = fake.message("hi")
    body, query = fake.call(content)
    proof = dict(parse_qsl(query))
    about = proof["msg_signature"], proof["timestamp"], proof["nonce"]
    assert judge.decrypt_message(body.decode(), *about).encode() == content
    with pytest.raises(InvalidSignatureException):
        judge.decrypt_message(body.decode(), "0" * 40, *about[1:])
    body, query = fake.call(content, receiver="another")
    proof = dict(parse_qsl(query))
    with pytest.raises(InvalidCorpIdException):
        judge.decrypt_message(body.decode(), proof["msg_signature"], proof["timestamp"], proof["nonce"])
    # The handshake: the echo is decrypted, and the judge reads the same.
    echo = fake.encrypted(b"1616140317555161061")
    query = fake.query(echo, echostr=echo)
    proof = dict(parse_qsl(query))
    assert (
        adapter.receive((b"", {}), method="GET", query=query).ack.body
        == judge.check_signature(proof["msg_signature"], proof["timestamp"], proof["nonce"], echo).encode()
    )


async def test_python_telegram_bots_updates(outgoing: Outgoing) -> None:
    """Telegram signs nothing. The judge of its updates is the library that most bots are written with."""
    fake = TelegramStandIn()
    adapter = Adapter("telegram", fake, outgoing)
    at = datetime(2026, 1, 1, tzinfo=UTC)
    chat, person = telegram.Chat(-5, "supergroup"), telegram.User(42, "Ada", False)

    def call(**fields: Any) -> Call:
        update = telegram.Update(7, **fields)
        return update.to_json().encode(), {"x-telegram-bot-api-secret-token": fake.secret_token}

    message = telegram.Message(8, at, chat, from_user=person, text="hi", message_thread_id=3, is_topic_message=True)
    item = adapter.one(call(message=message))
    assert isinstance(item, Inbound)
    assert (item.conversation, item.person, item.message, item.text) == ("-5/3", "42", "8", "hi")
    press = telegram.CallbackQuery("q1", person, "c1", message=message, data="yes")
    pressed = adapter.one(call(callback_query=press))
    assert isinstance(pressed, Inbound)
    assert (pressed.conversation, pressed.text) == ("-5/3", "yes")
    # The stand-in's updates are whole ones.
    body, _ = fake.update("hi", chat=-5, topic=3)
    read = telegram.Update.de_json(msgspec.json.decode(body), None)
    assert read.message
    assert (read.message.text, read.message.chat.id, read.message.message_thread_id) == ("hi", -5, 3)
    assert int(telegram.constants.MessageLimit.MAX_TEXT_LENGTH) == MAX_TEXT
