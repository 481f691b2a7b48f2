"""Drives an agent step by step in one process: real PostgreSQL, two workers, a model and tools that follow rules.

A worker stops before each of its transactions and in each of its calls until the test lets it go on. Nothing waits for
time: leases and pauses end because the driver moves the rows in the database into the past.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast
from urllib.parse import urlsplit
from uuid import UUID

import asyncpg
import msgspec
from prometheus_client import CollectorRegistry
from sqlalchemy.ext.asyncio import AsyncConnection

import services.agent
from infra.clock import utcnow, uuid7
from infra.lanes.effects import Effects, ItemEnded
from infra.lanes.runner import LaneRunner
from infra.observe.metrics import Metrics
from infra.postgres.database import Database
from infra.postgres.db import create_engine
from infra.postgres.schema import migrate, prepare_database, role_url
from infra.postgres.tx import Tx
from infra.security.crypto import Cipher
from infra.security.subjects import SubjectKeys
from protos.envelope import Envelope
from protos.plugin.v1 import plugin_pb2
from services.agent.definitions import store
from services.agent.definitions.models import NewAgent, RunLimits
from services.agent.definitions.queue_modes import QueueMode
from services.agent.execution.context import Services
from services.agent.execution.executor import Executor
from services.agent.execution.group_write import GroupWriter, RunWrite
from services.agent.execution.watch import Watch
from services.agent.lanes import RUNS, RunItem
from services.agent.models.contract import (
    ModelAnswer,
    ModelEndpoint,
    ModelFailed,
    OnText,
    Prompt,
    ToolCall,
    ToolTurn,
    Usage,
    UserTurn,
)
from services.agent.sessions.arrivals import Arrival, Origin
from services.agent.sessions.intake import take_in
from tests.conftest import execute
from tests.infra.conftest import PASSWORDS
from tooling.testing.service_fakes import HasCredit

T = TypeVar("T")
_PROCESSES = count(1)
SESSION = "s"
PERSON = "person-1"
LOOK, SEND, DOUBT = "look", "send", "doubt"
# Turns of the event loop, far more than coroutines need to reach their next stop if they wait for nothing outside.
TURNS = 50


class Gate:
    """The stops of the coroutines of one worker. inside: how many of them hold a connection meanwhile."""

    def __init__(self) -> None:
        self.standing: list[tuple[str, asyncio.Future[None]]] = []
        self.inside = 0
        # They also stop within a transaction, after its writes and before its fence.
        self.midway = False

    async def pass_(self, place: str) -> None:
        here = place, asyncio.get_running_loop().create_future()
        self.standing.append(here)
        try:
            await here[1]
        finally:
            if here in self.standing:
                self.standing.remove(here)

    def open(self, index: int) -> str:
        place, go = self.standing.pop(index % len(self.standing))
        go.set_result(None)
        return place


class GatedDatabase(Database):
    """A database that stops before the first statement of each transaction."""

    gate: Gate
    is_away = False
    """Transactions fail before their first statement, as if the server were away."""
    _place = "before"

    async def run(
        self, work: Callable[[Tx], Awaitable[T]], *, tenant_id: str | None = None, cause: Envelope | None = None
    ) -> T:
        """The item's own transaction. It is used first when the run is about to end or to wait."""
        self._place = "end"
        return await super().run(work, tenant_id=tenant_id, cause=cause)

    @asynccontextmanager
    async def begin(self, *, tenant_id: str | None = None, cause: Envelope | None = None) -> AsyncIterator[Tx]:
        place, self._place = self._place, "before"
        async with super().begin(tenant_id=tenant_id, cause=cause) as tx:
            flush = tx.flush

            async def stop_midway() -> None:
                await flush()
                if self.gate.midway and tx.in_use:
                    self.gate.inside += 1
                    try:
                        await self.gate.pass_("midway")
                    finally:
                        self.gate.inside -= 1

            self._stop_before(tx, place)
            tx.__dict__["flush"] = stop_midway
            yield tx
            # The last flush comes after the fence. A coroutine that stopped there would keep the lane's row locked.
            del tx.__dict__["flush"]

    async def autocommit(self, statement: str, *arguments: Any) -> Sequence[tuple[Any, ...]]:
        if self.is_away:
            raise ConnectionRefusedError("the database is away")
        return await super().autocommit(statement, *arguments)

    @asynccontextmanager
    async def read_only(self, *, tenant_id: str) -> AsyncIterator[Tx]:
        async with super().read_only(tenant_id=tenant_id) as tx:
            self._stop_before(tx, "before")
            yield tx

    def _stop_before(self, tx: Tx, place: str) -> None:
        connection = tx.connection

        async def stop() -> AsyncConnection:
            tx.__dict__.pop("connection", None)
            await self.gate.pass_(place)
            if self.is_away:
                raise ConnectionRefusedError("the database is away")
            return await connection()

        tx.__dict__["connection"] = stop


class GatedWriter(GroupWriter):
    """Stops before each group write. The place is "end" if the write ends a run."""

    gate: Gate

    async def _call(self, group: Sequence[RunWrite], *, repeated: bool) -> Sequence[tuple[Any, ...]]:
        await self.gate.pass_("end" if any(write.completion for write in group) else "before")
        return await super()._call(group, repeated=repeated)


class Cache:
    """A cache without listeners."""

    def publish_soon(self, channel: str, message: bytes) -> None:
        pass


class Outside:
    """The model and the tools, shared by all workers.

    The same prompt gets the same answer. keys: idempotency key → arguments. effects: the arguments of each effect; each
    call of a step has arguments of its own. flaked: the calls that failed once with a transient error.
    """

    def __init__(self) -> None:
        self.keys: dict[str, str] = {}
        self.replies: dict[str, plugin_pb2.CallReply] = {}
        self.effects: list[str] = []
        self.flaked: set[str] = set()

    def answer(self, prompt: Prompt) -> ModelAnswer:
        """Follows the plan after the number in the last message: one word for each time that the model is asked."""
        said = [n for n, turn in enumerate(prompt.turns) if isinstance(turn, UserTurn)]
        texts = [turn.text for turn in prompt.turns if isinstance(turn, UserTurn)]
        number, *plan = texts[-1].split("\n")[-1].split()
        returned = sum(isinstance(turn, ToolTurn) for turn in prompt.turns[said[-1] :])
        # `look` is called twice, together with itself.
        words = [word for word in plan for _ in range(2 if word == LOOK else 1)]
        word = words[returned] if returned < len(words) else ""
        asked = f"{number}/{returned}"
        if word == "broken":
            raise ModelFailed("broken", transient=False)
        if word == "flaky":
            if asked not in self.flaked:
                self.flaked.add(asked)
                raise ModelFailed("busy", transient=True)
            word = ""
        calls = tuple(
            ToolCall(f"c{n}", word, msgspec.json.encode(f"{asked}/{n}").decode())
            for n in range(0 if not word else 2 if word == LOOK else 1)
        )
        text = "" if calls else " ".join(line.split()[0] for text in texts for line in text.split("\n"))
        return ModelAnswer(text, calls, Usage(input_tokens=1, output_tokens=1), "m", "stop")

    def call(self, request: plugin_pb2.CallRequest) -> plugin_pb2.CallReply:
        """A known key gets its first answer again, without another effect."""
        key, arguments = request.idempotency_key, request.arguments_json
        assert self.keys.setdefault(key, arguments) == arguments
        if key not in self.replies:
            outcome = plugin_pb2.CallReply.OUTCOME_SUCCEEDED
            if request.tool == DOUBT and arguments not in self.effects:
                outcome = plugin_pb2.CallReply.OUTCOME_UNKNOWN
            self.effects.append(arguments)
            self.replies[key] = plugin_pb2.CallReply(outcome=outcome, result_json=arguments, error="no answer")
        return self.replies[key]


class Call(NamedTuple):
    """A call of the model or of a tool. key: empty for the model."""

    run_id: UUID
    key: str


class Worker:
    """One process that executes runs. epoch: of its last lease; 0: none yet. calls: made and not checked yet. process:
    another number after each death."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._engine = create_engine(world.url("worker"))
        self._control = create_engine(world.url("worker"), pool_size=1)
        self._database = GatedDatabase(self._engine, "agent")
        self._watching = Database(self._engine, "agent")
        work = RUNS.runner(concurrency=2, dead=self._give_up)(self._execute)
        self._runner = LaneRunner(
            self._database, [work], self._control, Metrics(CollectorRegistry()), lease_seconds=3600
        )
        self._kind = self._runner._kinds[RUNS.name]
        self.begin_again()

    def begin_again(self) -> None:
        self.process = next(_PROCESSES)
        self.gate = self._database.gate = Gate()
        self.epoch = 0
        self.calls: list[Call] = []
        self._writer = GatedWriter(self._database)
        self._writer.gate = self.gate
        self._watch = Watch(self._watching)
        services = Services(*(cast(Any, service) for service in (None, HasCredit(), self, Cache())))
        self._executor = Executor(
            self._database, cast(Any, self), services, self._writer, self._watch, self._world.cipher
        )

    async def _execute(self, item: RunItem, effects: Effects, tx: Tx) -> ItemEnded | None:
        self._run_id = item.run_id
        return await self._executor.execute(item.run_id, effects, tx)

    async def _give_up(self, item: RunItem, error: str, tx: Tx) -> None:
        await self._executor.give_up(item.run_id, error, tx)

    # The interfaces of the models and of the plugin service

    def model(self, name: str, endpoint: ModelEndpoint) -> Worker:
        return self

    async def answer(self, prompt: Prompt, on_text: OnText) -> ModelAnswer:
        await self.gate.pass_("model")
        self.calls.append(Call(self._run_id, ""))
        answer = self._world.outside.answer(prompt)
        await on_text(answer.text)
        return answer

    async def Tools(self, request: plugin_pb2.ToolsRequest, **_: Any) -> plugin_pb2.ToolsReply:
        return plugin_pb2.ToolsReply(tools=[plugin_pb2.Tool(name=name, schema_json="{}") for name in request.names])

    async def Call(self, request: plugin_pb2.CallRequest, **_: Any) -> plugin_pb2.CallReply:
        await self.gate.pass_("tool")
        self.calls.append(Call(self._run_id, request.idempotency_key))
        return self._world.outside.call(request)

    # Driving

    @property
    def has_lane(self) -> bool:
        """True if the worker believes so."""
        return bool(self._kind.running)

    async def claim(self) -> bool:
        """Claims the session's lane if it is free, and runs to the first stop."""
        await self._runner._fill(self._kind)
        for lease in self._kind.running:
            self.epoch = lease.epoch
        await self._settle()
        return self.has_lane

    async def move(self, index: int) -> str:
        """One coroutine goes on to its next stop. Returns the name of the stop that it left."""
        place = self.gate.open(index)
        await self._settle()
        return place

    async def _settle(self) -> None:
        calm = 0
        while calm < TURNS:
            busy = self._engine.taken > self.gate.inside
            calm = 0 if busy else calm + 1
            await asyncio.sleep(0.0005 if busy else 0)

    async def look(self) -> None:
        """Looks for cancelled runs, as a worker does every half second."""
        await self._watch.look()
        await self._settle()

    def lose_database(self) -> None:
        self._database.is_away = True

    def find_database(self) -> None:
        self._database.is_away = False

    async def hear_of_loss(self) -> None:
        """As if a renewal reports that another process has the lane. The group still tries to commit the writes that it
        has."""
        for task in self._kind.running.values():
            task.cancel()
        await self._settle()

    async def die(self) -> None:
        """The process dies: only its commits and its lease remain."""
        tasks: list[asyncio.Task[None]] = [*self._kind.running.values()]
        others = self._writer.commits.working, self._executor._loader.working, self._watch._poll
        tasks += [task for task in others if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._settle()
        self.begin_again()

    async def end(self) -> None:
        await self.die()
        await self._runner._claims.close()
        await self._engine.dispose()
        await self._control.dispose()


class World:
    """One session of one tenant at a time, and reads of its rows."""

    def __init__(self, database: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._admin_url = database
        self.run(prepare_database(database, {"agent": PASSWORDS}))
        self.run(migrate(database, "agent", Path(str(services.agent.__file__)).parent / "migrations"))
        # The machine does not lose power in this test, so commits need not wait for the disk.
        name = urlsplit(database).path[1:]
        execute(database, f'ALTER DATABASE "{name}" SET synchronous_commit = off')
        self.cipher = Cipher("A" * 43 + "=")
        self.subjects = SubjectKeys(self.cipher)
        self._looking = self.run(asyncpg.connect(self.url("worker")))
        self._request = Database(create_engine(self.url("request")), "agent", tenanted=True)
        self.outside = Outside()
        self.workers = [Worker(self) for _ in range(2)]

    def url(self, role: str) -> str:
        return role_url(self._admin_url, "agent", role, getattr(PASSWORDS, role))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def end(self) -> None:
        async def end() -> None:
            for worker in self.workers:
                await worker.end()
            await self._looking.close()
            await self._request.engine.dispose()

        self.run(end())
        self.loop.close()

    def begin_again(self) -> None:
        self.tenant_id = f"t-{uuid7()}"
        self.agent_id = uuid7()
        self._first_id, self._said = UUID(int=uuid7().int & ~(0xFFF << 64)), 0
        self.outside = Outside()
        self._mode: QueueMode = "collect"
        # No worker may claim lanes that a failed example has left behind.
        self.rows("UPDATE lane SET owner = NULL, ready_at = NULL, epoch = epoch + 1")

        async def insert(tx: Tx) -> None:
            await store.insert(tx, self.agent_id, self._definition(), store.ProviderKeys(), "test")

        self.ask(insert)

    def _definition(self) -> NewAgent:
        return NewAgent(
            name="Helper",
            model="scripted/answer",
            tools=(LOOK, SEND, DOUBT),
            approval=(SEND,),
            queue_mode=self._mode,
            limits=RunLimits(steps=100, seconds=3600),
        )

    async def in_tenant(self, work: Any) -> Any:
        """Runs `work` in a transaction of the request role and returns its result."""
        return await self._request.run(work, tenant_id=self.tenant_id)

    def ask(self, work: Any) -> Any:
        return self.run(self.in_tenant(work))

    def set_mode(self, mode: QueueMode) -> None:
        if mode == self._mode:
            return
        self._mode = mode

        async def change(tx: Tx) -> None:
            await store.change(
                tx, await store.lock(tx, self.agent_id), self._definition(), store.ProviderKeys(), "test"
            )

        self.ask(change)

    async def say(self, text: str, *, by_channel: bool, key: str | None = None) -> UUID:
        """Returns the run that answers it. Raises Busy."""
        self._said += 1
        arrival = Arrival(
            message_id=uuid7(),
            agent_id=self.agent_id,
            session_key=SESSION,
            subject_id=PERSON,
            text=text,
            received_at=utcnow(),
            origin=Origin(UUID(int=7), "chat", "m") if by_channel else None,
            idempotency_key=key,
            # New ids within one millisecond have no order. These are ordered, so that examples repeat exactly.
            new_run_id=UUID(int=self._first_id.int + (self._said << 64)),
        )
        run_id: UUID = await self.in_tenant(lambda tx: take_in(tx, arrival, self.subjects))
        return run_id

    def leases_run_out(self) -> None:
        self.rows("UPDATE lane SET ready_at = now() - interval '1 hour' WHERE owner IS NOT NULL")

    def pauses_are_over(self) -> None:
        self.rows(
            "WITH due AS (UPDATE lane_item SET not_before = now() - interval '1 hour' WHERE state = 'waiting') "
            "UPDATE lane SET ready_at = now() - interval '1 hour' WHERE owner IS NULL AND ready_at > now()"
        )

    def rows(self, statement: str, *arguments: Any) -> list[tuple[Any, ...]]:
        """Runs the statement on a connection of its own, without a transaction."""
        return [tuple(row) for row in self.run(self._looking.fetch(statement, *arguments))]
