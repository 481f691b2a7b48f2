"""Drafts, edited messages and signs of typing while a run is at work, against the running service and the fakes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import msgspec
import pytest
from redis.asyncio import Redis

from infra.clock import uuid7
from infra.errors import RetryLater, TooManyRequests
from infra.outgoing.client import Outgoing
from infra.security.crypto import Cipher
from infra.security.subjects import SubjectKeys
from infra.stores.cache import Cache
from protos.catalog import CHANNEL_OUTBOUND
from protos.messages.channel import SendMessage
from protos.pubsub import RUN_PROGRESS
from services.channel.accounts.store import AccountSecrets
from services.channel.deliveries.previews import Previews, Progress, _Place
from services.channel.vendors.base import PLACEHOLDER, AccountRefused, Outbound
from tests.services.channel.conftest import Desk
from tooling.testing.platform import MASTER_KEY, Platform
from tooling.testing.stack import Stack
from tooling.testing.vendors import (
    DiscordStandIn,
    FeishuStandIn,
    LineStandIn,
    SlackStandIn,
    TeamsStandIn,
    TelegramStandIn,
    WhatsAppStandIn,
    answer,
    cut,
    hold,
)
from tooling.testing.vendors.server import Fault, StandIn


@pytest.fixture
async def cache(stack: Stack) -> AsyncIterator[Cache]:
    redis = Redis.from_url(stack.redis_url)
    yield Cache(redis)
    await redis.aclose()


@pytest.fixture
async def in_process(platform: Platform, cache: Cache) -> AsyncIterator[Previews]:
    cipher, outgoing = Cipher(MASTER_KEY), Outgoing(allow_private=True)
    yield Previews(platform.database("channel"), AccountSecrets(cipher), SubjectKeys(cipher), outgoing, cache)
    await outgoing.close()


class Chat:
    """A conversation with one question, whose run is at work."""

    def __init__(self, desk: Desk, cache: Cache, fake: StandIn, channel: dict[str, Any], inbound: dict[str, Any]):
        self.desk = desk
        self.cache = cache
        self.fake = fake
        self.channel = channel
        self.inbound = inbound
        self.run_id = uuid7()

    @classmethod
    async def begun(cls, desk: Desk, cache: Cache, fake: StandIn, **settings: Any) -> Chat:
        name = type(fake).__name__.removesuffix("StandIn").lower()
        channel = await desk.connect(name, fake.credentials, fake.url)  # type: ignore[attr-defined]
        async with desk.client() as http:
            changed = await http.patch(f"/api/v1/channels/{channel['id']}", json={"streaming": True} | settings)
            assert changed.status_code == 200
        assert (await desk.call(channel, question(fake))).status_code == 200
        return cls(desk, cache, fake, channel, (await desk.received(channel))[-1])

    async def tell(self, text: str, shown: Callable[[], object]) -> None:
        """Tells that the run is at work, again and again as the agent does, until the person is shown something."""

        async def ask() -> object:
            news = Progress(self.run_id, self.inbound["session_key"], text)
            await self.cache.publish(RUN_PROGRESS, msgspec.json.encode(news))
            return shown()

        await self.desk.platform.until(ask)

    async def show_late(self, previews: Previews, text: str) -> None:
        """Handles a piece of news of the run, as soon as the limits allow it."""

        async def ask() -> bool:
            try:
                await previews.show(Progress(self.run_id, self.inbound["session_key"], text))
            except TooManyRequests:
                return False
            return True

        await self.desk.platform.until(ask)

    async def answer(self, text: str) -> dict[str, Any]:
        """The run's delivery, once it has ended."""
        return await self.desk.settled(await self.queue(text))

    async def queue(self, text: str) -> UUID:
        message = SendMessage(
            delivery_id=uuid7(),
            channel_id=UUID(self.channel["id"]),
            session_key=self.inbound["session_key"],
            conversation_id=self.inbound["conversation_id"],
            text=text,
            run_id=self.run_id,
            reply_to=self.inbound["vendor_message_id"],
        )
        await self.desk.platform.send(CHANNEL_OUTBOUND, message, tenant_id=self.desk.tenant_id)
        return message.delivery_id


def question(fake: StandIn) -> tuple[bytes, dict[str, str]]:
    match fake:
        case SlackStandIn():
            return fake.event("question")
        case DiscordStandIn():
            return fake.signed(fake.command("question"))
        case TeamsStandIn():
            return fake.signed(fake.activity("question"))
        case FeishuStandIn():
            return fake.call(fake.event("question"))
        case WhatsAppStandIn():
            return fake.call(fake.message("question"))
        case LineStandIn():
            return fake.call(fake.event("question"))
    assert isinstance(fake, TelegramStandIn)
    return fake.update("question")


EDITING = [SlackStandIn, DiscordStandIn, TeamsStandIn, FeishuStandIn]


@pytest.mark.parametrize("kind", EDITING)
async def test_an_answer_is_shown_while_it_is_written_and_replaced_by_the_finished_one(
    desk: Desk, cache: Cache, in_process: Previews, kind: type[StandIn]
) -> None:
    async with kind() as fake:
        chat = await Chat.begun(desk, cache, fake)
        await chat.tell("half of the", lambda: fake.texts() == ["half of the"])
        [shown] = fake.ledger
        assert shown.to == chat.inbound["conversation_id"]
        delivery = await chat.answer("the **whole** answer")
        assert (delivery["state"], delivery["vendor_message_id"]) == ("sent", shown.id)
        [message] = fake.ledger
        assert message.id == shown.id
        assert message.text.replace("*", "") == "the whole answer"
        await chat.show_late(in_process, "half of the")
        assert fake.texts() == [message.text]
        assert fake.refusals == []


async def test_a_token_that_is_revoked_while_the_answer_is_written_fails_the_answer_and_breaks_the_channel(
    desk: Desk, cache: Cache, in_process: Previews
) -> None:
    revoked = answer(200, {"ok": False, "error": "token_revoked"})
    async with SlackStandIn() as slack:
        chat = await Chat.begun(desk, cache, slack)
        await chat.tell("half", lambda: slack.texts() == ["half"])
        slack.faults.append(revoked)
        with pytest.raises(AccountRefused):
            await chat.show_late(in_process, "half of the")
        # The preview has ended: it asks the vendor no more.
        calls = slack.calls
        await chat.show_late(in_process, "half of the answer")
        assert slack.calls == calls
        slack.faults += [revoked] * 3
        delivery = await chat.answer("the answer")
        assert (delivery["state"], "token_revoked" in delivery["reason"]) == ("failed", True)
        assert (await desk.channel(chat.channel["id"]))["state"] == "broken"
        assert "the answer" not in slack.texts()


async def test_an_answer_under_way_during_a_rotation_replaces_its_preview(desk: Desk, cache: Cache) -> None:
    rotated = asyncio.Event()
    async with SlackStandIn() as slack:
        chat = await Chat.begun(desk, cache, slack)
        await chat.tell("half", lambda: slack.texts() == ["half"])
        slack.faults.append(hold(rotated))
        calls = slack.calls
        id_ = await chat.queue("the answer")

        async def is_called() -> bool:
            return slack.calls > calls

        await desk.platform.until(is_called)
        # The vendor takes the new credentials only, from now on.
        slack.bot_token = "xoxb-new"
        async with desk.client() as http:
            path, body = f"/api/v1/channels/{chat.channel['id']}/rotate", {"credentials": slack.credentials}
            assert (await http.post(path, json=body)).status_code == 200
        rotated.set()
        assert (await desk.settled(id_))["state"] == "sent"
        assert slack.texts() == ["the answer"]


@pytest.mark.parametrize(
    "fault", [answer(429, {"ok": False, "error": "ratelimited"}, retry_after="1"), cut(accept=True)]
)
async def test_an_edit_that_the_vendor_does_not_take_is_followed_by_the_next_one(
    desk: Desk, cache: Cache, fault: Fault
) -> None:
    async with SlackStandIn() as slack:
        chat = await Chat.begun(desk, cache, slack)
        await chat.tell("half", lambda: slack.texts() == ["half"])
        slack.faults.append(fault)
        await chat.tell("half of", lambda: not slack.faults)
        await chat.tell("half of the", lambda: slack.texts() == ["half of the"])
        assert (await chat.answer("half of the"))["state"] == "sent"
        assert slack.texts() == ["half of the"]


async def test_previews_pause_for_as_long_as_the_vendor_asks(desk: Desk, cache: Cache, in_process: Previews) -> None:
    async with SlackStandIn() as slack:
        chat = await Chat.begun(desk, cache, slack)
        await chat.tell("half", lambda: slack.texts() == ["half"])
        slack.faults.append(answer(429, {"ok": False, "error": "ratelimited"}, retry_after="600"))
        with pytest.raises(RetryLater):
            await chat.show_late(in_process, "half of")
        calls = slack.calls
        await chat.show_late(in_process, "half of the")
        assert (slack.calls, slack.texts()) == (calls, ["half"])
        assert (await chat.answer("answer"))["state"] == "sent"
        assert slack.texts() == ["answer"]


async def test_an_edit_under_way_ends_before_the_answer_is_sent(desk: Desk, cache: Cache) -> None:
    async with TeamsStandIn() as teams:
        chat = await Chat.begun(desk, cache, teams)
        await chat.tell("half", lambda: teams.texts() == ["half"])
        async with desk.platform.database("channel").begin() as tx:
            # As an instance that edits the message at this moment.
            await tx.sql("SELECT 1 FROM preview WHERE run_id = $1 FOR UPDATE", chat.run_id)
            id_ = await chat.queue("answer")

            async def waits_or_sent() -> bool:
                await tx.sql("SELECT pg_stat_clear_snapshot()")
                waiting = await tx.sql(
                    "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%INTO preview%'"
                )
                return bool(waiting) or (await desk.delivery(id_)).get("state") == "sent"

            await desk.platform.until(waits_or_sent)
            assert teams.texts() == ["half"]
        assert (await desk.settled(id_))["state"] == "sent"
        assert teams.texts() == ["answer"]


@pytest.mark.parametrize("kind", [DiscordStandIn, FeishuStandIn])
async def test_an_answer_whose_preview_is_lost_is_sent_anew(desk: Desk, cache: Cache, kind: type[StandIn]) -> None:
    async with kind() as fake:
        chat = await Chat.begun(desk, cache, fake)
        await chat.tell("half", lambda: fake.texts() == ["half"])
        if isinstance(fake, DiscordStandIn):
            # A message that came later is answered, by its own interaction. The preview is deleted.
            await desk.call(chat.channel, question(fake))
            chat.inbound = (await desk.received(chat.channel))[-1]
        else:
            fake.withdraw(fake.ledger[0].id)
        assert (await chat.answer("answer"))["state"] == "sent"
        assert fake.texts() == ["answer"]


async def test_a_long_answer_begins_in_the_preview(desk: Desk, cache: Cache) -> None:
    async with TeamsStandIn() as teams:
        chat = await Chat.begun(desk, cache, teams)
        await chat.tell("x" * 30_000, lambda: [len(text) for text in teams.texts()] == [28_000])
        assert (await chat.answer("x" * 30_000))["state"] == "sent"
        assert [len(text) for text in teams.texts()] == [28_000, 2_000]


async def test_only_the_first_delivery_of_a_run_replaces_the_preview(desk: Desk, cache: Cache) -> None:
    async with TeamsStandIn() as teams:
        chat = await Chat.begun(desk, cache, teams)
        await chat.tell("may I", lambda: teams.texts() == ["may I"])
        await chat.answer("may I call it?")
        await chat.answer("done")
        assert teams.texts() == ["may I call it?", "done"]


async def test_the_preview_of_a_run_that_sends_nothing_is_deleted(
    desk: Desk, cache: Cache, in_process: Previews
) -> None:
    async with TeamsStandIn() as teams, TeamsStandIn() as other:
        chat = await Chat.begun(desk, cache, teams)
        await chat.tell("half", lambda: teams.texts() == ["half"])
        delivered = await Chat.begun(desk, cache, other)
        await delivered.tell("half", lambda: other.texts() == ["half"])
        await delivered.answer("answer")
        while await in_process.sweep(timedelta(0)):
            pass
        assert (teams.texts(), other.texts()) == ([], ["answer"])
        assert (await chat.answer("late"))["state"] == "sent"
        assert teams.texts() == ["late"]


@pytest.mark.parametrize("kind", EDITING)
async def test_the_preview_of_a_run_that_is_cancelled_is_deleted_at_once(
    desk: Desk, cache: Cache, kind: type[StandIn]
) -> None:
    async with kind() as fake:
        chat = await Chat.begun(desk, cache, fake)
        await chat.tell("half", lambda: fake.texts() == ["half"])
        over = Progress(chat.run_id, chat.inbound["session_key"], "", over=True)
        await cache.publish(RUN_PROGRESS, msgspec.json.encode(over))

        async def is_gone() -> bool:
            return fake.texts() == []

        await desk.platform.until(is_gone)


async def test_a_deleted_question_keeps_no_preview_from_being_deleted(
    desk: Desk, cache: Cache, in_process: Previews
) -> None:
    async with SlackStandIn() as slack:
        chat = await Chat.begun(desk, cache, slack)
        await chat.tell("half", lambda: "half" in slack.texts())
        await desk.call(chat.channel, slack.event("second"))
        second = (await desk.received(chat.channel))[-1]["vendor_message_id"]
        await desk.call(chat.channel, slack.event("", subtype="message_deleted", deleted_ts=second))

        async def is_deleted() -> bool:
            async with desk.platform.database("channel").begin() as tx:
                rows = await tx.sql(
                    "SELECT FROM lane_item WHERE kind = 'changes' AND state = 'waiting' AND tenant_id = $1",
                    desk.tenant_id,
                )
            return not rows

        await desk.platform.until(is_deleted)
        while await in_process.sweep(timedelta(0)):
            pass
        assert slack.texts() == []


async def test_a_place_that_may_have_been_made_is_not_made_again(
    desk: Desk, cache: Cache, in_process: Previews
) -> None:
    async with SlackStandIn() as slack:
        chat = await Chat.begun(desk, cache, slack)
        slack.faults.append(cut(accept=True))
        await chat.tell("half", lambda: slack.texts())
        await chat.show_late(in_process, "half of")
        assert slack.texts() == [PLACEHOLDER]
        assert (await chat.answer("answer"))["state"] == "sent"
        assert slack.texts() == [PLACEHOLDER, "answer"]


async def test_telegram_shows_drafts_in_private_chats_and_typing_in_groups(desk: Desk, cache: Cache) -> None:
    async with TelegramStandIn() as telegram:
        chat = await Chat.begun(desk, cache, telegram)
        await chat.tell("**half", lambda: telegram.drafts)
        assert telegram.drafts[-1] == ("42", "**half")
        await chat.answer("answer")
        assert telegram.texts() == ["answer"]
        await desk.call(chat.channel, telegram.update("question", chat=-5))
        group = Chat(desk, cache, telegram, chat.channel, (await desk.received(chat.channel))[-1])
        await group.tell("half", lambda: telegram.signs)
        assert set(telegram.signs) == {"-5"}
        assert {to for to, _ in telegram.drafts} == {"42"}


@pytest.mark.parametrize("kind", [LineStandIn, TeamsStandIn, TelegramStandIn, WhatsAppStandIn])
async def test_before_there_is_a_text_the_bot_is_typing(desk: Desk, cache: Cache, kind: type[StandIn]) -> None:
    async with kind() as fake:
        chat = await Chat.begun(desk, cache, fake)
        await chat.tell("", lambda: fake.signs)
        at = "vendor_message_id" if kind is WhatsAppStandIn else "conversation_id"
        assert set(fake.signs) == {chat.inbound[at]}
        assert (fake.ledger, fake.refusals) == ([], [])


async def test_a_channel_can_switch_previews_off(desk: Desk, cache: Cache) -> None:
    async with TeamsStandIn() as teams:
        chat = await Chat.begun(desk, cache, teams, streaming=False)
        assert (await desk.channel(chat.channel["id"]))["streaming"] is False
        await chat.tell("half", lambda: teams.signs)
        await chat.answer("answer")
        assert (teams.texts(), teams.edits) == (["answer"], [])


async def test_a_tenant_whose_vendor_is_slow_leaves_room_for_others(
    in_process: Previews, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    answered = asyncio.Event()

    async def place(_: Any, run_id: UUID, session_key: str) -> _Place:
        account: Any = SimpleNamespace(tenant_id=session_key)
        return _Place(account, Outbound("", "", ""))

    async def show(account: Any, *_: Any) -> None:
        shown.append(account.tenant_id)
        await answered.wait()

    monkeypatch.setattr(in_process, "_place", place)
    monkeypatch.setattr(in_process, "_show_at", show)
    calls = [asyncio.create_task(in_process.show(Progress(uuid7(), tenant, ""))) for tenant in "aaaab"]
    while "b" not in shown:
        await asyncio.sleep(0.01)
    answered.set()
    await asyncio.gather(*calls)
    assert sorted(shown) == ["a", "a", "b"]
    await in_process.show(Progress(uuid7(), "a", ""))
    assert sorted(shown) == ["a", "a", "a", "b"]
