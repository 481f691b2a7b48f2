"""From the agent's SendMessage to the message that a person sees, against the running service and the fakes."""

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
from infra.postgres.dead_letters import read_payload
from protos.catalog import CHANNEL_OUTBOUND
from protos.envelope import Envelope
from protos.messages.channel import SendMessage
from services.channel.deliveries.queueing import DueDelivery
from services.channel.handlers import expire_delivery
from tests.services.channel.conftest import Desk
from tooling.testing.vendors import (
    DingTalkStandIn,
    DiscordStandIn,
    Fault,
    FeishuStandIn,
    LineStandIn,
    QQStandIn,
    SlackStandIn,
    TeamsStandIn,
    TelegramStandIn,
    TwilioStandIn,
    WebhookStandIn,
    WeComStandIn,
    WhatsAppStandIn,
    answer,
    cut,
    hold,
)


@pytest.fixture
async def telegram() -> AsyncIterator[TelegramStandIn]:
    async with TelegramStandIn() as vendor:
        yield vendor


@pytest.fixture
async def webhook() -> AsyncIterator[WebhookStandIn]:
    async with WebhookStandIn() as vendor:
        yield vendor


async def receive(
    desk: Desk, channel: dict[str, Any], vendor: TelegramStandIn, chat: int = 42, message_id: int = 7
) -> dict[str, Any]:
    """An inbound message over Telegram, as the agent gets it."""
    assert (await desk.call(channel, vendor.update("question", chat=chat, message_id=message_id))).status_code == 200
    return (await desk.received(channel))[-1]


async def test_a_reply_reaches_its_chat_and_is_published(desk: Desk, telegram: TelegramStandIn) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    inbound = await receive(desk, channel, telegram)
    id_ = await desk.reply(inbound, "answer 😀")
    delivery = await desk.settled(id_)
    [message] = telegram.ledger
    assert (message.to, message.text, message.fields["reply_parameters"]["message_id"]) == ("42", "answer 😀", 7)
    assert (delivery["state"], delivery["vendor_message_id"], delivery["reason"]) == ("sent", message.id, None)
    [published] = await desk.published(channel, "MessageDelivered")
    assert (published["delivery_id"], published["vendor_message_id"]) == (str(id_), message.id)
    assert (published["session_key"], published["run_id"]) == (inbound["session_key"], delivery["run_id"])


async def test_replies_are_sent_in_the_order_of_their_positions(desk: Desk, telegram: TelegramStandIn) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    inbound = await receive(desk, channel, telegram)
    ids = [await desk.reply(inbound, f"answer {n}", position=n) for n in (3, 2)]
    for id_ in ids:
        await desk.queued(id_)
    assert telegram.ledger == []
    ids.append(await desk.reply(inbound, "answer 1", position=1))
    for id_ in ids:
        assert (await desk.settled(id_))["state"] == "sent"
    assert telegram.texts() == ["answer 1", "answer 2", "answer 3"]


async def test_messages_carry_their_position_in_the_conversation(desk: Desk, telegram: TelegramStandIn) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    for message_id, chat in enumerate((42, 42, 43, 42), 101):
        await receive(desk, channel, telegram, chat, message_id)
    update = telegram.update("again", chat=42)
    for _ in range(2):
        await desk.call(channel, update)
    positions: dict[str, list[int]] = {}
    for message in await desk.received(channel):
        positions.setdefault(message["session_key"], []).append(message["position"])
    # The order of messages of different conversations is not promised.
    assert sorted(positions.values()) == [[1], [1, 2, 3, 4]]


async def test_slack_and_webhook_get_their_replies(desk: Desk, webhook: WebhookStandIn) -> None:
    async with SlackStandIn() as slack:
        channel = await desk.connect("slack", slack.credentials, slack.url)
        await desk.call(channel, slack.event("question", thread_ts="1700000000.000100"))
        [inbound] = await desk.received(channel)
        sent = await desk.settled(await desk.reply(inbound, "<answer>"))
        [message] = slack.ledger
        assert (message.to, message.text) == ("C1/1700000000.000100", "<answer>")
        assert (sent["state"], sent["vendor_message_id"]) == ("sent", message.id)
    channel = await desk.connect("webhook", webhook.credentials)
    await desk.call(channel, webhook.message("question"))
    [inbound] = await desk.received(channel)
    id_ = await desk.reply(inbound, "answer")
    sent = await desk.settled(id_)
    assert (sent["state"], sent["vendor_message_id"]) == ("sent", None)
    [message] = webhook.ledger
    assert (message.id, message.fields["run_id"]) == (str(id_), sent["run_id"])


async def test_discord_line_twilio_and_whatsapp_get_their_replies(desk: Desk) -> None:
    async with DiscordStandIn() as discord, LineStandIn() as line, TwilioStandIn() as twilio, WhatsAppStandIn() as meta:
        fakes: dict[str, Any] = {"discord": discord, "line": line, "twilio": twilio, "whatsapp": meta}
        channels = {name: await desk.connect(name, fake.credentials, fake.url) for name, fake in fakes.items()}
        calls = {
            "discord": discord.signed(discord.command("question", channel="77")),
            "line": line.call(line.event("question")),
            "twilio": twilio.message(f"http://127.0.0.1:8080{channels['twilio']['webhook_path']}", "question"),
            "whatsapp": meta.call(meta.message("question")),
        }
        for name, call in calls.items():
            for _ in range(2):
                assert (await desk.call(channels[name], call)).status_code == 200
            [inbound] = await desk.received(channels[name])
            assert inbound["text"] == "question"
            delivery = await desk.settled(await desk.reply(inbound, "**answer**\n\n" + "x" * 5_000))
            assert (delivery["state"], fakes[name].refusals) == ("sent", [])
            texts = fakes[name].texts()
            assert texts[0].replace("*", "").startswith("answer")
            assert sum(text.count("x") for text in texts) == 5_000
        challenge = f"{channels['whatsapp']['webhook_path']}?hub.mode=subscribe&hub.challenge=12&hub.verify_token="
        for token, status in ((meta.verify_token, 200), ("wrong", 401)):
            answered = await desk.call({"webhook_path": challenge + token}, (b"", {}), "GET")
            assert answered.status_code == status


async def test_a_long_answer_in_a_channel_that_the_bot_has_no_access_to(desk: Desk) -> None:
    async with DiscordStandIn() as discord:
        channel = await desk.connect("discord", discord.credentials, discord.url)
        discord.missing.add("77")
        await desk.call(channel, discord.signed(discord.command("question", channel="77")))
        [inbound] = await desk.received(channel)
        delivery = await desk.settled(await desk.reply(inbound, "x" * 5_000))
        assert (delivery["state"], delivery["vendor_message_id"]) == ("sent", discord.ledger[-1].id)
        assert [len(text) for text in discord.texts("77")] == [2_000, 2_000, 1_000]


async def test_dingtalk_feishu_qq_teams_and_wecom_get_their_replies(desk: Desk) -> None:
    async with (
        DingTalkStandIn() as dingtalk,
        FeishuStandIn() as feishu,
        QQStandIn() as qq,
        TeamsStandIn() as teams,
        WeComStandIn() as wecom,
    ):
        xml, query = wecom.call(wecom.message("question"))
        fakes: dict[str, tuple[Any, tuple[bytes, dict[str, str]]]] = {
            "dingtalk": (dingtalk, dingtalk.signed(dingtalk.message("question"))),
            "feishu": (feishu, feishu.call(feishu.event("question"))),
            "qq": (qq, qq.signed(qq.event("question"))),
            "teams": (teams, teams.signed(teams.activity("question"))),
            "wecom": (wecom, (xml, {"content-type": "text/xml"})),
        }
        for name, (fake, call) in fakes.items():
            channel = await desk.connect(name, fake.credentials, fake.url)
            path = channel["webhook_path"] + (f"?{query}" if name == "wecom" else "")
            for _ in range(2):
                assert (await desk.call({"webhook_path": path}, call)).status_code == 200
            [inbound] = await desk.received(channel)
            assert inbound["text"] == "question"
            delivery = await desk.settled(await desk.reply(inbound, "**answer**\n\n" + "x" * 5_000))
            assert (delivery["state"], delivery["reason"], fake.refusals) == ("sent", None, [])
            texts = fake.texts()
            assert texts[0].replace("*", "").startswith("answer")
            assert sum(text.count("x") for text in texts) == 5_000
            assert (await desk.call(channel, (call[0], {}))).status_code == 401


async def test_a_repeated_delivery_is_sent_once_even_after_the_lane_was_pruned(
    desk: Desk, telegram: TelegramStandIn
) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    inbound = await receive(desk, channel, telegram)
    id_ = await desk.reply(inbound, "answer")
    await desk.settled(id_)
    await desk.reply(inbound, "answer", delivery_id=id_)
    await desk.settled(await desk.reply(inbound, "next"))
    async with desk.platform.database("channel").begin() as tx:
        await tx.sql("DELETE FROM lane_item WHERE item_id = $1", id_)
        await tx.sql("DELETE FROM lane_effect WHERE key LIKE $1", f"{id_}%")
    await desk.reply(inbound, "answer", delivery_id=id_)
    await desk.settled(await desk.reply(inbound, "last"))
    assert telegram.texts() == ["answer", "next", "last"]


async def test_messages_of_a_chat_keep_their_order_during_retries_and_other_chats_do_not_wait(
    desk: Desk, telegram: TelegramStandIn
) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    slow, quick = [await receive(desk, channel, telegram, chat) for chat in (1, 2)]
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


async def test_a_blocked_bot_and_a_missing_chat_are_shown_as_failed(desk: Desk, telegram: TelegramStandIn) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    telegram.blocked.add(1)
    telegram.unknown.add(2)
    reasons = []
    for chat in (1, 2):
        delivery = await desk.settled(await desk.reply(await receive(desk, channel, telegram, chat), "answer"))
        assert delivery["state"] == "failed"
        reasons.append(delivery["reason"])
    assert reasons == ["Forbidden: bot was blocked by the user", "Bad Request: chat not found"]
    assert [published["reason"] for published in await desk.published(channel, "MessageUndelivered")] == reasons
    assert telegram.calls == 2
    assert (await desk.channel(channel["id"]))["state"] == "ok"


async def test_an_unanswered_send_without_a_key_is_unknown_and_never_repeated(
    desk: Desk, telegram: TelegramStandIn
) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    inbound = await receive(desk, channel, telegram)
    telegram.faults += [cut(accept=True), cut(accept=False)]
    states = [(await desk.settled(await desk.reply(inbound, text)))["state"] for text in ("one", "two", "three")]
    assert states == ["unknown", "unknown", "sent"]
    assert telegram.texts() == ["one", "three"]
    assert [published["outcome"] for published in await desk.published(channel, "MessageUndelivered")] == [
        "unknown",
        "unknown",
    ]


async def test_an_unanswered_send_with_a_key_is_repeated_and_accepted_once(desk: Desk, webhook: WebhookStandIn) -> None:
    channel = await desk.connect("webhook", webhook.credentials)
    await desk.call(channel, webhook.message("question"))
    [inbound] = await desk.received(channel)
    webhook.faults += [cut(accept=True), answer(503, retry_after="1"), cut(accept=False)]
    delivery = await desk.settled(await desk.reply(inbound, "answer"))
    assert delivery["state"] == "sent"
    assert (webhook.texts(), webhook.repeats, webhook.refusals) == (["answer"], 1, [])


async def test_an_unanswered_send_with_a_key_that_expires_is_unknown(desk: Desk, webhook: WebhookStandIn) -> None:
    channel = await desk.connect("webhook", webhook.credentials)
    await desk.call(channel, webhook.message("question"))
    [inbound] = await desk.received(channel)
    go_on = asyncio.Event()
    webhook.faults.append(Fault(accept=True, wait=go_on))
    id_ = await desk.reply(inbound, "answer")

    async def held() -> bool:
        return not webhook.faults

    await desk.platform.until(held)
    async with desk.platform.database("channel").begin() as tx:
        statement = "UPDATE lane_item SET expires_at = clock_timestamp() WHERE kind = 'deliveries' AND tenant_id = $1"
        await tx.sql(statement, desk.tenant_id)
    go_on.set()
    delivery = await desk.settled(id_)
    assert (delivery["state"], delivery["reason"]) == ("unknown", "expired")
    assert webhook.texts() == ["answer"]


@pytest.mark.parametrize(
    ("effects", "state"),
    [
        ({"": {"vendor_message_id": "7"}}, "sent"),
        ({"": {"vendor_message_id": None, "is_last": True}}, "sent"),
        ({"/shown": None}, "sent"),
        ({"/retracted": None}, "failed"),
        ({"-1": {"vendor_message_id": "7"}, "-2": {"vendor_message_id": "8", "is_last": True}}, "sent"),
        ({"-1": {"vendor_message_id": "7", "is_last": False}}, "failed"),
    ],
)
async def test_a_delivery_that_expires_after_its_last_part_was_sent_is_sent(
    desk: Desk, telegram: TelegramStandIn, effects: dict[str, Any], state: str
) -> None:
    """The process has died after the call, before the end of the delivery was stored."""
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    inbound = await receive(desk, channel, telegram)
    async with desk.client() as http:
        await http.post(f"/api/v1/channels/{channel['id']}/pause")
    await desk.queued(id_ := await desk.reply(inbound, "answer"))
    async with desk.platform.database("channel").begin(tenant_id=desk.tenant_id) as tx:
        for key, result in effects.items():
            await tx.sql(
                """
                INSERT INTO lane_effect (tenant_id, key, kind, state, attempt, lane_id, epoch, result, started_at)
                VALUES ($1, $2, 'once', 'succeeded', 1, 1, 1, $3, now())
                """,
                desk.tenant_id,
                f"{id_}{key}",
                msgspec.json.encode(result),
            )
        await expire_delivery(DueDelivery(id_), tx)
    assert (await desk.delivery(id_))["state"] == state


async def test_an_unanswered_send_is_not_repeated_after_the_vendor_has_forgotten_its_key(desk: Desk) -> None:
    async with FeishuStandIn() as feishu:
        channel = await desk.connect("feishu", feishu.credentials, feishu.url)
        assert (await desk.call(channel, feishu.call(feishu.event("question")))).status_code == 200
        [inbound] = await desk.received(channel)
        assert (await desk.settled(await desk.reply(inbound, "first")))["state"] == "sent"
        go_on = asyncio.Event()
        feishu.faults.append(Fault(accept=True, wait=go_on))
        id_ = await desk.reply(inbound, "answer")

        async def held() -> bool:
            return not feishu.faults

        await desk.platform.until(held)
        async with desk.platform.database("channel").begin() as tx:
            await tx.sql(
                "UPDATE lane_effect SET started_at = started_at - interval '1 hour' WHERE key LIKE $1", f"{id_}%"
            )
        go_on.set()
        delivery = await desk.settled(id_)
        assert (delivery["state"], delivery["reason"]) == ("unknown", "no answer for as long as the key is known")
        assert (feishu.texts(), feishu.repeats) == (["first", "answer"], 0)


async def test_a_long_text_is_sent_in_ordered_parts_and_a_retried_part_does_not_repeat_the_first(
    desk: Desk, telegram: TelegramStandIn
) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    paragraphs = [f"{n} " + "word " * 600 for n in range(3)]
    began = time.time()
    delivery = await desk.settled(await desk.reply(await receive(desk, channel, telegram), "\n\n".join(paragraphs)))
    assert telegram.texts() == [paragraph.strip() for paragraph in paragraphs]
    assert [message.fields["reply_parameters"] is None for message in telegram.ledger] == [False, True, True]
    assert (delivery["state"], delivery["vendor_message_id"]) == ("sent", telegram.ledger[-1].id)
    # Telegram allows one message per second in a chat.
    assert telegram.ledger[-1].at - began > 1.9


async def test_a_refused_part_ends_the_delivery_and_is_named_in_the_reason(
    desk: Desk, telegram: TelegramStandIn
) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    telegram.faults += [answer(502), answer(400, {"ok": False, "error_code": 400, "description": "no"})]
    inbound = await receive(desk, channel, telegram)
    delivery = await desk.settled(await desk.reply(inbound, "word " * 1000))
    assert (delivery["state"], delivery["reason"], telegram.ledger) == ("failed", "part 1 of 2: no", [])


async def test_a_refused_account_is_broken_its_owners_get_one_mail_and_new_credentials_repair_it(
    desk: Desk, telegram: TelegramStandIn
) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    conversations = [await receive(desk, channel, telegram, chat) for chat in range(1, 5)]
    telegram.revoked = True
    lost = [await desk.reply(inbound, "lost") for inbound in conversations]
    assert {(await desk.settled(id_))["state"] for id_ in lost} == {"failed"}
    shown = await desk.channel(channel["id"])
    assert (shown["state"], shown["broken_reason"]) == ("broken", "HTTP 401")
    calls = telegram.calls
    later = await desk.settled(await desk.reply(conversations[0], "not even tried"))
    assert (later["state"], later["reason"], telegram.calls) == ("failed", "the channel is broken: HTTP 401", calls)
    assert len(await desk.published(channel, "AccountBroken")) == 1
    mails = [
        body for headers, body in await desk.platform.outbox("channel", "notification") if channel["id"] in str(body)
    ]
    assert [mail["to"] for mail in mails] == [""]
    # The words of a server that may be the tenant's own are not in it.
    assert "HTTP 401" not in mails[0]["text"]

    assert (await desk.call(channel, telegram.update("still inbound"))).status_code == 200
    telegram.revoked = False
    async with desk.client() as http:
        await http.patch(f"/api/v1/channels/{channel['id']}", json={"credentials": telegram.credentials})
    assert (await desk.channel(channel["id"]))["state"] == "ok"
    assert (await desk.settled(await desk.reply(conversations[0], "back")))["state"] == "sent"


async def test_a_receiver_that_is_gone_for_good_breaks_its_channel(desk: Desk, webhook: WebhookStandIn) -> None:
    channel = await desk.connect("webhook", webhook.credentials)
    await desk.call(channel, webhook.message("question"))
    [inbound] = await desk.received(channel)
    webhook.gone = True
    assert (await desk.settled(await desk.reply(inbound, "answer")))["state"] == "failed"
    assert (await desk.channel(channel["id"]))["state"] == "broken"


async def test_a_late_reply_and_new_messages_follow_a_group_that_became_a_supergroup(
    desk: Desk, telegram: TelegramStandIn
) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    agent = str(uuid7())
    route = {"agent_id": agent, "conversation_id": "-500", "command": None}
    async with desk.client() as http:
        await http.patch(f"/api/v1/channels/{channel['id']}", json={"routes": [route]})
    inbound = await receive(desk, channel, telegram, -500)
    telegram.moved[-500] = -100500
    for fields in ({"migrate_to_chat_id": -100500}, {"migrate_from_chat_id": -500}):
        chat = -500 if "migrate_to_chat_id" in fields else -100500
        await desk.call(channel, telegram.update(None, chat=chat, **fields))
    later = await receive(desk, channel, telegram, -100500)
    assert (later["session_key"], later["conversation_id"]) == (inbound["session_key"], "-100500")
    assert [message["agent_id"] for message in (inbound, later)] == [agent, agent]
    assert (await desk.channel(channel["id"]))["routes"] == [route | {"conversation_id": "-100500"}]
    for message in (inbound, later):
        assert (await desk.settled(await desk.reply(message, "answer")))["state"] == "sent"
    assert [message.to for message in telegram.ledger] == ["-100500", "-100500"]


async def test_a_deleted_channel_sends_nothing(desk: Desk, telegram: TelegramStandIn) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    inbound = await receive(desk, channel, telegram)
    async with desk.client() as http:
        await http.delete(f"/api/v1/channels/{channel['id']}")
    assert (await desk.settled(await desk.reply(inbound, "answer")))["reason"] == "the channel was deleted"
    assert telegram.calls == 0


async def test_a_delivery_older_than_a_day_is_not_sent(desk: Desk, telegram: TelegramStandIn) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    inbound = await receive(desk, channel, telegram)
    late = await _send_aged(desk, inbound, timedelta(hours=24, seconds=1))
    in_time = await _send_aged(desk, inbound, timedelta(hours=23))
    delivery = await desk.settled(late)
    assert (delivery["state"], delivery["reason"]) == ("failed", "expired")
    assert (await desk.settled(in_time))["state"] == "sent"
    assert telegram.texts() == ["asked 23:00:00 ago"]


@pytest.mark.parametrize("wrong", ["session_key", "channel_id", "tenant"])
async def test_a_delivery_to_an_unknown_conversation_becomes_a_dead_letter(
    desk: Desk, telegram: TelegramStandIn, wrong: str
) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    inbound = await receive(desk, channel, telegram)
    sender = Desk(desk.platform, "another") if wrong == "tenant" else desk
    changed = {} if wrong == "tenant" else {wrong: str(uuid7())}
    id_ = await sender.reply(inbound | changed, "for somebody else")

    async def dead_lettered() -> list[str]:
        database = desk.platform.database("channel")
        async with database.begin() as tx:
            connection = await tx.connection()
            return [
                error
                for letter_id, error in await tx.sql("SELECT id, error FROM dead_letter")
                if str(id_) in await read_payload(connection, letter_id, database.sealing)
            ]

    [error] = await desk.platform.until(dead_lettered)
    assert "session_key: is not a conversation of this channel" in error
    assert telegram.calls == 0


async def test_deliveries_are_listed_by_run_channel_and_state_for_one_tenant_only(
    desk: Desk, telegram: TelegramStandIn
) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    inbound = await receive(desk, channel, telegram)
    telegram.faults.append(answer(400, {"ok": False, "error_code": 400, "description": "no"}))
    failed, sent = [await desk.settled(await desk.reply(inbound, text)) for text in ("one", "two")]
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


async def _send_aged(desk: Desk, inbound: dict[str, Any], age: timedelta) -> UUID:
    message = SendMessage(
        delivery_id=uuid7(),
        channel_id=UUID(inbound["channel_id"]),
        session_key=inbound["session_key"],
        conversation_id=inbound["conversation_id"],
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
