"""The texts that an index does not have yet, and the work that puts them there. Texts and vectors come from PostgreSQL;
a text that the model has not embedded is embedded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from infra.postgres.database import Database
from infra.postgres.tx import Tx
from services.memory.indexes import vectors
from services.memory.lanes import enqueue_fill, enqueue_memory, enqueue_utterance

# The texts that the indexes of the names $1 must have, and memories, which the model $2 must have embedded. Replies and
# memories that no model has embedded yet have an item of their own, which ends under the active model.
_DOCUMENTS = "document WHERE status = 'indexed' AND deleted_at IS NULL"
_REPLIES = """
    utterance u WHERE (vector IS NOT NULL OR other_vector IS NOT NULL) AND expires_at > clock_timestamp()
"""
_MEMORIES = "memory m WHERE (vector IS NOT NULL OR other_vector IS NOT NULL)"
_MISSING = "NOT indexed_in @> $1::text[]"
_NOT_EMBEDDED = f"{vectors.of('$2', 'm')} IS NULL"


class Unfilled(NamedTuple):
    total: int
    waiting: int
    """Of the total, those that are missing."""


async def waiting_for(tx: Tx, model: str, names: Sequence[str], tenant_id: str | None = None) -> Unfilled:
    """The indexed documents and replies that the indexes of these names must have, and the memories that the model must
    have embedded; of one tenant or of all."""
    [counts] = await tx.sql(
        f"""
        SELECT sum(total)::bigint, sum(waiting)::bigint
        FROM (
            SELECT count(*), count(*) FILTER (WHERE {_MISSING})
            FROM {_DOCUMENTS} AND ($3::text IS NULL OR tenant_id = $3)
            UNION ALL
            SELECT count(*), count(*) FILTER (WHERE {_MISSING})
            FROM {_REPLIES} AND ($3::text IS NULL OR tenant_id = $3)
            UNION ALL
            SELECT count(*), count(*) FILTER (WHERE {_NOT_EMBEDDED})
            FROM {_MEMORIES} AND ($3::text IS NULL OR tenant_id = $3)
        ) AS counted (total, waiting)
        """,
        list(names),
        model,
        tenant_id,
    )
    return Unfilled(*counts)


async def fill_missing(database: Database, model: str, names: Sequence[str]) -> None:
    """Enqueues the texts that are missing and not enqueued yet."""
    async with database.begin() as tx:
        tenants = await tenants_of(tx)
    for tenant_id in tenants:
        async with database.begin(tenant_id=tenant_id) as tx:
            await _fill(tx, tenant_id, model, names)


async def refill(database: Database, name: str, *, only: str | None = None) -> None:
    """Enqueues everything for the index of this name: it is empty, or it is to be filled again. Searches find documents
    by their words meanwhile; `GET /api/v1/memory/index` shows the progress. only: a tenant."""
    async with database.begin() as tx:
        tenants = [only] if only else await tenants_of(tx)
    for tenant_id in tenants:
        # The marks go and the work comes in one transaction: if the process stops in between, the call can be repeated.
        async with database.begin(tenant_id=tenant_id) as tx:
            await unmark(tx, tenant_id, name)
            await _fill(tx, tenant_id, name.partition("/")[2], [name])


async def unmark(tx: Tx, tenant_id: str, name: str) -> None:
    """Notes that the index of this name has nothing of the tenant."""
    for table, key in (("document", "id"), ("utterance", "run_id")):
        await tx.sql(
            f"""
            WITH own AS MATERIALIZED (
                SELECT {key} AS id
                FROM {table}
                WHERE tenant_id = $1 AND $2 = ANY(indexed_in)
                ORDER BY 1
                FOR UPDATE
            )
            UPDATE {table}
            SET indexed_in = array_remove(indexed_in, $2)
            WHERE {key} IN (SELECT id FROM own)
            """,
            tenant_id,
            name,
        )


async def tenants_of(tx: Tx) -> list[str]:
    rows = await tx.sql(
        """
        SELECT tenant_id FROM document
        UNION
        SELECT tenant_id FROM utterance
        UNION
        SELECT tenant_id FROM memory
        ORDER BY 1
        """
    )
    return [tenant_id for (tenant_id,) in rows]


async def _fill(tx: Tx, tenant_id: str, model: str, names: Sequence[str]) -> None:
    def idle(kind: str, lane: str) -> str:
        return f"""
            NOT EXISTS (
                SELECT FROM lane l
                WHERE l.kind = '{kind}' AND l.tenant_id = $3 AND l.lane = {lane} AND l.ready_at IS NOT NULL
            )
        """

    documents = await tx.sql(
        f"""
        SELECT id, coalesce(index_owner, id)
        FROM {_DOCUMENTS} AND tenant_id = $3 AND {_MISSING} AND {idle("fills", "$2 || ' ' || id::text")}
        ORDER BY id
        """,
        list(names),
        model,
        tenant_id,
    )
    for document_id, owner in documents:
        enqueue_fill(tx, document_id, model, owner)
    replies = await tx.sql(
        f"""
        SELECT run_id
        FROM {_REPLIES} AND tenant_id = $3 AND {_MISSING} AND $2 <> ''
            AND {idle("utterances", "'embed ' || run_id::text")}
        ORDER BY run_id
        """,
        list(names),
        model,
        tenant_id,
    )
    for (run_id,) in replies:
        enqueue_utterance(tx, run_id, "embed")
    memories = await tx.sql(
        f"""
        SELECT id
        FROM {_MEMORIES} AND tenant_id = $3 AND $1::text[] IS NOT NULL AND {_NOT_EMBEDDED}
            AND {idle("memories", "id::text")}
        ORDER BY id
        """,
        list(names),
        model,
        tenant_id,
    )
    for (memory_id,) in memories:
        enqueue_memory(tx, memory_id)
