"""The LINE adapter against its fake."""

from __future__ import annotations

from collections.abc import AsyncIterator
from unittest.mock import Mock

import pytest

from infra.errors import EffectFailed, InvalidMessage, RetryLater, TooLarge, Transient, Unanswered
from infra.outgoing.client import Outgoing
from services.channel.events import Attachment
from services.channel.vendors import base
from services.channel.vendors import line as module
from services.channel.vendors.base import AccountRefused, UnreadableCall
from services.channel.vendors.items import Deleted, Edited, Ignored, Inbound
from services.channel.vendors.splitting import utf16_length
from tests.services.channel.vendors.conftest import Adapter, assert_every_change_is_refused
from tooling.testing.vendors import Fault, LineStandIn, WebhookStandIn, answer, cut


@pytest.fixture
async def fake() -> AsyncIterator[LineStandIn]:
    async with LineStandIn() as running:
        yield running


@pytest.fixture
def line(fake: LineStandIn, outgoing: Outgoing) -> Adapter:
    return Adapter("line", fake, outgoing)


async def test_each_event_of_a_batch_is_read(fake: LineStandIn, line: Adapter) -> None:
    group = {"type": "group", "groupId": "C9", "userId": "U2"}
    items = line.receive(fake.call(fake.event("größer 😀"), fake.event("two", source=group))).items
    assert items == [
        Inbound(("event/01H1", "message/1"), "U1", "U1", "1", "größer 😀"),
        Inbound(("event/01H2", "message/2"), "C9", "U2", "2", "two", in_group=True),
    ]
    assert len(line.receive(fake.call(*(fake.event() for _ in range(1_000)))).items) == 1_000


async def test_a_person_without_an_id_never_counts_as_the_one_who_wrote_before(
    fake: LineStandIn, line: Adapter
) -> None:
    """Else a stranger's yes would allow the call that another person has asked for."""
    group = {"type": "group", "groupId": "C9"}
    events = [fake.event("delete it", source=group), fake.event("yes", source=group)]
    pressed = fake.event(source=group) | {"type": "postback", "postback": {"data": "yes"}}
    people = [item.person for item in line.receive(fake.call(*events, pressed)).items if isinstance(item, Inbound)]
    assert len(set(people)) == 3
    # The same event, sent again.
    [again] = line.receive(fake.call(events[1])).items
    assert isinstance(again, Inbound)
    assert again.person == people[1]


async def test_an_odd_event_does_not_take_the_others_of_its_batch_away(fake: LineStandIn, line: Adapter) -> None:
    group = {"type": "group", "groupId": "C9", "userId": "U2"}
    odd = [
        {"type": "somethingNew", "timestamp": 1, "source": group},
        fake.event() | {"message": {"type": "text", "id": 3, "text": "x"}},
        fake.event() | {"message": None},
        fake.event() | {"source": "U1"},
        7,
    ]
    for one in odd:
        items = line.receive(fake.call(fake.event("first"), one, fake.event("last"))).items  # type: ignore[arg-type]
        assert [item.text for item in items if isinstance(item, Inbound)] == ["first", "last"]
        assert isinstance(items[1], Ignored)
        assert items[1].reason.startswith("unexpected shape")


async def test_the_events_of_a_batch_are_counted_before_they_are_read(
    fake: LineStandIn, line: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = Mock(wraps=base.decode)
    monkeypatch.setattr(module, "decode", decode)
    with pytest.raises(TooLarge, match=f"at most {base.MAX_PARTS}"):
        line.receive(fake.call(*[1] * 520_000))  # type: ignore[arg-type]
    assert decode.call_count == 1
    assert len(line.receive(fake.call(*[1] * base.MAX_PARTS)).items) == base.MAX_PARTS  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "index", "length", "read"),
    [
        ("@Claw Bot yes", 0, 9, "yes"),
        ("yes @Claw Bot ", 4, 9, "yes"),
        ("😀 @Claw Bot", 3, 9, "😀"),
        ("ask @Claw Bot today", 4, 9, "ask @Claw Bot today"),
        ("@Claw Bot", 0, 9, "@Claw Bot"),
        ("@Claw Bot yes", 0, 99, "@Claw Bot yes"),
    ],
)
async def test_the_bots_own_mention_is_no_part_of_what_a_person_says(
    fake: LineStandIn, line: Adapter, text: str, index: int, length: int, read: str
) -> None:
    mentionees = [{"index": index, "length": length, "type": "user", "isSelf": True}]
    event = fake.event(message={"type": "text", "id": "7", "text": text, "mention": {"mentionees": mentionees}})
    item = line.one(fake.call(event))
    assert isinstance(item, Inbound)
    assert (item.text, item.mentions_bot) == (read, True)
    mentionees[0]["isSelf"] = False
    other = line.one(fake.call(event))
    assert isinstance(other, Inbound)
    assert other.text == text


async def test_the_consoles_check_has_no_events(fake: LineStandIn, line: Adapter) -> None:
    assert line.receive(fake.call()).items == []


async def test_a_changed_call_is_refused(fake: LineStandIn, line: Adapter) -> None:
    assert_every_change_is_refused(fake.call(fake.event()), ("x-line-signature",), line.receive)


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "follow"},
        {"mode": "standby"},
        {"source": {"type": "user"}},
        {"type": "postback", "postback": {"data": "b", "params": {"newRichMenuAliasId": "b", "status": "SUCCESS"}}},
        {"message": {"type": "unknown", "id": "1"}},
    ],
)
async def test_other_events_are_ignored(fake: LineStandIn, line: Adapter, fields: dict[str, object]) -> None:
    assert isinstance(line.one(fake.call(fake.event() | fields)), Ignored)


async def test_an_unsent_message_is_deleted(fake: LineStandIn, line: Adapter) -> None:
    taken = line.one(fake.call(fake.event()))
    assert isinstance(taken, Inbound)
    unsend = fake.event() | {"type": "unsend", "unsend": {"messageId": taken.message}, "message": None}
    assert line.one(fake.call(unsend)) == Deleted(("event/01H2",), taken.ids[1])


@pytest.mark.parametrize("author", [{"userId": "U2"}, {}])
async def test_an_edited_message_has_its_author_and_its_new_text(
    fake: LineStandIn, line: Adapter, author: dict[str, str]
) -> None:
    taken, edited = (fake.event(source={"type": "group", "groupId": "C9", **author}) for _ in range(2))
    message = {"type": "text", "id": "1", "quoteToken": "q", "text": "Hello, edited world"}
    changed = edited | {"type": "messageEdited", "message": message, "timestamp": 1462629479859}
    first, edit = line.receive(fake.call(taken, changed)).items
    assert isinstance(first, Inbound)
    assert isinstance(edit, Edited)
    assert (edit.ids, edit.target, edit.order) == (("event/01H2",), first.ids[1], 1462629479859)
    assert (edit.message.person, edit.message.text) == (first.person, "Hello, edited world")


async def test_a_file_is_an_attachment(fake: LineStandIn, line: Adapter) -> None:
    for kind, of_kind in (("image", "image"), ("video", "video"), ("audio", "voice"), ("file", "file")):
        item = line.one(fake.call(fake.event(message={"type": kind, "id": "7", "fileName": "a.pdf"})))
        assert isinstance(item, Inbound)
        assert (item.text, item.attachments) == ("", (Attachment(of_kind, "7", "a.pdf"),))  # type: ignore[arg-type]


async def test_a_file_of_an_app_in_line_is_fetched_from_its_address_without_the_token(
    fake: LineStandIn, line: Adapter
) -> None:
    async with WebhookStandIn() as other:
        other.files["/a.png"] = b"content"
        handle = Mock(wraps=other.handle)
        other.handle = handle  # type: ignore[method-assign]
        for kind in ("image", "video", "audio"):
            provider = {"type": "external", "originalContentUrl": f"{other.url}/a.png"}
            item = line.one(fake.call(fake.event(message={"type": kind, "id": "7", "contentProvider": provider})))
            assert isinstance(item, Inbound)
            [file] = item.attachments
            assert await line.vendor.fetch(line.outgoing, fake.url, line.credentials, file.ref, 100) == b"content"
        assert ["authorization" in call.args[0].headers for call in handle.call_args_list] == [False] * 3
        provider["originalContentUrl"] = "line://app"
        item = line.one(fake.call(fake.event(message={"type": "image", "id": "7", "contentProvider": provider})))
        assert isinstance(item, Inbound)
        with pytest.raises(InvalidMessage, match="url"):
            await line.vendor.fetch(line.outgoing, fake.url, line.credentials, item.attachments[0].ref, 100)


async def test_an_image_of_a_set_is_a_part_of_an_album(fake: LineStandIn, line: Adapter) -> None:
    image = {"type": "image", "id": "5", "contentProvider": {"type": "line"}}
    of_set = image | {"imageSet": {"id": "E1", "index": 1, "total": 2}}
    items = line.receive(fake.call(*(fake.event(message=one) for one in (image, of_set)))).items
    assert [isinstance(item, Inbound) and item.in_album for item in items] == [False, True]


async def test_a_genuine_call_of_another_shape_is_told_apart_from_one_that_is_not_json(
    fake: LineStandIn, line: Adapter
) -> None:
    with pytest.raises(UnreadableCall):
        line.receive(fake.signed(b'{"events":7}'))
    with pytest.raises(InvalidMessage):
        line.receive(fake.signed(b"{"))


async def test_a_push_is_repeated_under_its_key_and_accepted_once(fake: LineStandIn, line: Adapter) -> None:
    ids = [await line.send("**hi** [x](https://e.example)", "U1", "d1") for _ in range(2)]
    other = await line.send("hi", "U1", "d1-2")
    assert [(message.to, message.text) for message in fake.ledger] == [("U1", "hi x (https://e.example)"), ("U1", "hi")]
    assert (ids, fake.repeats, fake.refusals) == ([fake.ledger[0].id] * 2, 1, [])
    assert other == fake.ledger[1].id


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (answer(400, {"message": "The property, 'to', is invalid"}), EffectFailed),
        (answer(401, {"message": "Authentication failed"}), AccountRefused),
        (answer(401), AccountRefused),
        (answer(403, {"message": "Not available"}), AccountRefused),
        (answer(429, {"message": "limit"}), RetryLater),
        (answer(500, {"message": "x"}), Transient),
        (answer(200, "?"), Unanswered),
        (cut(accept=True), Unanswered),
    ],
)
async def test_permanent_transient_and_unknown_errors_are_distinguished(
    fake: LineStandIn, line: Adapter, fault: Fault, error: type[Exception]
) -> None:
    fake.faults.append(fault)
    with pytest.raises(error) as raised:
        await line.send(to="U1")
    assert type(raised.value) is error


def test_a_long_text_is_split_in_utf_16_units(line: Adapter) -> None:
    parts = line.vendor.split("😀" * 6_000)
    assert "".join(parts) == "😀" * 6_000
    assert [utf16_length(part) for part in parts] == [5_000, 5_000, 2_000]
