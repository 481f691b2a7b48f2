"""From a vendor's webhook to the message that the agent gets, against the running service."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
from typing import Any
from uuid import UUID

import aio_pika
import asyncpg
import httpx
import pytest

from protos.catalog import CHANNEL_INBOUND, PLATFORM_EVENTS
from protos.messages.user import SubjectErased
from tests.services.channel.conftest import Call, Desk
from tooling.testing.vendors import (
    DiscordStandIn,
    LineStandIn,
    SlackStandIn,
    TelegramStandIn,
    WebhookStandIn,
    WhatsAppStandIn,
)
from tooling.testing.vendors.server import StandIn

TEXT = "größer \u202eesrever\u202c 😀 'quoted' \\ line\nline"


async def test_a_repeated_message_reaches_the_agents_queue_once(desk: Desk) -> None:
    vendor = TelegramStandIn()
    channel = await desk.connect("telegram", vendor.credentials)
    call = vendor.update(TEXT, chat=42, person=43, message_id=7)
    statuses = [(await desk.call(channel, call)).status_code for _ in range(3)]
    assert statuses == [200, 200, 200]
    [inbound] = await desk.received(channel)
    assert {name: inbound[name] for name in ("channel_type", "agent_id", "conversation_id", "vendor_message_id")} == {
        "channel_type": "telegram",
        "agent_id": channel["agent_id"],
        "conversation_id": "42",
        "vendor_message_id": "7",
    }
    assert inbound["text"] == TEXT
    assert not {"42", "43"} & {inbound["session_key"], inbound["subject_id"]}
    assert await desk.published(channel, "MessageReceived") == [inbound]

    connection = await aio_pika.connect(desk.platform.rabbitmq_url)
    async with connection:
        queue = await (await connection.channel()).get_queue(CHANNEL_INBOUND["telegram"].name, ensure=False)
        async with queue.iterator(timeout=30) as messages:
            async for message in messages:
                await message.ack()
                if json.loads(message.body) == inbound:
                    assert message.headers["ce_type"] == "channel.v1.MessageReceived"
                    assert message.headers["tenant_id"] == desk.tenant_id
                    break


async def test_concurrent_repeats_are_accepted_once(desk: Desk) -> None:
    vendor = TelegramStandIn()
    channel = await desk.connect("telegram", vendor.credentials)
    call = vendor.update("hi")
    answers = await asyncio.gather(*(desk.call(channel, call) for _ in range(10)))
    assert {answer.status_code for answer in answers} == {200}
    assert len(await desk.received(channel)) == 1


async def test_the_same_id_on_another_channel_is_another_message(desk: Desk) -> None:
    vendor = TelegramStandIn()
    channels = [await desk.connect("telegram", vendor.credentials) for _ in range(2)]
    call = vendor.update("hi")
    for channel in channels:
        await desk.call(channel, call)
    [one], [other] = [await desk.received(channel) for channel in channels]
    assert one["session_key"] != other["session_key"]
    assert one["subject_id"] != other["subject_id"]


async def test_a_conversation_keeps_its_session_and_its_order(desk: Desk) -> None:
    vendor = TelegramStandIn()
    channel = await desk.connect("telegram", vendor.credentials)
    for n in range(5):
        await desk.call(channel, vendor.update(f"{n}", chat=-100, person=n + 1))
    await desk.call(channel, vendor.update("topic", chat=-100, topic=5))
    inbound = await desk.received(channel)
    assert [message["text"] for message in inbound] == ["0", "1", "2", "3", "4", "topic"]
    assert len({message["session_key"] for message in inbound[:5]}) == 1
    assert len({message["subject_id"] for message in inbound[:5]}) == 5
    assert inbound[5]["session_key"] != inbound[0]["session_key"]


async def test_no_personal_content_is_stored_unencrypted(desk: Desk) -> None:
    async with WebhookStandIn() as vendor:
        channel = await desk.connect("webhook", vendor.credentials)
        await desk.call(channel, vendor.message("my secret", conversation="conv-4711", user="ada-4711"))
        [inbound] = await desk.received(channel)
        await desk.settled(await desk.reply(inbound, "your secret"))
    async with desk.platform.database("channel").begin() as tx:
        pattern = b"%" + channel["id"].encode() + b"%"
        events = [json.loads(data) for (data,) in await tx.sql("SELECT data FROM event WHERE data LIKE $1", pattern)]
        kept = [
            *await tx.sql("SELECT * FROM lane_item JOIN lane USING (lane_id)"),
            *await tx.sql("SELECT * FROM inbound_seen JOIN conversation USING (channel_id)"),
            *await tx.sql("SELECT * FROM delivery"),
            *await tx.sql("SELECT * FROM lane_effect"),
            *events,
            *(base64.b64decode(event["content"]) for event in events if "content" in event),
        ]
    assert len(events) == 3
    assert not [word for word in ("secret", "conv-4711", "ada-4711") if word in str(kept)]


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PROPFIND"])
async def test_an_unknown_webhook_path_is_404_for_every_method(desk: Desk, method: str) -> None:
    channel = await desk.connect("telegram", TelegramStandIn().credentials)
    for path in ("/webhooks/telegram/unknown", channel["webhook_path"].replace("telegram", "slack")):
        assert (await desk.call({"webhook_path": path}, (b"{}", {}), method)).status_code == 404
    assert (await desk.call(channel, (b"{}", {}), method)).status_code == 401


async def test_a_message_that_the_buses_cannot_carry_is_refused_before_it_is_accepted(desk: Desk) -> None:
    async with WebhookStandIn() as vendor:
        channel = await desk.connect("webhook", vendor.credentials)
        refused = await desk.call(channel, vendor.message("x" * 1_020_000, conversation="c", user="u"))
        assert refused.status_code == 413
        taken = await desk.call(channel, vendor.message("x" * 990_000, conversation="c", user="u"))
        assert taken.status_code == 200
        [inbound] = await desk.received(channel)
    assert (len(inbound["text"]), inbound["position"]) == (990_000, 1)


async def test_a_second_signature_or_a_new_time_makes_a_call_wrong(desk: Desk) -> None:
    fakes: dict[str, Any] = {
        "slack": SlackStandIn(),
        "line": LineStandIn(),
        "whatsapp": WhatsAppStandIn(),
        "discord": DiscordStandIn(),
    }
    names = {"slack": "x-slack-signature", "line": "x-line-signature", "whatsapp": "x-hub-signature-256"}
    for type_, fake in fakes.items():
        channel = await desk.connect(type_, fake.credentials)
        match fake:
            case SlackStandIn():
                (body, headers), later = fake.event("hi"), fake.signed({}, age=-60)[1]["x-slack-request-timestamp"]
                assert (
                    await desk.call(channel, (body, headers | {"x-slack-request-timestamp": later}))
                ).status_code == 401
            case LineStandIn():
                body, headers = fake.call(fake.event("hi"))
            case WhatsAppStandIn():
                body, headers = fake.call(fake.message("hi"))
            case _:
                body, headers = fake.signed(fake.command("hi"))
                later = str(int(headers["x-signature-timestamp"]) + 60)
                assert (await desk.call(channel, (body, headers | {"x-signature-timestamp": later}))).status_code == 401
        name = names.get(type_, "x-signature-ed25519")
        wrong = (name, "0" * len(headers[name]))
        given = list(headers.items())
        async with httpx.AsyncClient(base_url=desk.platform.url("channel"), trust_env=False, timeout=30) as http:
            for both in ([*given, wrong], [wrong, *given]):
                assert (await http.post(channel["webhook_path"], content=body, headers=both)).status_code == 401
            assert (await http.post(channel["webhook_path"], content=body, headers=given)).status_code == 200
        assert len(await desk.received(channel)) == 1


async def test_each_event_of_a_very_large_batch_is_taken_once(desk: Desk) -> None:
    line = LineStandIn()
    channel = await desk.connect("line", line.credentials)
    call = line.call(*(line.event(str(n), source={"type": "user", "userId": f"U{n % 7}"}) for n in range(1_000)))
    for _ in range(2):
        assert (await desk.call(channel, call)).status_code == 200
    await desk.drained()
    texts = [one["text"] for one in await desk.received(channel)]
    assert sorted(map(int, texts)) == list(range(1_000))


async def test_half_a_character_loses_no_message(desk: Desk) -> None:
    telegram, webhook = TelegramStandIn(), WebhookStandIn()
    text = "\ud83d pay \\ud83d 😀\ude00"
    there = {"reply_url": "http://127.0.0.1:9/"}
    for name, credentials, call in (
        ("telegram", telegram.credentials, telegram.update(text)),
        ("webhook", webhook.credentials | there, webhook.message(text)),
    ):
        channel = await desk.connect(name, credentials)
        assert (await desk.call(channel, call)).status_code == 200
        assert [one["text"] for one in await desk.received(channel)] == ["\ufffd pay \\ud83d 😀\ufffd"]


async def test_the_own_words_beside_a_quotation_of_the_bot_reach_the_agent(desk: Desk) -> None:
    telegram = TelegramStandIn()
    channel = await desk.connect("telegram", telegram.credentials)
    bot = {"message_id": 1, "from": {"id": int(telegram.bot_token.partition(":")[0]), "is_bot": True}}
    quoted: dict[str, Any] = {"reply_to_message": bot, "quote": {"text": "May I?"}}
    assert (await desk.call(channel, telegram.update("yes\0", **quoted))).status_code == 200
    [inbound] = await desk.received(channel)
    assert (inbound["text"], inbound["words"]) == ("yes\n\n[In reply to this message]\nMay I?", "yes")


async def test_a_person_with_a_new_number_goes_on_and_its_next_owner_is_another_person(desk: Desk) -> None:
    meta = WhatsAppStandIn()
    channel = await desk.connect("whatsapp", meta.credentials)

    async def call(number: str, text: str | None = None, **fields: Any) -> dict[str, Any]:
        assert (await desk.call(channel, meta.call(meta.message(text, person=number, **fields)))).status_code == 200
        return (await desk.received(channel))[-1]

    def who(message: dict[str, Any]) -> tuple[str, str]:
        return message["session_key"], message["subject_id"]

    first = await call("491", "hello", id="wamid.a", from_user_id="US.1")
    moved: dict[str, Any] = {"type": "system", "system": {"type": "user_changed_number", "wa_id": "492"}}
    for _ in range(2):
        await call("491", id="wamid.b", **moved)
    assert who(await call("492", "it is me")) == who(first)
    # Without a number.
    assert who(await call("", "me again", from_user_id="US.1")) == who(first)
    edit = {"original_message_id": "wamid.a", "message": {"type": "text", "text": {"body": "Hello"}}}
    await call("492", type="edit", edit=edit)
    other = await call("491", "who is there?", from_user_id="US.2")
    assert not set(who(other)) & set(who(first))
    # The person takes the old number back.
    await call("492", id="wamid.c", type="system", system={"type": "user_changed_number", "wa_id": "491"})
    assert who(await call("491", "back")) == who(first)
    assert who(await call("492", "somebody")) not in (who(first), who(other))

    async def edited() -> bool:
        async with desk.client() as http:
            items = (await http.get("/api/v1/messages", params={"channel_id": channel["id"]})).json()["items"]
        return bool(items[-1]["text"] == "Hello")

    await desk.platform.until(edited)


async def test_in_a_group_a_message_that_quotes_another_one_than_the_bots_is_for_other_persons(desk: Desk) -> None:
    async with LineStandIn() as line:
        channel = await desk.connect("line", line.credentials, line.url)
        group = {"type": "group", "groupId": "C1", "userId": "U1"}

        async def call(quoted: str, source: dict[str, str]) -> None:
            message = {"type": "text", "id": f"{quoted}/{source['type']}", "text": "yes", "quotedMessageId": quoted}
            assert (await desk.call(channel, line.call(line.event(source=source, message=message)))).is_success

        await call("", group)
        [first] = await desk.received(channel)
        await desk.settled(await desk.reply(first, "word " * 2_000))
        parts = [sent.id for sent in line.ledger]
        assert len(parts) == 2
        for quoted in (*parts, "of another person"):
            await call(quoted, group)
        # In a chat with the bot, there are no others.
        await call("of the person", {"type": "user", "userId": "U1"})
        told = {one["vendor_message_id"]: one["for_others"] for one in await desk.received(channel)}
        assert len(told) == 5
        assert [id_ for id_, for_others in told.items() if for_others] == ["of another person/group"]


async def test_a_thread_that_begins_at_a_message_of_the_bot_names_its_run(desk: Desk) -> None:
    async with SlackStandIn() as slack:
        channel = await desk.connect("slack", slack.credentials, slack.url)
        await desk.call(channel, slack.event("question"))
        [question] = await desk.received(channel)
        sent = await desk.settled(await desk.reply(question, "May I?"))
        for thread in (sent["vendor_message_id"], "1600000000.000001"):
            await desk.call(channel, slack.event("yes", thread_ts=thread))
        told = {one["conversation_id"]: one["thread_run_id"] for one in await desk.received(channel)}
        assert told == {
            "C1": None,
            f"C1/{sent['vendor_message_id']}": sent["run_id"],
            "C1/1600000000.000001": None,
        }


async def test_that_a_message_is_for_other_persons_reaches_the_agent(desk: Desk) -> None:
    async with TelegramStandIn() as telegram:
        channel = await desk.connect("telegram", telegram.credentials, telegram.url)
        for text, length in (("@bob yes", 4), ("@other_bot yes", 10), ("@Ada_Bot yes", 8)):
            mention = {"type": "mention", "offset": 0, "length": length}
            assert (await desk.call(channel, telegram.update(text, chat=-5, entities=[mention]))).status_code == 200
        assert [one["for_others"] for one in await desk.received(channel)] == [True, True, False]


async def test_a_forged_or_malformed_call_stores_nothing(desk: Desk) -> None:
    telegram, slack, webhook = TelegramStandIn(), SlackStandIn(), WebhookStandIn()
    channels: dict[StandIn, dict[str, Any]] = {
        vendor: await desk.connect(type_, vendor.credentials | extra)
        for type_, vendor, extra in (
            ("telegram", telegram, {}),
            ("slack", slack, {}),
            ("webhook", webhook, {"reply_url": "http://127.0.0.1:9/"}),
        )
    }
    body, headers = telegram.update("hi")
    signed_body, signed = slack.event("hi")
    cases: list[tuple[StandIn, Call, int]] = [
        (telegram, (body, {}), 401),
        (telegram, (body, headers | {"x-telegram-bot-api-secret-token": "x"}), 401),
        (telegram, (body[:-3], headers), 400),
        (telegram, (body.replace(b"hi", b"\xff"), headers), 400),
        (telegram, (b"", headers), 400),
        (telegram, (body + b" " * 2**20, headers), 413),
        (slack, (signed_body.replace(b"hi", b"ho"), signed), 401),
        (slack, slack.signed({"type": "event_callback"}, age=400), 401),
        (slack, (b"[" * 100_000, {}), 401),
        (webhook, webhook.message("hi", age=400), 401),
        (webhook, webhook.message("hi", age=-400), 401),
        (webhook, webhook.signed(b"\xff\xfe"), 400),
        (webhook, webhook.signed(b"[" * 100_000), 400),
        (webhook, webhook.signed({"text": "hi"}), 400),
    ]
    for vendor, call, status in cases:
        assert (await desk.call(channels[vendor], call)).status_code == status, call
    for channel in channels.values():
        assert await desk.received(channel) == []


async def test_calls_are_counted_by_their_route_and_status_and_no_token_is_shown(desk: Desk) -> None:
    vendor = TelegramStandIn()
    channel = await desk.connect("telegram", vendor.credentials)
    async with httpx.AsyncClient(base_url=desk.platform.url("channel"), trust_env=False, timeout=30) as http:

        async def counted(status: int) -> float:
            text = (await http.get("/metrics")).text
            label = f'method="POST",route="/webhooks/{{type}}/{{token}}",status="{status}"'
            assert channel["webhook_path"] not in text
            return sum(float(line.split()[-1]) for line in text.splitlines() if f"_count{{{label}}}" in line)

        before = [await counted(status) for status in (200, 401, 404)]
        # The first call reads its account, the others find it in the cache.
        for _ in range(3):
            assert (await desk.call(channel, vendor.update("hi"))).status_code == 200
        await desk.call(channel, (b"{}", {}))
        await desk.call({"webhook_path": f"/webhooks/telegram/{'a' * 32}"}, vendor.update("hi"))
        after = [await counted(status) for status in (200, 401, 404)]
    assert [now - then for now, then in zip(after, before, strict=True)] == [3, 1, 1]


async def test_the_handshake_of_slack_is_answered(desk: Desk) -> None:
    vendor = SlackStandIn()
    channel = await desk.connect("slack", vendor.credentials)
    response = await desk.call(channel, vendor.signed({"type": "url_verification", "token": "t", "challenge": "abc"}))
    assert (response.status_code, response.text) == (200, "abc")


async def test_slacks_mention_and_message_events_of_one_text_are_one_message_also_as_a_retry(desk: Desk) -> None:
    vendor = SlackStandIn()
    channel = await desk.connect("slack", vendor.credentials)
    mention = vendor.event("<@U0BOT> hi", kind="app_mention", ts="1700000000.000777")
    for call in (mention, vendor.event("<@U0BOT> hi", ts="1700000000.000777"), mention):
        answer = await desk.call(channel, call, **{"x-slack-retry-num": "1", "x-slack-retry-reason": "http_timeout"})
        assert answer.status_code == 200
    [inbound] = await desk.received(channel)
    assert inbound["text"] == "<@U0BOT> hi"


async def test_an_ignored_event_is_answered_200_and_stored_with_its_reason(desk: Desk) -> None:
    vendor = TelegramStandIn()
    channel = await desk.connect("telegram", vendor.credentials)
    poll = {"update_id": 5, "poll": {"id": "1"}}
    for call in (vendor.signed(poll), vendor.update("\0 \0"), vendor.update("")):
        assert (await desk.call(channel, call)).status_code == 200
    async with desk.client() as http:
        await http.patch(f"/api/v1/channels/{channel['id']}", json={"enabled": False})
    assert (await desk.call(channel, vendor.update("hi"))).status_code == 200
    assert await desk.received(channel) == []
    assert await desk.ignored(channel) == [
        "votes in a poll, without their chat",
        "the text is empty",
        "the text is empty",
        "the channel is paused",
    ]


async def test_an_event_of_an_unexpected_shape_is_answered_200_and_stored_with_its_reason(desk: Desk) -> None:
    telegram, slack = TelegramStandIn(), SlackStandIn()
    bot = await desk.connect("telegram", telegram.credentials)
    app = await desk.connect("slack", slack.credentials)
    for channel, call in (
        (bot, telegram.signed({"update_id": 5, "message": {"message_id": "x"}})),
        (bot, telegram.signed({"update_id": "x"})),
        (app, slack.event("hi", user=None)),
        (app, slack.signed({"type": "event_callback", "event": {"type": "message", "user": "U1"}})),
    ):
        assert (await desk.call(channel, call)).status_code == 200
    assert (await desk.call(bot, telegram.update("read"))).status_code == 200
    assert (await desk.call(app, slack.event("read"))).status_code == 200
    for channel, count in ((bot, 2), (app, 1)):
        assert [inbound["text"] for inbound in await desk.received(channel)] == ["read"]
        shapes = [reason for reason in await desk.ignored(channel) if reason.startswith("unexpected shape: ")]
        assert len(shapes) == count


async def test_nul_is_removed_and_a_very_long_text_is_kept_whole(desk: Desk) -> None:
    async with WebhookStandIn() as vendor:
        channel = await desk.connect("webhook", vendor.credentials)
    long = "界" * 200_000
    for text in ("a\0b", long):
        assert (await desk.call(channel, vendor.message(text))).status_code == 200
    assert [message["text"] for message in await desk.received(channel)] == ["ab", long]


async def test_the_message_of_an_erased_person_is_not_stored(desk: Desk) -> None:
    vendor = TelegramStandIn()
    channel = await desk.connect("telegram", vendor.credentials)
    await desk.call(channel, vendor.update("before"))
    [inbound] = await desk.received(channel)
    erased = SubjectErased(tenant_id=desk.tenant_id, subject_id=inbound["subject_id"])
    await desk.platform.produce(PLATFORM_EVENTS, erased, key=desk.tenant_id, tenant_id=desk.tenant_id)

    async def destroyed() -> bool:
        async with desk.platform.database("channel").begin() as tx:
            rows = await tx.sql("SELECT destroyed_at FROM subject_key WHERE subject_id = $1", inbound["subject_id"])
        return rows[0][0] is not None

    await desk.platform.until(destroyed)
    assert (await desk.call(channel, vendor.update("after"))).status_code == 200
    assert await desk.received(channel) == [inbound]
    assert await desk.ignored(channel) == ["the author was erased"]
    delivery = await desk.settled(await desk.reply(inbound, "an answer that comes too late"))
    assert (delivery["state"], delivery["reason"]) == ("failed", "the person was erased")


async def test_dedupe_rows_are_kept_for_thirty_days(desk: Desk) -> None:
    vendor = TelegramStandIn()
    channel = await desk.connect("telegram", vendor.credentials)
    database = desk.platform.database("channel")
    for days in (31, 29):
        await desk.call(channel, vendor.update("hi"))
        async with database.begin() as tx:
            await tx.sql(
                "UPDATE inbound_seen SET seen_at = now() - make_interval(days => $2) "
                "WHERE channel_id = $1 AND seen_at > now() - interval '1 day'",
                UUID(channel["id"]),
                days,
            )

    async def left() -> list[int]:
        await desk.call(channel, vendor.signed({"update_id": 1}))
        async with database.begin() as tx:
            rows = await tx.sql(
                "SELECT DISTINCT extract(day FROM now() - seen_at)::int FROM inbound_seen WHERE channel_id = $1 "
                "AND seen_at < now() - interval '1 day'",
                UUID(channel["id"]),
            )
        return [days for (days,) in rows]

    async def cleared() -> bool:
        return await left() == [29]

    await desk.platform.until(cleared)


async def test_concurrent_messages_of_several_tenants_are_each_accepted_once_for_their_own_tenant(desk: Desk) -> None:
    desks = [desk, *(Desk(desk.platform, f"{desk.tenant_id}-{n}") for n in range(3))]
    vendor = SlackStandIn()
    channels = [await each.connect("slack", vendor.credentials) for each in desks]
    calls = [
        (each, channel, vendor.event(f"{each.tenant_id} {n}", channel=f"C{n % 3}", user=f"U{n % 4}"))
        for n in range(25)
        for each, channel in zip(desks, channels, strict=True)
    ]
    traces = [secrets.token_hex(16) for _ in calls]
    answers = await asyncio.gather(
        *(
            each.call(channel, call, traceparent=f"00-{trace}-{'1' * 16}-01")
            for (each, channel, call), trace in zip(calls * 2, traces * 2, strict=True)
        )
    )
    assert {answer.status_code for answer in answers} == {200}
    await desk.drained()
    rows = await desk.platform.outbox("channel", "channel.inbound")
    texts = [body["text"] for _, body in rows if body["channel_id"] in {channel["id"] for channel in channels}]
    assert sorted(texts) == sorted(f"{each.tenant_id} {n}" for n in range(25) for each in desks)
    for headers, body in rows:
        if body["text"] in texts:
            assert body["text"].rpartition(" ")[0] == headers["tenant_id"]
    async with desk.platform.database("channel").begin() as tx:
        stored = await tx.sql(
            "SELECT headers, data FROM event WHERE stream_id = ANY($1)",
            [f"conversation:{body['session_key']}" for _, body in rows if body["text"] in texts],
        )
    by_channel = {channel["id"]: each.tenant_id for each, channel in zip(desks, channels, strict=True)}
    assert len(stored) == len(calls)
    for event_headers, data in stored:
        assert json.loads(event_headers)["tenant_id"] == by_channel[json.loads(data)["channel_id"]]
    published = {body["text"]: headers["traceparent"].split("-")[1] for headers, body in rows if body["text"] in texts}
    sent = {f"{each.tenant_id} {n // 4}": traces[n] for n, (each, _, _) in enumerate(calls)}
    assert published == sent


async def test_a_message_that_cannot_be_stored_does_not_fail_others(desk: Desk) -> None:
    vendor = TelegramStandIn()
    good, bad = [await desk.connect("telegram", vendor.credentials) for _ in range(2)]
    administrator = await asyncpg.connect(desk.platform.database_url)
    try:
        await administrator.execute(
            f"ALTER TABLE channel.inbound_seen ADD CONSTRAINT bad CHECK (channel_id <> '{bad['id']}') NOT VALID"
        )
        calls = [*([good] * 20), bad, *([good] * 20)]
        answers = await asyncio.gather(*(desk.call(channel, vendor.update("hi")) for channel in calls))
    finally:
        await administrator.execute("ALTER TABLE channel.inbound_seen DROP CONSTRAINT bad")
        await administrator.close()
    assert [answer.status_code for answer in answers] == [200] * 20 + [500] + [200] * 20
    assert len(await desk.received(good)) == 40


async def test_a_database_outage_is_answered_503_and_no_secret_is_logged(
    desk: Desk,
) -> None:
    vendor = TelegramStandIn()
    channel = await desk.connect("telegram", vendor.credentials)
    call = vendor.update("my secret")
    await desk.call(channel, (b"{}", {}))
    await desk.call({"webhook_path": "/webhooks/telegram/mistaken"}, call)
    async with desk.platform.database("channel").begin() as tx:
        # A request that stores a message waits for this lock and fails, as with a database that hangs.
        await tx.sql("LOCK TABLE inbound_seen")
        waiting = asyncio.create_task(desk.call(channel, call))

        # The service's own deletion of old rows may wait for the lock, too.
        blocked = """
            FROM pg_stat_activity
            WHERE $1::int = ANY(pg_blocking_pids(pid)) AND query LIKE '%INSERT INTO inbound_seen%'
        """

        async def is_blocked() -> bool:
            # Otherwise a transaction sees the sessions of its first look, with their queries.
            await tx.sql("SELECT pg_stat_clear_snapshot()")
            return bool(await tx.sql(f"SELECT pid {blocked}", own))

        [(own,)] = await tx.sql("SELECT pg_backend_pid()")
        await desk.platform.until(is_blocked)
        await tx.sql(f"SELECT pg_terminate_backend(pid) {blocked}", own)
        assert (await waiting).status_code == 503
    assert (await desk.call(channel, call)).status_code == 200
    assert len(await desk.received(channel)) == 1
    log = desk.platform.log("channel")
    assert "request failed" in log
    assert not [word for word in (channel["webhook_path"], "mistaken", "my secret") if word in log]
