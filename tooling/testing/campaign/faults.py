"""The faults of a campaign: their names, their plan from a seed, and their injection."""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypeVar

import aio_pika
import asyncpg
import msgspec
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from infra.clock import uuid7
from infra.errors import describe
from protos.catalog import AGENT_EVENTS, AUDIT_LOGS, CHANNEL_EVENTS, CHANNEL_INBOUND, CHANNEL_OUTBOUND, USAGE_RECORDS
from tooling.stack.engines.base import ANSWER_SECONDS
from tooling.stack.home import Home
from tooling.stack.services import parts
from tooling.testing.campaign.evidence import Poison
from tooling.testing.campaign.rig import STOP_SECONDS, TWIN, TWINS, Rig
from tooling.testing.campaign.wires import Wires
from tooling.testing.stack import Stack, run_claw
from tooling.testing.until import until

T = TypeVar("T")
SERVICES = ("channel", "agent", "billing", "plugin", "memory", "user", "ws_gateway", "log_aggregator")
ENGINES = ("postgres", "kafka", "rabbitmq", "valkey", "s3", "milvus", "opensearch")
# The files of each bus, in its folder. They can be filled again from the outboxes, or hold nothing that must stay.
BUSES = {"kafka": ("data",), "rabbitmq": ("mnesia",), "valkey": ("appendonlydir", "dump.rdb")}
# With five minutes, Standard Webhooks are refused (401). The agent service refuses the tokens of its clients (401).
CLOCKS = ("channel +4m", "channel -4m")
# The failpoints that every message passes: between one transaction, call or acknowledgement and the next.
FAILPOINTS = {
    "channel": (
        "after_commit",
        "after_publish_before_mark",
        "after_commit_before_ack",
        "after_effect_started",
        "after_effect_call",
        "after_effect_commit",
        "before_lane_commit",
        "after_lane_commit",
    ),
    "agent": (
        "after_commit_before_ack",
        "after_publish_before_mark",
        "before_commit",
        "after_commit",
        "after_effect_call",
        "after_effect_commit",
        "before_lane_commit",
    ),
    "billing": ("after_effect_before_commit", "after_commit_of_batch", "after_publish_before_mark"),
}
# The points at which a process that was stopped too long would do harm, if it did not notice.
ZOMBIES = (
    "agent after_lane_claim",
    "agent after_effect_call",
    "channel after_lane_claim",
    "channel after_effect_started",
)
WIRES = ("gateway", "models", "vendors", "postgres", "kafka", "rabbitmq", "grpc")
NETWORK = ("latency", "reset", "blackhole", "half-open", "lost answers")
# Consumers whose position is a row in the database: schema, and the offset that is set back.
REWOUND = ("agent", "billing", "memory", "plugin", "log_aggregator")
POISONED = (
    *(f"kafka:{topic.name}" for topic in (USAGE_RECORDS, AGENT_EVENTS, CHANNEL_EVENTS, AUDIT_LOGS)),
    *(f"rabbit:{queue.name}" for queue in (CHANNEL_INBOUND["webhook"], CHANNEL_OUTBOUND)),
)
# Seconds before a fault, before one that is over at once, for a fault that lasts, and until a failpoint must have been
# passed.
PAUSE, QUICK, LASTING, PASS_SECONDS = (3.0, 9.0), (1.0, 4.0), 3.0, 20.0
LATENCY_SECONDS = 0.4
WRONG_SECONDS = 10.0
UP_SECONDS = 120.0


class Kind(NamedTuple):
    description: str
    targets: tuple[str, ...] = ()
    """The parts that a fault can hit. None: the clients do it all the time."""
    pause: tuple[float, float] = PAUSE
    """The least and the most seconds before such a fault."""


FAULTS: dict[str, Kind] = {
    "kill": Kind("SIGKILL of a service", SERVICES, QUICK),
    "engines": Kind("SIGKILL of an engine with all its processes", ENGINES, QUICK),
    "failpoints": Kind(
        "SIGKILL of a service by itself at a named point, such as after a commit and before the acknowledgement",
        tuple(f"{service} {point}" for service, points in FAILPOINTS.items() for point in points),
    ),
    "stop": Kind(
        "SIGSTOP of an instance beyond its leases and sessions, at a random moment or by itself at a named point; a "
        "second instance takes over; then SIGCONT",
        (*TWINS, "billing", *ZOMBIES),
    ),
    "pause": Kind("SIGSTOP of an engine, then SIGCONT: its ports accept and nothing answers", ENGINES),
    "restart": Kind("a clean stop and start of an engine", ENGINES),
    "network": Kind(
        "latency, a reset, a blackhole, half-open connections (only the server knows that they have ended) or lost "
        "answers (the other side has done it, and its answer is dropped) between client and gateway, agent and model, "
        "channel and vendor, services and PostgreSQL, Kafka, RabbitMQ and each other",
        tuple(f"{wire} {fault}" for wire in WIRES for fault in NETWORK),
    ),
    "wipe": Kind("a bus loses all of its data; the outboxes fill it again", tuple(BUSES)),
    "clock": Kind("the clock of the channel service is four minutes wrong for a while", CLOCKS),
    "rewind": Kind("the position of a service's Kafka reader is set back to the first record", REWOUND),
    "poison": Kind("a record or message that no consumer can read; it must become a visible dead letter", POISONED),
    "duplicates": Kind("the vendors send webhooks again, two at once and also late"),
    "reorder": Kind("the vendors send a conversation's messages in another order than they were written"),
}


class Planned(NamedTuple):
    pause: float
    """Seconds before it."""
    fault: str
    target: str


class Injected(msgspec.Struct):
    """A fault of this second of the campaign."""

    second: float
    fault: str
    target: str
    note: str = ""
    missed: bool = False
    """It could not be injected; the note says why."""
    recovered_after: float | None = None
    """Seconds from its beginning until a message that was accepted after it was answered; None if none was."""


def plan(seed: int, names: Sequence[str], count: int, targets: Sequence[str] = (), instances: int = 1) -> list[Planned]:
    """The schedule of `count` faults of these kinds: the same for the same arguments.

    `targets`: only these. `instances`: of each service; each of them is killed. The kinds come in turns, so that a
    short campaign has as many of them as it can.
    """
    chance = random.Random(seed)
    kinds = {
        name: [target for target in FAULTS[name].targets if not targets or target in targets]
        for name in names
        if FAULTS[name].targets
    }
    if instances > 1 and "kill" in kinds:
        kinds["kill"] += [service + TWIN for service in kinds["kill"]]
    kinds = {name: found for name, found in kinds.items() if found}
    planned: list[Planned] = []
    turn: list[str] = []
    while kinds and len(planned) < count:
        turn = turn or chance.sample(sorted(kinds), len(kinds))
        name = turn.pop()
        planned.append(Planned(round(chance.uniform(*FAULTS[name].pause), 2), name, chance.choice(kinds[name])))
    return planned


class Injector:
    """Injects planned faults into a running system. `rig`: None for a system that others share.

    `kept_answers`: lets the model keep its answers for a block.
    """

    def __init__(
        self,
        stack: Stack,
        rig: Rig | None,
        wires: Wires | None,
        kept_answers: Callable[[], AbstractContextManager[None]],
        tell: Callable[[str], None],
    ):
        self._stack = stack
        self._rig = rig
        self._wires = wires
        self._kept_answers = kept_answers
        self._tell = tell
        self.injected: list[Injected] = []
        self.poison: list[Poison] = []

    async def run(self, planned: Sequence[Planned], began: float) -> None:
        """`began`: Unix seconds of the campaign's begin."""
        for number, one in enumerate(planned, 1):
            await asyncio.sleep(one.pause)
            done = Injected(round(time.time() - began, 1), one.fault, one.target)
            self.injected.append(done)
            try:
                done.note = await getattr(self, f"_{one.fault}")(one.target) or ""
            except Exception as error:
                # One fault among a thousand ends no campaign: it is counted and shown.
                done.note, done.missed = describe(error), True
            missed = "not injected: " if done.missed else ""
            self._tell(f"{number} of {len(planned)}: {one.fault} {one.target} {missed}{done.note}".rstrip())
        # Faults that need a while to show, such as a lease that expires, shall meet load too.
        await asyncio.sleep(PAUSE[1])

    async def _kill(self, target: str) -> None:
        # An earlier fault may have ended it: a signal to a part that does not work would show nothing.
        await until(lambda: self._works(target), seconds=UP_SECONDS)
        await asyncio.to_thread(self._stack.kill, target, signal.SIGKILL)

    _engines = _kill

    async def _works(self, target: str) -> bool:
        """The part answers a client."""
        if self._rig and target in (*SERVICES, *self._rig.twins):
            # Another instance may answer at the same port.
            return await self._rig.is_ready(target)
        try:
            await asyncio.wait_for(parts()[target].ready(Home(self._stack.home).place()), ANSWER_SECONDS)
        except Exception:
            # Any error of a client means that the part does not work.
            return False
        return True

    async def _failpoints(self, target: str) -> None:
        await self._passed(target, signal.SIGKILL)

    async def _stop(self, target: str) -> None:
        service, _, point = target.partition(" ")
        if not point:
            await asyncio.to_thread(self._stack.pause, service)
        else:
            await self._passed(target, signal.SIGSTOP)
        # Requests of the stopped process arrive before the answers are kept, and its leases end after that.
        await asyncio.sleep(STOP_SECONDS / 4)
        with self._kept_answers() if point else nullcontext():
            await asyncio.sleep(STOP_SECONDS * 3 / 4)
            await asyncio.to_thread(self._stack.cont, service)
            # It wakes while the process that has taken over waits for the model.
            await asyncio.sleep(LASTING if point else 0)

    _pause = _stop

    async def _passed(self, target: str, number: signal.Signals) -> None:
        """Lets the service get the signal at its next pass of the failpoint. Raises TimeoutError if it did not pass."""
        assert self._rig
        service, point = target.split(" ")
        # A service reads the name of its point at its start.
        self._rig.set_failpoint(service, point, number)
        await self._rig.restart([service])
        if not await self._rig.passed_failpoint(service, PASS_SECONDS):
            raise TimeoutError(f"not passed within {PASS_SECONDS:.0f} s")

    async def _restart(self, target: str) -> None:
        await asyncio.to_thread(self._stack.restart, target)

    async def _wipe(self, target: str) -> None:
        await asyncio.to_thread(self._stack.stop, target)
        for name in BUSES[target]:
            path = self._stack.home / target / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        # The whole of it: topics and queues are made again, and the outboxes are sent again.
        await asyncio.to_thread(run_claw, self._stack.home, "up")
        # No outbox has these: only their sender could send them again.
        self.poison = [one for one in self.poison if not target.startswith(one.source.partition(":")[0])]

    async def _clock(self, target: str) -> None:
        assert self._rig
        service, _, offset = target.partition(" ")
        self._rig.set_clock(service, offset)
        await self._rig.restart([service])
        await asyncio.sleep(WRONG_SECONDS)
        self._rig.set_clock(service, "+0")
        await self._rig.restart([service])

    async def _network(self, target: str) -> None:
        assert self._wires
        wire, _, fault = target.partition(" ")
        proxies = self._wires.proxies[wire]
        for proxy in proxies:
            match fault:
                case "latency":
                    proxy.latency = LATENCY_SECONDS
                case "blackhole":
                    proxy.blackhole()
                case "half-open":
                    proxy.half_open()
                case "lost answers":
                    proxy.lose_answers()
        if fault != "reset":
            await asyncio.sleep(LASTING)
        for proxy in proxies:
            proxy.latency = 0.0
            proxy.heal()
            if fault in ("reset", "half-open", "lost answers"):
                proxy.reset()

    async def _rewind(self, target: str) -> str:
        connection = await connected(self._stack.postgres_url)
        try:
            # The reader loses its next transaction to this change, and begins again at the stored position.
            done = await connection.execute(f'UPDATE "{target}".consumer_offset SET next_offset = 0')
        finally:
            await connection.close()
        return f"{done.removeprefix('UPDATE ')} partitions"

    async def _poison(self, target: str) -> str:
        id_ = str(uuid7())
        bus, _, name = target.partition(":")
        headers = {"ce_id": id_, "ce_type": "campaign.v1.Poison", "ce_source": "campaign", "ce_specversion": "1.0"}
        send = self._produce if bus == "kafka" else self._publish
        await when_up(lambda: send(name, id_, headers, b'{"poison": '))
        self.poison.append(Poison(target, id_))
        return id_

    async def _produce(self, topic: str, id_: str, headers: dict[str, str], body: bytes) -> None:
        producer = AIOKafkaProducer(bootstrap_servers=self._stack.kafka_bootstrap_servers, acks="all")
        try:
            await producer.start()
            pairs = [(key, value.encode()) for key, value in headers.items()]
            # A key of its own: a record of an ordered topic that fails holds back later ones of its key.
            await producer.send_and_wait(topic, body, key=f"poison-{id_}".encode(), headers=pairs)
        finally:
            await producer.stop()

    async def _publish(self, queue: str, id_: str, headers: dict[str, str], body: bytes) -> None:
        async with await aio_pika.connect(self._stack.rabbitmq_url) as connection:
            channel = await connection.channel()
            message = aio_pika.Message(body, headers=dict(headers), message_id=id_, delivery_mode=2)
            await channel.default_exchange.publish(message, routing_key=queue)


async def connected(url: str) -> asyncpg.Connection:
    """A connection, as soon as the database takes one."""
    return await when_up(lambda: asyncpg.connect(url, timeout=5))


async def when_up(work: Callable[[], Awaitable[T]]) -> T:
    """Does the work as soon as its engine is up: an earlier fault may have stopped it. Raises its last error."""
    deadline = time.monotonic() + UP_SECONDS
    while True:
        try:
            return await work()
        except (OSError, TimeoutError, asyncpg.PostgresError, KafkaError, aio_pika.exceptions.AMQPError):
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.5)
