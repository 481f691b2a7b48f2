"""A run that asks another agent: the other's run is its child, and answers one of its steps."""

from __future__ import annotations

from typing import NamedTuple
from uuid import UUID

import msgspec

from infra.clock import utcnow
from infra.postgres.tx import Tx, derived_id
from infra.security.subjects import SubjectKeys
from services.agent.execution.conversation import Reader
from services.agent.runs import projections
from services.agent.runs.notices import Child
from services.agent.sessions.intake import Arrival, take_in

# Agents that ask agents that ask agents; more is a circle.
MAX_DEPTH = 3


class Question(msgspec.Struct, frozen=True):
    """What the model writes to another agent."""

    message: str


QUESTION = {
    "type": "object",
    "properties": {"message": {"type": "string", "minLength": 1}},
    "required": ["message"],
    "additionalProperties": False,
}


class State(NamedTuple):
    """How far a child is. reply: None where it gave none."""

    is_over: bool
    reply: str | None
    error: str | None


def child_id(run_id: UUID, step: int) -> UUID:
    return derived_id(run_id, "child", step)


async def open_child(tx: Tx, subjects: SubjectKeys, parent_id: UUID, child: Child) -> None:
    """Opens the run that answers the parent's step, for the same person, in a session of its own; once."""
    id_ = child_id(parent_id, child.step)
    if await tx.sql("SELECT 1 FROM run WHERE id = $1", id_):
        return
    [(subject_id, depth)] = await tx.sql("SELECT subject_id, depth FROM run WHERE id = $1", parent_id)
    arrival = Arrival(
        message_id=derived_id(id_, "message"),
        agent_id=child.agent_id,
        session_key=f"run_{id_}",
        subject_id=subject_id,
        text=child.text,
        received_at=utcnow(),
        new_run_id=id_,
    )
    await take_in(tx, arrival, subjects)
    await tx.sql(
        "UPDATE run SET parent_run_id = $2, parent_step = $3, depth = $4, limit_nanos = $5 WHERE id = $1",
        id_,
        parent_id,
        child.step,
        depth + 1,
        child.limit_nanos,
    )


async def state(tx: Tx, subjects: SubjectKeys, id_: UUID) -> State | None:
    """None where there is no such child yet."""
    rows = await tx.sql("SELECT status, subject_id, reply, error FROM run WHERE id = $1", id_)
    if not rows:
        return None
    [(status, subject_id, sealed, error)] = rows
    reply = await Reader(tx, subjects).open(sealed, subject_id, str(id_), "reply") if sealed else None
    return State(status not in projections.STOPPABLE, reply, error)


async def family(tx: Tx, run_id: UUID) -> list[UUID]:
    """The run, its children, theirs, and so on."""
    rows = await tx.sql(
        "WITH RECURSIVE family AS (SELECT $1::uuid AS id UNION ALL SELECT r.id FROM run r JOIN family f "
        "ON r.parent_run_id = f.id) SELECT id FROM family",
        run_id,
    )
    return [UUID(str(id_)) for (id_,) in rows]
