"""The Telegram adapter against its fake. The shapes are those of https://core.telegram.org/bots/api."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta

import msgspec
import pytest

from infra.clock import utcnow
from infra.errors import EffectFailed, InvalidMessage, RetryLater, TooLarge, Transient, Unanswered, Unauthenticated
from infra.outgoing.client import Outgoing
from services.channel.vendors.base import MAX_PARTS, AccountRefused, Outbound, Request, UnreadableCall
from services.channel.vendors.items import Edited, Ignored, Inbound, Item, Moved, Reacted
from services.channel.vendors.telegram import Telegram, TelegramCredentials
from services.channel.vendors.telegram_updates import Bot, read
from tooling.testing.vendors import Fault, TelegramStandIn, answer, cut

CREDENTIALS = TelegramCredentials("1:token", "secret-token")
# As in the vendor's documentation, spaces included.
UPDATE = (
    b'{"update_id":10001, "message":{"message_id":7,"date":1700000000,"chat":{"id":42,"type":"private"},'
    b'"from":{"id":43,"is_bot":false,"first_name":"A","language_code":"en"},"text":"hi"}}'
)


def receive(body: bytes, token: str = "secret-token") -> Item:
    headers = {"x-telegram-bot-api-secret-token": token}
    [item] = Telegram().receive(Request("POST", "", headers, body), CREDENTIALS, utcnow()).items
    return item


def message(**fields: object) -> Item:
    update = msgspec.json.decode(UPDATE)
    update["message"] |= fields
    return receive(msgspec.json.encode(update))


def test_a_message_is_read_with_what_a_reply_needs() -> None:
    assert receive(UPDATE) == Inbound(("update/10001", "message/42/7"), "42", "43", "7", "hi")


def test_a_call_names_so_many_deleted_messages_at_most() -> None:
    def deleted(count: int) -> bytes:
        about = {"business_connection_id": "b", "chat": {"id": 1, "type": "private"}, "message_ids": [1] * count}
        return msgspec.json.encode({"update_id": 1, "deleted_business_messages": about})

    bot = Bot("1", "@ada_bot")
    assert len(read(deleted(1_000), bot).items) == 1_000
    with pytest.raises(TooLarge):
        read(deleted(MAX_PARTS + 1), bot)


def test_a_topic_of_a_group_is_a_separate_conversation() -> None:
    topic = message(chat={"id": -100, "type": "supergroup"}, message_thread_id=5, is_topic_message=True)
    reply_chain = message(chat={"id": -100, "type": "supergroup"}, message_thread_id=5)
    assert isinstance(topic, Inbound)
    assert isinstance(reply_chain, Inbound)
    assert (topic.conversation, reply_chain.conversation) == ("-100/5", "-100")


@pytest.mark.parametrize("token", ["", "secret-tokem", "secret-token2", "gehe\xefm"])
def test_an_update_without_the_secret_token_is_refused_before_it_is_read(token: str) -> None:
    with pytest.raises(Unauthenticated):
        receive(b"{not even JSON", token)


@pytest.mark.parametrize("body", [b"", UPDATE[:-9], UPDATE.replace(b"hi", b"\xff\xfe")])
def test_a_verified_call_that_is_not_json_is_invalid(body: bytes) -> None:
    with pytest.raises(InvalidMessage):
        receive(body)


@pytest.mark.parametrize(
    "body", [b'{"update_id":"x"}', b"[]", b"{}", b'{"update_id":1,"message":7}', UPDATE.replace(b"42", b'"x"')]
)
def test_a_verified_update_of_another_shape_is_unreadable(body: bytes) -> None:
    with pytest.raises(UnreadableCall):
        receive(body)


@pytest.mark.parametrize("attachment", ["photo", "document", "video", "voice"])
def test_a_caption_is_the_text_and_an_attachment_without_one_is_named(attachment: str) -> None:
    item = message(text=None, caption="what is this?", **{attachment: [{"file_id": "f"}]})
    assert isinstance(item, Inbound)
    assert item.text == "what is this?"
    file = {"file_id": "f", "file_name": "n"}
    item = message(text=None, **{attachment: [{"file_id": "small"}, file] if attachment == "photo" else file})
    assert isinstance(item, Inbound)
    assert (item.text, [one.ref for one in item.attachments]) == ("", ["f"])
    # Of an unknown shape.
    item = message(text=None, **{attachment: [{"id": "f"}]})
    assert isinstance(item, Inbound)
    assert item.text.startswith("[The person sent a ")


def test_the_parts_of_an_album_have_one_id() -> None:
    parts = [message(text=None, photo=[{"file_id": "f"}], media_group_id="13", message_id=id_) for id_ in (7, 8)]
    assert [isinstance(part, Inbound) and part.album for part in parts] == ["album/42/13"] * 2


def test_a_channels_post_in_its_group_is_ignored_and_people_there_are_not() -> None:
    service_bot = {"from": {"id": 777000, "is_bot": False, "first_name": "Telegram"}}
    post = message(is_automatic_forward=True, sender_chat={"id": -1001, "type": "channel"}, **service_bot)
    assert post == Ignored(("update/10001",), "a channel's post, forwarded to its group automatically")
    assert isinstance(message(sender_chat={"id": -1001, "type": "channel"}, **service_bot), Ignored)
    # An anonymous administrator and a person who writes as a channel have one of Telegram's bots as their author.
    for chat in (-100, -1001):
        item = message(chat={"id": -100}, sender_chat={"id": chat}, **{"from": {"id": 1087968824, "is_bot": True}})
        assert isinstance(item, Inbound)
        assert item.by_admin is (chat == -100)


@pytest.mark.parametrize("chat", [-100, -1001])
def test_who_writes_in_the_name_of_a_chat_never_counts_as_the_one_who_wrote_before(chat: int) -> None:
    """Else one administrator's yes would allow the call that another one has asked for."""
    bot: dict[str, object] = {"from": {"id": 1087968824, "is_bot": True}, "sender_chat": {"id": chat}}
    asked, answered = (message(chat={"id": -100}, message_id=id_, **bot) for id_ in (7, 8))
    assert isinstance(asked, Inbound)
    assert isinstance(answered, Inbound)
    assert asked.person != answered.person
    # An edit has the same author.
    edit = {"message_id": 7, "chat": {"id": -100}, "text": "hi", **bot}
    edited = receive(msgspec.json.encode({"update_id": 2, "edited_message": edit}))
    assert isinstance(edited, Edited)
    assert edited.message.person == asked.person


def test_a_forwarded_message_is_told_from_the_persons_own_words() -> None:
    origin = {"type": "hidden_user", "sender_user_name": "Bob", "date": 1}
    item = message(text="yes", forward_origin=origin)
    assert isinstance(item, Inbound)
    assert item.text == "[Forwarded message]\nyes"
    item = message(text=None, forward_origin=origin, photo=[{"file_id": "f"}])
    assert isinstance(item, Inbound)
    assert (item.text, len(item.attachments)) == ("", 1)


def test_both_notices_of_a_move_name_the_old_and_the_new_chat() -> None:
    old = message(text=None, chat={"id": -500}, migrate_to_chat_id=-100500)
    new = message(text=None, chat={"id": -100500}, migrate_from_chat_id=-500)
    assert old == new == Moved(("update/10001",), "-500", "-100500")


@pytest.mark.parametrize(
    "item",
    [
        receive(b'{"update_id":1,"edited_message":{"message_id":7,"chat":{"id":42},"text":"hi"}}'),
        receive(b'{"update_id":1,"poll":{"id":"1"}}'),
        receive(b'{"update_id":1,"my_chat_member":{"chat":{"id":42}}}'),
        message(text=None, new_chat_title="x"),
        message(**{"from": {"id": 1, "is_bot": True}}),
        message(**{"from": None}),
    ],
)
def test_an_update_without_a_persons_text_is_ignored(item: Inbound | Ignored) -> None:
    assert isinstance(item, Ignored)


def test_edits_and_reactions_name_their_message() -> None:
    taken = message()
    edited = receive(UPDATE.replace(b'"message":', b'"edited_message":').replace(b"10001", b"10002"))
    assert isinstance(taken, Inbound)
    assert isinstance(edited, Edited)
    assert (edited.target, edited.message.text, edited.order) == (taken.ids[1], "hi", 10002)
    reaction = {
        "chat": {"id": 42, "type": "private"},
        "message_id": 7,
        "user": {"id": 43, "is_bot": False},
        "date": 1700000000,
        "old_reaction": [],
        "new_reaction": [{"type": "emoji", "emoji": "👍"}, {"type": "custom_emoji", "custom_emoji_id": "1"}],
    }
    reacted = receive(msgspec.json.encode({"update_id": 3, "message_reaction": reaction}))
    assert reacted == Reacted(("update/3",), taken.ids[1], "7", "43", ("👍", "[custom_emoji]"), "all", 3, "42")
    # In the name of a chat.
    reaction |= {"user": None, "actor_chat": {"id": -100}}
    reacted = receive(msgspec.json.encode({"update_id": 3, "message_reaction": reaction}))
    assert isinstance(reacted, Reacted)
    assert reacted.person == "chat/-100"


@pytest.mark.parametrize("field", ["text", "caption"])
def test_a_reply_to_another_person_brings_the_words_that_it_answers(field: str) -> None:
    group = {"id": -100, "type": "supergroup"}
    other = {"message_id": 1, "from": {"id": 9, "is_bot": False}, field: "Guten Morgen"}
    item = message(chat=group, text="@ada_bot translate this", reply_to_message=other)
    assert isinstance(item, Inbound)
    assert item.text == "@ada_bot translate this\n\n[In reply to this message]\nGuten Morgen"
    # The agent knows its own words, and a yes must stay a yes.
    own = other | {"from": {"id": int(CREDENTIALS.bot_token.partition(":")[0]), "is_bot": True}}
    for quoted in (own, {"message_id": 1}):
        item = message(chat=group, text="yes", reply_to_message=quoted)
        assert isinstance(item, Inbound)
        assert item.text == "yes"


def test_beside_a_quotation_of_the_bot_the_persons_own_words_are_told_apart() -> None:
    bot = {"message_id": 1, "from": {"id": int(CREDENTIALS.bot_token.partition(":")[0]), "is_bot": True}, "text": "?"}
    person = bot | {"from": {"id": 9, "is_bot": False}}
    for quoted, words in ((bot, "yes"), (person, "")):
        item = message(text="yes", reply_to_message=quoted, quote={"text": "May I", "position": 0})
        assert isinstance(item, Inbound)
        assert (item.text, item.words) == ("yes\n\n[In reply to this message]\nMay I", words)


def test_a_reply_to_a_message_of_another_chat_is_told_also_if_it_cannot_be_read() -> None:
    item = message(text="yes", external_reply={"origin": {"type": "user"}, "chat": {"id": -9}, "message_id": 3})
    assert isinstance(item, Inbound)
    assert item.text.startswith("yes\n\n[In reply to this message]\n[Message of another chat")


@pytest.mark.parametrize(
    ("fields", "text", "files"),
    [
        (
            {
                "text": "😀 see here",
                "entities": [{"type": "text_link", "offset": 7, "length": 4, "url": "https://e.x"}],
            },
            "😀 see here (https://e.x)",
            [],
        ),
        # An offset within a character.
        (
            {"text": "😀", "entities": [{"type": "text_link", "offset": 0, "length": 1, "url": "https://e.x"}]},
            "\ufffd (https://e.x)\ufffd",
            [],
        ),
        (
            {"text": "e.x", "entities": [{"type": "text_link", "offset": 0, "length": 3, "url": "https://e.x/"}]},
            "e.x",
            [],
        ),
        (
            {"text": "what?", "reply_to_message": {"from": {"id": 9}, "photo": [{"file_id": "a"}, {"file_id": "b"}]}},
            "what?\n\n[In reply to this message]\n[File: photo.jpg]",
            ["b"],
        ),
        (
            {"text": "what?", "reply_to_message": {"poll": {"question": "Q", "options": [{"text": "A"}]}}},
            "what?\n\n[In reply to this message]\n[Poll: Q]\n- A",
            [],
        ),
        (
            {"text": "what?", "external_reply": {"voice": {"file_id": "v"}}, "quote": {"text": "a part"}},
            "what?\n\n[In reply to this message]\na part",
            ["v"],
        ),
        (
            {"text": None, "caption": "what?", "paid_media": {"paid_media": [{"photo": [{"file_id": "p"}]}, {}]}},
            "what?",
            ["p"],
        ),
    ],
)
def test_what_a_message_points_at_comes_with_it(fields: dict[str, object], text: str, files: list[str]) -> None:
    item = message(**fields)
    assert isinstance(item, Inbound)
    assert (item.text, [file.ref for file in item.attachments]) == (text, files)


@pytest.fixture
async def vendor() -> AsyncIterator[TelegramStandIn]:
    async with TelegramStandIn() as running:
        yield running


async def send(vendor: TelegramStandIn, outgoing: Outgoing, text: str = "hello", chat: str = "42") -> str | None:
    credentials = TelegramCredentials(**vendor.credentials)
    return await Telegram().send(outgoing, vendor.url, credentials, Outbound("key", chat, text, reply_to="7"))


async def test_a_reply_is_one_plain_message_that_survives_the_deletion_of_its_question(
    vendor: TelegramStandIn, outgoing: Outgoing
) -> None:
    vendor.topics.add(5)
    sent = await send(vendor, outgoing, "<b>1 & 2</b>", "-100/5")
    [message] = vendor.ledger
    assert sent == message.id
    assert message.fields == {
        "chat_id": -100,
        "text": "<b>1 & 2</b>",
        "parse_mode": None,
        "message_thread_id": 5,
        "direct_messages_topic_id": None,
        "reply_parameters": {"message_id": 7, "allow_sending_without_reply": True},
    }


async def test_markdown_is_sent_as_html_and_plain_if_telegram_refuses_it(
    vendor: TelegramStandIn, outgoing: Outgoing
) -> None:
    text = "**Done** & [page](https://e.example/?a=1&b=2)\n\n```python\nif a < b:\n    pass\n```\n\n- one\n- _two_"
    await send(vendor, outgoing, text)
    refusal = {"ok": False, "error_code": 400, "description": "Bad Request: can't parse entities: ..."}
    vendor.faults.append(answer(400, refusal))
    await send(vendor, outgoing, text)
    html, plain = (message.fields for message in vendor.ledger)
    assert (html["parse_mode"], html["text"]) == (
        "HTML",
        '<b>Done</b> &amp; <a href="https://e.example/?a=1&amp;b=2">page</a>\n\n'
        '<pre><code class="language-python">if a &lt; b:\n    pass</code></pre>\n\n• one\n• <i>two</i>',
    )
    assert (plain["parse_mode"], plain["text"]) == (
        None,
        "Done & page (https://e.example/?a=1&b=2)\n\nif a < b:\n    pass\n\n• one\n• two",
    )


@pytest.mark.parametrize("problem", ["message thread not found", "TOPIC_CLOSED", "TOPIC_DELETED"])
async def test_the_answer_to_a_topic_that_is_gone_goes_to_its_group_once(
    vendor: TelegramStandIn, outgoing: Outgoing, problem: str
) -> None:
    vendor.faults.append(answer(400, {"ok": False, "error_code": 400, "description": f"Bad Request: {problem}"}))
    await send(vendor, outgoing, chat="-100/55")
    assert [message.to for message in vendor.ledger] == ["-100"]


async def test_a_refusal_after_every_correction_is_a_failure(vendor: TelegramStandIn, outgoing: Outgoing) -> None:
    refusal = {"ok": False, "error_code": 400, "description": "Bad Request: message thread not found"}
    vendor.faults += [answer(400, refusal)] * 2
    with pytest.raises(EffectFailed, match="thread not found"):
        await send(vendor, outgoing, chat="-100/55")
    assert vendor.ledger == []


async def test_a_group_that_became_a_supergroup_gets_it_under_its_new_id(
    vendor: TelegramStandIn, outgoing: Outgoing
) -> None:
    vendor.moved[-5] = -100500
    await send(vendor, outgoing, chat="-5")
    assert [message.to for message in vendor.ledger] == ["-100500"]


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (answer(403, {"ok": False, "error_code": 403, "description": "Forbidden: bot was blocked"}), EffectFailed),
        (answer(400, {"ok": False, "error_code": 400, "description": "Bad Request: chat not found"}), EffectFailed),
        (answer(400), EffectFailed),
        (answer(401, {"ok": False, "error_code": 401, "description": "Unauthorized"}), AccountRefused),
        (answer(404, {"ok": False, "error_code": 404, "description": "Not Found"}), AccountRefused),
        (answer(500), Transient),
        (answer(502, "bad gateway"), Transient),
        (answer(504), Unanswered),
        (answer(200, "no JSON of Telegram's"), Unanswered),
        (answer(200, {"ok": False, "error_code": 403, "description": "Forbidden"}), EffectFailed),
        (answer(200, {"ok": False, "error_code": 500, "description": "Internal"}), Transient),
        (cut(accept=True), Unanswered),
    ],
)
async def test_permanent_transient_and_unknown_errors_are_distinguished(
    vendor: TelegramStandIn, outgoing: Outgoing, fault: Fault, error: type[Exception]
) -> None:
    vendor.faults.append(fault)
    with pytest.raises(error) as raised:
        await send(vendor, outgoing)
    assert type(raised.value) is error


async def test_the_delay_that_telegram_asks_for_is_kept(vendor: TelegramStandIn, outgoing: Outgoing) -> None:
    body = {"ok": False, "error_code": 429, "description": "Too Many Requests", "parameters": {"retry_after": 35}}
    vendor.faults.append(answer(429, body))
    with pytest.raises(RetryLater) as raised:
        await send(vendor, outgoing)
    assert raised.value.after == timedelta(seconds=35)


async def test_each_person_who_writes_to_a_channel_has_a_conversation(
    vendor: TelegramStandIn, outgoing: Outgoing
) -> None:
    item = message(chat={"id": -300, "type": "supergroup"}, direct_messages_topic={"topic_id": 5})
    assert isinstance(item, Inbound)
    await send(vendor, outgoing, chat=item.conversation)
    assert vendor.ledger[0].fields["direct_messages_topic_id"] == 5


@pytest.mark.parametrize("result", [{}, {"result": True}, {"result": {"message_id": 8, "more": 1}}])
async def test_a_message_is_accepted_if_telegram_says_ok(
    vendor: TelegramStandIn, outgoing: Outgoing, result: dict[str, object]
) -> None:
    vendor.faults.append(answer(200, {"ok": True, **result}))
    assert await send(vendor, outgoing) in (None, "8")


async def test_an_unreachable_vendor_is_transient(vendor: TelegramStandIn, outgoing: Outgoing) -> None:
    await vendor.stop()
    with pytest.raises(Transient):
        await send(vendor, outgoing)
    await vendor.start()


def test_length_is_counted_in_utf_16_units() -> None:
    parts = Telegram().split("😀" * 3000)
    assert [len(part) for part in parts] == [2048, 952]
