"""The WhatsApp adapter against its fake. The signature's example is Meta's."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import msgspec
import pytest

from infra.clock import utcnow
from infra.errors import EffectFailed, RetryLater, TooLarge, Transient, Unanswered, Unauthenticated
from infra.outgoing.client import Outgoing
from services.channel.events import Attachment
from services.channel.vendors.base import MAX_PARTS, AccountRefused, Request, placeholder
from services.channel.vendors.items import Ignored, Inbound, Reacted, Receipt
from services.channel.vendors.whatsapp import WhatsApp, WhatsAppCredentials
from tests.services.channel.vendors.conftest import Adapter, assert_every_change_is_refused
from tooling.testing.vendors import Fault, WhatsAppStandIn, answer, cut


@pytest.fixture
async def fake() -> AsyncIterator[WhatsAppStandIn]:
    async with WhatsAppStandIn() as running:
        yield running


@pytest.fixture
def whatsapp(fake: WhatsAppStandIn, outgoing: Outgoing) -> Adapter:
    return Adapter("whatsapp", fake, outgoing)


def test_the_example_verifies() -> None:
    credentials = WhatsAppCredentials("1", "t", "app_secret", "v")
    signature = "sha256=c236c758c9b2bd40b388a550eeca09eaca72384dd0aa5e7c31d19cddac5bba46"
    body = b'{"object":"whatsapp_business_account","entry":[]}'
    request = Request("POST", "", {"x-hub-signature-256": signature}, body)
    [item] = WhatsApp().receive(request, credentials, utcnow()).items
    assert isinstance(item, Ignored)


async def test_every_message_of_every_change_is_read(fake: WhatsAppStandIn, whatsapp: Adapter) -> None:
    body, _ = fake.call(fake.message("one"), fake.message("größer 😀", person="492"))
    payload = msgspec.json.decode(body)
    payload["entry"][0]["changes"] *= 2
    payload["entry"] *= 2
    items = whatsapp.receive(fake.signed(msgspec.json.encode(payload))).items
    assert len(items) == 8
    assert items[:2] == [
        Inbound(("message/wamid.1",), "491", "491", "wamid.1", "one"),
        Inbound(("message/wamid.2",), "492", "492", "wamid.2", "größer 😀"),
    ]


async def test_a_changed_call_is_refused(fake: WhatsAppStandIn, whatsapp: Adapter) -> None:
    assert_every_change_is_refused(fake.call(fake.message()), ("x-hub-signature-256",), whatsapp.receive)


async def test_the_handshake_is_answered_only_with_the_verify_token(fake: WhatsAppStandIn, whatsapp: Adapter) -> None:
    query = f"hub.mode=subscribe&hub.verify_token={fake.verify_token}&hub.challenge=123"
    received = whatsapp.receive((b"", {}), method="GET", query=query)
    assert (received.items, received.ack.body, received.ack.status) == ([], b"123", 200)
    for wrong in (query.replace(fake.verify_token, "x"), "", "hub.mode=subscribe", query.replace("subscribe", "x")):
        with pytest.raises(Unauthenticated):
            whatsapp.receive((b"", {}), method="GET", query=wrong)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"type": "image", "image": {"id": "1", "caption": "what is this?"}}, "what is this?"),
        ({"type": "button", "button": {"text": "Yes", "payload": "y"}}, "Yes"),
        ({"type": "interactive", "interactive": {"button_reply": {"id": "1", "title": "No"}}}, "No"),
        ({"type": "interactive", "interactive": {"list_reply": {"id": "1", "title": "B"}}}, "B"),
        ({"type": "location", "location": {"latitude": 1, "longitude": 2}}, "[Location: 1.0, 2.0]"),
        *(
            ({"button": {"text": "Yes"}, "context": {name: True}}, "[Forwarded message]\nYes")
            for name in ("forwarded", "frequently_forwarded")
        ),
    ],
)
async def test_a_text_outside_of_the_field_text_is_found(
    fake: WhatsAppStandIn, whatsapp: Adapter, fields: dict[str, Any], text: str
) -> None:
    item = whatsapp.one(fake.call(fake.message(None, **fields)))
    assert isinstance(item, Inbound)
    assert item.text == text


@pytest.mark.parametrize(
    "given",
    [
        {"type": "interactive", "context": {"from": "972123456789", "id": "wamid.1"}},
        {"type": "interactive", "interactive": {"type": "poll_reply", "poll_reply": {}}},
        {"type": "video", "errors": [{"code": 131052, "title": "Media download error"}]},
        {"type": "document", "document": {"filename": "a.pdf"}, "errors": [{"code": 131052}]},
        {"type": "text", "errors": [{"code": 131000}]},
    ],
)
async def test_a_message_that_whatsapp_could_not_read_is_told(
    fake: WhatsAppStandIn, whatsapp: Adapter, given: dict[str, Any]
) -> None:
    item = whatsapp.one(fake.call({"from": "491", "id": "wamid.9", "timestamp": "1700000000", **given}))
    assert isinstance(item, Inbound)
    assert (item.text, item.attachments) == (placeholder("a message that WhatsApp does not pass on"), ())


async def test_files_are_attachments(fake: WhatsAppStandIn, whatsapp: Adapter) -> None:
    given: list[tuple[dict[str, Any], Attachment]] = [
        ({"type": "image", "image": {"id": "1", "caption": "what is this?"}}, Attachment("image", "1")),
        ({"type": "document", "document": {"id": "2", "filename": "a.pdf"}}, Attachment("file", "2", "a.pdf")),
        ({"type": "audio", "audio": {"id": "3", "voice": True}}, Attachment("voice", "3")),
    ]
    for fields, expected in given:
        item = whatsapp.one(fake.call(fake.message(None, **fields)))
        assert isinstance(item, Inbound)
        assert item.attachments == (expected,)


async def test_a_reaction_names_its_message(fake: WhatsAppStandIn, whatsapp: Adapter) -> None:
    for given, signs in (({"emoji": "👍"}, ("👍",)), ({"emoji": ""}, ()), ({}, ())):
        reaction = fake.message(None, type="reaction", reaction={"message_id": "wamid.0", **given})
        item = whatsapp.one(fake.call(reaction))
        assert isinstance(item, Reacted)
        assert item[1:] == ("message/wamid.0", "wamid.0", "491", signs, "all", 1_700_000_000, "")
    assert isinstance(whatsapp.one(fake.call(reaction | {"timestamp": "soon"})), Ignored)


async def test_an_odd_part_does_not_take_the_others_of_its_batch_away(fake: WhatsAppStandIn, whatsapp: Adapter) -> None:
    good = msgspec.json.decode(fake.call(fake.message("hi"))[0])
    [entry] = good["entry"]
    [change] = entry["changes"]
    refused = {"id": "wamid.9", "status": "failed", "errors": [{"code": "many"}]}
    for odd in (
        {"changes": 7},
        {"changes": [{"value": {}}, change]},
        {"changes": [{"field": "messages", "value": {"messages": 7}}, change]},
        {"changes": [{"field": "messages", "value": change["value"] | {"statuses": [{"status": "sent"}, refused]}}]},
        {"changes": [{"field": "messages", "value": change["value"] | {"messages": [fake.message(person="")]}}]},
    ):
        call = fake.signed(msgspec.json.encode(good | {"entry": [odd, entry]}))
        items = whatsapp.receive(call).items
        assert items[-1] == Inbound(("message/wamid.1",), "491", "491", "wamid.1", "hi")
        assert isinstance(items[0], Ignored)
        assert items[0].reason.startswith("unexpected shape")


async def test_the_parts_of_a_batch_are_counted_with_those_that_hold_them(
    fake: WhatsAppStandIn, whatsapp: Adapter
) -> None:
    good = msgspec.json.decode(fake.call(fake.message("hi"))[0])

    def items(entries: int, changes: int = 1, messages: int = 1) -> int:
        entry = copy.deepcopy(good["entry"][0])
        entry["changes"] *= changes
        entry["changes"][0]["value"]["messages"] *= messages
        return len(whatsapp.receive(fake.signed(msgspec.json.encode(good | {"entry": [entry] * entries}))).items)

    assert items(1_000) == 1_000
    for entries, changes, messages in ((5_000, 1, 1), (3, 1_000, 1), (3, 1, 1_500), (70, 1, 70)):
        with pytest.raises(TooLarge, match=f"at most {MAX_PARTS}"):
            items(entries, changes, messages)


async def test_sent_statuses_and_other_numbers_are_ignored(fake: WhatsAppStandIn, whatsapp: Adapter) -> None:
    unknown = fake.message(None, type="request_welcome")
    status = {"id": "wamid.9", "status": "sent", "timestamp": "1", "recipient_id": "491"}
    for call in (
        fake.call(unknown),
        fake.call(statuses=[status]),
        fake.call(fake.message(), metadata={"phone_number_id": "other"}),
        fake.signed(b'{"entry":[{"changes":[{"field":"account_update","value":{"event":"x"}}]}]}'),
        fake.signed(b'{"object":"x"}'),
    ):
        assert isinstance(whatsapp.one(call), Ignored)


async def test_receipts_tell_what_became_of_a_message(fake: WhatsAppStandIn, whatsapp: Adapter) -> None:
    failed = {"id": "wamid.9", "status": "failed", "errors": [{"code": 131026, "title": "Undeliverable", "href": "x"}]}
    unpaid = failed | {"errors": [{"code": 131042, "title": "Payment issue"}]}
    received = whatsapp.receive(fake.call(statuses=[{"id": "wamid.9", "status": "read"}, failed, unpaid]))
    assert received.items == [
        Receipt(("status/wamid.9/read",), "wamid.9", "read"),
        Receipt(("status/wamid.9/failed",), "wamid.9", "failed", "131026: Undeliverable"),
        Receipt(("status/wamid.9/failed",), "wamid.9", "failed", "account refused: 131042: Payment issue"),
    ]


async def test_a_reply_quotes_its_message_in_whatsapps_markup(fake: WhatsAppStandIn, whatsapp: Adapter) -> None:
    sent = await whatsapp.send("# Plan\n\n**Done**: [page](https://e.example) ~~no~~", "491", reply_to="wamid.1")
    [message] = fake.ledger
    assert (sent, message.to, message.text) == (
        message.id,
        "491",
        "*Plan*\n\n*Done*: page (https://e.example) ~no~",
    )
    assert message.fields["context"] == {"message_id": "wamid.1"}


async def test_outside_of_24_hours_a_reply_fails(fake: WhatsAppStandIn, whatsapp: Adapter) -> None:
    fake.closed.add("491")
    with pytest.raises(EffectFailed, match="131047: Re-engagement message"):
        await whatsapp.send(to="491")


async def test_outside_of_24_hours_a_template_carries_the_text(fake: WhatsAppStandIn, whatsapp: Adapter) -> None:
    whatsapp.credentials = msgspec.structs.replace(whatsapp.credentials, template="news", template_language="de")
    await whatsapp.send("in time", "492")
    fake.closed.add("491")
    await whatsapp.send("**Your order**\n\nis on its way", "491", reply_to="wamid.1")
    assert [(sent.text, sent.fields["type"]) for sent in fake.ledger] == [
        ("in time", "text"),
        ("Your order is on its way", "template"),
    ]
    with pytest.raises(EffectFailed, match="1024 characters at most"):
        await whatsapp.send("x" * 1_025, "491")
    # A template that is not approved.
    whatsapp.credentials = msgspec.structs.replace(whatsapp.credentials, template="other")
    with pytest.raises(EffectFailed, match="100: "):
        await whatsapp.send("late", "491")
    assert len(fake.ledger) == 2


async def test_a_late_text_goes_by_template_at_once(fake: WhatsAppStandIn, whatsapp: Adapter) -> None:
    fake.closed.add("491")
    fake.refuses_later = True
    await whatsapp.send("without a template", "491", is_late=True)
    assert fake.ledger == []
    whatsapp.credentials = msgspec.structs.replace(whatsapp.credentials, template="news")
    await whatsapp.send("**Your order**", "491", is_late=True)
    [sent] = fake.ledger
    assert (sent.text, sent.fields["type"]) == ("Your order", "template")
    with pytest.raises(EffectFailed, match="1024 characters at most"):
        await whatsapp.send("x" * 1_025, "491", is_late=True)


def refused(status: int, code: int) -> Fault:
    return answer(status, {"error": {"message": "m", "code": code}})


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (refused(400, 131026), EffectFailed),
        (refused(401, 190), AccountRefused),
        (refused(403, 200), AccountRefused),
        (refused(400, 131031), AccountRefused),
        (refused(400, 130429), RetryLater),
        (refused(429, 80007), RetryLater),
        (refused(400, 131000), Transient),
        (refused(500, 2), Transient),
        (answer(200, "?"), Unanswered),
        (cut(accept=True), Unanswered),
    ],
)
async def test_permanent_transient_and_unknown_errors_are_distinguished(
    fake: WhatsAppStandIn, whatsapp: Adapter, fault: Fault, error: type[Exception]
) -> None:
    fake.faults.append(fault)
    with pytest.raises(error) as raised:
        await whatsapp.send(to="491")
    assert type(raised.value) is error


async def test_the_limit_of_a_pair_is_waited_for(fake: WhatsAppStandIn, whatsapp: Adapter) -> None:
    fake.faults.append(refused(400, 131056))
    with pytest.raises(RetryLater) as raised:
        await whatsapp.send(to="491")
    assert raised.value.after == timedelta(seconds=6)


def test_a_long_text_is_split_by_characters(whatsapp: Adapter) -> None:
    assert [len(part) for part in whatsapp.vendor.split("x" * 9_000)] == [4_096, 4_096, 808]


async def test_people_without_a_number_and_groups_get_their_answers(fake: WhatsAppStandIn, whatsapp: Adapter) -> None:
    named = fake.message("hi", person="") | {"from_user_id": "US.1349"}
    del named["from"]
    other = fake.message("in a group", group_id="Z3JvdXA")
    broken = {"id": "wamid.9", "type": 7}
    person, unknown, group = whatsapp.receive(fake.call(named, broken, other)).items
    assert isinstance(unknown, Ignored)
    for item, conversation, author in ((person, "US.1349", "US.1349"), (group, "Z3JvdXA", "491")):
        assert isinstance(item, Inbound)
        assert (item.conversation, item.person, item.in_group) == (conversation, author, item is group)
        await whatsapp.send("hello", conversation)
    assert [sent.to for sent in fake.ledger] == ["US.1349", "Z3JvdXA"]
    assert [sent.fields["recipient_type"] for sent in fake.ledger] == ["individual", "group"]
