"""The database is away when a model's answer is to be recorded: it is kept, and the model is not asked again."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import UUID

import pytest

from tests.services.agent.execution.session_driver import Worker, World

USAGE = "SELECT usage_id, estimated FROM run_usage WHERE run_id = $1 AND resource <> 'agent/run' ORDER BY 1"


@pytest.fixture
def world(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr("services.agent.execution.watch.POLL_SECONDS", 3600)
    monkeypatch.setattr("services.agent.execution.group_write.RETRY_PAUSES", (0,))
    world = World(database)
    world.begin_again()
    yield world
    world.end()


def answered_without_database(world: World, worker: Worker) -> UUID:
    """The worker's model has answered, and the database was away from then until the worker had lost its lane."""
    run_id = world.run(world.say("m1", by_channel=False))
    world.run(worker.claim())
    while world.run(worker.move(0)) != "model":
        pass
    assert len(worker.calls) == 1
    worker.lose_database()
    world.run(worker.move(0))
    world.run(worker.hear_of_loss())
    worker.find_database()
    world.leases_run_out()
    return run_id


def finish(world: World, worker: Worker) -> None:
    world.run(worker.claim())
    while worker.gate.standing:
        world.run(worker.move(0))


def attempts(world: World, run_id: UUID) -> list[tuple[object, ...]]:
    return world.rows("SELECT status, attempts FROM run_step WHERE run_id = $1 ORDER BY n", run_id)


def test_the_process_that_made_the_call_records_its_answer_later(world: World) -> None:
    worker = world.workers[0]
    run_id = answered_without_database(world, worker)
    finish(world, worker)
    assert world.rows("SELECT status FROM run WHERE id = $1", run_id) == [("completed",)]
    assert len(worker.calls) == 1
    assert attempts(world, run_id) == [("completed", 1)]
    usage = world.rows(USAGE, run_id)
    assert usage == [(f"{run_id}/1/1", False)]


def test_the_answer_is_left_once_another_process_has_the_lane(world: World) -> None:
    worker, other = world.workers
    run_id = answered_without_database(world, worker)
    finish(world, other)
    assert len(other.calls) == 1
    assert attempts(world, run_id) == [("completed", 2)]
    finish(world, worker)
    assert len(worker.calls) == 1
    usage = world.rows(USAGE, run_id)
    assert usage == [(f"{run_id}/1/1", True), (f"{run_id}/1/2", False)]
