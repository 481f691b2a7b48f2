"""The agent's lanes: one per session executes its runs one after the other, one per person learns from them."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

import msgspec

from infra.lanes.lane import Lane
from infra.postgres.lane_items import AT_ONCE
from infra.postgres.tx import Tx
from protos.catalog import AGENT_TASKS
from protos.messages.agent import RunRequested


class RunItem(msgspec.Struct, frozen=True):
    """Execute this run. The first item of a run has the run's id; later ones, after a suspension, have other ids."""

    run_id: UUID


class LearningItem(msgspec.Struct, frozen=True):
    """Find facts about the person in the messages of this run, which has ended."""

    run_id: UUID


RUNS = Lane("runs", RunItem)
# One lane per person: each run is shown the memories of the one before, so that no fact is kept twice.
LEARNING = Lane("learning", LearningItem)


def queue_run(
    tx: Tx, run_id: UUID, session_key: str, *, item_id: UUID | None = None, after: timedelta = AT_ONCE
) -> None:
    """Puts the run at the end of its session's lane. `item_id`: the run's id if None.

    The run is announced to all workers, unless this process claims the lane. The announcement is only a hint: a worker
    that does not receive it finds the lane later by itself.
    """
    tx.enqueue(
        RUNS,
        lane=session_key,
        item=RunItem(run_id),
        item_id=item_id or run_id,
        after=after,
        hint=(AGENT_TASKS, RunRequested(run_id=run_id, session_key=session_key)),
    )
