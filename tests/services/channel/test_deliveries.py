"""From the agent's SendMessage to what a person sees, against the running service and strict stand-ins of vendors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import aio_pika
import msgspec
import pytest

from infra.clock import utcnow, uuid7
from protos.catalog import CHANNEL_OUTBOUND
from protos.envelope import Envelope
from protos.messages.channel import SendMessage
from tests.services.channel.conftest import Desk
from tooling.testing.vendors import SlackStandIn, TelegramStandIn, WebhookStandIn, answer, cut, hold


@pytest.fixture
async def telegram() -> AsyncIterator[TelegramStandIn]:
    async with TelegramStandIn() as vendor:
        yield vendor


@pytest.fixture
async def webhook() -> AsyncIterator[WebhookStandIn]:
    async with WebhookStandIn() as vendor:
        yield vendor


async def hear(desk: Desk, channel: dict[str, Any], vendor: TelegramStandIn, chat: int = 42) -> dict[str, Any]:
    """A message that came in over Telegram, as the agent was told of it."""
    assert (await desk.call(channel, vendor.update("question", chat=chat, message_id=7))).status_code == 200
    return (await desk.received(channel))[-1]


async def test_a_reply_reaches_its_chat_and_all_are_told(desk: Desk, telegram: TelegramStandIn) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    heard = await hear(desk, channel, telegram)
    id_ = await desk.reply(heard, "answer 😀")
    delivery = await desk.settled(id_)
    [message] = telegram.ledger
    assert (message.to, message.text, message.fields["reply_parameters"]["message_id"]) == ("42", "answer 😀", 7)
    assert (delivery["state"], delivery["vendor_message_id"], delivery["reason"]) == ("sent", message.id, None)
    [told] = await desk.told(channel, "MessageDelivered")
    assert (told["delivery_id"], told["vendor_message_id"]) == (str(id_), message.id)
    assert (told["session_key"], told["run_id"]) == (heard["session_key"], delivery["run_id"])


async def test_replies_are_sent_by_their_position_whatever_order_they_come_in(
    desk: Desk, telegram: TelegramStandIn
) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    heard = await hear(desk, channel, telegram)
    ids = [await desk.reply(heard, f"answer {n}", position=n) for n in (3, 2)]
    for id_ in ids:
        await desk.queued(id_)
    assert telegram.ledger == []
    ids.append(await desk.reply(heard, "answer 1", position=1))
    for id_ in ids:
        assert (await desk.settled(id_))["state"] == "sent"
    assert telegram.texts() == ["answer 1", "answer 2", "answer 3"]


async def test_messages_carry_their_position_in_the_conversation(desk: Desk, telegram: TelegramStandIn) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    for chat in (42, 42, 43, 42):
        await hear(desk, channel, telegram, chat)
    update = telegram.update("again", chat=42)
    for _ in range(2):
        await desk.call(channel, update)
    told = await desk.received(channel)
    assert [message["position"] for message in told] == [1, 2, 1, 3, 4]


async def test_slack_and_webhook_get_theirs(desk: Desk, webhook: WebhookStandIn) -> None:
    async with SlackStandIn() as slack:
        channel = await desk.connect("slack", slack.credentials, slack.url)
        await desk.call(channel, slack.event("question", thread_ts="1700000000.000100"))
        [heard] = await desk.received(channel)
        sent = await desk.settled(await desk.reply(heard, "<answer>"))
        [message] = slack.ledger
        assert (message.to, message.text) == ("C1/1700000000.000100", "<answer>")
        assert (sent["state"], sent["vendor_message_id"]) == ("sent", message.id)
    channel = await desk.connect("webhook", webhook.credentials)
    await desk.call(channel, webhook.message("question"))
    [heard] = await desk.received(channel)
    id_ = await desk.reply(heard, "answer")
    sent = await desk.settled(id_)
    assert (sent["state"], sent["vendor_message_id"]) == ("sent", None)
    [message] = webhook.ledger
    assert (message.id, message.fields["run_id"]) == (str(id_), sent["run_id"])


async def test_the_same_delivery_asked_for_again_is_sent_once_even_when_lanes_have_forgotten_it(
    desk: Desk, telegram: TelegramStandIn
) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    heard = await hear(desk, channel, telegram)
    id_ = await desk.reply(heard, "answer")
    await desk.settled(id_)
    await desk.reply(heard, "answer", delivery_id=id_)
    await desk.settled(await desk.reply(heard, "next"))
    async with desk.platform.database("channel").begin() as tx:
        await tx.sql("DELETE FROM lane_item WHERE item_id = $1", id_)
        await tx.sql("DELETE FROM lane_effect WHERE key LIKE $1", f"{id_}%")
    await desk.reply(heard, "answer", delivery_id=id_)
    await desk.settled(await desk.reply(heard, "last"))
    assert telegram.texts() == ["answer", "next", "last"]


async def test_a_chats_messages_keep_their_order_while_the_first_has_trouble_and_other_chats_do_not_wait(
    desk: Desk, telegram: TelegramStandIn
) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    slow, quick = [await hear(desk, channel, telegram, chat) for chat in (1, 2)]
    go_on = asyncio.Event()
    flood = {"ok": False, "error_code": 429, "description": "Too Many Requests", "parameters": {"retry_after": 1}}
    telegram.faults += [answer(429, flood), answer(502), hold(go_on)]
    waiting = []
    for text in ("one", "two", "three"):
        waiting.append(await desk.reply(slow, text))
        await desk.queued(waiting[-1])

    async def held() -> bool:
        return not telegram.faults

    await desk.platform.until(held)
    await desk.settled(await desk.reply(quick, "quick"))
    assert telegram.texts() == ["quick"]
    go_on.set()
    assert {(await desk.settled(id_))["state"] for id_ in waiting} == {"sent"}
    assert telegram.texts("1") == ["one", "two", "three"]


async def test_a_blocked_bot_and_a_missing_chat_are_failures_that_people_see(
    desk: Desk, telegram: TelegramStandIn
) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    telegram.blocked.add(1)
    telegram.unknown.add(2)
    reasons = []
    for chat in (1, 2):
        delivery = await desk.settled(await desk.reply(await hear(desk, channel, telegram, chat), "answer"))
        assert delivery["state"] == "failed"
        reasons.append(delivery["reason"])
    assert reasons == ["Forbidden: bot was blocked by the user", "Bad Request: chat not found"]
    assert [told["reason"] for told in await desk.told(channel, "MessageUndelivered")] == reasons
    assert telegram.calls == 2
    assert (await desk.channel(channel["id"]))["state"] == "active"


async def test_without_an_answer_and_without_a_key_it_is_unknown_and_never_sent_again(
    desk: Desk, telegram: TelegramStandIn
) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    heard = await hear(desk, channel, telegram)
    telegram.faults += [cut(accept=True), cut(accept=False)]
    states = [(await desk.settled(await desk.reply(heard, text)))["state"] for text in ("one", "two", "three")]
    assert states == ["unknown", "unknown", "sent"]
    assert telegram.texts() == ["one", "three"]
    assert [told["outcome"] for told in await desk.told(channel, "MessageUndelivered")] == ["unknown", "unknown"]


async def test_without_an_answer_but_with_a_key_it_is_sent_again_and_taken_once(
    desk: Desk, webhook: WebhookStandIn
) -> None:
    channel = await desk.connect("webhook", webhook.credentials)
    await desk.call(channel, webhook.message("question"))
    [heard] = await desk.received(channel)
    webhook.faults += [cut(accept=True), answer(503, retry_after="1"), cut(accept=False)]
    delivery = await desk.settled(await desk.reply(heard, "answer"))
    assert delivery["state"] == "sent"
    assert (webhook.texts(), webhook.repeats, webhook.refusals) == (["answer"], 1, [])


async def test_a_long_text_comes_in_parts_in_order_and_a_part_that_waits_does_not_repeat_the_first(
    desk: Desk, telegram: TelegramStandIn
) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    paragraphs = [f"{n} " + "word " * 600 for n in range(3)]
    began = time.time()
    delivery = await desk.settled(await desk.reply(await hear(desk, channel, telegram), "\n\n".join(paragraphs)))
    assert telegram.texts() == [paragraph.strip() for paragraph in paragraphs]
    assert [message.fields["reply_parameters"] is None for message in telegram.ledger] == [False, True, True]
    assert (delivery["state"], delivery["vendor_message_id"]) == ("sent", telegram.ledger[-1].id)
    # One a second is what Telegram allows in a chat.
    assert telegram.ledger[-1].at - began > 1.9


async def test_a_part_that_is_refused_ends_the_delivery_and_says_which(desk: Desk, telegram: TelegramStandIn) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    telegram.faults += [answer(502), answer(400, {"ok": False, "error_code": 400, "description": "no"})]
    heard = await hear(desk, channel, telegram)
    delivery = await desk.settled(await desk.reply(heard, "word " * 1000))
    assert (delivery["state"], delivery["reason"], telegram.ledger) == ("failed", "part 1 of 2: no", [])


async def test_an_account_that_is_refused_is_broken_its_owners_are_told_once_and_new_credentials_repair_it(
    desk: Desk, telegram: TelegramStandIn
) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    conversations = [await hear(desk, channel, telegram, chat) for chat in range(1, 5)]
    telegram.revoked = True
    lost = [await desk.reply(heard, "lost") for heard in conversations]
    assert {(await desk.settled(id_))["state"] for id_ in lost} == {"failed"}
    shown = await desk.channel(channel["id"])
    assert (shown["state"], shown["broken_reason"]) == ("broken", "HTTP 401")
    calls = telegram.calls
    later = await desk.settled(await desk.reply(conversations[0], "not even tried"))
    assert (later["state"], later["reason"], telegram.calls) == ("failed", "the channel is broken: HTTP 401", calls)
    assert len(await desk.told(channel, "AccountBroken")) == 1
    mails = [
        body for headers, body in await desk.platform.outbox("channel", "notification") if channel["id"] in str(body)
    ]
    assert [mail["to"] for mail in mails] == [""]

    assert (await desk.call(channel, telegram.update("still heard"))).status_code == 200
    telegram.revoked = False
    async with desk.client() as http:
        await http.patch(f"/api/v1/channels/{channel['id']}", json={"credentials": telegram.credentials})
    assert (await desk.channel(channel["id"]))["state"] == "active"
    assert (await desk.settled(await desk.reply(conversations[0], "back")))["state"] == "sent"


async def test_a_receiver_that_is_gone_for_good_breaks_its_channel(desk: Desk, webhook: WebhookStandIn) -> None:
    channel = await desk.connect("webhook", webhook.credentials)
    await desk.call(channel, webhook.message("question"))
    [heard] = await desk.received(channel)
    webhook.gone = True
    assert (await desk.settled(await desk.reply(heard, "answer")))["state"] == "failed"
    assert (await desk.channel(channel["id"]))["state"] == "broken"


async def test_a_disabled_and_a_deleted_channel_send_nothing(desk: Desk, telegram: TelegramStandIn) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    heard = await hear(desk, channel, telegram)
    path = f"/api/v1/channels/{channel['id']}"
    reasons = []
    async with desk.client() as http:
        for change in (http.patch(path, json={"enabled": False}), http.delete(path)):
            await change
            reasons.append((await desk.settled(await desk.reply(heard, "answer")))["reason"])
    assert reasons == ["the channel is disabled", "the channel was deleted"]
    assert telegram.calls == 0


async def test_what_was_asked_for_a_day_ago_is_not_sent_any_more(desk: Desk, telegram: TelegramStandIn) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    heard = await hear(desk, channel, telegram)
    late = await _send_aged(desk, heard, timedelta(hours=24, seconds=1))
    in_time = await _send_aged(desk, heard, timedelta(hours=23))
    delivery = await desk.settled(late)
    assert (delivery["state"], delivery["reason"]) == ("failed", "expired")
    assert (await desk.settled(in_time))["state"] == "sent"
    assert telegram.texts() == ["asked 23:00:00 ago"]


@pytest.mark.parametrize("wrong", ["session_key", "channel_id", "tenant"])
async def test_what_belongs_to_no_conversation_of_the_channel_is_set_aside(
    desk: Desk, telegram: TelegramStandIn, wrong: str
) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    heard = await hear(desk, channel, telegram)
    sender = Desk(desk.platform, "another") if wrong == "tenant" else desk
    changed = {} if wrong == "tenant" else {wrong: str(uuid7())}
    id_ = await sender.reply(heard | changed, "for somebody else")

    async def set_aside() -> list[Any]:
        async with desk.platform.database("channel").begin() as tx:
            pattern = b"%" + str(id_).encode() + b"%"
            return list(await tx.sql("SELECT error FROM dead_letter WHERE payload LIKE $1", pattern))

    [(error,)] = await desk.platform.until(set_aside)
    assert "session_key: is of no conversation of this channel" in error
    assert telegram.calls == 0


async def test_deliveries_are_listed_by_run_channel_and_state_and_only_ones_own(
    desk: Desk, telegram: TelegramStandIn
) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    heard = await hear(desk, channel, telegram)
    telegram.faults.append(answer(400, {"ok": False, "error_code": 400, "description": "no"}))
    failed, sent = [await desk.settled(await desk.reply(heard, text)) for text in ("one", "two")]
    async with desk.client() as http:

        async def found(query: str) -> list[str]:
            return [item["id"] for item in (await http.get(f"/api/v1/deliveries?{query}")).json()["items"]]

        assert await found("") == [sent["id"], failed["id"]]
        assert await found(f"run_id={sent['run_id']}") == [sent["id"]]
        assert await found(f"channel_id={channel['id']}&state=failed") == [failed["id"]]
        assert await found(f"channel_id={uuid7()}") == []
        assert (await http.get("/api/v1/deliveries?state=lost")).status_code == 422
    async with Desk(desk.platform, "another").client() as http:
        assert (await http.get("/api/v1/deliveries")).json()["items"] == []
        assert (await http.get(f"/api/v1/deliveries/{sent['id']}")).status_code == 404


async def _send_aged(desk: Desk, heard: dict[str, Any], age: timedelta) -> UUID:
    message = SendMessage(
        delivery_id=uuid7(),
        channel_id=UUID(heard["channel_id"]),
        session_key=heard["session_key"],
        conversation_id=heard["conversation_id"],
        text=f"asked {age} ago",
    )
    envelope = Envelope(
        id=uuid7(), source="agent", type=message.wire_name(), time=utcnow() - age, tenant_id=desk.tenant_id
    )
    connection = await aio_pika.connect(desk.platform.rabbitmq_url)
    async with connection:
        exchange = await (await connection.channel()).get_exchange(CHANNEL_OUTBOUND.exchange.name, ensure=False)
        body = aio_pika.Message(
            msgspec.json.encode(message), headers=dict(envelope.headers()), message_id=str(envelope.id)
        )
        await exchange.publish(body, routing_key=CHANNEL_OUTBOUND.routing_key)
    return message.delivery_id
