"""What a person decides about a run that waits, and how it goes on."""

from __future__ import annotations

import re
from uuid import UUID

from infra.errors import Conflict, NotFound
from infra.postgres.tx import Tx, derived_id
from protos.catalog import AGENT_TASKS
from protos.messages.agent import RunRequested
from services.agent.lanes import RUNS, RunItem
from services.agent.runs import projections
from services.agent.runs.domain import NotWaiting, Settle, Suspension
from services.agent.runs.events import Decision
from services.agent.runs.publishing import stream

_YES_WORDS = "y yes ok okay approve approved allow ja oui si sí 好 好的 是 是的 可以 同意 批准"
_NO_WORDS = "n no deny denied refuse stop nein non 不 不行 不可以 不要 不同意 否 拒绝"
_YES, _NO = frozenset(_YES_WORDS.split()), frozenset(_NO_WORDS.split())


def decision_in(text: str) -> Decision | None:
    """What a person's message decides, if it is nothing but a yes or a no."""
    word = re.sub(r"[\s.!?。！？,，/]+", "", text).casefold()
    return "approve" if word in _YES else "deny" if word in _NO else None


async def settle(tx: Tx, run_id: UUID, step: int, decision: Decision, by: str, content: bytes | None = None) -> None:
    """The run goes on, behind what its session has in its lane.

    Its row is locked. content: of the step that is skipped, sealed. Raises Conflict where it does not wait for this.
    """
    [(session_key,)] = await tx.sql("SELECT session_key FROM run WHERE id = $1", run_id)
    try:
        events = await tx.decide(stream(run_id), Settle(session_key, step, decision, by, content))
    except NotWaiting as error:
        raise Conflict(f"run {run_id}: {error}") from error
    if not events:
        raise Conflict(f"run {run_id} is over")
    item_id = derived_id(run_id, "item", events[0].n)
    await projections.goes_on(tx, run_id, item_id)
    tx.enqueue(RUNS, lane=session_key, item=RunItem(run_id), item_id=item_id)
    tx.publish(AGENT_TASKS, RunRequested(run_id=run_id, session_key=session_key), key=session_key)


async def suspension(tx: Tx, run_id: UUID) -> Suspension:
    """What the run waits for. Raises NotFound, Conflict where it waits for nobody."""
    rows = await tx.sql("SELECT status FROM run WHERE id = $1 AND tenant_id = $2 FOR UPDATE", run_id, tx.tenant_id)
    if not rows:
        raise NotFound(f"run {run_id}")
    waits = (await tx.load(stream(run_id))).suspended
    if waits is None:
        raise Conflict(f"the run is {rows[0][0]} and waits for nobody's decision")
    return waits


async def tell_parent(tx: Tx, run_id: UUID) -> None:
    """A run is over: the one that waits for it, if any, goes on and looks."""
    rows = await tx.sql(
        "SELECT p.id, c.parent_step FROM run c JOIN run p ON p.id = c.parent_run_id WHERE c.id = $1 FOR UPDATE OF p",
        run_id,
    )
    for parent_id, step in rows:
        waits = (await tx.load(stream(UUID(str(parent_id))))).suspended
        if waits and (waits.reason, waits.step) == ("agent", step):
            await settle(tx, UUID(str(parent_id)), step, "answer", f"run:{run_id}")
