"""SIGKILL at every boundary: no accepted message is lost, no reply is sent twice, unknown outcomes are reported."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.services.channel.conftest import Desk
from tooling.testing.platform import Platform
from tooling.testing.vendors import TelegramStandIn, WebhookStandIn

# How a delivery may end if the vendor has no idempotency key, and how many messages a person then sees.
UNKNOWN_UNSENT, UNKNOWN_SENT, SENT = ("unknown", 0), ("unknown", 1), ("sent", 1)


@pytest.fixture
async def fragile(platform: Platform, tmp_path: Path) -> AsyncIterator[Any]:
    """Starts the service so that it dies at the named failpoint once the marker file exists."""
    marker = tmp_path / "armed"

    async def start(failpoint: str) -> Path:
        await platform.prepare("channel")
        await platform.start("channel", CLAW_FAILPOINT=failpoint, CLAW_FAILPOINT_ONCE=str(marker))
        return marker

    yield start
    platform.stop("channel")


async def died_and_back(platform: Platform) -> None:
    # In a thread, because the fake answers in this event loop.
    assert await asyncio.to_thread(platform.processes["channel"].wait, 30) == -signal.SIGKILL
    await platform.start("channel")


@pytest.mark.parametrize("failpoint", ["after_append", "before_commit", "after_commit"])
async def test_a_webhook_interrupted_by_a_crash_and_sent_again_is_accepted_once(
    platform: Platform, fragile: Any, failpoint: str
) -> None:
    marker = await fragile(failpoint)
    desk = Desk(platform, "tenant")
    vendor = TelegramStandIn()
    channel = await desk.connect("telegram", vendor.credentials)
    call = vendor.update("hi")
    marker.touch()
    with pytest.raises(httpx.TransportError):
        await desk.call(channel, call)
    await died_and_back(platform)
    assert (await desk.call(channel, call)).status_code == 200
    assert [inbound["text"] for inbound in await desk.received(channel)] == ["hi"]


@pytest.mark.parametrize(
    "failpoint", ["before_accept", "after_accept", "before_drain", "before_drain_commit", "after_drain", "after_append"]
)
async def test_a_burst_interrupted_by_a_crash_and_sent_again_is_accepted_once_and_in_order(
    platform: Platform, fragile: Any, failpoint: str
) -> None:
    marker = await fragile(failpoint)
    desk = Desk(platform, "tenant")
    vendor = WebhookStandIn()
    channel = await desk.connect("webhook", vendor.credentials | {"reply_url": "http://127.0.0.1:9/"})
    calls = [vendor.message(f"{n}", conversation=f"c{n}") for n in range(40)]
    marker.touch()
    answers = await asyncio.gather(*(desk.call(channel, call) for call in calls), return_exceptions=True)
    acknowledged = [call for call, answer in zip(calls, answers, strict=True) if isinstance(answer, httpx.Response)]
    await died_and_back(platform)
    # The vendor repeats only the calls that were not answered.
    for call in calls:
        if call not in acknowledged:
            assert (await desk.call(channel, call)).status_code == 200
    for n in range(40):
        assert (await desk.call(channel, vendor.message(f"{n} again", conversation=f"c{n}"))).status_code == 200
    received = await desk.received(channel)
    assert sorted(inbound["text"] for inbound in received) == sorted(
        text for n in range(40) for text in (f"{n}", f"{n} again")
    )
    for n in range(40):
        conversation = [inbound for inbound in received if inbound["conversation_id"] == f"c{n}"]
        assert [(one["text"], one["position"]) for one in conversation] == [(f"{n}", 1), (f"{n} again", 2)]


@pytest.mark.parametrize(
    ("failpoint", "end"),
    [
        ("after_effect_started", UNKNOWN_UNSENT),
        ("after_effect_call", UNKNOWN_SENT),
        ("after_effect_commit", SENT),
        ("before_lane_commit", SENT),
        ("after_lane_commit", SENT),
    ],
)
async def test_without_a_key_a_crash_leaves_one_message_or_an_unknown_delivery(
    platform: Platform, fragile: Any, failpoint: str, end: tuple[str, int]
) -> None:
    marker = await fragile(failpoint)
    desk = Desk(platform, "tenant")
    async with TelegramStandIn() as vendor:
        channel = await desk.connect("telegram", vendor.credentials, vendor.url)
        await desk.call(channel, vendor.update("question"))
        [inbound] = await desk.received(channel)
        marker.touch()
        id_ = await desk.reply(inbound, "answer")
        await died_and_back(platform)
        delivery = await desk.settled(id_)
        assert (delivery["state"], len(vendor.ledger)) == end
        assert (await desk.settled(await desk.reply(inbound, "next")))["state"] == "sent"
    published = await desk.published(channel, "MessageUndelivered") + await desk.published(channel, "MessageDelivered")
    assert [one["delivery_id"] for one in published if one["delivery_id"] == str(id_)] == [str(id_)]


@pytest.mark.parametrize("failpoint", ["after_effect_started", "after_effect_call"])
async def test_with_a_key_a_crash_leaves_one_message(platform: Platform, fragile: Any, failpoint: str) -> None:
    marker = await fragile(failpoint)
    desk = Desk(platform, "tenant")
    async with WebhookStandIn() as vendor:
        channel = await desk.connect("webhook", vendor.credentials)
        await desk.call(channel, vendor.message("question"))
        [inbound] = await desk.received(channel)
        marker.touch()
        id_ = await desk.reply(inbound, "answer")
        await died_and_back(platform)
        assert (await desk.settled(id_))["state"] == "sent"
        assert vendor.texts() == ["answer"]


async def test_without_redis_messages_are_accepted_and_sent(platform: Platform) -> None:
    await platform.prepare("channel")
    await platform.start("channel", CLAW_REDIS_URL="redis://127.0.0.1:1")
    desk = Desk(platform, "tenant")
    async with TelegramStandIn() as vendor:
        channel = await desk.connect("telegram", vendor.credentials, vendor.url)
        await desk.call(channel, vendor.update("question"))
        [inbound] = await desk.received(channel)
        assert (await desk.settled(await desk.reply(inbound, "answer")))["state"] == "sent"
    platform.stop("channel")
