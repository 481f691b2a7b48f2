"""The group write on a real database: each refused write leaves nothing behind, and the others are written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import pytest

import services.agent
from infra.clock import utcnow, uuid7
from infra.errors import Conflict
from infra.lanes.claims import LaneLost, Lease
from infra.lanes.effects import Effects
from infra.postgres.db import create_engine
from infra.postgres.schema import migrate, prepare_database, role_url
from infra.postgres.tx import Database, OutboxRow
from infra.security.crypto import Cipher, DataKey
from infra.security.subjects import SubjectKeys
from protos.messages.billing import UsageRecorded
from services.agent.execution.context import RunContext
from services.agent.execution.group_write import (
    Begun,
    Completion,
    EndedStep,
    GroupWriter,
    MessagesArrived,
    ReplyMessage,
    RunStopped,
    RunWrite,
    Used,
)
from services.agent.execution.journal import Journal
from services.agent.lanes import RUNS, RunItem
from services.agent.models.contract import Usage
from services.agent.runs.domain import BeginStep, Limits, Run, Start
from services.agent.runs.events import MessagesTaken
from tests.infra.conftest import PASSWORDS

TENANT = "t"
_WEEK = timedelta(days=7)


@dataclass
class Runs:
    """Queued runs, each with one message and a claimed lane of its own."""

    database: Database
    writer: GroupWriter

    async def queued(self) -> tuple[UUID, Lease]:
        run_id = uuid7()
        session = f"s-{run_id}"
        async with self.database.begin(tenant_id=TENANT) as tx:
            await tx.sql(
                "INSERT INTO run (id, tenant_id, session_key, agent_id, subject_id) VALUES ($1, $2, $3, $4, 'p')",
                run_id,
                TENANT,
                session,
                uuid7(),
            )
            tx.enqueue(RUNS, lane=session, item=RunItem(run_id), item_id=run_id)
        await self.say(run_id)
        [(lane_id, epoch)] = await self.rows(
            "UPDATE lane SET owner = $1, epoch = epoch + 1 WHERE lane = $2 RETURNING lane_id, epoch", uuid7(), session
        )
        return run_id, Lease(RUNS.name, TENANT, session, lane_id, epoch, until=1e18)

    async def say(self, run_id: UUID) -> None:
        await self.rows(
            "INSERT INTO message (tenant_id, message_id, session_key, seq, run_id, subject_id, text, received_at) "
            "SELECT $2, $3, session_key, (SELECT count(*) FROM message) + 1, id, 'p', '', now() FROM run WHERE id = $1",
            run_id,
            TENANT,
            uuid7(),
        )

    def write(self, run_id: UUID, lease: Lease, *, version: int = 0, events: int = 1, **more: object) -> RunWrite:
        """A write with so many events, each with one message for the outbox."""
        out = self.database.collector(TENANT)
        write = RunWrite(lease, run_id, TENANT, version, out, **more)  # type: ignore[arg-type]
        for n in range(version + 1, version + events + 1):
            write.events.append((uuid7(), MessagesTaken(n=n, session_key=lease.lane, step=n, messages=1)))
        return write

    async def commit(self, *writes: RunWrite) -> list[BaseException | None]:
        """Submits the writes as one group. Returns the error of each."""
        return await asyncio.gather(*(self.writer.submit(write) for write in writes), return_exceptions=True)

    async def rows(self, statement: str, *arguments: object) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in await self.database.autocommit(statement, *arguments)]

    async def versions(self, run_id: UUID) -> list[object]:
        rows = await self.rows("SELECT version FROM event WHERE stream_id = $1 ORDER BY position", f"run:{run_id}")
        return [version for (version,) in rows]


@pytest.fixture
async def runs(database: str) -> AsyncIterator[Runs]:
    await prepare_database(database, {"agent": PASSWORDS})
    await migrate(database, "agent", Path(str(services.agent.__file__)).parent / "migrations")
    engine = create_engine(role_url(database, "agent", "worker", PASSWORDS.worker))
    worker = Database(engine, "agent")
    yield Runs(worker, GroupWriter(worker))
    await engine.dispose()


async def test_writes_of_one_run_in_one_group_follow_each_other(runs: Runs) -> None:
    run_id, lease = await runs.queued()
    first = runs.write(run_id, lease, begins=True)
    first.started_model = "m"
    second = runs.write(run_id, lease, version=1, events=2, begins=True, expected_messages=1)
    second.begun.append(Begun(1, "model", "m", 1, "span"))
    third = runs.write(run_id, lease, version=3)
    third.ended.append(EndedStep(1, "completed", 7, None))
    assert await runs.commit(first, second, third) == [None, None, None]
    assert await runs.versions(run_id) == [1, 2, 3, 4]
    assert await runs.rows("SELECT version FROM stream WHERE stream_id = $1", f"run:{run_id}") == [(4,)]
    assert await runs.rows("SELECT status, model FROM run WHERE id = $1", run_id) == [("running", "m")]
    steps = await runs.rows("SELECT n, status, attempts, duration_ms, span_id FROM run_step WHERE run_id = $1", run_id)
    assert steps == [(1, "completed", 1, 7, "span")]


async def test_each_refused_write_leaves_nothing_and_the_others_are_written(runs: Runs) -> None:
    (good, good_lease), (lost, lost_lease), (stopped, stopped_lease), (steered, steered_lease) = [
        await runs.queued() for _ in range(4)
    ]
    await runs.rows("UPDATE lane SET epoch = epoch + 1 WHERE lane_id = $1", lost_lease.lane_id)
    await runs.rows("UPDATE run SET cancel_reason = 'cancelled' WHERE id = $1", stopped)
    await runs.say(steered)
    writes = [
        runs.write(lost, lost_lease),
        runs.write(stopped, stopped_lease),  # the end of a step is written all the same
        runs.write(stopped, stopped_lease, version=1, begins=True),
        runs.write(steered, steered_lease, begins=True, expected_messages=1),
        runs.write(good, good_lease, begins=True, expected_messages=1),
    ]
    for write in writes:
        write.out._rows.append(OutboxRow("kafka", uuid7(), "topic", "", str(write.run_id), "{}", b"{}", _WEEK))
    errors = await runs.commit(*writes)
    assert [type(error) for error in errors] == [LaneLost, type(None), RunStopped, MessagesArrived, type(None)]
    assert [await runs.versions(run_id) for run_id in (lost, stopped, steered, good)] == [[], [1], [], [1]]
    assert [write.messages for write in writes] == [1, 1, 1, 2, 1]
    keys = await runs.rows("SELECT key FROM outbox WHERE destination = 'topic' ORDER BY position")
    assert keys == [(str(stopped),), (str(good),)]


async def test_a_write_at_another_version_fails_alone(runs: Runs) -> None:
    (bad, bad_lease), (good, good_lease) = [await runs.queued() for _ in range(2)]
    errors = await runs.commit(runs.write(bad, bad_lease, version=5), runs.write(good, good_lease))
    assert [type(error) for error in errors] == [Conflict, type(None)]
    assert [await runs.versions(run_id) for run_id in (bad, good)] == [[], [1]]


async def test_a_group_that_is_repeated_after_its_commit_is_written_once(runs: Runs) -> None:
    run_id, lease = await runs.queued()
    write = runs.write(run_id, lease)
    usage = Usage(input_tokens=3, output_tokens=2)
    record = UsageRecorded(tenant_id=TENANT, usage_id="u", resource="m", quantities={"calls": 1}, occurred_at=utcnow())
    write.used.append(Used(record, usage))
    await runs.writer._call([write], repeated=False)
    await runs.rows("UPDATE lane SET epoch = epoch + 1 WHERE lane_id = $1", lease.lane_id)
    [(refused, *_)] = await runs.writer._call([write], repeated=True)
    assert refused is None
    assert await runs.versions(run_id) == [1]
    assert await runs.rows("SELECT input_tokens, output_tokens FROM run WHERE id = $1", run_id) == [(3, 2)]


async def test_a_completed_run_ends_its_item_and_sends_its_reply_in_the_next_position(runs: Runs) -> None:
    run_id, lease = await runs.queued()
    next_id = uuid7()
    async with runs.database.begin(tenant_id=TENANT) as tx:
        tx.enqueue(RUNS, lane=lease.lane, item=RunItem(next_id), item_id=next_id)
    await runs.rows("INSERT INTO sequence VALUES ($1, 'sent', $2, 4)", TENANT, lease.lane)
    headers, body = '{"ce_id":"x","ce_sequence":"0"}', b'{"text":"Hi","position":0}'
    row = OutboxRow("rabbit", uuid7(), "channel.outbound", "r", "k", headers, body, _WEEK)
    write = runs.write(run_id, lease, begins=True, expected_messages=1)
    write.completion = Completion(1, True, b"sealed", None, ReplyMessage(uuid7(), lease.lane, row))
    assert await runs.commit(write) == [None]
    assert write.next is not None
    assert write.next.item_id == next_id
    assert await runs.rows("SELECT status, reply FROM run WHERE id = $1", run_id) == [("completed", b"sealed")]
    assert await runs.rows("SELECT state FROM lane_item WHERE item_id = $1", run_id) == [("done",)]
    sent = await runs.rows("SELECT headers, body FROM outbox WHERE bus = 'rabbit'")
    assert sent == [('{"ce_id":"x","ce_sequence":"5"}', b'{"text":"Hi","position":5}')]
    assert await runs.rows("SELECT state FROM delivery WHERE run_id = $1", run_id) == [("queued",)]
    # The run is over: nothing begins any more.
    again = runs.write(run_id, lease, version=1, begins=True)
    assert [type(error) for error in await runs.commit(again)] == [RunStopped]


async def test_groups_over_the_same_runs_in_any_order_do_not_deadlock(runs: Runs) -> None:
    found = [await runs.queued() for _ in range(10)]
    other = GroupWriter(runs.database)
    for _ in range(10):
        ahead = [runs.write(run_id, lease, events=0) for run_id, lease in found]
        behind = [runs.write(run_id, lease, events=0) for run_id, lease in reversed(found)]
        await asyncio.gather(runs.commit(*ahead), *(other.submit(write) for write in behind))


def journal(runs: Runs, run_id: UUID, lease: Lease) -> Journal:
    context = RunContext(
        database=runs.database,
        subjects=SubjectKeys(Cipher("A" * 43 + "=")),
        run_id=run_id,
        tenant_id=TENANT,
        session_key=lease.lane,
        agent_id=uuid7(),
        subject_id="p",
        key=DataKey(bytes(32)),
        limits=Limits(),
        depth=0,
        state=Run(),
        messages=1,
    )
    return Journal(context, cast("Effects", SimpleNamespace(lease=lease)), runs.writer)


async def test_the_start_of_a_run_is_written_with_its_first_step_also_after_a_refusal(runs: Runs) -> None:
    run_id, lease = await runs.queued()
    written = journal(runs, run_id, lease)
    written.start(Start(lease.lane, uuid7(), 1, utcnow(), 1), "m")
    begin = BeginStep(lease.lane, 1, "model", "m", 1, "digest", "code")
    with pytest.raises(MessagesArrived):
        await written.begin(begin, None, None, 2)
    assert await runs.versions(run_id) == []
    await written.begin(begin, None, None, 1)
    assert await runs.versions(run_id) == [1, 2]
    [(events, transactions)] = await runs.rows(
        "SELECT array_agg(type ORDER BY version), count(DISTINCT xmin::text) FROM event WHERE stream_id = $1",
        f"run:{run_id}",
    )
    assert (events, transactions) == (["RunStarted", "StepStarted"], 1)
    assert await runs.rows("SELECT status, model FROM run WHERE id = $1", run_id) == [("running", "m")]


async def test_the_start_of_a_run_that_ends_without_a_step_is_written(runs: Runs) -> None:
    run_id, lease = await runs.queued()
    written = journal(runs, run_id, lease)
    written.start(Start(lease.lane, uuid7(), 1, utcnow(), 1), "m")
    await written.settle()
    assert await runs.versions(run_id) == [1]


async def test_a_run_that_is_to_be_cancelled_does_not_start(runs: Runs) -> None:
    run_id, lease = await runs.queued()
    await runs.rows("UPDATE run SET cancel_reason = 'enough' WHERE id = $1", run_id)
    written = journal(runs, run_id, lease)
    written.start(Start(lease.lane, uuid7(), 1, utcnow(), 1), "m")
    with pytest.raises(RunStopped):
        await written.begin(BeginStep(lease.lane, 1, "model", "m", 1, "digest", "code"), None, None, 1)
    assert await runs.versions(run_id) == []
