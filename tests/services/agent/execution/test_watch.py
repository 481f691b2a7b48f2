"""The calls of a run end when the run is cancelled, when its time is over, or when their own task is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import asynccontextmanager
from typing import Any, cast
from uuid import UUID

import pytest

from infra.clock import uuid7
from infra.outgoing.shares import tenant, work_for
from infra.postgres.database import Database
from infra.security.subjects import SubjectKeys
from services.agent.execution.load import RunLoader
from services.agent.execution.watch import CancelRequested, Watch


class Cancelled:
    """Stands in for the database: these runs are to be cancelled."""

    def __init__(self) -> None:
        self.runs: list[UUID] = []

    @asynccontextmanager
    async def begin(self) -> Any:
        yield self

    async def sql(self, _: str, under_way: Sequence[UUID]) -> list[tuple[UUID]]:
        return [(run_id,) for run_id in self.runs if run_id in under_way]


@pytest.fixture
def cancelled(monkeypatch: pytest.MonkeyPatch) -> Cancelled:
    monkeypatch.setattr("services.agent.execution.watch.POLL_SECONDS", 3600)
    return Cancelled()


async def until_cancelled(under_way: asyncio.Event) -> None:
    under_way.set()
    await asyncio.Event().wait()


async def test_the_calls_of_a_cancelled_run_raise_and_the_task_goes_on(cancelled: Cancelled) -> None:
    watch, under_way, run_id = Watch(cast("Database", cancelled)), asyncio.Event(), uuid7()

    async def run() -> str:
        with pytest.raises(CancelRequested):
            await watch.guard(run_id, until_cancelled(under_way), 60)
        # The runner of the lane cancels its task only if it is not cancelled already.
        task = asyncio.current_task()
        assert task
        assert task.cancelling() == 0
        with pytest.raises(TimeoutError):
            await watch.guard(run_id, asyncio.Event().wait(), 0.01)
        return await watch.guard(run_id, asyncio.sleep(0, "answer"), 60)

    task = asyncio.create_task(run())
    await under_way.wait()
    cancelled.runs = [run_id]
    await watch.look()
    assert await task == "answer"


@pytest.mark.parametrize("and_the_run", [False, True])
async def test_a_task_that_is_cancelled_itself_ends(cancelled: Cancelled, and_the_run: bool) -> None:
    watch, under_way, run_id = Watch(cast("Database", cancelled)), asyncio.Event(), uuid7()
    task = asyncio.create_task(watch.guard(run_id, until_cancelled(under_way), 60))
    await under_way.wait()
    if and_the_run:
        cancelled.runs = [run_id]
        await watch.look()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_look_for_cancelled_runs_takes_the_share_of_no_tenant(
    cancelled: Cancelled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.agent.execution.watch.POLL_SECONDS", 0)
    watch, looked, asker = Watch(cast("Database", cancelled)), asyncio.Event(), ""

    async def sql(*_: object) -> list[tuple[UUID]]:
        nonlocal asker
        asker = tenant.get()
        looked.set()
        return []

    monkeypatch.setattr(cancelled, "sql", sql)
    work_for("tenant-1")
    await watch.guard(uuid7(), looked.wait(), 60)
    assert not asker


async def test_runs_of_several_tenants_are_loaded_with_the_share_of_none() -> None:
    askers = []

    class Recording:
        def read_only(self, **_: str) -> Any:
            askers.append(tenant.get())
            raise ConnectionError

    work_for("tenant-1")
    with pytest.raises(ConnectionError):
        await RunLoader(cast("Database", Recording()), cast("SubjectKeys", None)).load(uuid7())
    assert askers == [""]
