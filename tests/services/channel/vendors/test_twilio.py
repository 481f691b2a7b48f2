"""The Twilio adapter against its fake. The signature's example is Twilio's."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator

import pytest

from infra.errors import EffectFailed, InvalidMessage, RetryLater, Transient, Unanswered, Unauthenticated
from infra.outgoing.client import Outgoing
from services.channel.vendors.base import AccountRefused
from services.channel.vendors.items import Ignored, Inbound, Receipt
from services.channel.vendors.twilio import TwilioCredentials, sign
from tests.services.channel.vendors.conftest import Adapter
from tooling.testing.vendors import Fault, TwilioStandIn, answer, cut

URL = "https://bus.example/webhooks/twilio/token"


@pytest.fixture
async def fake() -> AsyncIterator[TwilioStandIn]:
    async with TwilioStandIn() as running:
        yield running


@pytest.fixture
def twilio(fake: TwilioStandIn, outgoing: Outgoing) -> Adapter:
    return Adapter("twilio", fake, outgoing)


def test_the_vendors_own_example_verifies() -> None:
    # https://www.twilio.com/docs/usage/security#validating-signatures-from-twilio
    parameters = [
        ("CallSid", "CA1234567890ABCDE"),
        ("Caller", "+12349013030"),
        ("Digits", "1234"),
        ("From", "+12349013030"),
        ("To", "+18005551212"),
    ]
    url = "https://mycompany.com/myapp.php?foo=1&bar=2"
    assert sign(TwilioCredentials("AC1", "12345", "+1"), url, parameters) == "0/KCTR6DLpKmkAf8muzZqo1nDgQ="


async def test_a_message_is_read(fake: TwilioStandIn, twilio: Adapter) -> None:
    call = fake.message(URL, "größer 😀 & more", MessageSid="SM1")
    received = twilio.receive(call, url=URL)
    assert received.items == [
        Inbound(("message/SM1",), "+4915550002", "+4915550002", "SM1", "größer 😀 & more"),
    ]
    assert received.ack.body == b""


async def test_a_changed_call_or_url_is_refused(fake: TwilioStandIn, twilio: Adapter) -> None:
    call = fake.message(URL)
    body, headers = call
    for at in range(len(body)):
        changed = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        with pytest.raises(Unauthenticated):
            twilio.receive((changed, headers), url=URL)
    for given in ("", "x" * 28, f"\xfc{headers['x-twilio-signature']}"):
        with pytest.raises(Unauthenticated):
            twilio.receive((body, headers | {"x-twilio-signature": given}), url=URL)
    for url in ("", URL + "?a=1", URL.replace("https", "http")):
        with pytest.raises(Unauthenticated):
            twilio.receive(call, url=url)


async def test_a_body_that_is_signed_by_its_hash_is_verified_and_ignored(fake: TwilioStandIn, twilio: Adapter) -> None:
    body = b'{"event":"x"}'
    query = f"bodySHA256={'0' * 64}"
    with pytest.raises(Unauthenticated):
        twilio.receive((body, fake.signed(f"{URL}?{query}", {})[1]), query=query, url=f"{URL}?{query}")
    query = f"bodySHA256={hashlib.sha256(body).hexdigest()}"
    url = f"{URL}?{query}"
    assert isinstance(twilio.one((body, fake.signed(url, {})[1]), query=query, url=url), Ignored)


async def test_statuses_other_accounts_and_pictures(fake: TwilioStandIn, twilio: Adapter) -> None:
    for status in ("sent", "", "x" * 1_000):
        assert isinstance(twilio.one(fake.message(URL, None, MessageStatus=status), url=URL), Ignored)
    other = fake.message(URL, None, MessageStatus="delivered", AccountSid="AC0")
    assert isinstance(twilio.one(other, url=URL), Ignored)
    other = fake.message(URL, AccountSid="AC0")
    assert isinstance(twilio.one(other, url=URL), Ignored)
    picture = twilio.one(fake.message(URL, "", NumMedia="1", MediaContentType0="image/png"), url=URL)
    assert isinstance(picture, Inbound)
    assert "image/png" in picture.text
    with_address = {"MediaContentType0": "image/png", "MediaUrl0": "https://api.twilio.com/m"}
    picture = twilio.one(fake.message(URL, "", NumMedia="1", **with_address), url=URL)
    assert isinstance(picture, Inbound)
    assert [(one.kind, one.ref) for one in picture.attachments] == [("image", "https://api.twilio.com/m")]
    with pytest.raises(InvalidMessage):
        twilio.receive(fake.signed(URL, {"Body": "hi"}), url=URL)


async def test_a_yes_that_also_opts_in_is_a_message(fake: TwilioStandIn, twilio: Adapter) -> None:
    for kind, text, expected in (
        ("START", "YES", Inbound),
        ("START", " start\n", Ignored),
        ("START", "Unstop", Ignored),
        ("STOP", "YES", Ignored),
        ("HELP", "INFO", Ignored),
    ):
        item = twilio.one(fake.message(URL, text, OptOutType=kind), url=URL)
        assert type(item) is expected


async def test_receipts_tell_what_became_of_a_message(fake: TwilioStandIn, twilio: Adapter) -> None:
    sid = await twilio.send(to="+4915550002", webhook=URL)
    assert sid
    assert [
        twilio.one(fake.status(sid, state, **fields), url=URL)
        for state, fields in (("delivered", {}), ("read", {}), ("undelivered", {"ErrorCode": "30003"}))
    ] == [
        Receipt((f"status/{sid}/delivered",), sid, "delivered"),
        Receipt((f"status/{sid}/read",), sid, "read"),
        Receipt((f"status/{sid}/undelivered",), sid, "failed", "30003: undelivered"),
    ]
    with pytest.raises(Unauthenticated):
        twilio.one(fake.status(sid, "delivered"), url=f"{URL}/other")


async def test_a_reply_is_sent_as_plain_text(fake: TwilioStandIn, twilio: Adapter) -> None:
    sent = await twilio.send("**Done** & [page](https://e.example/?a=1&b=2)", "+4915550002")
    [message] = fake.ledger
    assert (sent, message.to, message.text) == (
        message.id,
        "+4915550002",
        "Done & page (https://e.example/?a=1&b=2)",
    )
    assert fake.refusals == []


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (answer(400, {"code": 21211, "message": "invalid To"}), EffectFailed),
        (answer(401, {"code": 20003, "message": "Authenticate"}), AccountRefused),
        (answer(400, {"code": 21606, "message": "not your number"}), AccountRefused),
        (answer(404), EffectFailed),
        (answer(429, {"code": 20429, "message": "Too many"}), RetryLater),
        (answer(503), Transient),
        (answer(201, "?"), Unanswered),
        (cut(accept=True), Unanswered),
    ],
)
async def test_permanent_transient_and_unknown_errors_are_distinguished(
    fake: TwilioStandIn, twilio: Adapter, fault: Fault, error: type[Exception]
) -> None:
    fake.faults.append(fault)
    with pytest.raises(error) as raised:
        await twilio.send(to="+4915550002")
    assert type(raised.value) is error


async def test_a_person_who_unsubscribed_is_a_failure_of_this_message(fake: TwilioStandIn, twilio: Adapter) -> None:
    fake.stopped.add("+4915550002")
    with pytest.raises(EffectFailed, match="21610"):
        await twilio.send(to="+4915550002")


def test_a_long_text_is_split_by_characters(twilio: Adapter) -> None:
    assert [len(part) for part in twilio.vendor.split("x" * 3_300)] == [1_600, 1_600, 100]
