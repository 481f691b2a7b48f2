"""A kernel in one process, to be driven step by step: real PostgreSQL, a broker that is a list per partition.

Nothing here waits for time: `pass_time` moves the times in the database into the past, so that leases expire and
destinations that were held back return.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Coroutine, Sequence
from typing import Any, NamedTuple, TypeVar
from uuid import UUID, uuid4

import msgspec
from prometheus_client import CollectorRegistry
from sqlalchemy.exc import DBAPIError

from infra.bus.batch import Batches, Fenced
from infra.bus.outbox import HeldBack, Outcome, Pending, Relay, resend
from infra.errors import InvalidMessage
from infra.observe.metrics import Metrics
from infra.postgres.database import Database
from infra.postgres.db import create_engine, is_transient
from infra.postgres.outbox_rows import BUCKETS
from infra.postgres.tx import Tx
from infra.service.redrive import Redriver
from protos.messages.sample import NoteTaken
from tests.infra.conftest import SampleDatabase
from tooling.testing.sample.catalog import SAMPLE_EVENTS
from tooling.testing.sample.desk.domain import WriteNote
from tooling.testing.sample.desk.publishing import NOTEBOOK

T = TypeVar("T")
PARTITIONS = 2
GROUP = "sample_ledger"
OPEN = "state IN ('failed', 'waiting', 'redriving')"


class Crash(BaseException):
    """The process ends here."""


class Note(NamedTuple):
    """The tests' name of a message. A negative number is a record that cannot be decoded."""

    key: str
    number: int


def note_of(key: str, body: bytes) -> Note:
    return Note(key, -int(body[1:]) if body.startswith(b"?") else msgspec.json.decode(body, type=NoteTaken).number)


def bucket(key: str) -> int:
    return zlib.crc32(key.encode()) % BUCKETS


def partition(key: str) -> int:
    return sum(key.encode()) % PARTITIONS


class Record(NamedTuple):
    """As aiokafka hands it out."""

    offset: int
    key: bytes
    value: bytes
    headers: list[tuple[str, bytes]]

    @property
    def note(self) -> Note:
        return note_of(self.key.decode(), self.value)


class Broker:
    """One topic."""

    def __init__(self) -> None:
        self.topic_id = uuid4()
        self.log: list[list[Record]] = [[] for _ in range(PARTITIONS)]

    def append(self, key: str, value: bytes, headers: Sequence[tuple[str, bytes]]) -> None:
        log = self.log[partition(key)]
        log.append(Record(len(log), key.encode(), value, list(headers)))

    def first_occurrences(self, key: str) -> list[int]:
        notes = [record.note for record in self.log[partition(key)]]
        return list(dict.fromkeys(note.number for note in notes if note.key == key and note.number > 0))


class RelayProcess:
    """A process with a relay in it. `taken`: the messages that its publisher was given last."""

    bus = "kafka"

    def __init__(self, desk: Database, broker: Broker, metrics: Metrics) -> None:
        self.relay = Relay(desk, self, metrics)
        self.taken: list[Note] = []
        self.paused: asyncio.Task[int] | None = None
        self._broker = broker
        self._fate = ""
        self._limit = 0
        self._stopped = asyncio.Event()
        self._go = asyncio.Event()

    async def publish(self, rows: Sequence[Pending]) -> list[Outcome]:
        self.taken = [note_of(row.key, row.body) for row in rows]
        if self._fate == "paused before publish":
            await self._pause()
        count = self._limit if self._fate in ("crashes", "is refused") else len(rows)
        for row in rows[:count]:
            self._broker.append(row.key, row.body, [(name, value.encode()) for name, value in row.headers.items()])
        if self._fate == "crashes":
            raise Crash
        if self._fate == "paused before mark":
            await self._pause()
        return [None if n < count else HeldBack("refused") for n in range(len(rows))]

    async def _pause(self) -> None:
        self._stopped.set()
        await self._go.wait()

    async def step(self, fate: str, limit: int) -> None:
        """One window. If its fate is a pause, it stays `paused` until `wake`. Raises Crash if its fate is a crash."""
        self.taken, self._fate, self._limit = [], fate, limit
        self.relay.leases.due = 0.0
        task = asyncio.create_task(self.relay.step())
        stopped = asyncio.create_task(self._stopped.wait())
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if task.done():
            await task
        else:
            self.paused = task

    async def wake(self) -> None:
        assert self.paused is not None
        self._go.set()
        await self.paused
        self.paused = None
        self._go.clear()
        self._stopped.clear()

    async def kill(self) -> None:
        if self.paused is not None:
            self.paused.cancel()
            await asyncio.wait({self.paused})


class Handler:
    """Writes an effect per note; refuses the notes in `refused`; dies or loses its connection after the effect."""

    def __init__(self) -> None:
        self.refused: set[Note] = set()
        self.fate = ""
        self.after = 0

    async def count(self, notes: list[NoteTaken], tx: Tx) -> None:
        for note in notes:
            if Note(note.notebook, note.number) in self.refused:
                raise InvalidMessage("number", "refused") if note.number % 2 else ValueError("refused")
        await tx.sql(
            "INSERT INTO effect SELECT n, i, nextval('event_position') "
            "FROM unnest($1::text[], $2::bigint[]) AS x(n, i)",
            [note.notebook for note in notes],
            [note.number for note in notes],
        )
        self.after -= 1
        if self.fate and self.after == 0:
            if self.fate == "crashes":
                raise Crash
            await tx.sql("SELECT pg_terminate_backend(pg_backend_pid())")


class World:
    """All processes, and functions that read the database."""

    def __init__(self, database: str) -> None:
        self.loop = asyncio.new_event_loop()
        sample = SampleDatabase(database)
        self.run(sample.prepare())
        self.desk = Database(create_engine(sample.url("desk", "worker")), "sample_desk")
        self.ledger = Database(create_engine(sample.url("ledger", "worker")), GROUP)
        self._metrics = Metrics(CollectorRegistry())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def begin_again(self) -> None:
        for table in ("event", "stream", "outbox", "outbox_held_back", "lease", "lease_member"):
            self.rows(self.desk, f"DELETE FROM {table}")
        for table in ("inbox", "consumer_offset", "dead_letter", "parked_key", "effect", "outbox"):
            self.rows(self.ledger, f"DELETE FROM {table}")
        self.broker = Broker()
        self.handler = Handler()
        self._subscription = SAMPLE_EVENTS.batch(group=GROUP)(self.handler.count)
        self.relays = [self.new_relay() for _ in range(2)]
        self.members = [[self.new_member(p) for _ in range(2)] for p in range(PARTITIONS)]
        self.redriver = Redriver(self.ledger, [self._subscription], self._metrics)

    def end(self) -> None:
        self.run(self.desk.engine.dispose())
        self.run(self.ledger.engine.dispose())
        self.loop.close()

    def rows(self, database: Database, statement: str, *arguments: Any) -> Sequence[tuple[Any, ...]]:
        async def ask() -> Sequence[tuple[Any, ...]]:
            async with database.begin() as tx:
                return await tx.sql(statement, *arguments)

        return self.run(ask())

    def new_relay(self) -> RelayProcess:
        return RelayProcess(self.desk, self.broker, self._metrics)

    def new_member(self, p: int) -> Batches:
        member = Batches(self.ledger, GROUP, SAMPLE_EVENTS, p, [self._subscription], self._metrics)
        self.find_position(member, p)
        return member

    def find_position(self, member: Batches, p: int) -> None:
        self.run(member.find_position(self.broker.topic_id, 0, len(self.broker.log[p])))

    async def append(self, key: str, *, crashes: bool = False) -> int:
        async def work(tx: Tx) -> int:
            [note] = await tx.decide(NOTEBOOK.stream(key), WriteNote("x"))
            if crashes:
                await tx.flush()
                raise Crash
            number: int = note.number
            return number

        return await self.desk.run(work)

    async def consume(self, member: Batches, p: int, size: int) -> str:
        """Hands `member` the records from its own position on. Returns the outcome."""
        assert member.position is not None
        begin = member.position.next_offset
        records = self.broker.log[p][begin : begin + size]
        if not records:
            return "nothing to do"
        return await _outcome(member.process(member.position.topic_id, records))

    async def drain(self) -> str:
        """One step of the redriver. Returns the outcome."""
        return await _outcome(self.redriver.step())

    def pass_time(self) -> None:
        """Longer than any lease and any pause of a destination."""
        self.rows(self.desk, "UPDATE lease SET expires_at = clock_timestamp() - interval '1 hour'")
        self.rows(self.desk, "UPDATE lease_member SET seen_at = clock_timestamp() - interval '1 hour'")
        self.rows(self.desk, "UPDATE outbox_held_back SET retry_at = clock_timestamp() - interval '1 hour'")

    def resend(self) -> None:
        async def again() -> None:
            async with self.desk.begin() as tx:
                await resend(await tx.connection(), SAMPLE_EVENTS.name)

        self.run(again())

    def pending(self) -> set[Note]:
        return {
            note_of(key, body)
            for key, body in self.rows(self.desk, "SELECT key, body FROM outbox WHERE published_at IS NULL")
        }

    def leases_of(self, relay: Relay) -> set[int]:
        """The buckets that the database says are `relay`'s, under the epochs that it knows."""
        rows = self.rows(self.desk, "SELECT name, epoch FROM lease WHERE owner = $1", relay.leases.owner)
        found = {int(name.rpartition(":")[2]): epoch for name, epoch in rows}
        return {n for n, epoch in relay.leases.held.items() if found.get(n) == epoch}

    def letters(self) -> dict[str, list[tuple[Note, str]]]:
        """The open dead letters of each parked key, in order."""
        found: dict[str, list[tuple[Note, str]]] = {
            key: [] for (key,) in self.rows(self.ledger, "SELECT key FROM parked_key")
        }
        rows = self.rows(self.ledger, f"SELECT key, payload, state FROM dead_letter WHERE {OPEN} ORDER BY seq")
        for key, body, state in rows:
            found.setdefault(f"{key} (not parked)" if key not in found else key, []).append((note_of(key, body), state))
        return found

    def letter_id(self, key: str, index: int) -> UUID:
        rows = self.rows(self.ledger, f"SELECT id FROM dead_letter WHERE key = $1 AND {OPEN} ORDER BY seq", key)
        return UUID(str(rows[index][0]))

    def position(self, p: int) -> int:
        [(next_offset,)] = self.rows(
            self.ledger,
            "SELECT next_offset FROM consumer_offset WHERE topic = $1 AND partition = $2",
            SAMPLE_EVENTS.name,
            p,
        )
        return int(next_offset)


async def _outcome(work: Coroutine[Any, Any, object]) -> str:
    try:
        await work
    except Fenced:
        return "fenced"
    except Crash:
        return "crashed"
    except DBAPIError as error:
        if not is_transient(error):
            raise
        return "lost its connection"
    return "done"
