"""The demo's story: a note on its way, the same again, a kill half way. What it claims it reads from the engines."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import httpx
from rich.console import Console

from infra.bus.provisioning import ProvisioningError
from infra.clock import uuid7
from infra.schema import Passwords
from infra.testing.otlp import OtlpReceiver, ReceivedSpan, render_trace
from infra.testing.sample.catalog import SAMPLE_EVENTS, SAMPLE_WORK
from infra.testing.sample.look import Look, looking
from infra.testing.sample.run import SERVICES, Engines, SampleServices

DEADLINE_SECONDS = 60
ARMED = "kill-the-desk"
ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
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
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        # However it is ended, the processes must not stay behind.
        for number in ENDS:
            loop.add_signal_handler(number, task.cancel)
        try:
            console.print("\n[bold]1  The samples start[/]")
            try:
                await services.prepare()
            except ProvisioningError as error:
                raise DemoFailed(str(error)) from error
            for name in SERVICES:
                _start(services, name, folder)
            await asyncio.gather(*(_ready(services, name) for name in SERVICES))
            setup = time.monotonic() - began
            for name in SERVICES:
                console.print(f"   {name:<7} pid {services.processes[name].pid:<8} {services.base_url(name)}")
            async with looking(services) as look:
                return await _Story(services, receiver, look, console, folder).tell(setup)
        finally:
            # Not in this loop: the receiver takes the last spans in it.
            await asyncio.to_thread(services.stop)
            (folder / ARMED).unlink(missing_ok=True)
            for number in ENDS:
                loop.remove_signal_handler(number)


def _start(services: SampleServices, name: str, folder: Path) -> None:
    """Starts a service; the desk dies by kill -9 after the next commit once the file `ARMED` is there."""
    armed = {"CLAW_FAILPOINT": "after_commit_before_ack", "CLAW_FAILPOINT_ONCE": str(folder / ARMED)}
    services.start(name, OTEL_BSP_SCHEDULE_DELAY="100", **(armed if name == "desk" else {}))


async def _ready(services: SampleServices, name: str) -> None:
    try:
        await services.ready(name)
    except RuntimeError as error:
        reason, separator, log = str(error).partition("\n")
        # A traceback in a JSON log is one line of thousands of characters.
        end = "\n".join(line[-300:] for line in log.splitlines()[-4:])
        raise DemoFailed(f"{reason}{separator}{end}") from error


class _Story:
    """The demo in its order. Every claim is awaited or checked before it is printed."""

    def __init__(
        self, services: SampleServices, receiver: OtlpReceiver, look: Look, console: Console, folder: Path
    ) -> None:
        self._services = services
        self._receiver = receiver
        self._look = look
        self._console = console
        self._folder = folder
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
        place = f"{SAMPLE_EVENTS.name}, partition {record.partition}, offset {record.offset}"
        at(record.timestamp / 1000, "Kafka", f"has it in {place}")
        effects = await self._until("the effect", lambda: self._look.effects(self._book))
        answer = time.monotonic() - clock
        created = await self._span(lambda s: s.attributes.get("messaging.message.id") == str(id_))
        called = await self._span(lambda s: s.trace_id == created.trace_id and s.name.endswith("/Seen"), "sample_front")
        # What it tells the front follows its commit at once; the effect was seen a little later.
        told = await self._span(lambda s: s.trace_id == created.trace_id and s.kind == "internal", "sample_ledger")
        at(told.start_ns / 1e9, "ledger", f"has counted it: {len(effects)} effect")
        at(called.start_ns / 1e9, "front", "hears of it from the ledger by gRPC")
        return answer, created.trace_id

    async def _show_trace(self, trace_id: str) -> dict[str, Any]:
        names = {f"sample_{name}" for name in SERVICES}

        def complete(spans: Sequence[ReceivedSpan]) -> bool:
            trace = [span for span in spans if span.trace_id == trace_id]
            # Each message is sent in one batch and handled in another span, both with a link to its creation.
            links = [
                sum((trace_id, s.span_id) in other.links for other in spans) for s in trace if s.kind == "producer"
            ]
            return {span.service for span in trace} == names and links == [2, 2]

        await self._spans(complete)
        spans = self._receiver.trace(trace_id)
        services = sorted({span.service for span in spans})
        self._say(f"\n   Its trace {trace_id} (⇢ linked)")
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
        pid = services.processes["desk"].pid
        (self._folder / ARMED).touch()
        self._say(f"   desk    pid {pid} shall die after its next commit, before it acks to RabbitMQ")
        id_ = uuid7()
        await self._post(id_, "Hello again")
        try:
            code = await asyncio.to_thread(services.wait, "desk", DEADLINE_SECONDS)
        except subprocess.TimeoutExpired:
            raise DemoFailed("desk was to be killed and still runs") from None
        self._must(code == -signal.SIGKILL, f"desk was to be killed and ended with code {code}")
        events = len(await self._look.events(self._book))
        self._must(events == 2, f"desk died after its commit, yet the store has {events} events")
        self._say(f"   desk    pid {pid} died of signal 9; event {events} is stored, the message not acked")
        _start(services, "desk", self._folder)
        await _ready(services, "desk")
        created = await self._span(lambda s: s.attributes.get("messaging.message.id") == str(id_))
        await self._handled_by_desk(created.trace_id)
        self._say(f"   desk    pid {services.processes['desk'].pid} started, gets the message again and drops it")
        await self._until("the second effect", self._second_effect)
        await self._counted(2)
        effects = await self._look.effects(self._book)
        return {"killed": "sample_desk", "effects": sum(number == 2 for number, _ in effects)}

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
        async with httpx.AsyncClient(base_url=self._services.base_url("front"), trust_env=False, timeout=30) as client:
            try:
                answer = await client.post("/notes", json=note, headers={"idempotency-key": str(id_)})
            except httpx.HTTPError as error:
                raise DemoFailed(f"front does not answer: {type(error).__name__} {error}") from error
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

        await self._spans(lambda spans: bool(found(spans)))
        return found(self._receiver.spans)[0]

    async def _spans(self, complete: Callable[[Sequence[ReceivedSpan]], bool]) -> None:
        try:
            await self._receiver.wait_for(complete, DEADLINE_SECONDS)
        except TimeoutError as error:
            raise DemoFailed(str(error)) from error

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
