"""``runs``: runs of five steps that survive whatever ends their process; a thousand sessions at once.

Ours is the real agent service: lanes, journal, projections, outbox and relays on real engines, traces exported, commits
shared. Model, tools and billing answer at once inside of its process (``runs_agent``), for what is measured is that
nothing gets lost. A slice begins when one commit has queued a run in each session, and lasts until the last run has
ended; then the durable rows are counted, each step begun and ended in the journal.

Against it stand rows that are each committed by itself, by 8 connections; and runs of five steps that do nothing, by
LangGraph and by DBOS, in an environment of their own. These have slices of 2 s, and as many runs at once as suits them.
"""

from __future__ import annotations

import asyncio
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from time import perf_counter
from uuid import UUID

import msgspec

from infra.clock import utcnow, uuid7
from infra.security.crypto import Cipher
from infra.security.subjects import SubjectKeys
from services.agent.lanes import RUNS
from services.agent.models import scripted
from services.agent.sessions.intake import Arrival, take_in
from tooling.bench import runs_anchors
from tooling.bench.anchor_environment import environment
from tooling.bench.fixture import Fixture, child, connections, running_platform_on
from tooling.bench.protocol import SLICE_SECONDS, Anchor, Result, Slice, check
from tooling.bench.runs_agent import TOOL
from tooling.bench.runs_anchors import STEPS
from tooling.testing.platform import MASTER_KEY, Platform
from tooling.testing.processes import Process as Service

SERVICE = "agent"
TENANTS = 20
SESSIONS = 1_000
CONNECTIONS = 8
WAIT_SECONDS = 300.0
ANCHOR_SECONDS = 120.0

# Rows of the whole bench, each kind as many as there are steps.
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
# The rows of an anchor: runs, then steps.
_ROWS = {
    "langgraph": (
        # The first checkpoints are that of the input and that before the first node.
        "SELECT count(*) FILTER (WHERE (metadata->>'step')::int = $1), "
        "count(*) FILTER (WHERE (metadata->>'step')::int > 0) FROM public.checkpoints"
    ),
    "dbos": (
        "SELECT (SELECT count(*) FROM dbos.workflow_status WHERE status = 'SUCCESS'), "
        "(SELECT count(*) FROM dbos.operation_outputs WHERE function_id <= $1)"
    ),
}


@dataclass
class Runs:
    """The running service with an agent for each tenant. queued: runs until now."""

    fixture: Fixture
    platform: Platform
    agents: dict[str, UUID] = field(default_factory=dict)
    queued: int = 0

    async def prepare(self) -> None:
        await self.fixture.check_durable()
        await self.fixture.admin.execute("CREATE TABLE single (n bigint NOT NULL)")
        await self.platform.prepare(SERVICE)
        variables = {
            **self.platform.environment(SERVICE),
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.fixture.otlp,
            # That of production: tests have a shorter one, so that they need not wait for it to run out.
            "CLAW_LEASE_SECONDS": "9",
        }
        log = self.platform.folder / f"{SERVICE}.log"
        self.platform.processes[SERVICE] = Service("tooling.bench.runs_agent", variables, log)
        await self.platform.ready(SERVICE)
        body = {"name": "Helper", "model": scripted.NAME, "system_prompt": "Be kind.", "tools": [TOOL]}
        for _ in range(TENANTS):
            tenant_id = str(uuid7())
            async with self.platform.client(SERVICE, tenant_id) as http:
                made = (await http.post("/api/v1/agents", json=body)).raise_for_status().json()
            self.agents[tenant_id] = UUID(made["id"])

    async def ours(self) -> Slice:
        """Steps. Raises ValueError where not all of them are on record."""
        await self._queue()
        began = perf_counter()
        await self.platform.until(partial(self._none, _OPEN), seconds=WAIT_SECONDS)
        seconds = perf_counter() - began
        check("runs", {"of queued runs": self.queued * STEPS, **await self._rows()})
        # The next slice is not to share the machine with what this one has left to the relays.
        await self.platform.until(partial(self._none, _UNSENT), seconds=WAIT_SECONDS)
        return Slice(SESSIONS * STEPS, seconds)

    async def commits(self) -> Slice:
        """Rows, each committed by itself."""
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
        """A message in each of so many new sessions, all by one commit: so they are all there at once."""
        subjects = SubjectKeys(Cipher(MASTER_KEY))
        async with self.platform.database(SERVICE).begin() as tx:
            for n in range(self.queued, self.queued + SESSIONS):
                # The worker's role is not bound to one tenant.
                tx.tenant_id = list(self.agents)[n % TENANTS]
                arrival = Arrival(
                    message_id=uuid7(),
                    agent_id=self.agents[tx.tenant_id],
                    session_key=f"session-{n}",
                    subject_id=f"person-{n % SESSIONS}",
                    text="How much is one and one?",
                    received_at=utcnow(),
                )
                await take_in(tx, arrival, subjects)
            # As another process of the service calls: there is more than it can take.
            await tx.sql("SELECT pg_notify($1, $2)", f"claw_lanes_{SERVICE}", RUNS.name)
        self.queued += SESSIONS

    async def _none(self, counted: str) -> bool:
        return not await self.fixture.admin.fetchval(counted)

    async def _rows(self) -> dict[str, int]:
        return dict(await self.fixture.admin.fetchrow(_STEPS, STEPS))


@dataclass
class Other:
    """LangGraph or DBOS, waiting in its process."""

    fixture: Fixture
    which: str
    process: Process

    async def slice(self) -> Slice:
        """Steps. Raises ValueError where not all of them are on record."""
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
        """What it says next. Raises ValueError where it has ended."""
        assert self.process.stdout is not None
        async with asyncio.timeout(ANCHOR_SECONDS):
            line = (await self.process.stdout.readline()).decode().strip()
        if not line:
            raise ValueError(f"runs: {self.which} has ended; what it printed says why")
        return line

    async def _rows(self) -> tuple[int, int]:
        return tuple(await self.fixture.admin.fetchrow(_ROWS[self.which], STEPS))


def in_runs(result: Result) -> Result:
    """The same, its rates those of runs."""
    rates = {"our_rate": result.our_rate / STEPS, "anchor_rate": result.anchor_rate / STEPS}
    return msgspec.structs.replace(result, **rates)


@asynccontextmanager
async def running(place: Fixture) -> AsyncIterator[Runs]:
    async with running_platform_on(place) as platform:
        bench = Runs(place, platform)
        await bench.prepare()
        yield bench


@asynccontextmanager
async def others(place: Fixture) -> AsyncIterator[list[Anchor]]:
    """LangGraph and DBOS, ready. The first time their packages are installed."""
    python = await environment()
    async with AsyncExitStack() as stack:
        found = []
        for which, name, goal in (("langgraph", "LangGraph, sync", 8), ("dbos", "DBOS", 10)):
            # -I: the modules beside the program are not to be found in the place of packages.
            command = python, "-I", str(runs_anchors.__file__), which, place.admin_url
            process = await stack.enter_async_context(child(*command))
            other = Other(place, which, process)
            await other.line()
            found.append(Anchor(f"runs: {name}", goal, other.slice))
        yield found
