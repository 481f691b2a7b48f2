"""Workers: effect, inbox and commit before the ack; the ladder; dead letters, also those the broker gives up."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import aio_pika
import msgspec
import pytest
from aio_pika.exceptions import AMQPError, DeliveryError
from msgspec.structs import replace
from structlog.testing import capture_logs

from infra.bus import rabbit, rabbit_publisher
from infra.bus.outbox import Pending
from infra.bus.rabbit import Workers
from infra.bus.rabbit_publisher import RabbitPublisher
from infra.clock import utcnow, uuid7
from infra.errors import InvalidMessage, RetryLater, Transient
from infra.lanes.lane import Lane
from infra.lanes.resequencer import MissingMessages, Resequencer
from infra.postgres.database import Database
from infra.postgres.dead_letters import DeadLetterView, list_dead_letters, read_payload
from infra.postgres.tx import Tx
from infra.service.redrive import request_redrive
from protos.envelope import Envelope
from protos.messages.sample import TakeNote
from protos.topology import Queue
from tests.infra.bus.conftest import Buses
from tooling.testing.proxy import FaultProxy
from tooling.testing.sample.catalog import SAMPLE_WORK
from tooling.testing.until import until


class Desk:
    """A handler that writes an effect, and fails as it is told to; `attempts` counts its calls per text."""

    def __init__(self) -> None:
        self.failures: dict[str, list[Exception]] = {}
        self.attempts: dict[str, int] = {}

    async def take(self, message: TakeNote, tx: Tx) -> None:
        self.attempts[message.text] = self.attempts.get(message.text, 0) + 1
        await tx.sql("INSERT INTO stream VALUES ($1, 1)", f"effect {message.text} {self.attempts[message.text]}")
        if self.failures.get(message.text):
            raise self.failures[message.text].pop(0)


@pytest.fixture
def handler() -> Desk:
    return Desk()


@pytest.fixture
async def working(buses: Buses, desk: Database, handler: Desk) -> AsyncIterator[Database]:
    async with workers(buses, desk, handler):
        yield desk


@asynccontextmanager
async def workers(buses: Buses, desk: Database, handler: Desk, queue: Queue = SAMPLE_WORK) -> AsyncIterator[None]:
    subscription = queue.worker(prefetch=5)(handler.take)
    running, publisher = Workers(desk, [subscription], buses.rabbitmq, buses.metrics), buses.rabbit()
    await running.start()
    async with buses.redriver(desk, subscription), buses.relay(desk, publisher):
        yield
    # A connection that stays open outlives the loop, and the next test would fail.
    await publisher.stop()
    await running.stop()


async def send(
    buses: Buses, text: str, *, id_: UUID | None = None, body: bytes | None = None, age: timedelta = timedelta()
) -> UUID:
    id_ = id_ or uuid7()
    publisher = buses.rabbit()
    envelope = Envelope(id=id_, source="test", type="sample.v1.TakeNote", time=utcnow() - age)
    body = body if body is not None else msgspec.json.encode(TakeNote(notebook="b", text=text))
    await publisher.send("sample", "sample.work", body, envelope.headers(), str(id_))
    await publisher.stop()
    return id_


async def effects(desk: Database, text: str) -> int:
    async with desk.begin() as tx:
        [(count,)] = await tx.sql("SELECT count(*) FROM stream WHERE starts_with(stream_id, $1)", f"effect {text} ")
    return int(count)


async def letter(desk: Database, id_: UUID) -> DeadLetterView | None:
    async with desk.engine.connect() as connection:
        for found in await list_dead_letters(connection, "sample_desk"):
            if found.message_id == str(id_):
                return replace(found, payload=await read_payload(connection, found.id, desk.sealing))
    return None


async def test_a_repeat_has_no_second_effect(working: Database, buses: Buses, handler: Desk) -> None:
    id_ = await send(buses, "twice")
    await until(lambda: effects(working, "twice"))
    await send(buses, "twice", id_=id_)
    await send(buses, "after twice")
    await until(lambda: effects(working, "after twice"))
    assert handler.attempts["twice"] == 1


@pytest.mark.parametrize("failure", [RuntimeError("once"), Transient("once"), RetryLater(timedelta(milliseconds=900))])
async def test_a_failure_is_retried_by_the_ladder_and_leaves_one_effect(
    working: Database, buses: Buses, handler: Desk, failure: Exception
) -> None:
    text = f"retried {type(failure).__name__}"
    handler.failures[text] = [failure]
    await send(buses, text)
    await until(lambda: effects(working, text))
    assert handler.attempts[text] == 2
    assert await effects(working, text) == 1


async def test_after_the_ladder_it_is_a_dead_letter_that_can_be_redriven(
    working: Database, buses: Buses, handler: Desk
) -> None:
    handler.failures["hard"] = [ValueError(f"attempt {n}") for n in range(1, 4)]
    id_ = await send(buses, "hard")
    found = await until(lambda: letter(working, id_))
    assert (found.attempts, found.state, found.error) == (3, "failed", "ValueError: attempt 3")
    assert found.source == "rabbit:sample.work"
    assert '"text":"hard"' in found.payload
    assert await effects(working, "hard") == 0
    async with working.begin() as tx:
        await request_redrive(tx, [found.id], actor="test")
    await until(lambda: effects(working, "hard"))
    assert await letter(working, id_) is None


async def test_what_is_invalid_is_a_dead_letter_at_once(working: Database, buses: Buses, handler: Desk) -> None:
    handler.failures["invalid"] = [InvalidMessage("notebook", "is closed")]
    refused = await send(buses, "invalid")
    unreadable = await send(buses, "", body=b"\xff\x00 no json")
    found = await until(lambda: letter(working, refused))
    assert (found.attempts, found.error) == (1, "InvalidMessage: notebook: is closed")
    found = await until(lambda: letter(working, unreadable))
    assert found.error.startswith("InvalidMessage: body: ")
    assert found.payload == "\\xff\x00 no json"


async def test_a_message_that_is_older_than_its_queue_allows_is_a_dead_letter(
    desk: Database, buses: Buses, handler: Desk
) -> None:
    async with workers(buses, desk, handler, dataclasses.replace(SAMPLE_WORK, expires=timedelta(hours=1))):
        old = await send(buses, "old", age=timedelta(minutes=61))
        await send(buses, "fresh", age=timedelta(minutes=59))
        found = await until(lambda: letter(desk, old))
        await until(lambda: effects(desk, "fresh"))
    assert found.error == "InvalidMessage: header ce_time: must not be older than 1:00:00"
    assert list(handler.attempts) == ["fresh"]


async def test_the_resequencer_knows_a_dead_letter_by_its_key_and_position(
    working: Database, buses: Buses, handler: Desk
) -> None:
    handler.failures["dead seventh"] = [InvalidMessage("notebook", "is closed")]
    with capture_logs() as lines:
        async with working.begin(tenant_id="t") as tx:
            id_ = tx.send(SAMPLE_WORK, TakeNote(notebook="b", text="dead seventh"), key="conversation", position=7)
            other = tx.send(SAMPLE_WORK, TakeNote(notebook="b", text="done"), key="conversation", position=8)
        found = await until(lambda: letter(working, id_))
        assert found.key == "conversation"
        await until(lambda: effects(working, "done"))
    assert [line["tenant"] for line in lines if "dead letter" in line["event"]] == ["t"]
    async with working.begin(tenant_id="t") as tx:
        assert await Resequencer(Lane("gaps", MissingMessages))._dead(tx, "conversation") == {7}
        buckets = await tx.sql("SELECT DISTINCT bucket FROM outbox WHERE message_id = ANY($1::uuid[])", [id_, other])
    assert len(buckets) == 1


async def test_a_message_that_the_broker_refuses_is_not_overtaken_by_another_one_of_its_key() -> None:
    sent: list[str] = []

    class Broker(RabbitPublisher):
        async def start(self) -> None: ...

        async def send(
            self, exchange: str, routing_key: str, body: bytes, headers: Mapping[str, Any], message_id: str
        ) -> None:
            sent.append(body.decode())
            await asyncio.sleep(0)
            if body == b"a2":
                raise DeliveryError(None, None)  # type: ignore[arg-type]

    rows = [
        Pending(n, uuid7(), "exchange", "key", body[:1], {}, body.encode())
        for n, body in enumerate(["a1", "b1", "a2", "a3", "b2", "a4"])
    ]
    outcomes = await Broker("amqp://unused").publish(rows)
    assert sorted(sent) == ["a1", "a2", "b1", "b2"]
    assert [row.body.decode() for row, outcome in zip(rows, outcomes, strict=True) if outcome] == ["a2", "a3", "a4"]


async def test_messages_do_not_wait_for_each_other_on_a_busy_event_loop(buses: Buses) -> None:
    """A turn of the event loop is long while a tenant's many runs are under way. A reply of another tenant took three
    turns for each message before it."""
    turns, busy = 0, True

    def turn() -> None:
        nonlocal turns
        turns += 1
        time.sleep(0.01)
        if busy:
            asyncio.get_running_loop().call_soon(turn)

    publisher = buses.rabbit()
    async with await aio_pika.connect(buses.rabbitmq) as own:
        queue = await (await own.channel()).declare_queue(exclusive=True)
        rows = [Pending(n, uuid7(), "", queue.name, f"conversation {n}", {}, b"{}") for n in range(200)]
        await publisher.start()
        turn()
        try:
            outcomes = await publisher.publish(rows)
        finally:
            busy = False
            await publisher.stop()
    assert outcomes == [None] * len(rows)
    # Also the turns in which the broker confirms.
    assert turns < 2 * len(rows)


async def test_what_the_broker_gives_up_is_a_dead_letter_too(working: Database, buses: Buses, handler: Desk) -> None:
    id_ = uuid7()
    publisher = buses.rabbit()
    headers = {**Envelope(id=id_, source="test", type="sample.v1.TakeNote", time=utcnow()).headers()}
    await publisher.send(
        "", SAMPLE_WORK.dead_letter_queue, b"{}", {**headers, "x-first-death-reason": "delivery_limit"}, str(id_)
    )
    await publisher.stop()
    found = await until(lambda: letter(working, id_))
    assert found.error == "dead-lettered by the broker: delivery_limit"


async def test_a_message_that_nobody_acknowledged_comes_again_to_the_next_process(
    buses: Buses, desk: Database, handler: Desk
) -> None:
    """The stop drains: messages that were prefetched and not handled go back to the queue."""
    async with workers(buses, desk, handler):
        for n in range(30):
            await send(buses, f"many {n}")
    async with workers(buses, desk, handler):
        for n in range(30):
            await until(lambda n=n: effects(desk, f"many {n}"))  # type: ignore[misc]
    assert all(count == 1 for text, count in handler.attempts.items() if text.startswith("many"))


async def test_a_broker_that_falls_silent_is_an_error_and_not_a_cancellation(
    buses: Buses, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CancelledError out of a publish would end the relay, and a worker would never let its message go."""
    monkeypatch.setattr(rabbit_publisher, "HEARTBEAT_SECONDS", 1)
    broker = urlsplit(buses.rabbitmq)
    async with FaultProxy(broker.hostname or "", broker.port or 0) as proxy:
        publisher = RabbitPublisher(buses.rabbitmq.replace(f":{broker.port}/", f":{proxy.port}/"))
        headers = Envelope(id=uuid7(), source="test", type="sample.v1.TakeNote", time=utcnow()).headers()

        async def publish() -> bool:
            await publisher.send("", SAMPLE_WORK.dead_letter_queue, b"{}", headers, str(uuid7()))
            return True

        async def publishes() -> bool:
            with suppress(AMQPError, OSError):
                return await publish()
            return False

        try:
            await publish()
            proxy.blackhole()
            failures = await asyncio.gather(*(publish() for _ in range(30)), return_exceptions=True)
            assert all(isinstance(failure, AMQPError | OSError) for failure in failures), failures
            proxy.heal()
            await until(publishes)
        finally:
            await publisher.stop()


async def test_a_worker_that_gets_no_answer_while_it_connects_tries_again(
    buses: Buses, desk: Database, handler: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a broker that starts accepts connections and does not answer yet."""
    monkeypatch.setattr(rabbit_publisher, "HEARTBEAT_SECONDS", 1)
    for module in (rabbit, rabbit_publisher):
        monkeypatch.setattr(module, "CONNECT_SECONDS", 0.5)
        monkeypatch.setattr(module, "RECONNECT_SECONDS", 0.1)
    broker = urlsplit(buses.rabbitmq)
    async with FaultProxy(broker.hostname or "", broker.port or 0) as proxy:
        url = buses.rabbitmq.replace(f":{broker.port}/", f":{proxy.port}/")
        running = Workers(desk, [SAMPLE_WORK.worker(prefetch=5)(handler.take)], url, buses.metrics)
        await running._broker.start()
        try:
            first = set(proxy._connections)
            proxy.blackhole()
            await until(lambda: asyncio.sleep(0, len(proxy._connections - first) >= 3))
        finally:
            proxy.heal()
            await running.stop()
