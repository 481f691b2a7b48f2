"""Opens the run of another agent that answers a step of this run."""

from __future__ import annotations

from uuid import UUID

import msgspec

from infra.clock import utcnow
from infra.postgres.tx import Tx, derived_id
from infra.security.subjects import SubjectKeys
from services.agent.execution.outcome import ChildRun
from services.agent.runs.family import child_id
from services.agent.sessions.arrivals import Arrival, Context
from services.agent.sessions.intake import take_in

# An agent asks an agent that asks an agent. A longer chain is most likely a circle.
MAX_DEPTH = 3


class Question(msgspec.Struct, frozen=True):
    """The arguments with which a model asks another agent."""

    message: str


QUESTION = {
    "type": "object",
    "properties": {"message": {"type": "string", "minLength": 1}},
    "required": ["message"],
    "additionalProperties": False,
}


async def open_child(
    tx: Tx, subjects: SubjectKeys, parent_id: UUID, approvers: tuple[str, ...], child: ChildRun
) -> None:
    """Opens the run for the same person, in a session of its own. Does nothing if the run exists.

    `approvers`: of the channel in which the person is asked; empty: those of the agent.
    """
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
        context=Context((), approvers=approvers, is_complete=False) if approvers else None,
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
