"""The DingTalk adapter against its fake. The signature's example is made by DingTalk's rules."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from infra.errors import EffectFailed, InvalidMessage, RetryLater, Transient, Unanswered, Unauthenticated
from infra.outgoing.client import Outgoing
from services.channel.vendors.base import AccountRefused, UnreadableCall
from services.channel.vendors.dingtalk import DingTalkCredentials, sign
from services.channel.vendors.items import Ignored, Inbound
from tests.services.channel.vendors.conftest import Adapter
from tooling.testing.vendors import DingTalkStandIn, Fault, answer, cut


@pytest.fixture
async def fake() -> AsyncIterator[DingTalkStandIn]:
    async with DingTalkStandIn() as running:
        yield running


@pytest.fixture
def dingtalk(fake: DingTalkStandIn, outgoing: Outgoing) -> Adapter:
    return Adapter("dingtalk", fake, outgoing)


def test_the_example_is_signed() -> None:
    credentials = DingTalkCredentials("k", "this is secret", "r")
    assert sign(credentials, "1577262236757") == "hmPWwU+7lVdm3ZZz0r9tSfx0L4Q26jWOZr9+Gs6EZQM="


async def test_messages_of_people_and_groups_are_read(fake: DingTalkStandIn, dingtalk: Adapter) -> None:
    message = fake.message(" größer 😀")
    path = message["sessionWebhook"].removeprefix("https://oapi.dingtalk.com")
    assert dingtalk.one(fake.signed(message)) == Inbound(("message/msg1",), "user/s1", "s1", path, "größer 😀")
    group = dingtalk.one(fake.signed(fake.message(group="cid9")))
    assert isinstance(group, Inbound)
    assert (group.conversation, group.by_admin) == ("group/cid9", False)


@pytest.mark.parametrize(
    ("group", "is_admin", "expected"), [("cid9", True, True), ("cid9", False, False), (None, True, False)]
)
async def test_an_administrator_in_a_group_is_told(
    fake: DingTalkStandIn, dingtalk: Adapter, group: str | None, is_admin: bool, expected: bool
) -> None:
    for corp, of_ours in (("dingOURS", True), ("dingOTHER", False)):
        about = {"isAdmin": is_admin, "chatbotCorpId": "dingOURS", "senderCorpId": corp}
        item = dingtalk.one(fake.signed(fake.message(group=group) | about))
        assert isinstance(item, Inbound)
        assert item.by_admin is (expected and of_ours)
    item = dingtalk.one(fake.signed(fake.message(group=group, isAdmin=is_admin)))
    assert isinstance(item, Inbound)
    assert item.by_admin is expected


async def test_a_changed_or_old_signature_is_refused(fake: DingTalkStandIn, dingtalk: Adapter) -> None:
    body, headers = fake.signed(fake.message())
    for name in ("timestamp", "sign"):
        for wrong in ("", headers[name][:-1], headers[name] + "0", f"\xfc{headers[name]}", "9" * 20):
            with pytest.raises(Unauthenticated):
                dingtalk.receive((body, headers | {name: wrong}))
    for age in (3_601, -3_601):
        with pytest.raises(Unauthenticated):
            dingtalk.receive(fake.signed(fake.message(), age=age))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {
                "msgtype": "richText",
                "content": {"richText": [{"text": "rich "}, {"downloadCode": "x"}, {"text": "text"}]},
            },
            "rich text",
        ),
        ({"msgtype": "audio", "content": {"recognition": "spoken words", "downloadCode": "x"}}, "spoken words"),
        ({"msgtype": "file", "content": {"fileName": "a.pdf"}}, "a.pdf"),
    ],
)
async def test_a_text_outside_of_the_field_text_is_found(
    fake: DingTalkStandIn, dingtalk: Adapter, fields: dict[str, Any], text: str
) -> None:
    item = dingtalk.one(fake.signed(fake.message(None, **fields)))
    assert isinstance(item, Inbound)
    assert text in item.text


async def test_files_are_attachments(fake: DingTalkStandIn, dingtalk: Adapter) -> None:
    rich = {"richText": [{"text": "look: "}, {"downloadCode": "x"}, {"downloadCode": "y"}]}
    given: list[tuple[dict[str, Any], str, list[str]]] = [
        ({"msgtype": "picture", "content": {"downloadCode": "x"}}, "", ["x"]),
        ({"msgtype": "richText", "content": rich}, "look:", ["x", "y"]),
        ({"msgtype": "audio", "content": {"recognition": "spoken", "downloadCode": "x"}}, "spoken", []),
    ]
    for fields, text, refs in given:
        item = dingtalk.one(fake.signed(fake.message(None, **fields)))
        assert isinstance(item, Inbound)
        assert (item.text, [one.ref for one in item.attachments]) == (text, refs)


async def test_a_shared_document_comes_with_its_address(fake: DingTalkStandIn, dingtalk: Adapter) -> None:
    card = {"title": "Plan", "biz_custom_action_url": "https://alidocs.dingtalk.com/i/nodes/1"}
    shared = fake.message(None, msgtype="interactiveCard", content=card)
    text = {"content": "read it", "repliedMsg": {"msgType": "interactiveCard", "content": card}}
    replied = fake.message() | {"text": text}
    expected = (
        "[Link: Plan, https://alidocs.dingtalk.com/i/nodes/1]",
        "read it\n\n[In reply to this message]\nhttps://alidocs.dingtalk.com/i/nodes/1",
    )
    for message, words in zip((shared, replied), expected, strict=True):
        item = dingtalk.one(fake.signed(message))
        assert isinstance(item, Inbound)
        assert item.text == words


async def test_content_may_be_json_in_a_text(fake: DingTalkStandIn, dingtalk: Adapter) -> None:
    replied = {"msgType": "text", "content": '{"text":"May I?"}'}
    content = msgspec.json.encode({"richText": [{"text": "yes"}], "repliedMsg": replied}).decode()
    item = dingtalk.one(fake.signed(fake.message(None, msgtype="richText", content=content)))
    assert isinstance(item, Inbound)
    assert item.text == "yes\n\n[In reply to this message]\nMay I?"
    with pytest.raises(UnreadableCall, match="content"):
        dingtalk.receive(fake.signed(fake.message(None, msgtype="richText", content="{")))


@pytest.mark.parametrize(
    ("replied", "text", "refs"),
    [
        ({"msgType": "picture", "content": {"downloadCode": "p"}}, "what is it?", ["p"]),
        ({"msgType": "picture", "content": {"pictureDownloadCode": "p"}}, "what is it?", ["p"]),
        ({"msgType": "file", "content": {"downloadCode": "f", "fileName": "a.pdf"}}, "a.pdf", ["f"]),
        ({"msgType": "audio", "content": {"downloadCode": "v", "recognition": "spoken"}}, "spoken", []),
        ({"msgType": "richText", "content": {"richText": [{"text": "old"}, {"downloadCode": "p"}]}}, "old", ["p"]),
        ({"msgType": "text", "content": "plain"}, "plain", []),
        ({"msgType": "interactiveCard"}, "what is it?", []),
    ],
)
async def test_the_files_of_the_message_that_is_replied_to_come_with_the_reply(
    fake: DingTalkStandIn, dingtalk: Adapter, replied: dict[str, Any], text: str, refs: list[str]
) -> None:
    message = fake.message() | {"text": {"content": "what is it?", "isReplyMsg": True, "repliedMsg": replied}}
    item = dingtalk.one(fake.signed(message))
    assert isinstance(item, Inbound)
    assert item.text.startswith("what is it?")
    assert item.text.endswith(text)
    assert [one.ref for one in item.attachments] == refs


@pytest.mark.parametrize("place", ["text", "content"])
async def test_a_reply_of_any_type_keeps_its_own_content_beside_the_quotation(
    fake: DingTalkStandIn, dingtalk: Adapter, place: str
) -> None:
    """As robots get them: the quotation comes in either field, and an answer of the bot is quoted as a card."""
    children = [
        {"elementType": "UNKNOWN", "value": "{}"},
        {"elementType": "TEXT", "value": "Apples are red. See"},
        {"elementType": "LINK", "value": "https://example.com/a?x=1"},
    ]
    card = [{"elementType": "RICHTEXT", "children": children}, {"elementType": "IMAGE"}]
    replied = {"msgType": "interactiveCard", "senderId": "$bot", "content": {"cardContent": card}}
    quoted = "[In reply to this message]\nApples are red. See https://example.com/a?x=1"
    given: list[tuple[dict[str, Any], str, list[str]]] = [
        ({"msgtype": "text", "text": {"content": "why?"}}, "why?", []),
        ({"msgtype": "picture", "content": {"downloadCode": "p"}}, "", ["p"]),
        ({"msgtype": "richText", "content": {"richText": [{"text": "and "}, {"downloadCode": "p"}]}}, "and", ["p"]),
        ({"msgtype": "audio", "content": {"recognition": "spoken", "downloadCode": "v"}}, "spoken", []),
    ]
    for fields, words, refs in given:
        message = fake.message(None, chatbotUserId="$bot") | fields
        message[place] = (message.get(place) or {}) | {"isReplyMsg": True, "repliedMsg": replied}
        item = dingtalk.one(fake.signed(message))
        assert isinstance(item, Inbound)
        assert item.text == f"{words}\n\n{quoted}".lstrip()
        assert (item.words, [one.ref for one in item.attachments]) == (words, refs)


@pytest.mark.parametrize(("sender", "words"), [("$bot", "yes"), (None, "yes"), ("$other", "")])
async def test_beside_a_quotation_of_the_bot_the_persons_own_words_are_told_apart(
    fake: DingTalkStandIn, dingtalk: Adapter, sender: str | None, words: str
) -> None:
    replied = {"msgType": "text", "content": {"text": "May I?"}} | ({"senderId": sender} if sender else {})
    message = fake.message() | {"chatbotUserId": "$bot", "text": {"content": " yes", "repliedMsg": replied}}
    item = dingtalk.one(fake.signed(message))
    assert isinstance(item, Inbound)
    assert (item.text, item.words) == ("yes\n\n[In reply to this message]\nMay I?", words)


async def test_odd_parts_are_read(fake: DingTalkStandIn, dingtalk: Adapter) -> None:
    records = '[{"senderNick":"Ada","content":"hi"},{"senderNick":"Bob","msgType":"picture","downloadCode":"z"}]'
    forwarded = "[Forwarded message]\nAda: hi\nBob: [picture]"
    rich = [{"type": "at", "atName": "Ann"}, {"text": "look"}, {"type": "picture", "pictureDownloadCode": "p"}]
    given: list[tuple[dict[str, Any], str, int]] = [
        ({"msgtype": "richText", "content": {"richText": rich}}, "@Ann look", 1),
        ({"msgtype": "chatRecord", "content": {"chatRecord": records}}, forwarded, 0),
        ({"text": {"content": None}}, "", 0),
    ]
    for fields, text, files in given:
        item = dingtalk.one(fake.signed(fake.message(None) | fields))
        assert isinstance(item, Inbound)
        assert (item.text, len(item.attachments)) == (text, files)


@pytest.mark.parametrize(
    ("field", "error"),
    [
        ("invalidStaffIdList", EffectFailed),
        ("filteredStaffIdList", EffectFailed),
        ("flowControlledStaffIdList", RetryLater),
    ],
)
async def test_a_person_who_does_not_get_the_message_is_told_with_status_200(
    fake: DingTalkStandIn, dingtalk: Adapter, field: str, error: type[Exception]
) -> None:
    await dingtalk.send("one", "user/s1")
    fake.faults.append(answer(200, {"processQueryKey": "k", field: ["s1"]}))
    with pytest.raises(error):
        await dingtalk.send("two", "user/s1")


def test_a_part_is_measured_as_json(dingtalk: Adapter) -> None:
    parts = dingtalk.vendor.split('"' * 20_000)
    assert "".join(parts) == '"' * 20_000
    assert all(len(msgspec.json.encode(part)) <= 15_000 for part in parts)


async def test_the_robot_itself_and_unknown_kinds_are_ignored(fake: DingTalkStandIn, dingtalk: Adapter) -> None:
    for fields in ({"senderId": "$:bot"}, {"robotCode": "another"}):
        assert isinstance(dingtalk.one(fake.signed(fake.message(**fields))), Ignored)
    assert isinstance(dingtalk.one(fake.signed(fake.message(None, msgtype="unknown"))), Ignored)
    with pytest.raises(UnreadableCall):
        dingtalk.receive(fake.signed({"msgId": 7}))
    with pytest.raises(InvalidMessage):
        dingtalk.receive(fake.signed(b"{"))


async def test_a_reply_goes_to_the_session_of_its_message_on_the_vendors_host_only(
    fake: DingTalkStandIn, dingtalk: Adapter
) -> None:
    evil = fake.message()
    evil["sessionWebhook"] = evil["sessionWebhook"].replace("oapi.dingtalk.com", "evil.example")
    item = dingtalk.one(fake.signed(evil))
    assert isinstance(item, Inbound)
    assert item.message.startswith("/robot/")
    await dingtalk.send("**Done**", item.conversation, answers=item.message)
    assert [(message.to, message.text) for message in fake.ledger] == [("s1", "**Done**")]
    assert fake.tokens == set()


@pytest.mark.parametrize("group", [None, "cid9"])
async def test_after_the_session_a_reply_is_sent_proactively(
    fake: DingTalkStandIn, dingtalk: Adapter, group: str | None
) -> None:
    message = fake.message(group=group)
    fake.expired.add(message["sessionWebhook"].rpartition("=")[2])
    item = dingtalk.one(fake.signed(message))
    assert isinstance(item, Inbound)
    for _ in range(2):
        await dingtalk.send("late", item.conversation, answers=item.message)
        # A token that ran out is fetched again once.
        fake.tokens.clear()
    assert [(sent.to, sent.text) for sent in fake.ledger] == [(group or "s1", "late")] * 2
    fake.app_secret = "rotated"
    with pytest.raises(AccountRefused):
        await dingtalk.send("later", item.conversation, answers=item.message)


@pytest.mark.parametrize("code", [300001, 310000, 400101, 400102, 400106])
async def test_a_session_that_is_unknown_is_replaced_by_a_proactive_message(
    fake: DingTalkStandIn, dingtalk: Adapter, code: int
) -> None:
    fake.faults.append(answer(200, {"errcode": code, "errmsg": "m"}))
    await dingtalk.send("late", "user/s1", answers="/robot/sendBySession?session=x")
    assert [(sent.to, sent.text) for sent in fake.ledger] == [("s1", "late")]


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (answer(200, {"errcode": 400013, "errmsg": "group was deleted"}), EffectFailed),
        (answer(200, {"errcode": 130101, "errmsg": "send too fast"}), RetryLater),
        (answer(200, {"errcode": 410100, "errmsg": "send too fast"}), RetryLater),
        (answer(200, {"errcode": -1, "errmsg": "system busy"}), Transient),
        (answer(502), Transient),
        (answer(200, "?"), Unanswered),
        (cut(accept=True), Unanswered),
    ],
)
async def test_permanent_transient_and_unknown_errors_are_distinguished(
    fake: DingTalkStandIn, dingtalk: Adapter, fault: Fault, error: type[Exception]
) -> None:
    fake.faults.append(fault)
    with pytest.raises(error) as raised:
        await dingtalk.send("hello", "user/s1", answers="/robot/sendBySession?session=x")
    assert type(raised.value) is error


def test_a_long_text_is_split_by_bytes(dingtalk: Adapter) -> None:
    parts = dingtalk.vendor.split("界" * 12_000)
    assert all(len(part.encode()) <= 15_000 for part in parts)
    assert "".join(parts) == "界" * 12_000
