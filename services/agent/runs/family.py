"""A run and its children: the runs of other agents that answer steps of this run."""

from __future__ import annotations

from typing import NamedTuple
from uuid import UUID

import msgspec

from infra.postgres.tx import Tx, derived_id
from infra.security.subjects import SubjectKeys
from services.agent.runs import projections
from services.agent.runs.content import StoredFile, ToolResult, Unsealer
from services.agent.runs.publishing import stream


class ChildState(NamedTuple):
    """The progress of a child run."""

    is_over: bool
    reply: str | None
    """None if it has not answered, or not yet."""
    error: str | None


def child_id(run_id: UUID, step: int) -> UUID:
    return derived_id(run_id, "child", step)


async def child_state(tx: Tx, subjects: SubjectKeys, id_: UUID) -> ChildState | None:
    """None if there is no such child yet."""
    rows = await tx.sql("SELECT status, subject_id, reply, error FROM run WHERE id = $1", id_)
    if not rows:
        return None
    [(status, subject_id, sealed, error)] = rows
    reply = await Unsealer(tx, subjects).open(sealed, subject_id, str(id_), "reply") if sealed else None
    return ChildState(status not in projections.STOPPABLE, reply, error)


async def files_of(tx: Tx, subjects: SubjectKeys, run_id: UUID) -> tuple[StoredFile, ...]:
    """The files that the tools of the run have made, and the agents that it asked, in order."""
    [(subject_id,)] = await tx.sql("SELECT subject_id FROM run WHERE id = $1", run_id)
    unsealer, steps = Unsealer(tx, subjects), (await tx.load(stream(run_id))).steps
    found: list[StoredFile] = []
    for n, step in sorted(steps.items()):
        if step.kind == "tool" and step.content:
            content = await unsealer.open(step.content, subject_id, f"{run_id}/{n}", "content")
            found += msgspec.json.decode(content, type=ToolResult).files if content else ()
    return tuple(found)


async def is_in_chat(tx: Tx, run_id: UUID) -> bool:
    """True if a channel shows the answer of the run, or of the run that asked first."""
    return bool(
        await tx.sql(
            """
            WITH RECURSIVE asking AS (
                SELECT channel_id, parent_run_id FROM run WHERE id = $1
                UNION ALL
                SELECT r.channel_id, r.parent_run_id FROM run r JOIN asking a ON r.id = a.parent_run_id
            )
            SELECT FROM asking WHERE channel_id IS NOT NULL LIMIT 1
            """,
            run_id,
        )
    )


async def first_asker(tx: Tx, run_id: UUID) -> UUID:
    """The run that asked first; the run itself if no other run asked for it."""
    [(id_,)] = await tx.sql(
        """
        WITH RECURSIVE asking AS (
            SELECT id, parent_run_id FROM run WHERE id = $1
            UNION ALL
            SELECT r.id, r.parent_run_id FROM run r JOIN asking a ON r.id = a.parent_run_id
        )
        SELECT id FROM asking WHERE parent_run_id IS NULL
        """,
        run_id,
    )
    return UUID(str(id_))


async def asked_runs(tx: Tx, run_id: UUID) -> list[UUID]:
    """The runs that wait below this one, which waits for them. Locks their rows in the order of ids."""
    rows = await tx.sql(
        """
        WITH RECURSIVE asked AS (
            SELECT id FROM run WHERE parent_run_id = $1 AND status = 'waiting'
            UNION ALL
            SELECT r.id FROM run r JOIN asked a ON r.parent_run_id = a.id WHERE r.status = 'waiting'
        )
        SELECT id FROM run WHERE id IN (SELECT id FROM asked) ORDER BY id FOR UPDATE
        """,
        run_id,
    )
    return [UUID(str(id_)) for (id_,) in rows]


async def family(tx: Tx, run_id: UUID) -> list[UUID]:
    """The run, its children, their children, and so on."""
    rows = await tx.sql(
        """
        WITH RECURSIVE family AS (
            SELECT $1::uuid AS id
            UNION ALL
            SELECT r.id FROM run r JOIN family f ON r.parent_run_id = f.id
        )
        SELECT id FROM family
        """,
        run_id,
    )
    return [UUID(str(id_)) for (id_,) in rows]
