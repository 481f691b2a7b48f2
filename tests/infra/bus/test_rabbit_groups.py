"""Workers for groups: all waiting messages in one transaction, and a bad message fails alone."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import pytest
from structlog.testing import capture_logs

from infra.bus.rabbit import Workers
from infra.clock import uuid7
from infra.errors import InvalidMessage
from infra.postgres.database import Database
from infra.postgres.tx import Tx
from protos.messages.sample import TakeNote
from tests.infra.bus.conftest import Buses
from tests.infra.bus.test_rabbit import effects, letter, send
from tooling.testing.sample.catalog import SAMPLE_WORK
from tooling.testing.stack import Stack
from tooling.testing.until import until


class Desk:
    """A handler that writes an effect per message. While `gate` is closed, it keeps its group."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self.gate = asyncio.Event()
        self.bad: set[str] = set()

    async def take(self, messages: list[TakeNote], tx: Tx) -> None:
        self.groups.append([message.text for message in messages])
        await self.gate.wait()
        for message in messages:
            assert tx.origins[id(message)]["ce_type"] == "sample.v1.TakeNote"
            await tx.sql("INSERT INTO stream VALUES ($1, 1)", f"effect {message.text} {uuid7()}")
            if message.text in self.bad:
                raise InvalidMessage("text", "is bad")


@pytest.fixture
def handler() -> Desk:
    return Desk()


@asynccontextmanager
async def working(buses: Buses, desk: Database, handler: Desk, most: int = 20) -> AsyncIterator[Database]:
    running = Workers(desk, [SAMPLE_WORK.batch_worker(most=most)(handler.take)], buses.rabbitmq, buses.metrics)
    await running.start()
    yield desk
    await running.stop()


async def gathered(buses: Buses, handler: Desk, texts: list[str]) -> None:
    """The handler has the first message, and the others wait at the worker."""
    handler.groups.clear()
    handler.gate.clear()
    first = f"first of {texts[0]}"
    await send(buses, first)

    async def taken() -> bool:
        return handler.groups == [[first]]

    await until(taken)
    for text in texts:
        await send(buses, text)
    # The broker delivers in order: once this message is here, the others are, too.
    async with asyncio.timeout(30):
        while await ready(buses):
            await asyncio.sleep(0.05)
    handler.gate.set()


async def ready(buses: Buses) -> int:
    """How many messages are in the queue and not delivered to a worker."""
    publisher = buses.rabbit()
    await publisher.start()
    assert publisher._channel
    queue = await publisher._channel.declare_queue(SAMPLE_WORK.name, passive=True)
    await publisher.stop()
    return int(queue.declaration_result.message_count or 0)


async def test_waiting_messages_are_one_group_in_order_and_are_acknowledged(
    buses: Buses, desk: Database, handler: Desk
) -> None:
    texts = [f"together {n}" for n in range(5)]
    async with working(buses, desk, handler):
        await gathered(buses, handler, texts)
        await until(lambda: effects(desk, texts[-1]))
    assert handler.groups[1:] == [texts]
    # A new worker gets nothing again: all were acknowledged.
    handler.groups.clear()
    async with working(buses, desk, handler):
        await send(buses, "later")
        await until(lambda: effects(desk, "later"))
    assert handler.groups == [["later"]]
    assert [await effects(desk, text) for text in texts] == [1] * 5


async def test_a_bad_message_fails_alone(buses: Buses, desk: Database, handler: Desk) -> None:
    texts = [*(f"fine {n}" for n in range(6)), "bad", "fine 7"]
    handler.bad.add("bad")
    async with working(buses, desk, handler):
        await gathered(buses, handler, texts)
        await until(lambda: effects(desk, "fine 7"))
        bad = uuid7()
        await send(buses, "bad", id_=bad)
        found = await until(lambda: letter(desk, bad))
    assert found.error == "InvalidMessage: text: is bad"
    # The others stay in groups, as long as they may: one by one, they would delay all that come behind them.
    halves = [texts, texts[:4], texts[4:], texts[4:6], texts[6:], ["bad"], ["fine 7"]]
    assert handler.groups[1:8] == halves
    assert [await effects(desk, text) for text in texts] == [text != "bad" for text in texts]


async def test_a_repeat_in_one_group_has_one_effect(buses: Buses, desk: Database, handler: Desk) -> None:
    id_ = uuid7()
    handler.gate.clear()
    async with working(buses, desk, handler):
        await send(buses, "before")
        await until(lambda: _nonempty(handler))
        await send(buses, "repeated", id_=id_)
        await send(buses, "repeated", id_=id_)
        async with asyncio.timeout(30):
            while await ready(buses):
                await asyncio.sleep(0.05)
        handler.gate.set()
        await until(lambda: effects(desk, "repeated"))
        await send(buses, "after")
        await until(lambda: effects(desk, "after"))
    assert await effects(desk, "repeated") == 1


async def _nonempty(handler: Desk) -> bool:
    return bool(handler.groups)


async def test_a_worker_goes_on_after_its_connection_was_closed_while_it_handled_a_group(
    buses: Buses, desk: Database, handler: Desk, stack: Stack
) -> None:
    """As after a pause of the process beyond the heartbeat. The broker delivers the messages again."""
    texts = [f"closed {n}" for n in range(5)]
    lost: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: lost.append(context))
    with capture_logs() as lines:
        async with working(buses, desk, handler):
            handler.gate.clear()
            await send(buses, "kept")
            await until(lambda: _nonempty(handler))
            for text in texts:
                await send(buses, text)
            async with asyncio.timeout(30):
                while await ready(buses):
                    await asyncio.sleep(0.05)
            await close_connections(buses, stack)
            handler.gate.set()
            await until(lambda: effects(desk, texts[-1]))
            await send(buses, "after the close")
            await until(lambda: effects(desk, "after the close"))
    gc.collect()
    assert lost == []
    assert "the broker delivers them again" in " ".join(line["event"] for line in lines)
    assert [await effects(desk, text) for text in ["kept", *texts]] == [1] * 6


async def close_connections(buses: Buses, stack: Stack) -> None:
    """Closes all connections of the virtual host by the broker's management, as an operator does."""
    url = httpx.URL(stack.rabbitmq_management_url)
    vhost = urlsplit(buses.rabbitmq).path[1:]
    base = f"{url.scheme}://{url.host}:{url.port}/api"
    async with httpx.AsyncClient(auth=(url.username, url.password), trust_env=False) as client:

        async def names() -> list[str]:
            # A new connection is in this list some seconds after it was opened.
            found = (await client.get(f"{base}/vhosts/{vhost}/connections")).raise_for_status().json()
            return [one["name"] for one in found if one.get("channels")]

        for name in await until(names):
            (await client.delete(f"{base}/connections/{quote(name, safe='')}")).raise_for_status()
