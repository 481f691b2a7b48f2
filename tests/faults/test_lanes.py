"""A courier that is killed at every boundary of its work, and one that is stopped beyond its lease."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from infra.clock import uuid7
from infra.postgres.database import Database
from infra.postgres.db import create_engine
from infra.postgres.schema import migrate, prepare_database
from tests.infra.conftest import PASSWORDS
from tooling.testing.sample import courier
from tooling.testing.sample.courier.handlers import PARCELS, Parcel
from tooling.testing.sample.run import Engines, SampleServices
from tooling.testing.stack import Stack, free_port
from tooling.testing.until import until

STREETS = ("repeatable", "keyed", "once")
BOUNDARIES = (
    "after_lane_claim",
    "after_effect_started",
    "after_effect_call",
    "after_effect_commit",
    "before_lane_commit",
    "after_lane_commit",
)


class Office:
    """The other side. Keeps a ledger of its acts. A known key gets the first answer again, without a new act."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, str]] = []
        self.done: dict[str, tuple[str, int]] = {}
        self.refused: list[str] = []
        self.open = threading.Event()
        self.open.set()
        self._lock = threading.Lock()

    def take(self, key: str | None, body: bytes) -> tuple[int, str]:
        parcel = json.loads(body)
        what = (parcel["street"], parcel["number"])
        with self._lock:
            self.calls.append((*what, key or ""))
            if not key or self.done.setdefault(key, what) != what:
                self.refused.append(f"{what}: key {key!r}")
                return 400, "key"
            receipt = list(self.done).index(key)
        self.open.wait(60)
        return 200, str(receipt)

    def calls_of(self, street: str) -> Counter[int]:
        return Counter(number for called, number, _ in list(self.calls) if called == street)


@pytest.fixture
def office() -> Office:
    return Office()


@pytest.fixture
def office_url(office: Office) -> Iterator[str]:
    class Desk(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["content-length"])
            status, answer = office.take(self.headers["idempotency-key"], self.rfile.read(length))
            try:
                self.send_response(status)
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer.encode())
            except OSError:
                return  # who called is dead by now

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", free_port()), Desk)
    serving = threading.Thread(target=server.serve_forever, args=(0.05,))
    serving.start()
    yield f"http://127.0.0.1:{server.server_port}/parcels"
    office.open.set()
    server.shutdown()
    serving.join()
    server.server_close()


@dataclass
class Couriers:
    """The courier's processes, and the states of the parcels of this test."""

    services: SampleServices
    database: Database
    office: Office
    office_url: str
    town: str = field(default_factory=lambda: uuid7().hex)
    sent: Counter[str] = field(default_factory=Counter)

    async def start(self, instance: str = "courier", **environment: str) -> None:
        self.services.start(instance, CLAW_OFFICE_URL=self.office_url, CLAW_ALLOW_PRIVATE_TARGETS="1", **environment)
        await self.services.ready(instance)

    async def send(self, count: int, *streets: str) -> None:
        """Enqueues the next parcels of each street; its name is the kind of effect."""
        for _ in range(count):
            async with self.database.begin(tenant_id="town") as tx:
                for street in streets:
                    self.sent[street] += 1
                    name = f"{self.town} {street}"
                    tx.enqueue(PARCELS, lane=name, item=Parcel(name, self.sent[street], street))  # type: ignore[arg-type]

    async def rows(self, statement: str) -> list[tuple[Any, ...]]:
        async with self.database.begin() as tx:
            return list(await tx.sql(statement, self.town))

    async def delivered(self, street: str) -> list[tuple[int, str]]:
        rows = await self.rows("SELECT street, number, state FROM delivery WHERE street LIKE $1 || '%' ORDER BY nth")
        return [(number, state) for name, number, state in rows if name == f"{self.town} {street}"]

    async def all_delivered(self) -> None:
        """Waits for all that was sent; then nothing may be lost, doubled or out of order."""

        async def as_many() -> bool:
            return all([len(await self.delivered(street)) >= count for street, count in self.sent.items()])

        await until(as_many)
        for street, count in self.sent.items():
            assert [number for number, _ in await self.delivered(street)] == list(range(1, count + 1)), street
        waiting = "SELECT 1 FROM lane_item JOIN lane USING (lane_id) WHERE lane LIKE $1 || '%' AND state <> 'done'"
        assert await self.rows(waiting) == []
        assert self.office.refused == []

    def calls(self, street: str) -> Counter[int]:
        return self.office.calls_of(f"{self.town} {street}")

    async def is_called(self, street: str) -> bool:
        return self.calls(street)[1] > 0

    async def has_lost_its_lane(self, instance: str) -> bool:
        async with httpx.AsyncClient(base_url=self.services.base_url(instance)) as client:
            try:
                text = (await client.get("/metrics")).text
            except httpx.TimeoutException:
                return False
            except httpx.TransportError as error:
                raise AssertionError(self.services.last_words(instance)) from error
        # Twice if its handler ends at the moment at which the renewal fails.
        return re.search(r'claw_lane_items_total{kind="parcels",outcome="lost"} [12]\.0', text) is not None

    async def fates(self) -> None:
        """Checks that the office's calls fit the recorded states, by the kind of effect."""
        for street in STREETS:
            for number, state in await self.delivered(street):
                calls = self.calls(street)[number]
                if street != "once":
                    assert (state, calls >= 1) == ("succeeded", True)
                elif state == "succeeded":
                    assert calls == 1
                else:
                    assert (state, calls <= 1) == ("unknown", True)
        # The office may have been called often, but an act with a key was done under one key, so once.
        done = Counter(what for what in self.office.done.values() if what[0].endswith(" keyed"))
        assert set(done.values()) <= {1}


@pytest.fixture(scope="module")
async def services(
    stack: Stack, database: str, vhost: str, topic_prefix: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[SampleServices]:
    engines = Engines(database, stack.kafka_bootstrap_servers, vhost, stack.rabbitmq_management_url, stack.redis_url)
    running = SampleServices(engines, tmp_path_factory.mktemp("couriers"), PASSWORDS, prefix=topic_prefix)
    await running.prepare()
    await prepare_database(database, {"sample_courier": PASSWORDS})
    await migrate(database, "sample_courier", Path(str(courier.__file__)).parent / "migrations")
    yield running
    running.stop()


@pytest.fixture
async def couriers(services: SampleServices, office: Office, office_url: str) -> AsyncIterator[Couriers]:
    engine = create_engine(services.url("courier"), pool_size=2)
    yield Couriers(services, Database(engine, "sample_courier"), office, office_url)
    office.open.set()
    services.stop()
    await engine.dispose()


@pytest.mark.parametrize("boundary", BOUNDARIES)
async def test_a_courier_killed_at_a_boundary_loses_and_doubles_nothing(
    couriers: Couriers, tmp_path: Path, boundary: str
) -> None:
    once = tmp_path / "once"
    once.touch()
    await couriers.send(5, *STREETS)
    couriers.services.start(
        "courier",
        CLAW_OFFICE_URL=couriers.office_url,
        CLAW_ALLOW_PRIVATE_TARGETS="1",
        CLAW_FAILPOINT=boundary,
        CLAW_FAILPOINT_ONCE=str(once),
    )
    assert await asyncio.to_thread(couriers.services.wait, "courier", 60) == -signal.SIGKILL
    await couriers.send(5, *STREETS)
    await couriers.start()
    await couriers.send(5, *STREETS)
    await couriers.all_delivered()
    await couriers.fates()


@pytest.mark.parametrize(("boundary", "calls"), [("after_effect_started", 0), ("after_effect_call", 1)])
async def test_a_call_that_had_begun_is_unknown_where_it_may_be_made_once(
    couriers: Couriers, boundary: str, calls: int
) -> None:
    await couriers.send(1, "once")
    couriers.services.start(
        "courier", CLAW_OFFICE_URL=couriers.office_url, CLAW_ALLOW_PRIVATE_TARGETS="1", CLAW_FAILPOINT=boundary
    )
    assert await asyncio.to_thread(couriers.services.wait, "courier", 60) == -signal.SIGKILL
    await couriers.start()
    await couriers.send(1, "once")
    await couriers.all_delivered()
    assert await couriers.delivered("once") == [(1, "unknown"), (2, "succeeded")]
    assert couriers.calls("once")[1] == calls


@pytest.mark.parametrize("street", STREETS)
async def test_a_courier_stopped_beyond_its_lease_writes_nothing_when_it_wakes(couriers: Couriers, street: str) -> None:
    await couriers.start()
    couriers.office.open.clear()
    await couriers.send(3, street)
    await until(lambda: couriers.is_called(street))
    couriers.services.processes["courier"].send_signal(signal.SIGSTOP)
    try:
        couriers.office.open.set()
        await couriers.start("courier-2")
        await couriers.all_delivered()
    finally:
        couriers.services.processes["courier"].send_signal(signal.SIGCONT)
    await until(lambda: couriers.has_lost_its_lane("courier"))
    couriers.services.processes["courier-2"].terminate()
    couriers.services.wait("courier-2")
    # The one that slept is sound, and works on.
    await couriers.send(3, street)
    await couriers.all_delivered()
    await couriers.fates()
    attempts = await couriers.rows("SELECT attempt, state FROM lane_effect WHERE key = $1 || ' " + street + " 1'")
    assert attempts == [(1, "unknown") if street == "once" else (2, "succeeded")]
