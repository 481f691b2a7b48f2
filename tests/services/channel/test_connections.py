"""Test, registration, rotation, pause and health of channels, against the running service and the fakes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.services.channel.conftest import Desk
from tooling.testing.vendors import SlackStandIn, TelegramStandIn, answer, cut, hold


@pytest.fixture
async def telegram() -> AsyncIterator[TelegramStandIn]:
    async with TelegramStandIn() as vendor:
        yield vendor


async def act(desk: Desk, channel: dict[str, Any], path: str, **body: Any) -> httpx.Response:
    async with desk.client() as http:
        return await http.post(f"/api/v1/channels/{channel['id']}/{path}", json=body or None)


async def health(desk: Desk, channel: dict[str, Any]) -> dict[str, Any]:
    async with desk.client() as http:
        found: dict[str, Any] = (await http.get(f"/api/v1/channels/{channel['id']}/health")).json()
    return found


async def question(desk: Desk, channel: dict[str, Any], vendor: TelegramStandIn) -> dict[str, Any]:
    assert (await desk.call(channel, vendor.update("question"))).status_code == 200
    return (await desk.received(channel))[-1]


async def test_a_test_makes_a_real_call_and_says_why_it_failed(desk: Desk, telegram: TelegramStandIn) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    assert (await act(desk, channel, "test")).json() == {"ok": True, "identity": "@ada_bot", "error": None}
    telegram.revoked = True
    failed = (await act(desk, channel, "test")).json()
    assert (failed["ok"], failed["identity"], failed["error"]) == (False, None, "account refused: HTTP 401")
    for fault in (answer(500), cut(accept=False)):
        telegram.faults.append(fault)
        assert (await act(desk, channel, "test")).json()["ok"] is False
    # A failed test changes nothing.
    assert (await desk.channel(channel["id"]))["state"] == "ok"


async def test_tests_are_limited(desk: Desk, telegram: TelegramStandIn) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    answers = [await act(desk, channel, "test") for _ in range(12)]
    limited = [one for one in answers if one.status_code == 429]
    assert limited
    assert all("retry-after" in one.headers for one in limited)
    assert telegram.calls == 12 - len(limited) <= 10


async def test_a_webhook_is_registered_where_the_vendor_has_a_call_for_it(
    desk: Desk, telegram: TelegramStandIn
) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    done = (await act(desk, channel, "register")).json()
    assert done["ok"]
    assert telegram.webhook == done["url"]
    assert done["url"].endswith(channel["webhook_path"])
    async with SlackStandIn() as slack:
        app = await desk.connect("slack", slack.credentials, slack.url)
        refused = await act(desk, app, "register")
    assert refused.status_code == 409
    assert app["webhook_path"] in refused.text
    assert "Event Subscriptions" in refused.text


async def test_both_credentials_work_during_a_rotation(desk: Desk) -> None:
    async with TelegramStandIn() as old, TelegramStandIn() as new:
        channel = await desk.connect("telegram", old.credentials, new.url)
        rotated = await act(desk, channel, "rotate", credentials=new.credentials, overlap_seconds=600)
        assert rotated.status_code == 200
        assert not any(s in rotated.text for s in new.credentials.values())
        for vendor in (old, new):
            inbound = await question(desk, channel, vendor)
            assert (await desk.settled(await desk.reply(inbound, "answer")))["state"] == "sent"
        # Replies use the new credentials at once.
        assert (len(old.ledger), len(new.ledger)) == (0, 2)
        async with desk.platform.database("channel").begin() as tx:
            await tx.sql("UPDATE account SET old_until = now() WHERE id = $1", channel["id"])

        async def over() -> bool:
            return (await desk.call(channel, old.update("late"))).status_code == 401

        # A process may use its cached copy of the account for a few seconds.
        await desk.platform.until(over)
        assert (await desk.call(channel, new.update("in time"))).status_code == 200


async def test_a_message_under_way_during_a_rotation_is_sent_with_the_new_credentials(desk: Desk) -> None:
    rotated = asyncio.Event()
    async with TelegramStandIn() as telegram:
        channel = await desk.connect("telegram", telegram.credentials, telegram.url)
        inbound = await question(desk, channel, telegram)
        telegram.faults.append(hold(rotated))
        calls = telegram.calls
        under_way = await desk.reply(inbound, "one")

        async def is_called() -> bool:
            return telegram.calls > calls

        await desk.platform.until(is_called)
        await act(desk, channel, "rotate", credentials=telegram.credentials | {"bot_token": "1:new"})
        telegram.bot_token = "1:new"
        rotated.set()
        assert (await desk.settled(under_way))["state"] == "sent"
        assert (await desk.channel(channel["id"]))["state"] == "ok"
        assert (await desk.settled(await desk.reply(inbound, "two")))["state"] == "sent"
        assert telegram.texts() == ["one", "two"]


async def test_without_an_overlap_the_old_credentials_end_at_once(desk: Desk) -> None:
    async with TelegramStandIn() as old, TelegramStandIn() as new:
        channel = await desk.connect("telegram", old.credentials)
        await act(desk, channel, "rotate", credentials=new.credentials)
        assert (await desk.call(channel, old.update("late"))).status_code == 401
        await act(desk, channel, "rotate", credentials=old.credentials, overlap_seconds=600)
        async with desk.client() as http:
            await http.patch(f"/api/v1/channels/{channel['id']}", json={"credentials": old.credentials})
        assert (await desk.call(channel, new.update("late"))).status_code == 401


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"credentials": {"bot_token": "1:abc"}}, "credentials.secret_token"),
        ({"credentials": {"bot_token": "1:a", "secret_token": "b"}, "overlap_seconds": -1}, "overlap_seconds"),
        ({"credentials": {"bot_token": "1:a", "secret_token": "b"}, "overlap_seconds": 10**9}, "overlap_seconds"),
        ({"overlap_seconds": 5}, "credentials"),
    ],
)
async def test_a_bad_rotation_changes_nothing(
    desk: Desk, telegram: TelegramStandIn, body: dict[str, Any], field: str
) -> None:
    channel = await desk.connect("telegram", telegram.credentials)
    refused = await act(desk, channel, "rotate", **body)
    assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, field)
    assert (await desk.call(channel, telegram.update("hi"))).status_code == 200


async def test_a_paused_channel_ignores_messages_and_its_replies_wait(desk: Desk, telegram: TelegramStandIn) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    inbound = await question(desk, channel, telegram)
    assert (await act(desk, channel, "pause")).json()["enabled"] is False
    assert (await health(desk, channel))["state"] == "paused"
    waiting = await desk.reply(inbound, "answer")
    await desk.queued(waiting)
    assert (await desk.call(channel, telegram.update("meanwhile"))).status_code == 200
    assert (await desk.ignored(channel), len(await desk.received(channel))) == (["the channel is paused"], 1)
    assert telegram.calls == 0
    assert (await act(desk, channel, "resume")).json()["enabled"] is True
    assert (await desk.settled(waiting))["state"] == "sent"
    await question(desk, channel, telegram)
    acts = [body for _, body in await desk.platform.outbox("channel", "audit.logs")]
    assert [one["action"] for one in acts if one["object_id"] == channel["id"]] == [
        "channel.create",
        "channel.pause",
        "channel.resume",
    ]


async def test_health_shows_the_last_event_the_last_delivery_and_errors(desk: Desk, telegram: TelegramStandIn) -> None:
    channel = await desk.connect("telegram", telegram.credentials, telegram.url)
    nothing = {"last_event_at": None, "last_delivery_at": None, "error_rate": 0.0, "last_error": None}
    assert await health(desk, channel) == {"state": "ok", **nothing}
    inbound = await question(desk, channel, telegram)
    await desk.settled(await desk.reply(inbound, "answer"))
    telegram.blocked.add(42)
    await desk.settled(await desk.reply(inbound, "refused"))
    found = await health(desk, channel)
    assert (found["state"], found["error_rate"]) == ("ok", 0.5)
    assert found["last_error"] == "Forbidden: bot was blocked by the user"
    assert found["last_event_at"] < found["last_delivery_at"]
    telegram.revoked = True
    await desk.settled(await desk.reply(inbound, "refused"))
    assert ((await health(desk, channel))["state"], (await health(desk, channel))["last_error"]) == (
        "broken",
        "HTTP 401",
    )


async def test_another_tenants_channel_is_404_and_reading_changes_nothing(
    desk: Desk, telegram: TelegramStandIn
) -> None:
    channel = await desk.connect("telegram", telegram.credentials)
    other = Desk(desk.platform, "another")
    acts = ("test", "register", "pause", "resume")
    assert [(await act(other, channel, name)).status_code for name in acts] == [404] * 4
    assert (await act(other, channel, "rotate", credentials=telegram.credentials)).status_code == 404
    async with other.client() as http:
        assert (await http.get(f"/api/v1/channels/{channel['id']}/health")).status_code == 404
    async with desk.platform.client("channel", desk.tenant_id, scopes=("read",)) as http:
        for name in (*acts, "rotate", "messages"):
            assert (await http.post(f"/api/v1/channels/{channel['id']}/{name}", json={})).status_code == 403
