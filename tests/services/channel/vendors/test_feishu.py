"""The Feishu adapter against its fake. The example of encryption and signature is made by Feishu's rules."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from infra.errors import EffectFailed, RetryLater, Transient, Unanswered, Unauthenticated
from infra.outgoing.client import Outgoing
from services.channel.vendors.base import AccountRefused, Outbound, UnreadableCall, placeholder
from services.channel.vendors.feishu import FeishuCredentials, decrypt, sign
from services.channel.vendors.feishu_events import forwarded
from services.channel.vendors.items import Deleted, Ignored, Inbound, Reacted
from tests.services.channel.vendors.conftest import Adapter, assert_every_change_is_refused
from tooling.testing.vendors import Fault, FeishuStandIn, answer, cut


@pytest.fixture
async def fake() -> AsyncIterator[FeishuStandIn]:
    async with FeishuStandIn() as running:
        yield running


@pytest.fixture
def feishu(fake: FeishuStandIn, outgoing: Outgoing) -> Adapter:
    return Adapter("feishu", fake, outgoing)


def test_the_example_is_decrypted_and_signed() -> None:
    credentials = FeishuCredentials("cli", "s", "test key", "v")
    encrypted = "P37w+VZImNgPEO1RBhJ6RtKl7n6zymIbEG1pReEzghk="
    assert decrypt(credentials, encrypted) == b"hello world"
    body = f'{{"encrypt":"{encrypted}"}}'.encode()
    signature = "669e3ed5328644f71370e3249f96af0fd17e5ed4d7b178c44f11f7997339e344"
    assert sign(credentials, "1700000000", "nonce123", body) == signature


async def test_a_message_is_read_with_its_mentions(fake: FeishuStandIn, feishu: Adapter) -> None:
    event = fake.event("@_user_1 größer 😀", mentions=[{"key": "@_user_1", "name": "Bot"}], thread_id="")
    assert feishu.receive(fake.call(event)).items == [
        Inbound(("event/e1", "message/om_1"), "oc_1", "ou_1", "om_1", "@Bot größer 😀", mentions_bot=True),
    ]


async def test_a_thread_is_a_conversation_with_its_chat_as_parent(fake: FeishuStandIn, feishu: Adapter) -> None:
    item = feishu.one(fake.call(fake.event(thread_id="omt_1", root_id="om_root")))
    assert isinstance(item, Inbound)
    assert (item.conversation, item.parent) == ("oc_1/om_root", "oc_1")


async def test_a_changed_call_is_refused(fake: FeishuStandIn, feishu: Adapter) -> None:
    proofs = ("x-lark-request-timestamp", "x-lark-request-nonce", "x-lark-signature")
    body, headers = fake.call(fake.event())
    assert_every_change_is_refused((body, headers), proofs, _as_forged(feishu))
    for age in (301, -301):
        with pytest.raises(Unauthenticated):
            feishu.receive(fake.call(fake.event(), age=age))


def _as_forged(feishu: Adapter) -> Any:
    """A change may also make the body another shape or no JSON; then it is refused without being read."""

    def receive(call: Any) -> object:
        try:
            return feishu.receive(call)
        except Exception as error:
            if type(error).__name__ in ("UnreadableCall", "InvalidMessage"):
                raise Unauthenticated(str(error)) from error
            raise

    return receive


async def test_a_plain_body_and_another_token_are_refused(fake: FeishuStandIn, feishu: Adapter) -> None:
    _, headers = fake.call(fake.event())
    with pytest.raises(Unauthenticated):
        feishu.receive((msgspec.json.encode(fake.event()), headers))
    for body in (b"null", b"[]", b'{"encrypt": 5}'):
        with pytest.raises(Unauthenticated):
            feishu.receive((body, headers))
    wrong = fake.event()
    wrong["header"]["token"] = "x"
    payloads: list[Any] = [wrong, {"type": "url_verification", "challenge": "c", "token": "x"}, {"event": {}}]
    for payload in payloads:
        with pytest.raises(Unauthenticated):
            feishu.receive(fake.call(payload))


async def test_the_handshake_is_answered_by_its_token_without_a_signature(fake: FeishuStandIn, feishu: Adapter) -> None:
    payload = {"type": "url_verification", "challenge": "abc", "token": fake.verification_token}
    received = feishu.receive((fake.encrypted(payload), {}))
    assert (received.items, msgspec.json.decode(received.ack.body)) == ([], {"challenge": "abc"})
    with pytest.raises(Unauthenticated):
        feishu.receive((fake.encrypted(fake.event()), {}))


@pytest.mark.parametrize(
    ("kind", "content", "text"),
    [
        ("post", {"title": "T", "content": [[{"tag": "text", "text": "a "}, {"tag": "a", "text": "b"}]]}, "T\na b"),
        (
            "post",
            {"zh_cn": {"title": "", "content": [[{"tag": "text", "text": "一"}], [{"tag": "md", "text": "二"}]]}},
            "一\n二",
        ),
    ],
)
async def test_a_text_outside_of_the_field_text_is_found(
    fake: FeishuStandIn, feishu: Adapter, kind: str, content: object, text: str
) -> None:
    item = feishu.one(fake.call(fake.event(kind=kind, content=content)))
    assert isinstance(item, Inbound)
    assert text in item.text


MENTIONS = [{"key": "@_user_1", "name": "Bot"}, {"key": "@_user_10", "name": "Zed"}]


@pytest.mark.parametrize(
    ("kind", "content", "text"),
    [
        ("text", {"text": "@_user_1 ask @_user_10 and @_all"}, "@Bot ask @Zed and @all"),
        ("text", {"text": "@_user_9 who?"}, "@user_9 who?"),
        ("post", [{"tag": "a", "text": "docs", "href": "https://e.example/x"}], "docs (https://e.example/x)"),
        ("post", [{"tag": "a", "text": "https://e.example", "href": "https://e.example"}], "https://e.example"),
        ("post", [{"tag": "a", "text": "", "href": "https://e.example"}], "https://e.example"),
        ("post", [{"tag": "at", "user_id": "@_user_10"}, {"tag": "emotion", "emoji_type": "OK"}], "@Zed:OK:"),
        ("post", [{"tag": "code_block", "language": "GO", "text": "func main(){}"}], "func main(){}"),
    ],
)
async def test_names_links_and_emoji_are_read(
    fake: FeishuStandIn, feishu: Adapter, kind: str, content: Any, text: str
) -> None:
    given = {"title": "", "content": [content]} if kind == "post" else content
    item = feishu.one(fake.call(fake.event(kind=kind, content=given, mentions=MENTIONS)))
    assert isinstance(item, Inbound)
    assert item.text == text


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("@_user_1 yes", "yes"),
        ("@_user_1好的", "好的"),
        ("yes @_user_1 ", "yes"),
        ("@_user_10 yes", "@Ada Lovelace yes"),
        ("ask @_user_1 today", "ask @Claw Assistant today"),
        ("@_user_1 ", "@Claw Assistant "),
    ],
)
async def test_the_bots_own_mention_is_no_part_of_what_a_person_says(
    fake: FeishuStandIn, feishu: Adapter, text: str, read: str
) -> None:
    bot = {"key": "@_user_1", "name": "Claw Assistant", "mentioned_type": "bot"}
    person = {"key": "@_user_10", "name": "Ada Lovelace", "mentioned_type": "user"}
    item = feishu.one(fake.call(fake.event(text, mentions=[bot, person], chat_type="group")))
    assert isinstance(item, Inbound)
    assert (item.text, item.mentions_bot) == (read, True)


@pytest.mark.parametrize(
    ("kind", "content", "text", "images"),
    [
        # In two forms, and in two languages.
        (
            "post",
            {"content": [[{"tag": "text", "text": "a"}]], "content_v2": [[{"tag": "md", "text": "# a"}]]},
            "# a",
            [],
        ),
        ("post", {"content": [[{"tag": "text", "text": "a"}]], "content_v2": []}, "a", []),
        ("post", {"content": [[{"tag": "text", "text": "a"}]], "content_v2": "?"}, "a", []),
        ("post", {name: {"content": [[{"tag": "text", "text": name}]]} for name in ("zh_cn", "en_us")}, "zh_cn", []),
        (
            "post",
            {"content_v2": [[{"tag": "md", "text": "see ![x](img_v3_a) ![y](https://e.example)"}]]},
            "see  ![y](https://e.example)",
            ["img_v3_a"],
        ),
        ("post", {"content": [[{"tag": "img", "image_key": "k"}], [{"tag": "img", "image_key": "l"}]]}, "", ["k", "l"]),
        ("post", {"content": [[{"tag": "at", "user_id": "ou_1", "user_name": "Bob"}]]}, "@Bob", []),
        (
            "interactive",
            {
                "header": {"title": {"tag": "plain_text", "content": "Plan"}},
                "elements": [
                    {"tag": "div", "text": {"tag": "lark_md", "content": "**bold**"}},
                    {"tag": "markdown", "content": "- one"},
                ],
            },
            "Plan\n**bold**\n- one",
            [],
        ),
        ("interactive", {"title": "Plan", "elements": [[{"tag": "text", "text": "one"}]]}, "Plan\none", []),
    ],
)
async def test_rich_texts_and_cards_are_read_once_in_each_of_their_forms(
    fake: FeishuStandIn, feishu: Adapter, kind: str, content: Any, text: str, images: list[str]
) -> None:
    item = feishu.one(fake.call(fake.event(kind=kind, content=content)))
    assert isinstance(item, Inbound)
    assert (item.text, [one.ref.partition("/")[2] for one in item.attachments]) == (text, images)


async def test_a_mention_of_all_people_is_none_of_the_bot(fake: FeishuStandIn, feishu: Adapter) -> None:
    for key, expected in (("@_all", False), ("@_user_1", True)):
        mentions = [{"key": key, "id": {"open_id": ""}, "name": "everyone"}]
        item = feishu.one(fake.call(fake.event(f"{key} hi", mentions=mentions, chat_type="group")))
        assert isinstance(item, Inbound)
        assert item.mentions_bot is expected


async def test_a_button_may_have_null_for_the_values_of_other_elements(fake: FeishuStandIn, feishu: Adapter) -> None:
    names = ("name", "option", "options", "input_value", "form_value")
    for value, text in (({"a": 1}, '{"a":1}'), (None, "")):
        action = {"tag": "button", "value": value, **dict.fromkeys(names)}
        context = {"open_message_id": "om_1", "open_chat_id": "oc_1"}
        press = fake.about("card.action.trigger", operator={"open_id": "ou_1"}, action=action, context=context)
        item = feishu.one(fake.call(press))
        assert isinstance(item, Inbound)
        assert item.text == text


async def test_a_button_names_its_chat_in_either_place(fake: FeishuStandIn, feishu: Adapter) -> None:
    ids = {"open_message_id": "om_1", "open_chat_id": "oc_1"}
    for place in (ids, {"context": ids}):
        press = fake.about("card.action.trigger", operator={"open_id": "ou_1"}, action={"value": "yes"}, **place)
        item = feishu.one(fake.call(press))
        assert isinstance(item, Inbound)
        assert (item.conversation, item.message, item.text) == ("oc_1", "om_1", "yes")


def test_forwarded_messages_are_read_also_beside_deleted_and_unreadable_ones() -> None:
    mentions = [{"key": "@_user_1", "id": "ou_1", "id_type": "open_id", "name": "Ada"}]
    given: list[dict[str, Any]] = [
        {"msg_type": "merge_forward", "body": {"content": "Merged and Forwarded Message"}},
        {"msg_type": "text", "body": {"content": '{"text":"@_user_1 hi"}'}, "mentions": mentions},
        {"msg_type": "text", "deleted": True, "body": {"content": "This message was recalled"}},
        {"msg_type": "text", "body": {"content": "no JSON"}},
        {"msg_type": "text", "body": {"content": '{"text":"bye"}'}, "mentions": "?"},
        {"msg_type": "image", "body": {"content": '{"image_key":"img_1"}'}},
    ]
    assert forwarded(given).split("\n\n") == [
        "@Ada hi",
        "[Deleted message]",
        "[Message: text]",
        "[Message: text]",
        placeholder("a file"),
    ]


async def test_files_are_attachments(fake: FeishuStandIn, feishu: Adapter) -> None:
    for n, (kind, content, expected) in enumerate(
        (
            ("image", {"image_key": "k"}, ("image", "")),
            ("file", {"file_key": "k", "file_name": "a.pdf"}, ("file", "a.pdf")),
            ("audio", {"file_key": "k", "duration": 1}, ("voice", "")),
        ),
        1,
    ):
        item = feishu.one(fake.call(fake.event(kind=kind, content=content)))
        assert isinstance(item, Inbound)
        [attachment] = item.attachments
        assert (attachment.kind, attachment.name, attachment.ref) == (*expected, f"om_{n}/k")


async def test_deletions_and_reactions_name_their_message(fake: FeishuStandIn, feishu: Adapter) -> None:
    taken = feishu.one(fake.call(fake.event()))
    assert isinstance(taken, Inbound)
    target = taken.ids[1]
    deleted = feishu.one(fake.call(fake.about("im.message.recalled_v1", message_id=taken.message, chat_id="oc_1")))
    assert isinstance(deleted, Deleted)
    assert deleted.target == target
    fields = {
        "message_id": taken.message,
        "reaction_type": {"emoji_type": "THUMBSUP"},
        "operator_type": "user",
        "user_id": {"open_id": "ou_2"},
        "action_time": "1700000000123",
    }
    for kind, mode in (("created", "added"), ("deleted", "removed")):
        reacted = feishu.one(fake.call(fake.about(f"im.message.reaction.{kind}_v1", **fields)))
        assert isinstance(reacted, Reacted)
        assert reacted[1:] == (target, taken.message, "ou_2", (":THUMBSUP:",), mode, 1700000000123, "")
    by_app = fake.about("im.message.reaction.created_v1", **fields | {"operator_type": "app"})
    assert isinstance(feishu.one(fake.call(by_app)), Ignored)


async def test_bots_and_other_events_are_ignored(fake: FeishuStandIn, feishu: Adapter) -> None:
    bot, other = fake.event(), fake.event()
    bot["event"]["sender"]["sender_type"] = "app"
    other["header"]["event_type"] = "im.message.message_read_v1"
    old = {"uuid": "1", "token": fake.verification_token, "type": "event_callback", "event": {}}
    for payload in (bot, other, old, fake.event(kind="system")):
        assert isinstance(feishu.one(fake.call(payload)), Ignored)
    broken = fake.event()
    broken["event"] = {"message": 7}
    with pytest.raises(UnreadableCall):
        feishu.receive(fake.call(broken))


async def test_a_reply_is_rich_text_and_repeated_under_its_uuid(fake: FeishuStandIn, feishu: Adapter) -> None:
    for _ in range(2):
        await feishu.send('**Done** <at user_id="all"></at>', "oc_1", "d1")
    await feishu.send("plain", "oc_1/om_9", "d2")
    assert [(message.to, message.text, message.fields["msg_type"]) for message in fake.ledger] == [
        ("oc_1", '**Done** &lt;at user_id="all"></at>', "post"),
        ("om_9", "plain", "text"),
    ]
    assert (fake.repeats, fake.refusals, len(fake.tokens)) == (1, [], 1)


async def test_a_token_that_ran_out_is_fetched_again_once(fake: FeishuStandIn, feishu: Adapter) -> None:
    await feishu.send("one", "oc_1", "d1")
    fake.tokens.clear()
    await feishu.send("two", "oc_1", "d2")
    assert (fake.texts(), len(fake.tokens)) == (["one", "two"], 1)
    fake.app_secret = "rotated"
    fake.tokens.clear()
    with pytest.raises(AccountRefused):
        await feishu.send("three", "oc_1", "d3")


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (answer(400, {"code": 230002, "msg": "Bot/User can NOT be out of the chat."}), EffectFailed),
        (answer(400, {"code": 230006, "msg": "Bot ability is not activated"}), AccountRefused),
        (answer(400, {"code": 230020, "msg": "This operation triggers the frequency limit."}), RetryLater),
        (answer(429), RetryLater),
        (answer(500), Transient),
        (answer(200, "?"), Unanswered),
        (cut(accept=True), Unanswered),
    ],
)
async def test_permanent_transient_and_unknown_errors_are_distinguished(
    fake: FeishuStandIn, feishu: Adapter, fault: Fault, error: type[Exception]
) -> None:
    await feishu.send("first", "oc_1", "d0")
    fake.faults.append(fault)
    with pytest.raises(error) as raised:
        await feishu.send("hello", "oc_1")
    assert type(raised.value) is error


@pytest.mark.parametrize("text", ['**a**: "b"\n' * 4_000, "**a** " + "\\" * 30_000])
async def test_each_part_fits_into_a_request_also_if_json_makes_it_longer(
    fake: FeishuStandIn, feishu: Adapter, text: str
) -> None:
    for n, part in enumerate(feishu.vendor.split(text)):
        await feishu.send(part, "oc_1", f"d{n}")
        shown = await feishu.vendor.place(feishu.outgoing, fake.url, feishu.credentials, Outbound(f"p{n}", "oc_1", ""))
        assert shown
        message = Outbound("e", "oc_1", part)
        await feishu.vendor.edit(feishu.outgoing, fake.url, feishu.credentials, message, shown)
    assert fake.refusals == []


def test_a_long_text_is_split_by_bytes(feishu: Adapter) -> None:
    parts = feishu.vendor.split("界" * 20_000)
    assert all(len(part.encode()) <= 28_000 for part in parts)
    assert "".join(parts) == "界" * 20_000
