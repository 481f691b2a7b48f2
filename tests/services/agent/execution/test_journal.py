"""The journal of a run on a real database: the writes at its start and at its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import cast
from uuid import UUID

import pytest

from infra.clock import utcnow, uuid7
from infra.lanes.claims import Lease
from infra.lanes.effects import Effects
from infra.security.crypto import Cipher, DataKey
from infra.security.subjects import SubjectKeys
from services.agent.execution.context import RunContext
from services.agent.execution.group_write import MessagesArrived, RunStopped
from services.agent.execution.journal import RunJournal
from services.agent.runs.domain import BeginStep, EndStep, Run, Start
from services.agent.runs.limits import Limits
from tests.services.agent.execution.written_runs import TENANT, Runs, written_runs


@pytest.fixture
async def runs(database: str) -> AsyncIterator[Runs]:
    async with written_runs(database) as found:
        yield found


def journal(runs: Runs, run_id: UUID, lease: Lease) -> RunJournal:
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
    return RunJournal(context, cast("Effects", SimpleNamespace(lease=lease)), runs.writer)


def begin(lease: Lease, step: int) -> BeginStep:
    return BeginStep(lease.lane, step, "model", "m", 1, "digest", "code")


def end(lease: Lease, step: int) -> EndStep:
    return EndStep(lease.lane, step, 1, 7, b"sealed")


async def test_the_start_of_a_run_is_written_with_its_first_step_also_after_a_refusal(runs: Runs) -> None:
    run_id, lease = await runs.queued()
    written = journal(runs, run_id, lease)
    written.start(Start(lease.lane, uuid7(), 1, utcnow(), 1), "m")
    with pytest.raises(MessagesArrived):
        await written.begin(begin(lease, 1), None, None, 2)
    assert await runs.versions(run_id) == []
    await written.begin(begin(lease, 1), None, None, 1)
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


async def test_the_end_of_a_step_is_one_write_with_the_next_start_unless_that_is_refused_or_comes_later(
    runs: Runs,
) -> None:
    run_id, lease = await runs.queued()
    written = journal(runs, run_id, lease)
    written.start(Start(lease.lane, uuid7(), 1, utcnow(), 1), "m")
    recorded: list[int] = []
    await written.begin(begin(lease, 1), None, None, 1)
    await written.end(end(lease, 1), None, recorded=lambda: recorded.append(1))
    await written.begin(begin(lease, 2), None, None, 1)
    await written.end(end(lease, 2), None, recorded=lambda: recorded.append(2))
    with pytest.raises(MessagesArrived):
        await written.begin(begin(lease, 3), None, None, 2)
    assert runs.writer.commits.working
    await runs.writer.commits.working
    await written.begin(begin(lease, 3), None, None, 1)
    await written.end(end(lease, 3), None, recorded=lambda: recorded.append(3))
    await asyncio.sleep(0)  # the end of this turn of the event loop
    assert runs.writer.commits.working
    await runs.writer.commits.working
    assert recorded == [1, 2, 3]
    groups = await runs.rows(
        """
        SELECT array_agg(type ORDER BY version) FROM event WHERE stream_id = $1 GROUP BY xmin::text
        ORDER BY min(version)
        """,
        f"run:{run_id}",
    )
    assert [types for (types,) in groups] == [
        ["RunStarted", "StepStarted"],
        ["StepCompleted", "StepStarted"],
        ["StepCompleted"],
        ["StepStarted"],
        ["StepCompleted"],
    ]
    assert await runs.rows("SELECT n, status FROM run_step WHERE run_id = $1 ORDER BY n", run_id) == [
        (1, "completed"),
        (2, "completed"),
        (3, "completed"),
    ]
    sent = await runs.rows("SELECT count(*), count(DISTINCT message_id) FROM outbox WHERE key = $1", lease.lane)
    assert sent == [(7, 7)]


async def test_a_run_that_is_to_be_cancelled_does_not_start(runs: Runs) -> None:
    run_id, lease = await runs.queued()
    await runs.rows("UPDATE run SET cancel_reason = 'enough' WHERE id = $1", run_id)
    written = journal(runs, run_id, lease)
    written.start(Start(lease.lane, uuid7(), 1, utcnow(), 1), "m")
    with pytest.raises(RunStopped):
        await written.begin(begin(lease, 1), None, None, 1)
    assert await runs.versions(run_id) == []
