"""A button that a person presses is a message with its value."""

from __future__ import annotations

from urllib.parse import urlencode

import msgspec
import pytest

from infra.clock import utcnow
from infra.errors import Unauthenticated
from infra.outgoing.client import Outgoing
from services.channel.accounts.routing import is_for_the_bot
from services.channel.events import Attachment
from services.channel.vendors.base import Request
from services.channel.vendors.items import Ignored, Inbound, Received
from tests.services.channel.vendors.conftest import Adapter, keys_of
from tooling.testing.vendors import (
    DingTalkStandIn,
    DiscordStandIn,
    LineStandIn,
    SlackStandIn,
    TeamsStandIn,
    TelegramStandIn,
)


def pressed(received: Received) -> tuple[str, str, str]:
    """The conversation, the person and the value."""
    [item] = received.items
    assert isinstance(item, Inbound)
    # In a group, too, a button of the bot's own message is for the bot.
    assert is_for_the_bot("mentions", item)
    assert is_for_the_bot("replies", item)
    return item.conversation, item.person, item.text


async def test_telegram(outgoing: Outgoing) -> None:
    fake = TelegramStandIn()
    adapter = Adapter("telegram", fake, outgoing)
    message = msgspec.json.decode(fake.update("choose", chat=-5, topic=3)[0])["message"]
    query = {"id": "q1", "from": {"id": 42, "is_bot": False}, "message": message, "data": "yes"}
    received = adapter.receive(fake.signed({"update_id": 1, "callback_query": query}))
    assert pressed(received) == ("-5/3", "42", "yes")
    # Without this, the button seems to work for half a minute.
    ack = msgspec.json.decode(received.ack.body)
    assert ack == {"method": "answerCallbackQuery", "callback_query_id": "q1"}
    for missing in ("message", "data"):
        less = {name: value for name, value in query.items() if name != missing}
        assert isinstance(adapter.one(fake.signed({"update_id": 2, "callback_query": less})), Ignored)


@pytest.mark.parametrize(
    ("action", "value"),
    [
        ({"action_id": "a", "value": "yes", "text": {"text": "Yes!"}}, "yes"),
        ({"action_id": "a", "text": {"text": "Yes!"}}, "Yes!"),
        ({"action_id": "a"}, "a"),
        ({"action_id": "a", "rich_text_value": {"elements": [{"type": "text", "text": "typed"}]}}, "typed"),
    ],
)
async def test_slack(outgoing: Outgoing, action: dict[str, object], value: str) -> None:
    fake = SlackStandIn()
    press = {
        "type": "block_actions",
        "user": {"id": "U1"},
        "channel": {"id": "C1"},
        "message": {"ts": "1.000002", "thread_ts": "1.000001"},
        "actions": [action | {"action_ts": "1.5"}],
    }
    form = {"content-type": "application/x-www-form-urlencoded"}

    def call(content: dict[str, str]) -> tuple[bytes, dict[str, str]]:
        body, headers = fake.signed_bytes(urlencode(content).encode())
        return body, headers | form

    adapter = Adapter("slack", fake, outgoing)
    received = adapter.receive(call({"payload": msgspec.json.encode(press).decode()}))
    assert pressed(received) == ("C1/1.000001", "U1", value)
    [item] = received.items
    # A route of the channel counts for its threads.
    assert isinstance(item, Inbound)
    assert item.parent == "C1"
    # Of a message that only its person sees, Slack tells the place.
    place = {"type": "message", "channel_id": "C1", "message_ts": "1.000002", "is_ephemeral": True}
    unseen = press | {"message": None, "container": place | {"thread_ts": "1.000001"}}
    received = adapter.receive(call({"payload": msgspec.json.encode(unseen).decode()}))
    assert pressed(received) == ("C1/1.000001", "U1", value)
    # A button of an attachment.
    old = {"name": "a", "type": "button"} | {name: of for name, of in action.items() if name != "action_id"}
    legacy = press | {"type": "interactive_message", "actions": [old], "action_ts": "1.5", "message": None}
    if "rich_text_value" not in action:
        legacy["original_message"] = press["message"]
        received = adapter.receive(call({"payload": msgspec.json.encode(legacy).decode()}))
        assert pressed(received) == ("C1/1.000001", "U1", value)
        assert received.items[0].ids == item.ids
    # A form: the button comes with the inputs of its message.
    inputs = {"b1": {"name": {"value": "Ada"}, "day": {"selected_date": "2026-01-01"}, "a": {"value": "no"}, "x": {}}}
    form_of = press | {"state": {"values": inputs}}
    received = adapter.receive(call({"payload": msgspec.json.encode(form_of).decode()}))
    assert pressed(received) == ("C1/1.000001", "U1", f"{value}\nname: Ada\nday: 2026-01-01")
    # A shortcut brings the whole message.
    file = {"url_private": "https://files.slack.com/a", "mimetype": "image/png", "name": "a"}
    blocks = [{"type": "section", "text": {"type": "mrkdwn", "text": "a &lt; b"}}]
    about = {"ts": "1.000002", "blocks": blocks, "files": [file]}
    shortcut = press | {"type": "message_action", "callback_id": "translate", "message": about}
    item = adapter.one(call({"payload": msgspec.json.encode(shortcut).decode()}))
    assert isinstance(item, Inbound)
    assert item.text == "translate\n\n[Forwarded message]\na < b"
    assert item.attachments == (Attachment("image", "https://files.slack.com/a", "a"),)
    # Two shortcuts without a time are two messages.
    keys = set()
    for text in ("one", "two"):
        untimed = shortcut | {"trigger_id": text, "action_ts": None}
        payload = msgspec.json.encode({name: value for name, value in untimed.items() if value is not None}).decode()
        item = adapter.one(call({"payload": payload}))
        assert isinstance(item, Inbound)
        keys.add(item.ids)
    assert len(keys) == 2
    changes: list[dict[str, object]] = [
        {"type": "block_suggestion"},
        {"user": None},
        {"channel": None},
        {"actions": []},
    ]
    for change in changes:
        payload = msgspec.json.encode(press | change).decode()
        assert isinstance(adapter.one(call({"payload": payload})), Ignored)
    for other in ({"payload": '{"type":"view_submission"}'}, {"command": "/weather"}):
        assert isinstance(adapter.one(call(other)), Ignored)


async def test_discord(outgoing: Outgoing) -> None:
    fake = DiscordStandIn()
    adapter = Adapter("discord", fake, outgoing)
    for data, value in (({"custom_id": "yes"}, "yes"), ({"custom_id": "menu", "values": ["a", "b"]}, "a, b")):
        received = adapter.receive(fake.signed(fake.command(type=3, data=data)))
        assert pressed(received) == ("77", "42", value)
        assert msgspec.json.decode(received.ack.body) == {"type": 5}


async def test_teams(outgoing: Outgoing) -> None:
    fake = TeamsStandIn()
    adapter = Adapter("teams", fake, outgoing)
    group = {"id": "19:c", "tenantId": "t1", "conversationType": "groupChat"}
    for words, value, text in (
        (None, {"choice": "yes"}, '{"choice":"yes"}'),
        (None, "yes", "yes"),
        ("approve", {"reason": "late"}, 'approve\n{"reason":"late"}'),
    ):
        body, headers = fake.signed(fake.activity(words, value=value, conversation=group))
        request = Request("POST", "", headers, body, keys=keys_of(fake))
        received = adapter.vendor.receive(request, adapter.credentials, utcnow())
        assert pressed(received) == ("19:c", "29:1", text)


async def test_dingtalk(outgoing: Outgoing) -> None:
    fake = DingTalkStandIn()
    adapter = Adapter("dingtalk", fake, outgoing)
    both = {"city": "Bern", "count": 2}
    for params, text in (({"answer": "yes"}, "yes"), (None, "agree"), (both, '{"city":"Bern","count":2}')):
        received = adapter.receive(fake.signed_press(fake.press(params)))
        assert pressed(received) == ("user/s1", "s1", text)
        assert received.ack.body == b"{}"
    group = fake.press({"answer": "yes"}, spaceType="IM_GROUP", spaceId="cid9")
    assert pressed(adapter.receive(fake.signed_press(group))) == ("group/cid9", "s1", "yes")
    for change in ({"type": "dataSourceQuery"}, {"userId": ""}, {"userIdType": 2}):
        assert isinstance(adapter.one(fake.signed_press(fake.press(**change))), Ignored)
    body, headers = fake.signed_press(group)
    for name in headers:
        for wrong in ("", headers[name][:-1], f"\xfc{headers[name]}", "9" * 20):
            with pytest.raises(Unauthenticated):
                adapter.receive((body, headers | {name: wrong}))
    # The signature of a message is another one.
    with pytest.raises(Unauthenticated):
        adapter.receive((body, {"x-ddpaas-signature": "x"} | fake.signed(group)[1]))
    for age in (3_601, -3_601):
        with pytest.raises(Unauthenticated):
            adapter.receive(fake.signed_press(group, age=age))


async def test_line(outgoing: Outgoing) -> None:
    fake = LineStandIn()
    event = fake.event(type="postback", postback={"data": "choice=yes"}, message=None)
    del event["message"]
    assert pressed(Adapter("line", fake, outgoing).receive(fake.call(event))) == ("U1", "U1", "choice=yes")
    event["source"] = {"type": "group", "groupId": "C1", "userId": "U1"}
    assert pressed(Adapter("line", fake, outgoing).receive(fake.call(event))) == ("C1", "U1", "choice=yes")
