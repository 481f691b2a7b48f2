"""The list of messages in both directions, and sending without a run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from protos.catalog import PLATFORM_EVENTS
from protos.messages.user import SubjectErased
from tests.services.channel.conftest import Desk
from tooling.testing.vendors import TelegramStandIn


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


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"text": "x"}, "conversation_id"),
        ({"conversation_id": "", "text": "x"}, "conversation_id"),
        ({"conversation_id": "1", "text": ""}, "text"),
        ({"conversation_id": "1", "text": "x" * 100_001}, "text"),
        ({"conversation_id": "1", "text": "x", "to": "2"}, "to"),
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
