"""``runs``: durable runs of five steps, in a thousand sessions at once.

Ours is the real agent service: lanes, events, projections, outbox and relays on real engines, with traces exported and
shared commits. Model, tools and billing answer immediately inside its process (``runs_agent``), because the bench
measures the cost of durability. A slice begins when one commit has queued a run in each session and ends with the last
run. Then the durable rows are counted: each step started and completed in the event store.

One anchor is single-row commits over 8 connections. The others are runs of five empty steps by LangGraph and by DBOS,
in an environment of their own, with slices of 2 s and the number of parallel runs that suits each best.
"""

from __future__ import annotations

import asyncio
from asyncio.subprocess import Process
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from statistics import median
from time import perf_counter
from uuid import UUID

import msgspec

from infra.clock import utcnow, uuid7
from infra.security.crypto import Cipher
from infra.security.subjects import SubjectKeys
from services.agent.lanes import RUNS
from services.agent.models import scripted
from services.agent.sessions.arrivals import Arrival
from services.agent.sessions.intake import take_in
from tooling.bench import cpu, runs_anchors
from tooling.bench.fixture import PRODUCTION, Fixture, child, connections, running_platform_on
from tooling.bench.protocol import SLICE_SECONDS, Anchor, Result, Slice, Units, check, median_units
from tooling.bench.runs_agent import TOOL
from tooling.bench.runs_anchors import STEPS
from tooling.stack.own_environment import environment
from tooling.testing.platform import MASTER_KEY, Platform
from tooling.testing.processes import Process as Service

SERVICE = "agent"
TENANTS = 20
SESSIONS = 1_000
CONNECTIONS = 8
WAIT_SECONDS = 300.0
ANCHOR_SECONDS = 120.0

# The processes that work for our runs.
_OURS = (SERVICE, "postgres", "kafka", "valkey")
# The largest part of the CPU time of a run by others that meets the goal.
_CPU_GOALS = {"LangGraph, sync": 0.2}
# Counts over the whole bench; all of them must equal the number of steps.
_STEPS = """
SELECT (SELECT count(*) FROM agent.run WHERE status = 'completed') * $1 AS "of completed runs",
    (SELECT count(*) FROM agent.run) * $1 AS "of all runs",
    (SELECT count(*) FROM agent.lane_item WHERE state = 'done') * $1 AS "of items done",
    (SELECT count(*) FROM agent.outbox WHERE headers LIKE '%agent.v1.RunCompleted%') * $1 AS "of replies sent",
    (SELECT count(*) FROM agent.event WHERE type = 'StepStarted') AS "begun",
    (SELECT count(*) FROM agent.event WHERE type = 'StepCompleted') AS "ended",
    (SELECT count(*) FROM agent.run_step WHERE status = 'completed' AND n BETWEEN 1 AND $1) AS "completed"
"""
_OPEN = "SELECT count(*) FROM agent.run WHERE status IN ('queued', 'running', 'waiting')"
_UNSENT = "SELECT count(*) FROM agent.outbox WHERE published_at IS NULL"
# Counts of an anchor: runs, then steps.
_ROWS = {
    "langgraph": (
        # The first two checkpoints are the input and the state before the first node.
        """
        SELECT count(*) FILTER (WHERE (metadata->>'step')::int = $1),
        count(*) FILTER (WHERE (metadata->>'step')::int > 0) FROM public.checkpoints
        """
    ),
    "dbos": (
        """
        SELECT (SELECT count(*) FROM dbos.workflow_status WHERE status = 'SUCCESS'),
        (SELECT count(*) FROM dbos.operation_outputs WHERE function_id <= $1)
        """
    ),
}


@dataclass
class Runs:
    """The running service with an agent for each tenant."""

    fixture: Fixture
    platform: Platform
    agents: dict[str, UUID] = field(default_factory=dict)
    """Tenant → its agent."""
    queued: int = 0
    """Runs that were queued so far."""
    tenants: int = field(default_factory=lambda: TENANTS)
    sessions: int = field(default_factory=lambda: SESSIONS)
    """New sessions of a slice, each with one run."""
    workers: int = 1
    """Processes of the service."""
    milliseconds: dict[str, list[dict[str, float]]] = field(default_factory=lambda: defaultdict(list))
    """CPU time of a run in each slice, by contender and process."""

    async def prepare(self) -> None:
        await self.fixture.check_durable()
        await self.fixture.admin.execute("CREATE TABLE single (n bigint NOT NULL)")
        await self.platform.prepare(SERVICE)
        variables = {
            **self.platform.environment(SERVICE),
            **PRODUCTION,
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.fixture.otlp,
        }
        self._start(SERVICE, variables)
        await self.platform.ready(SERVICE)
        for n in range(2, self.workers + 1):
            # Only the first one serves HTTP and gRPC on the ports of the service.
            self._start(f"{SERVICE}-{n}", {**variables, "CLAW_HTTP_PORT": "0", "CLAW_GRPC_PORT": "0"})
        body = {"name": "Helper", "model": scripted.NAME, "system_prompt": "Be kind.", "tools": [TOOL]}
        for _ in range(self.tenants):
            tenant_id = str(uuid7())
            async with self.platform.client(SERVICE, tenant_id) as http:
                made = (await http.post("/api/v1/agents", json=body)).raise_for_status().json()
            self.agents[tenant_id] = UUID(made["id"])

    def _start(self, name: str, variables: dict[str, str]) -> None:
        log = self.platform.folder / f"{name}.log"
        self.platform.processes[name] = Service("tooling.bench.runs_agent", variables, log)

    async def ours(self) -> Slice:
        """Counts steps. Raises ValueError if one of them is not on record."""
        await self._queue()
        used = self._cpu()
        began = perf_counter()
        await self.platform.until(partial(self._none, _OPEN), seconds=WAIT_SECONDS)
        seconds = perf_counter() - began
        check("runs", {"of queued runs": self.queued * STEPS, **await self._rows()})
        # Otherwise the relays would publish this slice's rows during the next slice.
        await self.platform.until(partial(self._none, _UNSENT), seconds=WAIT_SECONDS)
        self._count("ours", used, self._cpu(), self.sessions)
        return Slice(self.sessions * STEPS, seconds)

    async def of(self, name: str, other: Other) -> Slice:
        """A slice of LangGraph or DBOS."""
        used = self._cpu() | {name: cpu.seconds(other.process.pid)}
        slice_ = await other.slice()
        spent = {"postgres": self._cpu()["postgres"], name: cpu.seconds(other.process.pid)}
        self._count(name, used, spent, slice_.done // STEPS)
        return slice_

    def costs(self) -> list[Units]:
        """CPU time of a run with its engines: of ours, and as a part of that of the others' runs."""
        sums = {name: [sum(parts.values()) for parts in slices[1:]] for name, slices in self.milliseconds.items()}
        ours = sums.pop("ours")
        parts = {name: median(slice_[name] for slice_ in self.milliseconds["ours"][1:]) for name in _OURS}
        return [
            median_units("runs", "CPU of a run, with the engines", None, ours, "ms", **parts),
            *(
                median_units(
                    "runs",
                    f"CPU of a run, part of that of {name}",
                    _CPU_GOALS.get(name),
                    [own / theirs for own, theirs in zip(ours, other, strict=True)],
                    "",
                    other_ms=median(other),
                )
                for name, other in sums.items()
            ),
        ]

    def _cpu(self) -> dict[str, float]:
        used = cpu.of_all(self.fixture.stack, self.platform)
        return {name: used[name] for name in _OURS}

    def _count(self, name: str, before: dict[str, float], after: dict[str, float], runs: int) -> None:
        used = cpu.difference(before, after)
        self.milliseconds[name].append({part: seconds / runs * 1000 for part, seconds in used.items()})

    async def commits(self) -> Slice:
        """Counts rows that 8 connections insert, each in its own commit."""
        pool = await connections(self.fixture.admin_url, CONNECTIONS)
        numbers, until = count(), perf_counter() + SLICE_SECONDS

        async def insert() -> None:
            async with pool.acquire() as connection:
                while perf_counter() < until:
                    await connection.execute("INSERT INTO bench.single VALUES ($1)", next(numbers))

        await self.fixture.admin.execute("TRUNCATE single")
        began = perf_counter()
        await asyncio.gather(*(insert() for _ in range(CONNECTIONS)))
        seconds = perf_counter() - began
        await pool.close()
        done = await self.fixture.admin.fetchval("SELECT count(*) FROM single")
        check("commits", {"rows": done, "inserted": next(numbers)})
        return Slice(done, seconds)

    async def _queue(self) -> None:
        """Takes in one message in each of `sessions` new sessions, in one commit, so that all are there at once."""
        subjects = SubjectKeys(Cipher(MASTER_KEY))
        async with self.platform.database(SERVICE).begin() as tx:
            for n in range(self.queued, self.queued + self.sessions):
                # The worker's role is not bound to one tenant.
                tx.tenant_id = list(self.agents)[n % self.tenants]
                arrival = Arrival(
                    message_id=uuid7(),
                    agent_id=self.agents[tx.tenant_id],
                    session_key=f"session-{n}",
                    subject_id=f"person-{n % self.sessions}",
                    text="How much is one and one?",
                    received_at=utcnow(),
                )
                await take_in(tx, arrival, subjects)
            # The wake-up that another process of the service would send.
            await tx.sql("SELECT pg_notify($1, $2)", f"claw_lanes_{SERVICE}", RUNS.name)
        self.queued += self.sessions

    async def _none(self, counted: str) -> bool:
        return not await self.fixture.admin.fetchval(counted)

    async def _rows(self) -> dict[str, int]:
        return dict(await self.fixture.admin.fetchrow(_STEPS, STEPS))


@dataclass
class Other:
    """LangGraph or DBOS in its process."""

    fixture: Fixture
    which: str
    process: Process

    async def slice(self) -> Slice:
        """Counts steps. Raises ValueError if one of them is not on record."""
        assert self.process.stdin is not None
        runs, steps = await self._rows()
        began = perf_counter()
        self.process.stdin.write(b"%f\n" % SLICE_SECONDS)
        done = int(await self.line())
        seconds = perf_counter() - began
        runs_now, steps_now = await self._rows()
        check(self.which, {"ended": done * STEPS, "runs": (runs_now - runs) * STEPS, "steps": steps_now - steps})
        return Slice(done * STEPS, seconds)

    async def line(self) -> str:
        """The next line that the process prints. Raises ValueError if it has ended."""
        assert self.process.stdout is not None
        async with asyncio.timeout(ANCHOR_SECONDS):
            line = (await self.process.stdout.readline()).decode().strip()
        if not line:
            raise ValueError(f"runs: the process of {self.which} has ended; see its output above")
        return line

    async def _rows(self) -> tuple[int, int]:
        return tuple(await self.fixture.admin.fetchrow(_ROWS[self.which], STEPS))


def in_runs(result: Result) -> Result:
    """The same result with rates of runs in place of steps."""
    rates = {"our_rate": result.our_rate / STEPS, "anchor_rate": result.anchor_rate / STEPS}
    return msgspec.structs.replace(result, **rates)


@asynccontextmanager
async def running(place: Fixture) -> AsyncIterator[Runs]:
    async with running_platform_on(place) as platform:
        bench = Runs(place, platform)
        await bench.prepare()
        yield bench


@asynccontextmanager
async def others(bench: Runs) -> AsyncIterator[list[Anchor]]:
    """LangGraph and DBOS, ready to run. Installs their packages the first time."""
    python = await environment("bench")
    async with AsyncExitStack() as stack:
        found = []
        for which, name, goal in (("langgraph", "LangGraph, sync", 6), ("dbos", "DBOS", 5)):
            # -I: otherwise modules beside the program would hide packages of the same name.
            command = python, "-I", str(runs_anchors.__file__), which, bench.fixture.admin_url
            process = await stack.enter_async_context(child(*command))
            other = Other(bench.fixture, which, process)
            await other.line()
            found.append(Anchor(f"runs: {name}", goal, partial(bench.of, name, other)))
        yield found
