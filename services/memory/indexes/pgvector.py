"""The index in PostgreSQL, by pgvector.

Exact, over the rows of one tenant: with a shared HNSW and a filter by tenant, a tenant of median size finds 3 of 100
neighbours. The rows of a tenant with many rows get an HNSW of their own, made by `index_large_tenant`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from uuid import UUID

from infra.postgres.database import Database
from services.memory.indexes.index import Hit, VectorRow
from services.memory.rights import EVERY, Owners

# From so many rows of one scope on, a tenant gets an HNSW: before, the exact search is as fast.
LARGE = 10_000
# Above the 64 of the build, for recall.
SEARCH_EF = 128
# Rows of one transaction.
DROPPED_ROWS = 5_000


class PgvectorIndex:
    """`database`: the worker role's."""

    def __init__(self, database: Database, model: str) -> None:
        self._database = database
        self._model = model
        self.name = f"pgvector/{model}"

    async def search(
        self, vector: list[float], tenant_id: str, scope: str, limit: int, owners: Owners = EVERY
    ) -> list[Hit]:
        """The tenant's `limit` nearest rows in `scope`, best first. PostgreSQL may have deleted some of them."""
        dimension = len(vector)
        # The planner uses a tenant's HNSW only for literals and for the very expression of the index. The sub-select
        # is evaluated once, and not for each row.
        distance = (
            f"(vector::public.vector({dimension})) OPERATOR(public.<=>) (SELECT $1::real[]::public.vector({dimension}))"
        )
        rows_of = f"tenant_id = {_literal(tenant_id)} AND model = {_literal(self._model)} AND scope = {_literal(scope)}"
        # One round trip: the settings hold for the statement, whose inner part waits for them.
        rows = await self._database.autocommit(
            f"""
            SELECT found.*
            FROM (
                SELECT
                    set_config('hnsw.ef_search', $5, true) || set_config('hnsw.iterative_scan', 'relaxed_order', true)
                OFFSET 0
            ) AS setting (done)
            CROSS JOIN LATERAL (
                SELECT text_id, {distance} AS distance
                FROM index_row
                WHERE {rows_of}
                    AND ($3::uuid[] IS NULL OR owner_id = ANY($3))
                    AND NOT owner_id = ANY($4::uuid[])
                    AND setting.done <> ''
                ORDER BY distance
                LIMIT $2
            ) AS found
            """,
            vector,
            limit,
            None if owners.only is None else list(owners.only),
            list(owners.without),
            str(min(1000, max(SEARCH_EF, limit))),
        )
        # A relaxed scan is nearly in order.
        return sorted((Hit(id_, 1 - distance) for id_, distance in rows), key=lambda hit: -hit.score)

    async def replace(
        self, tenant_id: str, owner_id: UUID, scope: str, batches: AsyncIterator[Sequence[VectorRow]]
    ) -> None:
        """Replaces the owner's rows by these rows in one transaction."""
        collected = [row for batch in [rows async for rows in batches] for row in batch]
        async with self._database.begin() as tx:
            await tx.sql(
                "DELETE FROM index_row WHERE tenant_id = $1 AND owner_id = $2 AND model = $3",
                tenant_id,
                owner_id,
                self._model,
            )
            await tx.sql(
                """
                INSERT INTO index_row (tenant_id, model, scope, owner_id, text_id, vector)
                SELECT $1, $2, $3, $4, id, vector::public.vector
                FROM unnest($5::uuid[], $6::text[]) AS n (id, vector)
                ORDER BY id
                ON CONFLICT (tenant_id, model, owner_id, text_id) DO UPDATE SET vector = excluded.vector
                """,
                tenant_id,
                self._model,
                scope,
                owner_id,
                [row.id for row in collected],
                [_text(row.vector) for row in collected],
            )

    async def remove(self, tenant_id: str, owner_id: UUID) -> None:
        """Removes the owner's rows, including those of former models."""
        async with self._database.begin() as tx:
            await tx.sql("DELETE FROM index_row WHERE tenant_id = $1 AND owner_id = $2", tenant_id, owner_id)

    async def remove_tenant(self, tenant_id: str) -> None:
        """Nothing: the erasure of a tenant deletes its rows in every table."""

    async def index_large_tenants(self, scope: str) -> list[str]:
        """Makes an HNSW for each tenant that has LARGE rows or more and none yet. Returns these tenants.

        Searches go on meanwhile; writes of the index wait, for half a minute per 25,000 rows.
        """
        async with self._database.begin() as tx:
            rows = await tx.sql(
                "SELECT tenant_id FROM index_row WHERE model = $1 AND scope = $2 GROUP BY 1 HAVING count(*) >= $3",
                self._model,
                scope,
                LARGE,
            )
        made = []
        for (tenant_id,) in rows:
            async with self._database.begin() as tx:
                await tx.sql("SET LOCAL statement_timeout = 0")
                await tx.sql("SET LOCAL transaction_timeout = 0")
                [(new,)] = await tx.sql("SELECT index_large_tenant($1, $2, $3)", tenant_id, self._model, scope)
            if new:
                made.append(tenant_id)
        return made

    async def drop(self) -> None:
        """Removes all rows of the model."""
        removed: Sequence[tuple[object, ...]] = [()]
        while removed:
            removed = await self._database.autocommit(
                """
                DELETE FROM index_row
                WHERE (tenant_id, model, owner_id, text_id) IN (
                    SELECT tenant_id, model, owner_id, text_id
                    FROM index_row
                    WHERE model = $1
                    ORDER BY 1, 2, 3, 4
                    LIMIT $2
                    FOR UPDATE
                )
                RETURNING 1
                """,
                self._model,
                DROPPED_ROWS,
            )

    async def check(self) -> None:
        """Makes one round trip."""
        async with self._database.begin() as tx:
            await tx.sql("SELECT 1")


def _text(vector: Sequence[float]) -> str:
    return "[" + ",".join(map(repr, vector)) + "]"


def _literal(text: str) -> str:
    # `standard_conforming_strings` is on: only the quote itself has a meaning.
    return "'" + text.replace("'", "''") + "'"
