"""Writes the tables of runs, steps and deliveries in the transaction of the event. Read by `queries` and `timeline`."""

from __future__ import annotations

from datetime import datetime
from typing import Literal
from uuid import UUID

from infra.postgres.tx import Tx
from services.agent.runs.events import Ending, Reason, StepKind

OPEN = ("queued", "running", "waiting")
# These wait for a decision. They have no item in a lane.
SUSPENDED = ("waiting", "indeterminate")
STOPPABLE = ("queued", "running", *SUSPENDED)


async def started(tx: Tx, run_id: UUID, model: str) -> None:
    await tx.sql(
        """
        UPDATE run SET status = 'running', started_at = coalesce(started_at, clock_timestamp()), model = $2
        WHERE id = $1
        """,
        run_id,
        model,
    )


def step_not_made(
    tx: Tx,
    run_id: UUID,
    n: int,
    kind: StepKind,
    name: str,
    status: Literal["completed", "failed"],
    attempts: int,
    error: str | None,
) -> None:
    """A step that has already ended when it is stored: refused, or copied from another run."""
    tx.buffer(
        """
        INSERT INTO run_step (tenant_id, run_id, n, kind, name, status, attempts, started_at, duration_ms, error)
        SELECT tenant_id, run_id, n, kind, name, status, attempts, clock_timestamp(), 0, error
        FROM unnest($1::text[], $2::uuid[], $3::int[], $4::text[], $5::text[], $6::text[], $7::int[], $8::text[])
        AS s(tenant_id, run_id, n, kind, name, status, attempts, error)
        """,
        tx.tenant_id,
        run_id,
        n,
        kind,
        name,
        status,
        attempts,
        error,
    )


async def suspended(tx: Tx, run_id: UUID, reason: Reason, text: str) -> None:
    status, error = ("indeterminate", text) if reason == "indeterminate" else ("waiting", None)
    await tx.sql("UPDATE run SET status = $2, error = $3 WHERE id = $1", run_id, status, error)


async def resumed(tx: Tx, run_id: UUID, item_id: UUID) -> None:
    """The run goes on after a decision. The lane item `item_id` executes it."""
    await tx.sql("UPDATE run SET status = 'queued', error = NULL, item_id = $2 WHERE id = $1", run_id, item_id)


async def completed(tx: Tx, run_id: UUID, reply: bytes, calls: bytes | None) -> None:
    await tx.sql(
        "UPDATE run SET status = 'completed', reply = $2, calls = $3, finished_at = clock_timestamp() WHERE id = $1",
        run_id,
        reply,
        calls,
    )


async def failed(tx: Tx, run_id: UUID, status: Ending, error: str) -> None:
    await tx.sql(
        "UPDATE run SET status = $2, error = $3, finished_at = clock_timestamp() WHERE id = $1", run_id, status, error
    )


async def delivery_asked(tx: Tx, run_id: UUID, delivery_id: UUID) -> None:
    await tx.sql(
        """
        INSERT INTO delivery (tenant_id, delivery_id, run_id, state, asked_at)
        VALUES ($1, $2, $3, 'queued', clock_timestamp()) ON CONFLICT DO NOTHING
        """,
        tx.tenant_id,
        delivery_id,
        run_id,
    )


async def delivery_ended(tx: Tx, delivery_id: UUID, state: str, reason: str | None, at: datetime) -> None:
    """Does nothing for a delivery that belongs to no run."""
    await tx.sql(
        "UPDATE delivery SET state = $3, reason = $4, ended_at = $5 WHERE tenant_id = $1 AND delivery_id = $2",
        tx.tenant_id,
        delivery_id,
        state,
        reason,
        at,
    )
