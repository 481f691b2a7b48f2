"""Tables of runs, steps and usage, written in the transaction of the event. Read by `api` and `timeline`."""

from __future__ import annotations

from datetime import datetime
from typing import Literal
from uuid import UUID

import msgspec

from infra.postgres.tx import Tx
from protos.messages.billing import UsageRecorded
from services.agent.models.contract import Usage
from services.agent.runs.events import Ending, Reason, StepKind

OPEN = ("queued", "running", "waiting")
# These wait for a decision. They have no item in a lane.
SUSPENDED = ("waiting", "indeterminate")
STOPPABLE = ("queued", "running", *SUSPENDED)


# Locks the runs in the order of their ids. A step of a run that is to be cancelled is not begun.
CANCELLED = "SELECT id, cancel_reason IS NOT NULL FROM run WHERE id = ANY($1::uuid[]) ORDER BY id FOR UPDATE"


async def started(tx: Tx, run_id: UUID, model: str) -> None:
    await tx.sql(
        "UPDATE run SET status = 'running', started_at = coalesce(started_at, clock_timestamp()), model = $2 "
        "WHERE id = $1",
        run_id,
        model,
    )


def step_started(tx: Tx, run_id: UUID, n: int, kind: StepKind, name: str, attempt: int, span_id: str | None) -> None:
    tx.buffer(
        "INSERT INTO run_step (tenant_id, run_id, n, kind, name, status, attempts, started_at, span_id) "
        "SELECT tenant_id, run_id, n, kind, name, 'running', attempts, clock_timestamp(), span_id "
        "FROM unnest($1::text[], $2::uuid[], $3::int[], $4::text[], $5::text[], $6::int[], $7::text[]) "
        "AS s(tenant_id, run_id, n, kind, name, attempts, span_id) ON CONFLICT (run_id, n) DO UPDATE "
        "SET attempts = excluded.attempts, started_at = excluded.started_at, span_id = excluded.span_id, "
        "status = 'running'",
        tx.tenant_id,
        run_id,
        n,
        kind,
        name,
        attempt,
        span_id,
    )


def step_ended(
    tx: Tx, run_id: UUID, n: int, status: Literal["completed", "failed"], duration_ms: int, error: str | None
) -> None:
    tx.buffer(
        "UPDATE run_step r SET status = s.status, duration_ms = s.ms, error = s.error "
        "FROM unnest($1::uuid[], $2::int[], $3::text[], $4::int[], $5::text[]) AS s(run_id, n, status, ms, error) "
        "WHERE r.run_id = s.run_id AND r.n = s.n",
        run_id,
        n,
        status,
        duration_ms,
        error,
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
        "INSERT INTO run_step (tenant_id, run_id, n, kind, name, status, attempts, started_at, duration_ms, error) "
        "SELECT tenant_id, run_id, n, kind, name, status, attempts, clock_timestamp(), 0, error "
        "FROM unnest($1::text[], $2::uuid[], $3::int[], $4::text[], $5::text[], $6::text[], $7::int[], $8::text[]) "
        "AS s(tenant_id, run_id, n, kind, name, status, attempts, error)",
        tx.tenant_id,
        run_id,
        n,
        kind,
        name,
        status,
        attempts,
        error,
    )


def used(tx: Tx, record: UsageRecorded, usage: Usage) -> None:
    """Adds to the run's sums. A figure that was never reported stays null."""
    tx.buffer(
        "INSERT INTO run_usage (tenant_id, run_id, usage_id, resource, quantities, estimated, occurred_at) "
        "SELECT * FROM unnest($1::text[], $2::uuid[], $3::text[], $4::text[], $5::text[], $6::bool[], "
        "$7::timestamptz[])",
        tx.tenant_id,
        record.run_id,
        record.usage_id,
        record.resource,
        msgspec.json.encode(record.quantities).decode(),
        record.estimated,
        record.occurred_at,
    )
    tx.buffer(
        "UPDATE run SET input_tokens = coalesce(run.input_tokens + coalesce(u.input, 0), u.input), "
        "cached_tokens = coalesce(run.cached_tokens + coalesce(u.cached, 0), u.cached), "
        "output_tokens = coalesce(run.output_tokens + coalesce(u.output, 0), u.output) "
        # One run may have two records here: the estimate of a lost attempt, and the usage of the next one.
        "FROM (SELECT id, sum(input)::bigint AS input, sum(cached)::bigint AS cached, sum(output)::bigint AS output "
        "FROM unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::bigint[]) AS n(id, input, cached, output) "
        "GROUP BY id) u WHERE run.id = u.id",
        record.run_id,
        usage.input_tokens,
        usage.cached_tokens,
        usage.output_tokens,
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
        "INSERT INTO delivery (tenant_id, delivery_id, run_id, state, asked_at) "
        "VALUES ($1, $2, $3, 'queued', clock_timestamp()) ON CONFLICT DO NOTHING",
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
