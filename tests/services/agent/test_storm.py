"""Workers are killed, or stopped beyond their leases, at every boundary of every step while runs go on.

Each run ends once, says one thing, makes no completed step again, and its usage is counted to the attempt. Some of the
points here; all with ``CLAW_ALL_POINTS=1 ./claw test tests/services/agent/test_storm.py``.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from tests.services.agent.conftest import MODEL, Tenant, World
from tooling.testing.model_server import Asked, Says
from tooling.testing.processes import Process
from tooling.testing.service_fakes import WEATHER
from tooling.testing.stack import free_ports

WORKERS = 4
SESSIONS = 6
CHILDS = "gpt-4.1-mini"
# Place → at how many of its passes a worker ends there. A run passes the first three at each of its six calls: it looks
# something up, asks the model, calls two tools together, asks again, and again when a colleague has answered.
PLACES = {
    "after_effect_started": 16,
    "after_effect_call": 16,
    "after_effect_commit": 16,
    "before_commit": 32,
    "after_commit": 32,
    "after_append": 16,
    "after_lane_claim": 4,
    "before_lane_commit": 8,
    "after_lane_commit": 8,
    "after_commit_before_ack": 4,
}
# Places at which a stopped worker holds no transaction: otherwise the database would have to end it, after 45 s.
STOPPED = {"after_effect_started": 14, "after_effect_call": 14, "after_effect_commit": 14, "after_commit": 6}


class Point(NamedTuple):
    place: str
    at_pass: int
    signal: signal.Signals


POINTS = [
    *(Point(place, n + 1, signal.SIGKILL) for place, count in PLACES.items() for n in range(count)),
    *(Point(place, n + 1, signal.SIGSTOP) for place, count in STOPPED.items() for n in range(count)),
]
IN_CI = POINTS[::5]
# Mixed, the same each time: the early passes of one place, one after the other, would leave no run time for a step, and
# an item whose process dies 10 times becomes a dead letter.
ALL = random.Random(1).sample(POINTS, len(POINTS))


def answers(asked: Asked) -> Says:
    """The same answer to the same messages."""
    messages = asked.body["messages"]
    last = max(n for n, message in enumerate(messages) if message["role"] == "user")
    match sum(message["role"] == "tool" for message in messages[last:]):
        case 0:
            return Says(calls=((WEATHER, '{"city":"Bern"}'), (WEATHER, '{"city":"Oslo"}')))
        case 2:
            return Says(calls=(("ask_librarian", f'{{"message":"{asked.last_user_text}, child"}}'),))
        case _:
            return Says(f"Answer to {asked.last_user_text}")


class Storm:
    """Workers that each end at one of the points, and as many runs as it takes to reach all points."""

    def __init__(self, world: World, points: Sequence[Point], folder: Path) -> None:
        self.world = world
        self._points = points
        self.tenant = world.tenant()
        self.asked = 0
        self._folder = folder
        self._quiet = asyncio.Event()
        self._alive: list[Process] = []
        self._ports = free_ports([f"{kind}-{slot}" for kind in ("http", "grpc") for slot in range(WORKERS)])

    async def rage(self) -> None:
        other = await self.tenant.agent(model=f"openai/{CHILDS}")
        colleague = {"agent_id": other, "name": "ask_librarian", "description": "Knows places."}
        agent = await self.tenant.agent(agents=[colleague], tools=[WEATHER], knowledge=True)
        await asyncio.to_thread(self.world.platform.stop, "agent")
        try:
            async with asyncio.TaskGroup() as tasks:
                # Not all workers can be stopped at once: the others have to take over their lanes.
                killed = deque(point for point in self._points if point.signal == signal.SIGKILL)
                stopped = deque(point for point in self._points if point.signal == signal.SIGSTOP)
                keepers = [
                    tasks.create_task(self._keep(slot, stopped if slot < WORKERS // 2 else killed))
                    for slot in range(WORKERS)
                ]
                askers = [tasks.create_task(self._ask(agent, f"c{n}")) for n in range(SESSIONS)]
                await asyncio.gather(*keepers)
                self._quiet.set()
                await asyncio.gather(*askers)
        finally:
            for process in self._alive:
                process.kill()
        await self.world.platform.start("agent")

    async def _keep(self, slot: int, points: deque[Point]) -> None:
        """One worker after the other until all points are reached; then one that runs to the end."""
        while points:
            point = points.popleft()
            process = self._start(slot, point)
            if point.signal == signal.SIGKILL:
                assert await asyncio.to_thread(process.wait, 120) == -signal.SIGKILL, point
            else:
                await self._stopped(process)
        self._start(slot, None)

    def _start(self, slot: int, point: Point | None) -> Process:
        environment = {
            **self.world.platform.environment("agent"),
            "CLAW_HTTP_PORT": str(self._ports[f"http-{slot}"]),
            "CLAW_GRPC_PORT": str(self._ports[f"grpc-{slot}"]),
            "CLAW_LEASE_SECONDS": "1",
        }
        if point:
            environment |= {
                "CLAW_FAILPOINT": point.place,
                "CLAW_FAILPOINT_PASS": str(point.at_pass),
                "CLAW_FAILPOINT_SIGNAL": point.signal.name,
            }
        process = Process("services.agent", environment, self._folder / f"{slot}.log")
        self._alive.append(process)
        return process

    async def _stopped(self, process: Process) -> None:
        """When it has stopped, others claim its lanes. Then it goes on, and must not write."""
        platform = self.world.platform

        async def still() -> bool:
            return bool(psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)

        await platform.until(still)
        owned = await self._rows("SELECT lane_id, epoch FROM lane WHERE owner IS NOT NULL")

        async def taken() -> bool:
            now = await self._rows("SELECT lane_id, epoch FROM lane WHERE owner IS NOT NULL")
            return not set(owned) & set(now)

        await platform.until(taken)
        process.send_signal(signal.SIGCONT)
        process.terminate()
        assert await asyncio.to_thread(process.wait, 130) == 0  # a service that does not stop is ended after 120 s

    async def _ask(self, agent: str, chat: str) -> None:
        """Sends questions, the next one when the last one has its answer."""
        while not self._quiet.is_set():
            self.asked += 1
            question = f"Question {self.asked}"
            await self.tenant.receive(agent, question, chat=chat)
            await self.world.platform.until(partial(self._is_answered, question))

    async def _is_answered(self, question: str) -> bool:
        ended = "SELECT id, status, error FROM run WHERE status NOT IN ('queued', 'running', 'waiting', 'completed')"
        assert await self._rows(ended) == []
        said = (
            "SELECT 1 FROM outbox WHERE destination = 'channel.outbound' "
            "AND convert_from(body, 'UTF8')::json ->> 'text' = $1"
        )
        return bool(await self._rows(said, f"Answer to {question}"))

    async def _rows(self, statement: str, *arguments: Any) -> list[tuple[Any, ...]]:
        async with self.world.platform.database("agent").begin() as tx:
            return [tuple(row) for row in await tx.sql(statement, *arguments)]


@pytest.mark.timeout(1800)
async def test_whatever_workers_die_of_each_run_ends_once(world: World, tmp_path: Path) -> None:
    world.models.rules |= {MODEL: answers, CHILDS: lambda asked: Says("Somewhere.")}
    storm = Storm(world, ALL if os.environ.get("CLAW_ALL_POINTS") else IN_CI, tmp_path)
    await storm.rage()
    tenant = storm.tenant
    runs = await all_runs(tenant)
    parents = {run["id"]: run for run in runs if not run["parent_run_id"]}
    assert len(parents) == storm.asked
    assert len(runs) == 2 * storm.asked
    assert {run["status"] for run in runs} == {"completed"}
    said = [message["text"] for message in await tenant.sent("channel.outbound")]
    assert sorted(said) == sorted(f"Answer to Question {n + 1}" for n in range(storm.asked))

    facts = defaultdict(list)
    for fact in await tenant.sent("agent.events"):
        facts[fact["run_id"]].append(fact)
    assert set(facts) == {run["id"] for run in runs}
    for told in facts.values():
        assert [fact["n"] for fact in told] == list(range(1, len(told) + 1))
        ended = Counter(fact["step"] for fact in told if "duration_ms" in fact)
        assert set(ended.values()) == {1}
        assert sum("reply" in fact for fact in told) == 1

    usage = sorted(record["usage_id"] for record in await tenant.usage())
    attempts = {
        f"{run['id']}/{step['n']}/{attempt + 1}"
        for run in runs
        for step in run["steps"]
        if step["kind"] == "model"
        for attempt in range(step["attempts"])
    }
    # A call that the model server did not answer, on a busy machine, costs nothing.
    unanswered = {
        f"{fact['run_id']}/{fact['step']}/{fact['attempt']}"
        for told in facts.values()
        for fact in told
        if fact.keys() == {"run_id", "session_key", "n", "step", "attempt"}
    }
    assert usage == sorted(attempts - (unanswered - set(usage)))
    # Not more calls than attempts: recorded answers were not asked for again.
    assert len(world.models.requests) <= len(attempts)
    tools = [key for key, (tool, _) in world.peers.plugin.calls.items() if tool == WEATHER]
    assert len(tools) == 2 * len(parents)


async def all_runs(tenant: Tenant) -> list[dict[str, Any]]:
    """Each of the tenant's runs in whole, once all have ended."""
    found: list[dict[str, Any]] = []
    cursor = None
    while cursor is not None or not found:
        page = await tenant.call("GET", "/api/v1/runs", params={"limit": 100} | ({"cursor": cursor} if cursor else {}))
        found += page["items"]
        if (cursor := page["next"]) is None:
            break
    return [await tenant.over(run["id"]) for run in found]
