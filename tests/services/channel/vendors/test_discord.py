"""The Discord adapter against its fake. The signature's example is made with the first key of RFC 8032."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from infra.errors import EffectFailed, InvalidMessage, RetryLater, Transient, Unanswered, Unauthenticated
from infra.outgoing.client import Outgoing
from services.channel.events import Attachment
from services.channel.vendors.base import AccountRefused, Outbound, OutboundFile, Request
from services.channel.vendors.discord import Discord, DiscordCredentials
from services.channel.vendors.items import Ignored, Inbound
from tests.services.channel.vendors.conftest import Adapter, assert_every_change_is_refused
from tooling.testing.vendors import DiscordStandIn, Fault, answer, cut

EXAMPLE = DiscordCredentials("1", "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a", "t")
EXAMPLE_SIGNATURE = (
    "1695961a47c91a1ec033b819b7e87e3dbc583dd0cee6d1fd0216f58ac87b6228"
    "ae531ddbf91fb7bc28d7edf7f08604da16f54624f38a6bc0614e4dc13cd47f0f"
)


@pytest.fixture
async def fake() -> AsyncIterator[DiscordStandIn]:
    async with DiscordStandIn() as running:
        yield running


@pytest.fixture
def discord(fake: DiscordStandIn, outgoing: Outgoing) -> Adapter:
    return Adapter("discord", fake, outgoing)


def test_the_example_verifies_and_is_a_ping() -> None:
    headers = {"x-signature-timestamp": "1700000000", "x-signature-ed25519": EXAMPLE_SIGNATURE}
    request, now = Request("POST", "", headers, b'{"type":1}'), datetime.fromtimestamp(1700000000, UTC)
    received = Discord().receive(request, EXAMPLE, now)
    assert (received.items, msgspec.json.decode(received.ack.body)) == ([], {"type": 1})
    assert received.ack.media_type == "application/json"
    for late in (301, -301):
        with pytest.raises(Unauthenticated):
            Discord().receive(request, EXAMPLE, now + timedelta(seconds=late))


async def test_a_command_is_read_and_answered_with_is_thinking(fake: DiscordStandIn, discord: Adapter) -> None:
    command = fake.command("größer 😀", channel="7", person="42")
    received = discord.receive(fake.signed(command))
    assert received.items == [
        Inbound((f"interaction/{command['id']}",), "7", "42", command["token"], "größer 😀"),
    ]
    assert msgspec.json.decode(received.ack.body) == {"type": 5}


@pytest.mark.parametrize(
    ("permissions", "expected"),
    [("8", True), ("1099511627784", True), ("1099511627776", False), ("x", False), ("", False)],
)
async def test_an_administrator_of_the_server_is_told(
    fake: DiscordStandIn, discord: Adapter, permissions: str, expected: bool
) -> None:
    command = fake.command("yes")
    command["member"]["permissions"] = permissions
    [item] = discord.receive(fake.signed(command)).items
    assert isinstance(item, Inbound)
    assert item.by_admin is expected


async def test_a_changed_call_is_refused(fake: DiscordStandIn, discord: Adapter) -> None:
    proofs = ("x-signature-timestamp", "x-signature-ed25519")
    body, headers = fake.signed({"type": 1})
    assert_every_change_is_refused((body, headers), proofs[:1], discord.receive)
    for wrong in ("", "00" * 64, headers["x-signature-ed25519"][:-2], "zz" * 64, "\xfc" * 128):
        with pytest.raises(Unauthenticated):
            discord.receive((body, headers | {"x-signature-ed25519": wrong}))
    for age in (301, -301):
        with pytest.raises(Unauthenticated):
            discord.receive(fake.signed({"type": 1}, age=age))


async def test_the_text_is_the_string_option_also_of_a_subcommand(fake: DiscordStandIn, discord: Adapter) -> None:
    options = [
        {"name": "n", "type": 4, "value": 7},
        {"name": "sub", "type": 1, "options": [{"type": 3, "value": "deep"}]},
    ]
    for data, text in (
        ({"name": "ask", "options": options}, "deep\nn: 7"),
        ({"name": "ask"}, "/ask"),
        ({"name": "ask", "options": None}, "/ask"),
    ):
        item = discord.one(fake.signed(fake.command(data=data)))
        assert isinstance(item, Inbound)
        assert item.text == text
    direct = discord.one(fake.signed(fake.command(member=None, user={"id": "9"})))
    assert isinstance(direct, Inbound)
    assert direct.person == "9"


@pytest.mark.parametrize(
    ("fields", "status", "ack"),
    [
        ({"type": 4}, 200, {"type": 8, "data": {"choices": []}}),
        ({"type": 99}, 200, None),
        ({"member": None}, 200, {"type": 5}),
        ({"type": 1, "event": {"type": "APPLICATION_AUTHORIZED"}}, 204, None),
    ],
)
async def test_other_calls_are_ignored(
    fake: DiscordStandIn, discord: Adapter, fields: dict[str, Any], status: int, ack: Any
) -> None:
    received = discord.receive(fake.signed(fake.command() | fields))
    assert [type(item) for item in received.items] == [Ignored]
    assert received.ack.status == status
    assert (msgspec.json.decode(received.ack.body) if received.ack.body else None) == ack


async def test_a_file_of_the_command_is_an_attachment(fake: DiscordStandIn, discord: Adapter) -> None:
    file = {
        "id": "9",
        "filename": "a.png",
        "content_type": "image/png",
        "url": "https://cdn.discordapp.com/attachments/a",
    }
    options = [{"name": "question", "type": 3, "value": "what?"}, {"name": "file", "type": 11, "value": "9"}]
    data = {"id": "1", "name": "ask", "options": options, "resolved": {"attachments": {"9": file}}}
    item = discord.one(fake.signed(fake.command(data=data)))
    assert isinstance(item, Inbound)
    assert (item.text, item.attachments) == ("what?", (Attachment("image", file["url"], "a.png"),))


async def test_the_ping_of_webhook_events_is_answered_204(fake: DiscordStandIn, discord: Adapter) -> None:
    received = discord.receive(fake.signed({"version": 1, "application_id": fake.application, "type": 0}))
    assert (received.items, received.ack.status, received.ack.body) == ([], 204, b"")
    with pytest.raises(InvalidMessage):
        discord.receive(fake.signed(b"{"))


async def test_the_first_part_replaces_is_thinking_and_others_follow_once(
    fake: DiscordStandIn, discord: Adapter
) -> None:
    token = fake.command(channel="77")["token"]
    for _ in range(2):
        for part in (1, 2):
            await discord.send(f"@everyone **part {part}**", "77", f"d-{part}", answers=token, part=part)
    assert [(message.to, message.text) for message in fake.ledger] == [
        ("77", "@everyone **part 1**"),
        ("77", "@everyone **part 2**"),
    ]
    assert (fake.repeats, fake.refusals) == (2, [])


async def test_after_fifteen_minutes_the_reply_is_a_message_of_the_bot(fake: DiscordStandIn, discord: Adapter) -> None:
    token = fake.command(channel="77")["token"]
    fake.expired.add(token)
    sent = await discord.send("late", "77", answers=token)
    assert [(message.id, message.text, "nonce" in message.fields) for message in fake.ledger] == [(sent, "late", True)]


async def test_without_access_to_the_channel_parts_are_follow_ups_of_the_command(
    fake: DiscordStandIn, discord: Adapter
) -> None:
    fake.missing.add("77")
    token = fake.command(channel="77")["token"]
    await discord.send("one", "77", "d-1", answers=token)
    file = OutboundFile("https://e.example/a", "a.png", "image/png", b"png")
    for part, given in ((2, None), (3, file)):
        message = Outbound(f"d-{part}", "77", "@everyone two", answers=token, part=part, file=given)
        arguments = discord.outgoing, fake.url, discord.credentials
        with pytest.raises(EffectFailed) as refused:
            await discord.vendor.send(*arguments, message)
        other = discord.vendor.otherwise(message, str(refused.value))
        assert other
        assert other.key != message.key
        assert (discord.vendor.effect_of(message), discord.vendor.effect_of(other)) == ("keyed", "once")
        assert await discord.vendor.send(*arguments, other) == fake.ledger[-1].id
    assert fake.texts("77") == ["one", "@everyone two", "[file a.png]"]
    for part, answers, reason in ((1, token, "50001: m"), (2, None, "50001: m"), (2, token, "50035: m")):
        message = Outbound("d-1", "77", "x", answers=answers, part=part)
        assert discord.vendor.otherwise(message, reason) is None


async def test_a_preview_is_deleted_by_its_command_or_by_the_bot(fake: DiscordStandIn, discord: Adapter) -> None:
    arguments = discord.outgoing, fake.url, discord.credentials
    for is_missing in (True, False):
        command = fake.command(channel="77")
        message = Outbound("d1", "77", "half", answers=command["token"])
        shown = await discord.vendor.send(*arguments, message)
        assert shown
        if is_missing:
            fake.missing.add("77")
        else:
            fake.missing.clear()
            fake.expired.add(command["token"])
        await discord.vendor.retract(*arguments, message, shown)
        assert fake.ledger == []


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (answer(403, {"code": 50001, "message": "Missing Access"}), EffectFailed),
        (answer(404, {"code": 10003, "message": "Unknown Channel"}), EffectFailed),
        (answer(401, {"code": 0, "message": "401: Unauthorized"}), AccountRefused),
        (answer(429, {"message": "You are being rate limited.", "retry_after": 1.5, "global": False}), RetryLater),
        (answer(429), RetryLater),
        (answer(502), Transient),
        (answer(200, "?"), Unanswered),
        (cut(accept=True), Unanswered),
    ],
)
async def test_permanent_transient_and_unknown_errors_are_distinguished(
    fake: DiscordStandIn, discord: Adapter, fault: Fault, error: type[Exception]
) -> None:
    fake.faults.append(fault)
    with pytest.raises(error) as raised:
        await discord.send(to="77")
    assert type(raised.value) is error


async def test_the_delay_that_discord_asks_for_is_kept(fake: DiscordStandIn, discord: Adapter) -> None:
    fake.faults.append(answer(429, {"message": "m", "retry_after": 1.5}))
    with pytest.raises(RetryLater) as raised:
        await discord.send(to="77", answers=fake.command()["token"])
    assert raised.value.after > timedelta(seconds=1.5)


def test_a_long_text_is_split_by_characters_and_tables_become_code(discord: Adapter) -> None:
    assert [len(part) for part in discord.vendor.split("x" * 4_100)] == [2_000, 2_000, 100]


MEDIA = {"url": "https://cdn.discordapp.com/y.png", "content_type": "image/png"}


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ({"embeds": [{"title": None, "fields": [{"name": "Build", "value": "failed"}]}]}, "Build: failed"),
        ({"content": "hi", "poll": None, "sticker_items": None}, "hi"),
        (
            {
                "components": [
                    {"type": 17, "components": [{"type": 10, "content": "inside"}, {"type": 13, "file": MEDIA}]},
                    {"type": 9, "components": [{"type": 10, "content": "also"}], "accessory": {"media": MEDIA}},
                    {"type": 12, "items": [{"media": MEDIA}]},
                ]
            },
            "inside\nalso",
        ),
        (
            {"poll": {"question": {"text": "Q"}, "answers": [{"poll_media": {"emoji": {"name": "👍"}}}]}},
            "[Poll: Q]\n- 👍",
        ),
    ],
)
async def test_a_message_of_a_command_is_read_whole(
    fake: DiscordStandIn, discord: Adapter, target: dict[str, object], text: str
) -> None:
    data = {"name": "Translate", "type": 3, "target_id": "5", "resolved": {"messages": {"5": target}}}
    item = discord.one(fake.signed(fake.command(data=data)))
    assert isinstance(item, Inbound)
    assert item.text == f"/Translate\n\n[Forwarded message]\n{text}"
    assert [file.kind for file in item.attachments] == ["image"] * 3 * ("components" in target)


async def test_choices_have_their_names_and_a_thread_its_channel(fake: DiscordStandIn, discord: Adapter) -> None:
    resolved = {
        "users": {"7": {"id": "7", "username": "bo"}},
        "channels": {"8": {"name": "general"}},
        "attachments": {"1": {"url": "https://cdn.discordapp.com/u.pdf"}},
    }
    options = [{"type": 3, "name": "q", "value": "x"}, {"type": 3, "name": "p", "value": "x"}]
    options += [{"type": 6, "name": "user", "value": "7"}, {"type": 7, "name": "place", "value": "8"}]
    entered = [{"type": 18, "component": {"type": 19, "values": ["1"]}}]
    entered.append({"type": 18, "component": {"type": 23, "custom_id": "agree", "value": True}})
    for kind, data, text in (
        (2, {"name": "ask", "options": options}, "x\np: x\nuser: bo (7)\nplace: general (8)"),
        (3, {"custom_id": "menu", "values": ["7"]}, "bo (7)"),
        (5, {"custom_id": "f", "components": entered}, "agree: True"),
    ):
        call = fake.command(type=kind, data={**data, "resolved": resolved})
        call |= {"channel": {"type": 11, "parent_id": "70"}}
        item = discord.one(fake.signed(call))
        assert isinstance(item, Inbound)
        assert (item.text, item.parent) == (text, "70")
