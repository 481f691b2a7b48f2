"""Dead letters by their cause, and the redrive of all that share one.

A cause is the first line of the error, with ``#`` for ids and numbers, which differ from message to message.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from infra.errors import InvalidMessage
from infra.postgres.dead_letters import OPEN
from infra.postgres.tx import Tx
from infra.security.audit import audit
from infra.service.redrive import RECOGNISED

LIMIT = 10_000
"""The most dead letters that one call marks, so that its transaction stays short."""
MAX_RATE = 1000.0

_CAUSE = r"""
    regexp_replace(
        split_part(left(error, 500), E'\n', 1), '[0-9a-f]{8}-[0-9a-f-]{27}|[0-9a-f]{16,}|[0-9]+', '#', 'gi'
    )
    """


class DeadLetterGroup(NamedTuple):
    """The open dead letters of one consumer and source with the same cause."""

    first_id: UUID
    """The oldest one: an example."""
    consumer: str
    source: str
    cause: str
    failed: int
    waiting: int
    redriving: int
    first_failed_at: datetime
    last_failed_at: datetime


class RedriveCounts(NamedTuple):
    """The result of a bulk redrive."""

    matched: int
    """Failed dead letters that match."""
    redriven: int
    """Those that were marked, or would be: at most LIMIT. The rest needs a further call."""
    too_old: int
    """Those that were left, because a repeat of their message would not be recognised."""


async def group_by_cause(
    tx: Tx, *, limit: int, after: UUID | None = None, tenant_id: str | None = None
) -> list[DeadLetterGroup]:
    """The groups by their oldest dead letter; after: the `first_id` of the last group of the previous page."""
    rows = await tx.sql(
        f"""
        -- min() has no form for uuid before PostgreSQL 18; their text has the same order.
        SELECT min(id::text)::uuid, consumer, source || ':' || destination, cause,
               count(*) FILTER (WHERE state = 'failed'),
               count(*) FILTER (WHERE state = 'waiting'),
               count(*) FILTER (WHERE state = 'redriving'),
               min(first_failed_at), max(last_failed_at)
        FROM (SELECT *, {_CAUSE} AS cause FROM dead_letter) d
        WHERE {OPEN} AND ($1::text IS NULL OR tenant_id = $1)
        GROUP BY 2, 3, 4
        HAVING $2::uuid IS NULL OR min(id::text) > $2::uuid::text
        ORDER BY 1
        LIMIT $3
        """,
        tenant_id,
        after,
        limit,
    )
    return [DeadLetterGroup(*row) for row in rows]


async def redrive_matching(
    tx: Tx,
    *,
    actor: str,
    ids: Sequence[UUID] | None = None,
    cause: str | None = None,
    tenant_id: str | None = None,
    rate_per_s: float | None = None,
    dry_run: bool = False,
    force: bool = False,
) -> RedriveCounts:
    """Marks the failed dead letters that match, the oldest first; one audit record names the cause and the number.

    rate_per_s: how many of them the service handles in a second, on average. force: also those that are too old. Raises
    InvalidMessage for a rate that is not above 0 and at most MAX_RATE.
    """
    if rate_per_s is not None and not 0 < rate_per_s <= MAX_RATE:
        raise InvalidMessage("rate_per_s", f"must be above 0 and at most {MAX_RATE:g}")
    matching = f"""
        state = 'failed' AND ($1::text IS NULL OR tenant_id = $1) AND ($2::text IS NULL OR {_CAUSE} = $2)
        AND ($3::uuid[] IS NULL OR id = ANY($3))
        """
    arguments = (tenant_id, cause, None if ids is None else list(ids))
    [(matched, fresh)] = await tx.sql(
        f"SELECT count(*), count(*) FILTER (WHERE $4 OR {RECOGNISED}) FROM dead_letter WHERE {matching}",
        *arguments,
        force,
    )
    if dry_run or not fresh:
        return RedriveCounts(matched, min(fresh, LIMIT), matched - fresh)
    marked = await tx.sql(
        f"""
        -- Locks the letters, the oldest first. Those that an operator or a redriver works on are left to them.
        WITH chosen AS (
            SELECT id, seq
            FROM dead_letter
            WHERE {matching} AND ($4 OR {RECOGNISED})
            ORDER BY seq
            LIMIT {LIMIT}
            FOR UPDATE SKIP LOCKED
        )
        UPDATE dead_letter d
        SET state = 'redriving', redrive_after = statement_timestamp() + (n - 1) / $5::float8 * interval '1 second'
        FROM (SELECT id, row_number() OVER (ORDER BY seq) AS n FROM chosen) numbered
        WHERE d.id = numbered.id
        RETURNING 1
        """,
        *arguments,
        force,
        rate_per_s,
    )
    if marked:
        details = {"count": str(len(marked)), "rate_per_s": "" if rate_per_s is None else f"{rate_per_s:g}"}
        if ids is not None:
            # The acts on single letters are found by their ids.
            details["ids"] = " ".join(map(str, ids))
        audit(tx, actor, "dead_letter.redrive_all", "cause", cause or "", **details)
    return RedriveCounts(matched, len(marked), matched - fresh)
