"""The QQ adapter against its fake."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from infra.clock import uuid7
from infra.errors import EffectFailed, InvalidMessage, RetryLater, Transient, Unanswered, Unauthenticated
from infra.outgoing.client import Outgoing
from services.channel.accounts.routing import is_for_the_bot
from services.channel.vendors.base import AccountRefused, Outbound, UnreadableCall
from services.channel.vendors.items import Ignored, Inbound
from tests.services.channel.vendors.conftest import Adapter, assert_every_change_is_refused
from tooling.testing.vendors import Fault, QQStandIn, answer, cut


@pytest.fixture
async def fake() -> AsyncIterator[QQStandIn]:
    async with QQStandIn() as running:
        yield running


@pytest.fixture
def qq(fake: QQStandIn, outgoing: Outgoing) -> Adapter:
    return Adapter("qq", fake, outgoing)


async def test_messages_of_people_and_groups_are_read(fake: QQStandIn, qq: Adapter) -> None:
    received = qq.receive(fake.signed(fake.event(" größer 😀 ")))
    ids: tuple[str, ...] = ("C2C_MESSAGE_CREATE/msg1", "message/msg1")
    assert received.items == [Inbound(ids, "users/u1", "u1", "msg1", "größer 😀")]
    assert msgspec.json.decode(received.ack.body) == {"op": 12}
    group = qq.one(fake.signed(fake.event("hi", group="g1")))
    ids = ("GROUP_AT_MESSAGE_CREATE/msg2", "message/msg2")
    assert group == Inbound(ids, "groups/g1", "m1", "msg2", "hi", in_group=True, mentions_bot=True)
    picture = qq.one(fake.signed(fake.event("", attachments=[{"filename": "a.png"}])))
    assert isinstance(picture, Inbound)
    assert "a.png" in picture.text


async def test_a_message_of_a_group_is_for_the_bot_if_it_mentions_it(fake: QQStandIn, qq: Adapter) -> None:
    """The owner of a group may let a bot have all messages. Only the mention of the bot is left out of the text."""
    you, other = {"is_you": True, "member_openid": "B1"}, {"is_you": False, "member_openid": "M2"}
    given = [
        ("GROUP_MESSAGE_CREATE", "<@B1> hi", [you, other], "hi", True),
        ("GROUP_MESSAGE_CREATE", "<@M2> hi", [other], "<@M2> hi", False),
        ("GROUP_MESSAGE_CREATE", "hi", None, "hi", False),
        ("GROUP_AT_MESSAGE_CREATE", "<@B1> hi", None, "hi", True),
        ("AT_MESSAGE_CREATE", "<@!7> hi", None, "hi", True),
    ]
    for kind, content, mentions, text, told in given:
        event = fake.event(content, group="g1", mentions=mentions, channel_id="c1") | {"t": kind}
        item = qq.one(fake.signed(event))
        assert isinstance(item, Inbound)
        assert (item.text, item.in_group, item.mentions_bot) == (text, True, told)
        assert is_for_the_bot("all", item)
        assert is_for_the_bot("mentions", item) == told
    assert qq.vendor.groups == ("all", "mentions")


async def test_a_changed_call_is_refused(fake: QQStandIn, qq: Adapter) -> None:
    body, headers = fake.signed(fake.event())
    assert_every_change_is_refused((body, headers), ("x-signature-timestamp",), qq.receive)
    for wrong in ("", "00" * 64, headers["x-signature-ed25519"][:-2], "zz" * 64, "\xfc" * 128):
        with pytest.raises(Unauthenticated):
            qq.receive((body, headers | {"x-signature-ed25519": wrong}))
    for age in (301, -301):
        with pytest.raises(Unauthenticated):
            qq.receive(fake.signed(fake.event(), age=age))


async def test_the_validation_is_signed_with_the_key_of_the_secret(fake: QQStandIn, qq: Adapter) -> None:
    payload = {"op": 13, "d": {"plain_token": "Arq0D5A61EgUu4OxUvOp", "event_ts": "1725442341"}}
    received = qq.receive(fake.signed(payload))
    signed = msgspec.json.decode(received.ack.body)
    assert (received.items, signed["plain_token"]) == ([], "Arq0D5A61EgUu4OxUvOp")
    fake.key.public_key().verify(bytes.fromhex(signed["signature"]), b"1725442341Arq0D5A61EgUu4OxUvOp")


async def test_other_events_are_ignored_and_other_shapes_are_told_apart(fake: QQStandIn, qq: Adapter) -> None:
    for payload in ({"op": 0, "t": "FRIEND_ADD", "id": "e", "d": {}}, {"op": 1, "d": 7}, fake.event(author={})):
        assert isinstance(qq.one(fake.signed(payload)), Ignored)
    with pytest.raises(UnreadableCall):
        qq.receive(fake.signed({"op": 0, "t": "C2C_MESSAGE_CREATE", "d": 7}))
    with pytest.raises(InvalidMessage):
        qq.receive(fake.signed(b"{"))


async def test_parts_are_numbered_and_a_repeat_is_accepted_once(fake: QQStandIn, qq: Adapter) -> None:
    delivery = uuid7()
    for _ in range(2):
        for part in (1, 2):
            await qq.send(f"**part {part}**", "users/u1", f"{delivery}-{part}", answers="msg1", part=part)
    assert [(message.to, message.text) for message in fake.ledger] == [("users/u1", "part 1"), ("users/u1", "part 2")]
    first, second = (message.fields["msg_seq"] for message in fake.ledger)
    assert second == first + 1
    assert (fake.repeats, fake.refusals, len(fake.tokens)) == (2, [], 1)


async def test_a_second_delivery_to_the_same_message_is_no_repeat(fake: QQStandIn, qq: Adapter) -> None:
    """A run asks whether it may call a tool, and answers later: both to the person's message."""
    for text in ("May I?", "Done"):
        await qq.send(text, "users/u1", str(uuid7()), answers="msg1")
    assert (fake.texts(), fake.repeats) == (["May I?", "Done"], 0)


@pytest.mark.parametrize("code", [40034028, 40054010, 304003])
async def test_a_text_with_an_address_is_sent_again_without_its_dots(fake: QQStandIn, qq: Adapter, code: int) -> None:
    text = "See [it](https://e.example/a.html), README.md, http://10.0.0.1 and 3.14. End."
    await qq.send("first", "users/u1", answers="m0")
    fake.faults.append(answer(400, {"code": code, "message": "url not allowed"}))
    await qq.send(text, "users/u1", answers="m1")
    assert fake.texts()[1:] == ["See it (https://e．example/a．html), README．md, http://10．0．0.1 and 3.14. End."]
    # Another refusal is final.
    fake.faults += [answer(400, {"code": code, "message": "url not allowed"})] * 2
    with pytest.raises(EffectFailed, match=f"{code}: url not allowed"):
        await qq.send(text, "users/u1", answers="m2")
    assert len(fake.ledger) == 2


async def test_an_answer_with_an_address_keeps_its_number(fake: QQStandIn, qq: Adapter) -> None:
    for _ in range(2):
        await qq.send("at e.example", "users/u1", answers="m1")
    assert (fake.texts(), fake.repeats) == (["at e．example"], 1)


VOICE = {"content_type": "voice", "url": "https://m.qq.com.cn/silk", "voice_wav_url": "https://m.qq.com.cn/wav"}
QUOTED = {"content": "old", "attachments": [{"content_type": "image/png", "url": "https://m.qq.com.cn/p"}]}


@pytest.mark.parametrize(
    ("fields", "text", "files"),
    [
        ({"attachments": [VOICE]}, "hi", [("voice", "https://m.qq.com.cn/wav")]),
        ({"attachments": [VOICE | {"asr_refer_text": "spoken"}]}, "hi\nspoken", []),
        ({"attachments": [{"url": None, "content_type": None}]}, "hi", []),
        (
            {"message_type": 103, "msg_elements": [QUOTED]},
            "hi\n\n[In reply to this message]\nold",
            [("image", "https://m.qq.com.cn/p")],
        ),
        (
            {"content": "", "message_type": 102, "msg_elements": [{"content": "one"}, {"attachments": None}]},
            "[Forwarded message]\none",
            [],
        ),
        ({"content": "", "message_type": 3, "ark_data": {"prompt": "Main Street"}}, "[Card: Main Street]", []),
        ({"content": "", "message_type": 3}, "[Card]", []),
    ],
)
async def test_voices_quotations_and_cards_are_read(
    fake: QQStandIn, qq: Adapter, fields: dict[str, Any], text: str, files: list[tuple[str, str]]
) -> None:
    item = qq.one(fake.signed(fake.event("hi", **fields)))
    assert isinstance(item, Inbound)
    assert (item.text, [(one.kind, one.ref) for one in item.attachments]) == (text, files)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ('<faceType=1,faceId="5",ext="eyJ0ZXh0IjoiL3NtaWxlIn0=">', "[Emoji: /smile]"),
        ('hm <faceType=1,faceId="5">', "hm [Emoji]"),
        ('look <faceType=6,faceId="0",ext="eyJ0ZXh0IjoiIn0=">', "look"),
        ('<attachmentType="image/gif",attachmentIndex=0,description="eyJ0ZXh0IjoieCJ9">look', "look"),
    ],
)
async def test_signs_in_place_of_faces_and_files_are_never_shown(
    fake: QQStandIn, qq: Adapter, content: str, text: str
) -> None:
    item = qq.one(fake.signed(fake.event(content)))
    assert isinstance(item, Inbound)
    assert item.text == text


async def test_people_are_told_by_their_names_and_only_the_bots_mention_is_left_out(
    fake: QQStandIn, qq: Adapter
) -> None:
    mentions = [{"id": "B1", "is_you": True, "username": "Claw"}, {"member_openid": "M2", "username": "Ann"}]
    item = qq.one(fake.signed(fake.event("<@M2> <@!B1> ask <@X3>", group="g1", mentions=mentions)))
    assert isinstance(item, Inbound)
    assert item.text == "@Ann ask <@X3>"
    # Without an id of the bot among the mentions, it is the one that begins the text.
    for mention in ({"id": "7", "username": "Claw"}, {"is_you": True}):
        event = fake.event("<@!7> ask <@!8>", channel_id="c1", mentions=[mention])
        item = qq.one(fake.signed(event | {"t": "AT_MESSAGE_CREATE"}))
        assert isinstance(item, Inbound)
        assert item.text == "ask <@!8>"


async def test_the_messages_before_a_mention_are_no_quotation(fake: QQStandIn, qq: Adapter) -> None:
    item = qq.one(fake.signed(fake.event("why?", group="g1", msg_elements=[{"content": "it rains"}])))
    assert isinstance(item, Inbound)
    assert (item.text, item.words) == ("why?\n\n[Messages before it in the group]\nit rains", "why?")


async def test_a_mention_that_comes_as_two_events_has_a_common_id(fake: QQStandIn, qq: Adapter) -> None:
    """The first may not tell it; a channel that answers mentions only ignores that event by its own id."""
    told = fake.event("why?", group="g1")
    untold = told | {"t": "GROUP_MESSAGE_CREATE", "id": "e9"}
    first, second = (qq.one(fake.signed(payload)) for payload in (untold, told))
    assert isinstance(first, Inbound)
    assert isinstance(second, Inbound)
    assert (first.mentions_bot, second.mentions_bot) == (False, True)
    assert first.ids[0] != second.ids[0]
    assert first.ids[1] == second.ids[1]


@pytest.mark.parametrize(
    ("author", "words"), [({}, "yes"), ({"author": {"id": "b", "bot": True}}, "yes"), ({"author": {"id": "u"}}, "")]
)
async def test_beside_a_quotation_of_the_bot_the_persons_own_words_are_told_apart(
    fake: QQStandIn, qq: Adapter, author: dict[str, Any], words: str
) -> None:
    item = qq.one(fake.signed(fake.event(" yes", message_type=103, msg_elements=[{"content": "May I?"} | author])))
    assert isinstance(item, Inbound)
    assert (item.text, item.words) == ("yes\n\n[In reply to this message]\nMay I?", words)


@pytest.mark.parametrize(
    ("to", "answers", "kind"),
    [
        ("users/u1", "m1", "keyed"),
        ("groups/g1", "m1", "keyed"),
        ("channels/c1", "m1", "once"),
        ("users/u1", None, "once"),
    ],
)
def test_only_a_numbered_answer_may_be_repeated(qq: Adapter, to: str, answers: str | None, kind: str) -> None:
    assert qq.vendor.effect_of(Outbound("d1", to, "hi", answers=answers)) == kind


async def test_a_button_without_data_is_told_by_its_id(fake: QQStandIn, qq: Adapter) -> None:
    press = {"id": "i1", "user_openid": "u1", "data": {"resolved": {"button_data": None, "button_id": "b"}}}
    item = qq.one(fake.signed({"id": "e1", "op": 0, "t": "INTERACTION_CREATE", "d": press}))
    assert isinstance(item, Inbound)
    assert item.text == "b"


async def test_a_token_that_ran_out_is_fetched_again_once(fake: QQStandIn, qq: Adapter) -> None:
    await qq.send("one", "groups/g1", answers="m1")
    fake.tokens.clear()
    await qq.send("two", "groups/g1", answers="m2")
    assert (fake.texts(), len(fake.tokens)) == (["one", "two"], 1)
    fake.secret = "rotated"
    fake.tokens.clear()
    with pytest.raises(AccountRefused):
        await qq.send("three", "groups/g1", answers="m3")


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (answer(400, {"code": 304027, "message": "known"}), None),
        (answer(202, {"code": 304023, "message": "push message is waiting for audit"}), None),
        (answer(400, {"code": 304031, "message": "too old"}), EffectFailed),
        (answer(400, {"code": 22009, "message": "too many"}), RetryLater),
        (answer(429), RetryLater),
        (answer(500), Transient),
        (answer(200, "?"), Unanswered),
        (cut(accept=True), Unanswered),
    ],
)
async def test_permanent_transient_and_unknown_errors_are_distinguished(
    fake: QQStandIn, qq: Adapter, fault: Fault, error: type[Exception] | None
) -> None:
    await qq.send("first", "users/u1", answers="m0")
    fake.faults.append(fault)
    if error is None:
        assert await qq.send("hello", "users/u1", answers="m1") is None
        return
    with pytest.raises(error) as raised:
        await qq.send("hello", "users/u1", answers="m1")
    assert type(raised.value) is error


def test_a_long_text_fills_at_most_five_parts(qq: Adapter) -> None:
    assert [len(part) for part in qq.vendor.split("x" * 4_000)] == [1_500, 1_500, 1_000]
    parts = qq.vendor.split("x" * 30_000)
    assert len(parts) <= 5
    assert "".join(parts) == "x" * 30_000
