"""The demo's story: a note on its way, the same once more, a kill half way. What it claims it reads from the engines."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import asyncpg
import httpx
from aiokafka import AIOKafkaConsumer, TopicPartition
from rich.console import Console

from infra.clock import uuid7
from infra.schema import Passwords
from infra.testing.otlp import OtlpReceiver, ReceivedSpan, render_trace
from infra.testing.sample.catalog import SAMPLE_EVENTS, SAMPLE_WORK
from infra.testing.sample.run import SERVICES, Engines, SampleServices

DEADLINE_SECONDS = 60
T = TypeVar("T")


class DemoFailed(Exception):
    """Something of the story did not hold; the text says what."""


async def play(
    engines: Engines, folder: Path, passwords: Passwords, prefix: str, console: Console, began: float
) -> dict[str, Any]:
    """Starts the samples, tells the story, stops them. Returns what `--json` prints.

    `began`: since when set-up counts, of the monotonic clock. Raises DemoFailed where anything does not hold.
    """
    async with OtlpReceiver() as receiver:
        services = SampleServices(engines, folder, passwords, prefix=prefix, otlp=receiver.endpoint)
        # Ctrl-C cancels by itself; a SIGTERM must not leave the processes behind either.
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        try:
            console.print("\n[bold]1  The samples start[/]")
            await services.prepare()
            for name in SERVICES:
                _start(services, name)
            await asyncio.gather(*(_ready(services, name) for name in SERVICES))
            setup = time.monotonic() - began
            for name in SERVICES:
                console.print(f"   {name:<7} pid {services.processes[name].pid:<8} {services.base_url(name)}")
            async with _looking(services) as look:
                return {**await _Story(services, receiver, look, console).tell(setup)}
        finally:
            asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)
            # Not in this loop: the receiver takes the last spans in it.
            await asyncio.to_thread(services.stop)


def _start(services: SampleServices, name: str, **environment: str) -> None:
    services.start(name, OTEL_BSP_SCHEDULE_DELAY="100", **environment)


async def _ready(services: SampleServices, name: str) -> None:
    try:
        await services.ready(name)
    except RuntimeError as error:
        reason, separator, log = str(error).partition("\n")
        # A traceback in a JSON log is one line of thousands of characters.
        end = "\n".join(line[-300:] for line in log.splitlines()[-4:])
        raise DemoFailed(f"{reason}{separator}{end}") from error


class _Look:
    """Reads from the engines what has happened to one notebook."""

    def __init__(self, connection: asyncpg.Connection, consumer: AIOKafkaConsumer, topic: str) -> None:
        self._connection = connection
        self._consumer = consumer
        self._partitions = [TopicPartition(topic, n) for n in range(SAMPLE_EVENTS.partitions)]
        self._begin: dict[TopicPartition, int] = {}

    async def start(self) -> None:
        """What is in the topic already is not of this story."""
        self._consumer.assign(self._partitions)
        self._begin = await self._consumer.end_offsets(self._partitions)

    async def events(self, book: str) -> list[tuple[int, datetime]]:
        rows = await self._connection.fetch(
            "SELECT version, recorded_at FROM sample_desk.event WHERE stream_id = $1 ORDER BY version",
            f"notebook:{book}",
        )
        return [(row[0], row[1]) for row in rows]

    async def effects(self, book: str) -> list[tuple[int, int]]:
        rows = await self._connection.fetch(
            "SELECT number, nth FROM sample_ledger.effect WHERE notebook = $1 ORDER BY nth", book
        )
        return [(row[0], row[1]) for row in rows]

    async def unsent(self) -> int:
        count: int = await self._connection.fetchval(
            "SELECT count(*) FROM sample_desk.outbox WHERE published_at IS NULL AND destination = $1",
            SAMPLE_EVENTS.name,
        )
        return count

    async def records(self, book: str) -> list[Any]:
        """The Kafka records of this key, in order."""
        found = []
        end = await self._consumer.end_offsets(self._partitions)
        for partition in self._partitions:
            self._consumer.seek(partition, self._begin[partition])
        for partition in self._partitions:
            while await self._consumer.position(partition) < end[partition]:
                batch = (await self._consumer.getmany(partition, timeout_ms=200)).get(partition, [])
                found += [record for record in batch if record.key == book.encode()]
        return found


@asynccontextmanager
async def _looking(services: SampleServices) -> AsyncIterator[_Look]:
    connection = await asyncpg.connect(services.engines.postgres)
    consumer = AIOKafkaConsumer(bootstrap_servers=services.engines.kafka, enable_auto_commit=False)
    try:
        await consumer.start()
        look = _Look(connection, consumer, services.prefix + SAMPLE_EVENTS.name)
        await look.start()
        yield look
    finally:
        await consumer.stop()
        await connection.close()


class _Story:
    """The demo in its order. Every claim is awaited or checked before it is printed."""

    def __init__(self, services: SampleServices, receiver: OtlpReceiver, look: _Look, console: Console) -> None:
        self._services = services
        self._receiver = receiver
        self._look = look
        self._console = console
        self._book = f"demo {uuid7().hex[-6:]}"

    async def tell(self, setup: float) -> dict[str, Any]:
        first = uuid7()
        self._say("\n[bold]2  One note on its way[/]")
        answer, trace_id = await self._send_and_follow(first)
        trace = await self._show_trace(trace_id)
        self._say("\n[bold]3  The same note once more[/], with the same Idempotency-Key")
        effects = await self._send_again(first, trace_id)
        self._say("\n[bold]4  kill -9 in the middle[/]")
        crash = await self._crash()
        return {
            "delivered": True,
            "trace_id": trace_id,
            "trace": trace,
            "duplicates": {"sent": 1, "effects": effects},
            "crash": crash,
            "seconds": {"setup": round(setup, 2), "answer": round(answer, 3)},
        }

    async def _send_and_follow(self, id_: UUID) -> tuple[float, str]:
        began, clock = time.time(), time.monotonic()

        def at(moment: float, who: str, what: str) -> None:
            self._say(f"   +{max(moment - began, 0) * 1000:5.0f} ms  {who:<7} {what}")

        await self._post(id_, "Hello, bus")
        at(time.time(), "front", "answers 202: the note is committed to its outbox")
        [(version, recorded)] = await self._until("the event", lambda: self._look.events(self._book))
        at(recorded.timestamp(), "desk", f"takes it from queue {SAMPLE_WORK.name}, stores event {version}")
        [record] = await self._until("the Kafka record", lambda: self._look.records(self._book))
        place = f"{record.topic}, partition {record.partition}, offset {record.offset}"
        at(record.timestamp / 1000, "Kafka", f"has it in {place}")
        effects = await self._until("the effect", lambda: self._look.effects(self._book))
        answer = time.monotonic() - clock
        at(time.time(), "ledger", f"has counted it: {len(effects)} effect")
        created = await self._span(lambda s: s.attributes.get("messaging.message.id") == str(id_))
        called = await self._span(lambda s: s.trace_id == created.trace_id and s.name.endswith("/Seen"), "sample_front")
        at(called.start_ns / 1e9, "front", "hears of it from the ledger by gRPC")
        return answer, created.trace_id

    async def _show_trace(self, trace_id: str) -> dict[str, Any]:
        names = {f"sample_{name}" for name in SERVICES}
        spans = self._receiver.trace(trace_id)
        services = sorted({span.service for span in spans})
        self._must(set(services) == names, f"the trace has spans of {services} only")
        self._say(f"\n   Its trace {trace_id}; ⇢ marks a batch, which has a trace of its own:")
        self._console.print(render_trace(self._receiver.spans, trace_id))
        return {"services": services, "spans": len(spans)}

    async def _send_again(self, id_: UUID, first_trace: str) -> int:
        await self._post(id_, "Hello, bus")
        copy = await self._span(
            lambda s: s.attributes.get("messaging.message.id") == str(id_) and s.trace_id != first_trace
        )
        await self._handled_by_desk(copy.trace_id)
        self._say("   front   answers 202 as before, and sends the copy to RabbitMQ")
        self._say("   desk    has taken the copy, and dropped it: its inbox knows the id")
        return await self._counted(1)

    async def _crash(self) -> dict[str, Any]:
        services = self._services
        services.processes["desk"].terminate()
        await self._ended("desk")
        with tempfile.TemporaryDirectory() as folder:
            once = Path(folder) / "once"
            once.touch()
            _start(services, "desk", CLAW_FAILPOINT="after_commit_before_ack", CLAW_FAILPOINT_ONCE=str(once))
            await _ready(services, "desk")
            pid = services.processes["desk"].pid
            self._say(f"   desk    pid {pid} is to die after its commit, before it acknowledges to RabbitMQ")
            id_ = uuid7()
            await self._post(id_, "Hello again")
            code = await self._ended("desk")
        self._must(code == -signal.SIGKILL, f"desk was to be killed and ended with code {code}")
        events = len(await self._look.events(self._book))
        self._must(events == 2, f"desk died after its commit, yet the store has {events} events")
        self._say(f"   desk    pid {pid} died of signal 9; event {events} is stored, the message not acknowledged")
        _start(services, "desk")
        await _ready(services, "desk")
        created = await self._span(lambda s: s.attributes.get("messaging.message.id") == str(id_))
        await self._handled_by_desk(created.trace_id)
        self._say(f"   desk    pid {services.processes['desk'].pid} started, got the message again, and dropped it")
        await self._until("the second effect", self._second_effect)
        await self._counted(2)
        effects = await self._look.effects(self._book)
        return {"killed": "sample_desk", "effects": sum(number == 2 for number, _ in effects)}

    async def _ended(self, name: str) -> int:
        try:
            return await asyncio.to_thread(self._services.wait, name, DEADLINE_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise DemoFailed(f"{name} was to end and still runs: {error}") from None

    async def _second_effect(self) -> bool:
        return any(number == 2 for number, _ in await self._look.effects(self._book))

    async def _counted(self, notes: int) -> int:
        """Reads from the engines how often each note happened; it must be once, and in order."""

        async def all_sent() -> bool:
            return not await self._look.unsent()

        await self._until("the desk's outbox to be sent", all_sent)
        events = [version for version, _ in await self._look.events(self._book)]
        records = [json.loads(record.value)["number"] for record in await self._look.records(self._book)]
        effects = await self._look.effects(self._book)
        self._say(
            f"   notes {notes} · events in the store {len(events)} · Kafka records of the key {len(records)} · "
            f"effects {len(effects)}"
        )
        once = list(range(1, notes + 1))
        self._must(events == once, f"{notes} notes were written, the store has events {events}")
        # A relay may repeat a record; the first occurrences are in order and the consumer drops the rest.
        self._must(list(dict.fromkeys(records)) == once, f"{notes} notes were written, Kafka has records {records}")
        self._must(effects == [(n, n) for n in once], f"{notes} notes were written, the ledger has effects {effects}")
        return len(effects)

    async def _post(self, id_: UUID, text: str) -> None:
        note = {"notebook": self._book, "text": text}
        async with httpx.AsyncClient(base_url=self._services.base_url("front"), trust_env=False) as client:
            answer = await client.post("/notes", json=note, headers={"idempotency-key": str(id_)})
        self._must(
            answer.status_code == 202 and answer.json() == {"id": str(id_)},
            f"front answered {answer.status_code}: {answer.text}",
        )

    async def _handled_by_desk(self, trace_id: str) -> None:
        """Waits for the end of the desk's work on a message; before it a count would prove nothing."""
        await self._span(lambda s: (s.trace_id, s.kind) == (trace_id, "consumer"), "sample_desk")

    async def _span(self, wanted: Callable[[ReceivedSpan], bool], service: str = "") -> ReceivedSpan:
        def found(spans: Sequence[ReceivedSpan]) -> list[ReceivedSpan]:
            return [span for span in spans if wanted(span) and span.service.startswith(service)]

        try:
            await self._receiver.wait_for(lambda spans: bool(found(spans)), DEADLINE_SECONDS)
        except TimeoutError as error:
            raise DemoFailed(str(error)) from error
        return found(self._receiver.spans)[0]

    async def _until(self, what: str, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                while not (answer := await ask()):  # noqa: ASYNC110 - the engines are asked, nothing here can be set
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise DemoFailed(f"waited {DEADLINE_SECONDS} s in vain for {what}") from None
        return answer

    def _must(self, holds: bool, otherwise: str) -> None:
        if not holds:
            raise DemoFailed(otherwise)

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)
