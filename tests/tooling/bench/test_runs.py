"""Runs: the real service with a model that answers immediately. A step that is not on record gives an error."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tooling.bench import runs
from tooling.bench.fixture import bench_fixture
from tooling.bench.protocol import verdict
from tooling.bench.runs import Runs, in_runs, running
from tooling.testing.stack import Stack

SESSIONS, TENANTS = 10, 3


@pytest.fixture(scope="module")
async def bench(stack: Stack) -> AsyncIterator[Runs]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "SESSIONS", SESSIONS)
        patch.setattr(runs, "TENANTS", TENANTS)
        async with bench_fixture(stack, []) as place, running(place) as found:
            yield found


async def test_a_slice_is_as_many_runs_as_there_are_sessions_each_of_five_steps(bench: Runs) -> None:
    before = await steps_of_runs(bench)
    slice_ = await bench.ours()
    assert slice_.done == SESSIONS * 5
    assert slice_.seconds > 0
    ran = (await steps_of_runs(bench))[len(before) :]
    assert ran == [["model", "tool", "model", "tool", "model"]] * SESSIONS


async def test_single_row_commits_are_counted(bench: Runs) -> None:
    assert (await bench.commits()).done > 0


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [("run", "status", "completed"), ("run_step", "status", "completed"), ("event", "type", "StepStarted")],
)
async def test_a_step_that_is_not_on_record_is_an_error(bench: Runs, table: str, column: str, value: str) -> None:
    await bench.ours()
    admin = bench.fixture.admin
    await admin.execute(f"UPDATE agent.{table} SET {column} = 'lost' WHERE {column} = '{value}'")
    with pytest.raises(ValueError, match="the counts of one slice differ"):
        await bench.ours()
    await admin.execute(f"UPDATE agent.{table} SET {column} = '{value}' WHERE {column} = 'lost'")
    assert (await bench.ours()).done > 0


def test_rates_of_steps_are_shown_as_rates_of_runs() -> None:
    result = in_runs(verdict("runs", "LangGraph", 6, [500.0] * 3, [5000.0] * 3))
    assert (result.our_rate, result.anchor_rate, result.ratio, result.met) == (1000, 100, 10, True)


async def steps_of_runs(bench: Runs) -> list[list[str]]:
    rows = await bench.fixture.admin.fetch(
        "SELECT array_agg(s.kind ORDER BY s.n) FROM agent.run r JOIN agent.run_step s ON s.run_id = r.id "
        "GROUP BY r.created_at, r.id ORDER BY r.created_at, r.id"
    )
    return [kinds for (kinds,) in rows]
