"""Runs, steps and usage as tables, written in the transaction of the fact. Read by `api` and `timeline`."""

from __future__ import annotations

from datetime import datetime
from typing import Literal
from uuid import UUID

import msgspec

from infra.tx import Tx
from protos.messages.billing import UsageRecorded
from services.agent.models.contract import Usage
from services.agent.runs.events import Ending, Reason, StepKind

OPEN = ("queued", "running", "waiting")
# Waiting for a person; no lane holds them.
SUSPENDED = ("waiting", "indeterminate")
STOPPABLE = ("queued", "running", *SUSPENDED)


async def started(tx: Tx, run_id: UUID) -> None:
    await tx.sql(
        "UPDATE run SET status = 'running', started_at = coalesce(started_at, clock_timestamp()) WHERE id = $1", run_id
    )


async def step_started(
    tx: Tx, run_id: UUID, n: int, kind: StepKind, name: str, attempt: int, span_id: str | None
) -> None:
    await tx.sql(
        "INSERT INTO run_step (tenant_id, run_id, n, kind, name, status, attempts, started_at, span_id) "
        "VALUES ($1, $2, $3, $4, $5, 'running', $6, clock_timestamp(), $7) ON CONFLICT (run_id, n) DO UPDATE "
        "SET attempts = excluded.attempts, started_at = excluded.started_at, span_id = excluded.span_id",
        tx.tenant_id,
        run_id,
        n,
        kind,
        name,
        attempt,
        span_id,
    )


async def step_completed(
    tx: Tx, run_id: UUID, n: int, status: Literal["completed", "failed"], duration_ms: int, error: str | None
) -> None:
    await tx.sql(
        "UPDATE run_step SET status = $3, duration_ms = $4, error = $5 WHERE run_id = $1 AND n = $2",
        run_id,
        n,
        status,
        duration_ms,
        error,
    )


async def used(tx: Tx, record: UsageRecorded, usage: Usage) -> None:
    """Adds to the run's sums; a figure that was never reported stays null."""
    await tx.sql(
        "INSERT INTO run_usage (tenant_id, run_id, usage_id, resource, quantities, estimated, occurred_at) "
        "VALUES ($1, $2, $3, $4, $5, $6, $7)",
        tx.tenant_id,
        record.run_id,
        record.usage_id,
        record.resource,
        msgspec.json.encode(record.quantities).decode(),
        record.estimated,
        record.occurred_at,
    )
    await tx.sql(
        "UPDATE run SET input_tokens = CASE WHEN $2::bigint IS NULL THEN input_tokens "
        "ELSE coalesce(input_tokens, 0) + $2 END, cached_tokens = CASE WHEN $3::bigint IS NULL THEN cached_tokens "
        "ELSE coalesce(cached_tokens, 0) + $3 END, output_tokens = CASE WHEN $4::bigint IS NULL THEN output_tokens "
        "ELSE coalesce(output_tokens, 0) + $4 END WHERE id = $1",
        record.run_id,
        usage.input_tokens,
        usage.cached_tokens,
        usage.output_tokens,
    )


async def suspended(tx: Tx, run_id: UUID, reason: Reason, text: str) -> None:
    status, error = ("indeterminate", text) if reason == "indeterminate" else ("waiting", None)
    await tx.sql("UPDATE run SET status = $2, error = $3 WHERE id = $1", run_id, status, error)


async def goes_on(tx: Tx, run_id: UUID, item_id: UUID) -> None:
    """A person has decided; the lane item `item_id` executes it further."""
    await tx.sql("UPDATE run SET status = 'queued', error = NULL, item_id = $2 WHERE id = $1", run_id, item_id)


async def completed(tx: Tx, run_id: UUID, reply: bytes) -> None:
    await tx.sql(
        "UPDATE run SET status = 'completed', reply = $2, finished_at = clock_timestamp() WHERE id = $1", run_id, reply
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
    """Nothing for a delivery that is no run's."""
    await tx.sql(
        "UPDATE delivery SET state = $3, reason = $4, ended_at = $5 WHERE tenant_id = $1 AND delivery_id = $2",
        tx.tenant_id,
        delivery_id,
        state,
        reason,
        at,
    )
