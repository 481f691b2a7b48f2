"""Edits, deletions and reactions, from the vendor's call to the history and to the message that the agent gets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import pytest

from protos.catalog import PLATFORM_EVENTS
from protos.messages.user import SubjectErased
from tests.services.channel.conftest import Call, Desk
from tooling.testing.vendors import Fault, SlackStandIn, TelegramStandIn, answer, cut


@pytest.fixture
async def telegram() -> AsyncIterator[TelegramStandIn]:
    async with TelegramStandIn() as vendor:
        yield vendor


class Chat:
    """A chat with a Telegram bot."""

    def __init__(self, desk: Desk, channel: dict[str, Any], vendor: TelegramStandIn) -> None:
        self.desk = desk
        self.channel = channel
        self.vendor = vendor

    async def call(self, call: Call) -> None:
        assert (await self.desk.call(self.channel, call)).status_code == 200

    async def history(self) -> list[dict[str, Any]]:
        async with self.desk.client() as http:
            items = (await http.get("/api/v1/messages", params={"channel_id": self.channel["id"]})).json()["items"]
        return items[::-1]  # type: ignore[no-any-return]

    async def shows(self, **fields: Any) -> dict[str, Any]:
        """The first message of the history once it has these fields."""

        async def found() -> dict[str, Any] | None:
            items = await self.history()
            return items[0] if items and fields.items() <= items[0].items() else None

        item = await self.desk.platform.until(found)
        assert item
        return item

    async def changes(self) -> list[dict[str, Any]]:
        """The changes that the agent was told of, in order."""
        rows = await self.desk.platform.outbox("channel", "channel.changes")
        return [body for _, body in rows if body["channel_id"] == self.channel["id"]]

    async def ends(self) -> list[str]:
        """The reasons of ignored changes, once no change waits."""

        async def ended() -> bool:
            async with self.desk.platform.database("channel").begin() as tx:
                rows = await tx.sql(
                    "SELECT FROM lane_item WHERE kind = 'changes' AND state = 'waiting' AND tenant_id = $1",
                    self.desk.tenant_id,
                )
            return not rows

        await self.desk.platform.until(ended)
        return await self.desk.ignored(self.channel)


@pytest.fixture
async def chat(desk: Desk, telegram: TelegramStandIn) -> Chat:
    return Chat(desk, await desk.connect("telegram", telegram.credentials, telegram.url), telegram)


async def test_an_edit_is_in_the_history_and_told_to_the_agent_once(chat: Chat) -> None:
    await chat.call(chat.vendor.update("Helo", message_id=7))
    edit = chat.vendor.edit("Hello", 7)
    for _ in range(3):
        await chat.call(edit)
    shown = await chat.shows(text="Hello")
    assert (shown["edited"], shown["state"]) == (True, "received")
    await chat.ends()
    [received] = await chat.desk.received(chat.channel)
    [told] = await chat.changes()
    assert (told["text"], told["deleted"], told["position"], told["has_files"]) == ("Hello", False, 1, False)
    assert told["session_key"] == received["session_key"]
    [(headers, _)] = [
        row for row in await chat.desk.platform.outbox("channel", "channel.inbound") if row[1] == received
    ]
    assert headers["ce_id"] == told["message_id"]


async def test_edits_before_their_message_and_in_reverse_order_leave_the_newest_text(chat: Chat) -> None:
    first, second = chat.vendor.edit("Hello!", 7, update_id=11), chat.vendor.edit("Hello!!", 7, update_id=12)
    await chat.call(second)
    await chat.call(first)
    await chat.call(chat.vendor.update("Hello", message_id=7, update_id=10))
    await chat.shows(text="Hello!!")
    await chat.ends()
    assert [item["text"] for item in await chat.history()] == ["Hello!!"]
    assert {(told["text"], told["order"]) for told in await chat.changes()} == {("Hello!", 11), ("Hello!!", 12)}


async def test_nobody_edits_the_message_of_another_person(chat: Chat) -> None:
    await chat.call(chat.vendor.update("mine", chat=-5, person=1, message_id=7))
    await chat.call(chat.vendor.edit("yours", 7, chat=-5, person=2))
    # A message with the same number in another chat.
    await chat.call(chat.vendor.update("other", chat=-6, person=2, message_id=7))
    await chat.call(chat.vendor.edit("other!", 7, chat=-6, person=2))
    assert await chat.ends() == ["edited: by another person"]
    assert [item["text"] for item in await chat.history()] == ["mine", "other!"]


async def test_a_deletion_removes_the_stored_texts(desk: Desk) -> None:
    vendor = SlackStandIn()
    chat = Chat(desk, await desk.connect("slack", vendor.credentials), TelegramStandIn())
    sent = {"channel": "D1", "ts": "1700000000.000001"}
    now = {"user": "U1", "text": "worse secret", "ts": sent["ts"], "edited": {"ts": "1700000001.000000"}}
    deletion: dict[str, Any] = {
        "subtype": "message_deleted",
        "deleted_ts": sent["ts"],
        "previous_message": {"user": "U1"},
    }
    # The deletion comes first, and the edit last.
    await chat.call(vendor.event("", **deletion, channel="D1"))
    await chat.call(vendor.event("secret", **sent))
    await chat.shows(state="deleted", text="[deleted]")
    await chat.call(vendor.event("", subtype="message_changed", channel="D1", message=now))
    assert await chat.ends() == ["edited: of a message that was deleted, or changed too often"]
    [told] = await chat.changes()
    assert (told["deleted"], told["text"]) == (True, "")
    async with desk.platform.database("channel").begin() as tx:
        stored = await tx.sql(
            "SELECT convert_from(data, 'UTF8')::jsonb->>'content' FROM event WHERE stream_id = $1",
            f"conversation:{told['session_key']}",
        )
    assert stored == [("",)]


async def test_a_paused_channel_takes_edits_and_deletions(desk: Desk) -> None:
    vendor = SlackStandIn()
    chat = Chat(desk, await desk.connect("slack", vendor.credentials), TelegramStandIn())
    sent = {"channel": "D1", "ts": "1700000000.000001"}
    await chat.call(vendor.event("secret", **sent))
    await desk.received(chat.channel)
    async with desk.client() as http:
        await http.post(f"/api/v1/channels/{chat.channel['id']}/pause")
    now = {"user": "U1", "text": "worse secret", "ts": sent["ts"], "edited": {"ts": "1700000001.000000"}}
    await chat.call(vendor.event("", subtype="message_changed", channel="D1", message=now))
    await chat.shows(text="worse secret")
    await chat.call(vendor.event("", subtype="message_deleted", deleted_ts=sent["ts"], channel="D1"))
    await chat.shows(state="deleted", text="[deleted]")


async def test_reactions_to_messages_of_people_and_of_the_bot_are_in_the_history(chat: Chat) -> None:
    await chat.call(chat.vendor.update("Hi", message_id=1_000))
    [inbound] = await chat.desk.received(chat.channel)
    delivery = await chat.desk.settled(await chat.desk.reply(inbound, "Hello"))
    answer = int(delivery["vendor_message_id"])
    for call in (
        chat.vendor.reaction(1_000, "👍"),
        chat.vendor.reaction(answer, "👎"),
        # Of another person, who takes it back.
        chat.vendor.reaction(answer, "🔥", person=43),
        chat.vendor.reaction(answer, person=43),
    ):
        await chat.call(call)
    assert await chat.ends() == []
    subject = inbound["subject_id"]
    assert [item["reactions"] for item in await chat.history()] == [
        [{"sign": "👍", "subject_id": subject}],
        [{"sign": "👎", "subject_id": subject}],
    ]
    assert await chat.changes() == []
    # A reaction to a message with this number in another chat is one to an unknown message.
    await chat.call(chat.vendor.reaction(answer, "🔥", chat=99))
    erased = SubjectErased(tenant_id=chat.desk.tenant_id, subject_id=subject)
    await chat.desk.platform.produce(PLATFORM_EVENTS, erased, key=chat.desk.tenant_id, tenant_id=chat.desk.tenant_id)

    async def gone() -> bool:
        return all(item["reactions"] == [] for item in await chat.history())

    await chat.desk.platform.until(gone)


async def test_a_reaction_to_the_first_part_of_a_long_answer_is_in_the_history(chat: Chat) -> None:
    await chat.call(chat.vendor.update("Hi", message_id=1_000))
    [inbound] = await chat.desk.received(chat.channel)
    await chat.desk.settled(await chat.desk.reply(inbound, "word " * 1_000))
    first, _ = chat.vendor.ledger
    await chat.call(chat.vendor.reaction(int(first.id), "👍"))
    assert await chat.ends() == []
    sign = {"sign": "👍", "subject_id": inbound["subject_id"]}
    assert [item["reactions"] for item in await chat.history()] == [[], [sign]]


@pytest.mark.parametrize("fault", [answer(400, {"ok": False, "description": "no"}), cut(accept=False)])
async def test_a_reaction_to_a_part_that_was_sent_before_another_one_failed_is_in_the_history(
    chat: Chat, fault: Fault
) -> None:
    await chat.call(chat.vendor.update("Hi", message_id=1_000))
    [inbound] = await chat.desk.received(chat.channel)
    chat.vendor.faults += [Fault(late=True), fault]
    await chat.desk.settled(await chat.desk.reply(inbound, "word " * 1_000))
    [first] = chat.vendor.ledger
    await chat.call(chat.vendor.reaction(int(first.id), "👍"))
    assert await chat.ends() == []
    sign = {"sign": "👍", "subject_id": inbound["subject_id"]}
    assert [item["reactions"] for item in await chat.history()] == [[], [sign]]


@pytest.mark.parametrize(
    "given_up",
    [
        "UPDATE lane_item SET expires_at = clock_timestamp() WHERE kind = 'deliveries' AND tenant_id = $1",
        "UPDATE account SET broken_reason = 'gone' WHERE tenant_id = $1",
    ],
)
async def test_a_reaction_to_a_part_of_a_delivery_that_was_given_up_is_in_the_history(
    chat: Chat, given_up: str
) -> None:
    await chat.call(chat.vendor.update("Hi", message_id=1_000))
    [inbound] = await chat.desk.received(chat.channel)
    go_on = asyncio.Event()
    chat.vendor.faults += [Fault(late=True), answer(503)._replace(wait=go_on)]
    id_ = await chat.desk.reply(inbound, "word " * 1_000)

    async def second() -> bool:
        return not chat.vendor.faults

    await chat.desk.platform.until(second)
    async with chat.desk.platform.database("channel").begin() as tx:
        await tx.sql(given_up, chat.desk.tenant_id)
    go_on.set()
    assert (await chat.desk.settled(id_))["state"] == "failed"
    [first] = chat.vendor.ledger
    await chat.call(chat.vendor.reaction(int(first.id), "👍"))
    assert await chat.ends() == []
    sign = {"sign": "👍", "subject_id": inbound["subject_id"]}
    assert [item["reactions"] for item in await chat.history()] == [[], [sign]]


async def test_a_message_keeps_a_bounded_number_of_changes(chat: Chat) -> None:
    await chat.call(chat.vendor.update("Hi", message_id=7))
    [inbound] = await chat.desk.received(chat.channel)
    for _ in range(202):
        await chat.call(chat.vendor.reaction(7, "👍"))
    assert await chat.ends() == ["reacted: of a message that was deleted, or changed too often"] * 2
    async with chat.desk.platform.database("channel").begin() as tx:
        rows = await tx.sql("SELECT event_id FROM event WHERE stream_id = $1", f"conversation:{inbound['session_key']}")
        [(count,)] = await tx.sql("SELECT version FROM stream WHERE stream_id = $1", f"message:{UUID(str(rows[0][0]))}")
    assert count == 200
