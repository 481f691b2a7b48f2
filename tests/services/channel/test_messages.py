"""The list of messages in both directions, and sending without a run."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
import msgspec
import pytest
from asyncpg import connect

from infra.clock import uuid7
from infra.postgres.database import Database
from infra.postgres.db import create_engine
from infra.postgres.schema import role_url
from protos.catalog import PLATFORM_EVENTS
from protos.messages.user import SubjectErased
from services.channel.events import MessageTaken
from services.channel.messages_api import _CHANNELS, _INBOUND_OF_CHANNELS, _INBOUND_OF_SESSION, _SESSION
from services.channel.publishing import CONVERSATION
from tests.services.channel.conftest import Desk
from tooling.testing.platform import PASSWORDS
from tooling.testing.vendors import Fault, TelegramStandIn, TwilioStandIn, WebhookStandIn, cut


@pytest.fixture
async def telegram() -> AsyncIterator[TelegramStandIn]:
    async with TelegramStandIn() as vendor:
        yield vendor


async def messages(desk: Desk, **query: Any) -> list[dict[str, Any]]:
    """All pages, of two messages each."""
    found: list[dict[str, Any]] = []
    async with desk.client() as http:
        while True:
            page = (await http.get("/api/v1/messages", params={"limit": 2, **query})).json()
            found += page["items"]
            if page["next"] is None:
                return found
            query["cursor"] = page["next"]


async def send(desk: Desk, channel: dict[str, Any], body: dict[str, Any], **headers: str) -> httpx.Response:
    async with desk.client() as http:
        return await http.post(f"/api/v1/channels/{channel['id']}/messages", json=body, headers=headers)


async def test_messages_are_listed_in_both_directions_with_their_states(desk: Desk, telegram: TelegramStandIn) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    inbound = []
    for chat, text in ((1, "one"), (2, "two"), (1, "three")):
        await desk.call(channel, telegram.update(text, chat=chat))
        inbound.append((await desk.received(channel))[-1])
        await desk.settled(await desk.reply(inbound[-1], f"answer to {text}"))
    telegram.blocked.add(1)
    await desk.settled(await desk.reply(inbound[0], "refused"))
    found = await messages(desk, channel_id=channel["id"])
    assert [(one["direction"], one["text"], one["state"]) for one in found] == [
        ("outbound", "refused", "failed"),
        ("outbound", "answer to three", "sent"),
        ("inbound", "three", "received"),
        ("outbound", "answer to two", "sent"),
        ("inbound", "two", "received"),
        ("outbound", "answer to one", "sent"),
        ("inbound", "one", "received"),
    ]
    assert found[0]["reason"] == "Forbidden: bot was blocked by the user"
    assert found[1]["vendor_message_id"]
    assert found[1]["run_id"]
    assert found[1]["conversation_id"] == "1"
    of_session = await messages(desk, session_key=inbound[1]["session_key"])
    assert [one["text"] for one in of_session] == ["answer to two", "two"]
    assert await messages(desk) == found
    assert await messages(Desk(desk.platform, "another"), channel_id=channel["id"]) == []


async def test_a_page_of_long_messages_is_cut(desk: Desk, telegram: TelegramStandIn) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    for sign in "abcdefg":
        await desk.call(channel, telegram.update(sign * 800_000, chat=1))
    [first, *_] = await desk.received(channel)
    await desk.settled(await desk.reply(first, "short"))
    pages: list[str] = []
    query = {"limit": 200}
    async with desk.client() as http:
        while len(pages) < 3:
            page = (await http.get("/api/v1/messages", params=query)).json()
            pages.append("".join(one["text"][0] for one in page["items"]))
            if page["next"] is None:
                break
            query["cursor"] = page["next"]
    # Stored, a text of 800 kB has more than a megabyte.
    assert pages == ["sgfed", "cba"]


async def test_a_page_of_messages_with_long_edits_is_cut(desk: Desk, telegram: TelegramStandIn) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    for number in (1, 2, 3):
        await desk.call(channel, telegram.update("short", chat=1, message_id=number))
        for size in (800_000, 900_000, 700_000):
            await desk.call(channel, telegram.edit("x" * size, number, chat=1))

    async def edited() -> bool:
        async with desk.platform.database("channel").begin() as tx:
            rows = await tx.sql(
                "SELECT FROM lane_item WHERE kind = 'changes' AND state = 'waiting' AND tenant_id = $1", desk.tenant_id
            )
        return not rows

    await desk.platform.until(edited)
    async with desk.client() as http:
        page = (await http.get("/api/v1/messages")).json()
        assert [len(one["text"]) for one in page["items"]] == [700_000, 700_000]
        page = (await http.get("/api/v1/messages", params={"cursor": page["next"]})).json()
    assert ([len(one["text"]) for one in page["items"]], page["next"]) == ([700_000], None)


async def test_each_page_of_messages_reads_as_few_rows_as_the_first(desk: Desk) -> None:
    """Of 2,000 messages in one conversation and one in each of 2,000, all in one channel, a second apart."""
    begin, channel_id, prefix = datetime(2026, 1, 1, tzinfo=UTC), uuid7(), CONVERSATION.stream("").row
    long, times = f"long-{desk.tenant_id}", [begin + timedelta(seconds=n) for n in range(4_000)]
    sessions = [long if n % 2 else f"{n}-{desk.tenant_id}" for n in range(4_000)]
    data = msgspec.json.encode(MessageTaken(channel_id, "telegram", uuid7(), "s", b"", begin))
    administrator = await connect(desk.platform.database_url, server_settings={"search_path": "channel"})
    await administrator.execute(
        """
        INSERT INTO conversation (session_key, tenant_id, channel_id, subject_id)
        SELECT DISTINCT session, $2, $3::uuid, 's' FROM unnest($1::text[]) AS s(session) ORDER BY session
        """,
        sessions,
        desk.tenant_id,
        channel_id,
    )
    await administrator.execute(
        "INSERT INTO stream SELECT DISTINCT $2 || session, 1 FROM unnest($1::text[]) AS s(session) ORDER BY 1",
        sessions,
        prefix,
    )
    await administrator.execute(
        """
        INSERT INTO event (stream_id, version, event_id, type, schema_version, data, headers, recorded_at)
        SELECT $3 || session, n, gen_random_uuid(), 'MessageTaken', 1, $4, '{}', at
        FROM unnest($1::text[], $2::timestamptz[]) WITH ORDINALITY AS s(session, at, n) ORDER BY 1, 2
        """,
        sessions,
        times,
        prefix,
        data,
    )
    await administrator.execute("ANALYZE event, conversation")
    await administrator.close()
    url = role_url(desk.platform.database_url, "channel", "request", PASSWORDS.request)
    engine = create_engine(url, pool_size=1)
    lists = (_CHANNELS, _INBOUND_OF_CHANNELS, times), (_SESSION, _INBOUND_OF_SESSION, times[1::2])
    async with Database(engine, "channel", tenanted=True).begin(tenant_id=desk.tenant_id) as tx:
        for of, inbound, expected in lists:
            selected = (long, None) if of is _SESSION else ()
            reads = []
            for last in (None, expected[1_000], expected[10]):
                known = [id_ for (id_,) in await tx.sql(of, *selected)]
                where = prefix, known, last, UUID(int=0), 5
                found = [at for at, *_ in await tx.sql(inbound, *where)]
                assert found == [at for at in expected if last is None or at < last][:-6:-1]
                plans = [await tx.sql(f"EXPLAIN ANALYZE {of}", *selected)]
                plans += [await tx.sql(f"EXPLAIN ANALYZE {inbound}", *where)]
                reads.append(
                    max(map(float, re.findall(r"(?:Removed by \w+: |actual time=\S+ rows=)(\d+)", str(plans))))
                )
            assert reads == [5, 5, 5]
    await engine.dispose()


async def test_slow_lists_of_one_tenant_leave_connections_to_others(desk: Desk) -> None:
    administrator = await connect(desk.platform.database_url)
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'channel.conversation'::regclass"
    async with desk.client() as http, Desk(desk.platform, "another").client() as another:
        async with administrator.transaction():
            # Each list waits here. A process has ten connections for requests.
            await administrator.execute("LOCK TABLE channel.conversation")
            lists = [asyncio.create_task(http.get("/api/v1/messages")) for _ in range(12)]

            async def begun() -> bool:
                return int(await administrator.fetchval(waiting)) >= 5

            await desk.platform.until(begun)
            assert (await another.get("/api/v1/channels")).status_code == 200
            assert await administrator.fetchval(waiting) == 5
        assert {one.status_code for one in await asyncio.gather(*lists)} == {200}
    await administrator.close()


async def test_an_erased_person_is_not_shown(desk: Desk, telegram: TelegramStandIn) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    await desk.call(channel, telegram.update("secret", chat=7, person=7))
    [inbound] = await desk.received(channel)
    await desk.settled(await desk.reply(inbound, "your secret"))
    erased = SubjectErased(tenant_id=desk.tenant_id, subject_id=inbound["subject_id"])
    await desk.platform.produce(PLATFORM_EVENTS, erased, key=desk.tenant_id, tenant_id=desk.tenant_id)

    async def gone() -> bool:
        return {one["text"] for one in await messages(desk)} == {"[erased]"}

    await desk.platform.until(gone)
    assert {one["conversation_id"] for one in await messages(desk)} == {None}


async def test_a_message_that_a_member_sends_is_usage_of_the_member(desk: Desk, telegram: TelegramStandIn) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    member = str(uuid7())
    async with desk.platform.client("channel", desk.tenant_id, actor=f"member:{member}") as http:
        body = {"conversation_id": "5", "text": "Hello"}
        sent = await http.post(f"/api/v1/channels/{channel['id']}/messages", json=body)
    assert sent.status_code == 202, sent.text
    await desk.settled(sent.json()["delivery_id"])
    found = await desk.platform.outbox("channel", "channel.events")
    [event] = [body for _, body in found if body.get("delivery_id") == sent.json()["delivery_id"]]
    assert event["sender"] == {"member_id": member}


async def test_a_text_is_sent_without_a_run(desk: Desk, telegram: TelegramStandIn) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    # To a person who has never written.
    sent = await send(desk, channel, {"conversation_id": "5", "text": "Hello **you**"}, **{"idempotency-key": "k"})
    assert sent.status_code == 202
    again = await send(desk, channel, {"conversation_id": "5", "text": "Hello **you**"}, **{"idempotency-key": "k"})
    assert again.json() == sent.json()
    delivery = await desk.settled(sent.json()["delivery_id"])
    assert (delivery["state"], delivery["run_id"]) == ("sent", None)
    assert [(one.to, one.text) for one in telegram.ledger] == [("5", "Hello you")]
    # The answer continues the same session.
    await desk.call(channel, telegram.update("thanks", chat=5, person=5))
    [inbound] = await desk.received(channel)
    assert inbound["session_key"] == delivery["session_key"]
    found = await messages(desk, session_key=inbound["session_key"])
    assert [(one["direction"], one["text"]) for one in found] == [("inbound", "thanks"), ("outbound", "Hello **you**")]


async def test_the_agent_of_the_conversation_is_told_of_a_message_that_a_member_sends(
    desk: Desk, telegram: TelegramStandIn
) -> None:
    channel, other = await desk.connect("telegram", telegram.credentials, telegram.url), str(uuid7())
    routes = [{"agent_id": str(uuid7()), "command": "x"}, {"agent_id": other, "conversation_id": "5"}]
    async with desk.client() as http:
        assert (await http.patch(f"/api/v1/channels/{channel['id']}", json={"routes": routes})).status_code == 200
    await desk.call(channel, telegram.update("question", chat=5, person=5))
    [inbound] = await desk.received(channel)
    files = [{"url": "http://127.0.0.1:9/label.pdf", "name": "label.pdf"}]
    await send(desk, channel, {"conversation_id": "5", "text": "Tomorrow.", "attachments": files})
    await send(desk, channel, {"conversation_id": "6", "text": "Hello"})
    answers = [
        body
        for headers, body in await desk.platform.outbox("channel", "channel.answers")
        if headers["tenant_id"] == desk.tenant_id
    ]
    assert [(one["agent_id"], one["text"]) for one in answers] == [
        (other, "Tomorrow.\nlabel.pdf: <http://127.0.0.1:9/label.pdf>"),
        (channel["agent_id"], "Hello"),
    ]
    assert (answers[0]["session_key"], answers[0]["subject_id"]) == (inbound["session_key"], inbound["subject_id"])


async def test_files_follow_the_text_and_a_lost_answer_is_not_repeated(desk: Desk, telegram: TelegramStandIn) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    async with WebhookStandIn() as host:
        host.files |= {"/a.txt": b"\x89PNG\r\n\x1a\n", "/b": b"%PDF-1.7"}
        files = [{"url": f"{host.url}/a.txt", "name": ""}, {"url": f"{host.url}/b", "name": "paper.pdf"}]
        body = {"conversation_id": "5", "text": "Two files", "attachments": files}
        sent = await send(desk, channel, body, **{"idempotency-key": "k"})
        assert (await send(desk, channel, body, **{"idempotency-key": "k"})).json() == sent.json()
        delivery = await desk.settled(sent.json()["delivery_id"])
        assert telegram.texts("5") == ["Two files", "[photo a.txt]", "[document paper.pdf]"]
        assert (delivery["state"], delivery["vendor_message_id"]) == ("sent", telegram.ledger[-1].id)
        [found] = await messages(desk, channel_id=channel["id"])
        assert (found["text"], found["attachments"]) == ("Two files", files)

        telegram.faults.extend([Fault(late=True), cut(accept=True)])
        lost = await send(desk, channel, body | {"conversation_id": "6"})
        delivery = await desk.settled(lost.json()["delivery_id"])
        assert (delivery["state"], delivery["reason"][:12]) == ("unknown", "part 2 of 3:")
        assert telegram.texts("6") == ["Two files", "[photo a.txt]"]

        files[1]["url"] += "none"
        refused = await send(desk, channel, body | {"conversation_id": "7"})
        delivery = await desk.settled(refused.json()["delivery_id"])
        assert delivery["reason"] == "part 3 of 3: the file could not be fetched: HTTP 404"
        assert (await desk.channel(channel["id"]))["state"] == "ok"


async def test_a_type_that_sends_no_files_sends_links(desk: Desk) -> None:
    async with TwilioStandIn() as twilio:
        channel = await desk.connect("twilio", twilio.credentials, twilio.url)
        files = [{"url": "http://127.0.0.1/a_b_c"}, {"url": "http://127.0.0.1/*d*", "name": "paper"}]
        body = {"conversation_id": "+4915550002", "text": "Two files", "attachments": files}
        sent = await send(desk, channel, body)
        assert (await desk.settled(sent.json()["delivery_id"]))["state"] == "sent"
        assert twilio.texts() == ["Two files\n\nhttp://127.0.0.1/a_b_c\npaper: http://127.0.0.1/*d*"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"text": "x"}, "conversation_id"),
        ({"conversation_id": "", "text": "x"}, "conversation_id"),
        ({"conversation_id": "1", "text": ""}, "text"),
        ({"conversation_id": "1", "text": "x" * 100_001}, "text"),
        ({"conversation_id": "1", "text": "x", "to": "2"}, "to"),
        *(
            ({"conversation_id": "1", "text": "x", "attachments": [{"url": "http://127.0.0.1/a"}, wrong]}, field)
            for wrong, field in (
                ({"name": "a"}, "attachments[1].url"),
                ({"url": "ftp://127.0.0.1/a"}, "attachments[1].url"),
                ({"url": "http://127.0.0.1/a b"}, "attachments[1].url"),
                ({"url": "http://127.0.0.1/a>"}, "attachments[1].url"),
                ({"url": "http://me:secret@127.0.0.1/a"}, "attachments[1].url"),
                # Clouds give secrets to machines there.
                ({"url": "http://169.254.169.254/a"}, "attachments[1].url"),
                ({"url": "http://127.0.0.1/" + "a" * 1_500}, "attachments[1].url"),
                ({"url": "http://127.0.0.1/a", "name": "a\nb"}, "attachments[1].name"),
                ({"url": "http://127.0.0.1/a", "name": "a" * 201}, "attachments[1].name"),
                ({"url": "http://127.0.0.1/a", "content": "x"}, "attachments[1].content"),
            )
        ),
        ({"conversation_id": "1", "text": "x", "attachments": [{"url": "http://127.0.0.1/a"}] * 11}, "attachments"),
    ],
)
async def test_a_bad_message_is_refused(
    desk: Desk, telegram: TelegramStandIn, body: dict[str, Any], field: str
) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    refused = await send(desk, channel, body)
    assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, field)
    assert await messages(desk) == []


async def test_nothing_is_sent_through_another_tenants_channel(desk: Desk, telegram: TelegramStandIn) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    refused = await send(Desk(desk.platform, "another"), channel, {"conversation_id": "5", "text": "x"})
    assert refused.status_code == 404
