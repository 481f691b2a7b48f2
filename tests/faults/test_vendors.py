"""Each vendor's message goes the whole way to the bill. A storm of repeats over two instances is one run each."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any

import httpx

from services.channel.vendors import VENDORS
from tests.faults.test_main_job import billed, delivered, ended
from tooling.testing.platform import Platform
from tooling.testing.processes import Process
from tooling.testing.stack import free_ports
from tooling.testing.vendors import (
    DingTalkStandIn,
    DiscordStandIn,
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
)

QUESTION = "What is 6 * 7?"
# Messages of the storm, and how often each is sent at once to each instance.
CHATS, TIMES = 10, 20


async def connected(platform: Platform, tenant: str, name: str, fake: Any) -> tuple[str, str]:
    """A channel of the vendor to an agent of its own: the agent's id, and the webhook's path."""
    async with platform.client("agent", tenant) as api:
        body = {"name": name, "model": "scripted/answer", "system_prompt": "Be brief.", "tools": ["calculator"]}
        made = await api.post("/api/v1/agents", json=body)
    assert made.status_code == 201, made.text
    agent = made.json()["id"]
    account = {"type": name, "agent_id": agent, "credentials": fake.credentials}
    if VENDORS[name].origin:
        account["api_base"] = fake.url
    async with platform.client("channel", tenant) as api:
        answer = await api.post("/api/v1/channels", json=account)
    assert answer.status_code == 201, answer.text
    return agent, answer.json()["webhook_path"]


def question(name: str, fake: Any, path: str) -> tuple[bytes, dict[str, str], str]:
    """Body, headers and query of a genuine call."""
    query = ""
    match name:
        case "telegram":
            call = fake.update(QUESTION)
        case "slack":
            call = fake.event(QUESTION)
        case "discord":
            call = fake.signed(fake.command(QUESTION))
        case "whatsapp":
            call = fake.call(fake.message(QUESTION))
        case "line":
            call = fake.call(fake.event(QUESTION))
        case "twilio":
            call = fake.message(f"http://127.0.0.1:8080{path}", QUESTION)
        case "feishu":
            call = fake.call(fake.event(QUESTION))
        case "teams":
            call = fake.signed(fake.activity(QUESTION))
        case "qq":
            call = fake.signed(fake.event(QUESTION))
        case "dingtalk":
            call = fake.signed(fake.message(QUESTION))
        case "wecom":
            body, query = fake.call(fake.message(QUESTION))
            call = body, {"content-type": "text/xml"}
        case _:
            call = fake.message(QUESTION)
    return (*call, query)


FAKES: dict[str, type[Any]] = {
    "telegram": TelegramStandIn,
    "slack": SlackStandIn,
    "discord": DiscordStandIn,
    "teams": TeamsStandIn,
    "whatsapp": WhatsAppStandIn,
    "line": LineStandIn,
    "twilio": TwilioStandIn,
    "feishu": FeishuStandIn,
    "dingtalk": DingTalkStandIn,
    "wecom": WeComStandIn,
    "qq": QQStandIn,
    "webhook": WebhookStandIn,
}


async def test_each_vendors_message_is_answered_delivered_and_billed_once(platform: Platform, tenant: str) -> None:
    assert set(FAKES) == set(VENDORS)

    async def goes(name: str, fake: Any, agent: str, path: str) -> None:
        body, headers, query = question(name, fake, path)
        async with httpx.AsyncClient(base_url=platform.url("channel"), trust_env=False, timeout=60) as vendor:
            for _ in range(2):
                answer = await vendor.post(f"{path}?{query}" if query else path, content=body, headers=headers)
                assert answer.status_code == 200, (name, answer.text)
        run = await ended(platform, tenant, agent)
        assert run["status"] == "completed", (name, run)
        assert (await delivered(platform, tenant, run["id"]))["state"] == "sent", name
        assert fake.texts() == [run["reply"]], name
        assert fake.refusals == [], name
        await billed(platform, tenant, run["id"])

    async with AsyncExitStack() as stack:
        fakes = {name: await stack.enter_async_context(kind()) for name, kind in FAKES.items()}
        places = {name: await connected(platform, tenant, name, fake) for name, fake in fakes.items()}
        await asyncio.gather(*(goes(name, fake, *places[name]) for name, fake in fakes.items()))


async def test_a_storm_of_repeats_over_two_instances_with_a_kill_is_one_run_and_one_reply_each(
    platform: Platform, tenant: str
) -> None:
    ports = free_ports(["channel", "channel_grpc"])
    environment = platform.environment("channel") | {
        "CLAW_HTTP_PORT": str(ports["channel"]),
        "CLAW_GRPC_PORT": str(ports["channel_grpc"]),
    }
    second = Process("services.channel", environment, platform.folder / "second.log")
    urls = [platform.url("channel"), f"http://127.0.0.1:{ports['channel']}"]
    try:
        async with LineStandIn() as line, httpx.AsyncClient(trust_env=False, timeout=60) as vendor:

            async def ready() -> bool:
                try:
                    return (await vendor.get(f"{urls[1]}/readyz")).status_code == 200
                except httpx.TransportError:
                    return False

            await platform.until(ready)
            agent, path = await connected(platform, tenant, "line", line)
            calls = [line.call(line.event(QUESTION, source={"type": "user", "userId": f"U{n}"})) for n in range(CHATS)]
            answered: Counter[int] = Counter()
            killed = asyncio.Event()

            async def sends(n: int, url: str) -> None:
                """As a vendor: again until it is told 200."""
                body, headers = calls[n]

                async def told() -> bool:
                    # After the kill, the balancer leads to the other instance.
                    to = urls[0] if killed.is_set() else url
                    try:
                        return (await vendor.post(f"{to}{path}", content=body, headers=headers)).status_code == 200
                    except httpx.TransportError:
                        return False

                await platform.until(told)
                answered[n] += 1
                if sum(answered.values()) == CHATS * TIMES // 2:
                    second.kill()
                    killed.set()

            await asyncio.gather(*(sends(n, url) for _ in range(TIMES) for n in range(CHATS) for url in urls))
            assert set(answered.values()) == {2 * TIMES}

            async def all_ended() -> list[dict[str, Any]] | None:
                async with platform.client("agent", tenant) as api:
                    items = (await api.get("/api/v1/runs", params={"agent_id": agent, "limit": 100})).json()["items"]
                over = [run for run in items if run["status"] not in ("queued", "running", "waiting")]
                return items if len(over) >= CHATS else None

            runs = await platform.until(all_ended)
            assert [run["status"] for run in runs] == ["completed"] * CHATS
            for run in runs:
                assert (await delivered(platform, tenant, run["id"]))["state"] == "sent"
            assert Counter(message.to for message in line.ledger) == {f"U{n}": 1 for n in range(CHATS)}
            assert line.refusals == []
    finally:
        second.kill()
        await asyncio.to_thread(second.wait, 30)
