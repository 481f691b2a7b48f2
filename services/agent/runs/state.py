"""The state of a run at any of its events, folded from its journal."""

from __future__ import annotations

from uuid import UUID

from infra.errors import InvalidMessage
from infra.postgres import event_store
from infra.postgres.tx import Tx
from services.agent.runs import queries
from services.agent.runs.domain import Run, completed_in_a_row
from services.agent.runs.publishing import stream
from services.agent.runs.views import Phase, RunState, StateEvent, StateStep


async def state_at(tx: Tx, run_id: UUID, at: int | None) -> RunState:
    """The state after the event with the number `at` (None: the last one), without texts of people and models.

    Raises NotFound, and InvalidMessage (``at``) if the run has no such event.
    """
    await queries.load(tx, run_id)
    journal = stream(run_id)
    events = await event_store.history(await tx.connection(), journal)
    last = len(events) if at is None else at
    if not min(1, len(events)) <= last <= len(events):
        raise InvalidMessage("at", f"must be from 1 to {len(events)}, the number of the run's events")
    state = journal.aggregate.initial()
    for event, _ in events[:last]:
        state = journal.aggregate.evolve(state, event)
    return RunState(
        run_id=run_id,
        at=last,
        events=[
            StateEvent(n=n, type=type(event).__name__, recorded_at=recorded_at)
            for n, (event, recorded_at) in enumerate(events, 1)
        ],
        status=_status(state),
        attempts=state.attempts,
        tokens=state.tokens,
        reserved_nanos=sum(state.reserved.values()),
        steps=[
            StateStep(n=n, kind=step.kind, name=step.name, status=step.status, attempt=step.attempt, error=step.error)
            for n, step in sorted(state.steps.items())
        ],
        waits_for=state.suspended.reason if state.suspended else None,
        fork_step=completed_in_a_row(state),
    )


def _status(state: Run) -> Phase:
    if state.over:
        return "over"
    if state.suspended:
        return "waiting"
    return "running" if state.started_at else "queued"
