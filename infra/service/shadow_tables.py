"""Shadow tables: empty copies of a projection's tables, which a replay fills, compares and switches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection

from infra.errors import Conflict
from infra.postgres.db import sql

SHOWN = 20


class Reached(NamedTuple):
    """How far a partition was replayed."""

    next_offset: int
    skipped: list[int]
    """Offsets of records that were dead letters when they were read."""


@dataclass
class TableComparison:
    """One table of a projection: row count and hash of the live and of the rebuilt table, at the same offsets."""

    table: str
    live_rows: int
    live_hash: str
    rebuilt_rows: int
    rebuilt_hash: str
    differences: list[str] = field(default_factory=list)
    """Keys of rows that differ, at most SHOWN."""

    @property
    def equal(self) -> bool:
        return (self.live_rows, self.live_hash) == (self.rebuilt_rows, self.rebuilt_hash)


class ShadowTables:
    """Copies of `tables` in the schema ``<service>_rebuild``; a switch moves the old ones to ``<service>_retired``."""

    def __init__(self, service: str, tables: Sequence[str]) -> None:
        self.schema = f"{service}_rebuild"
        self._service = service
        self._tables = tables

    async def make(self, connection: AsyncConnection) -> None:
        """Makes empty tables with the columns, indexes, grants and policies of the live ones, and an inbox for them.

        Raises Conflict if a live table has attachments (foreign keys, triggers, views) that a switch would lose.
        """
        await self._refuse_attachments(connection)
        await sql(connection, f'DROP SCHEMA IF EXISTS "{self.schema}" CASCADE')
        await sql(connection, f'CREATE SCHEMA "{self.schema}" AUTHORIZATION "{self._service}_owner"')
        await sql(connection, f'SET LOCAL ROLE "{self._service}_owner"')
        for table in self._tables:
            live, shadow = self._names(table)
            await sql(connection, f"CREATE TABLE {shadow} (LIKE {live} INCLUDING ALL)")
            for role, rights in await sql(
                connection,
                """
                SELECT grantee, string_agg(privilege_type, ', ')
                FROM information_schema.role_table_grants
                WHERE table_schema = $1 AND table_name = $2 AND grantee <> $1 || '_owner'
                GROUP BY grantee
                """,
                self._service,
                table,
            ):
                await sql(connection, f'GRANT {rights} ON {shadow} TO "{role}"')
            await self._copy_policies(connection, table)
        await sql(
            connection,
            f'CREATE TABLE "{self.schema}".inbox (message_id uuid, consumer text, PRIMARY KEY (message_id, consumer))',
        )

    async def begin_progress(self, connection: AsyncConnection, projection: str, topic_id: UUID) -> None:
        """From now on the progress of the replay is kept, so that an interrupted one goes on."""
        await sql(
            connection, f'CREATE TABLE "{self.schema}".replayed AS SELECT $1::text, $2::uuid', projection, topic_id
        )
        await sql(
            connection,
            f"""
            CREATE TABLE "{self.schema}".progress (
                partition int PRIMARY KEY, next_offset bigint NOT NULL, skipped bigint[] NOT NULL
            )
            """,
        )

    async def progress(self, connection: AsyncConnection, projection: str, topic_id: UUID) -> dict[int, Reached] | None:
        """How far an interrupted replay of this projection came, by partition; None: there is none to go on with."""
        replayed, progress = (f'"{self.schema}".{name}' for name in ("replayed", "progress"))
        [(exists,)] = await sql(connection, "SELECT to_regclass($1) IS NOT NULL", replayed)
        if not exists or await sql(connection, f"SELECT * FROM {replayed}") != [(projection, topic_id)]:
            return None
        rows = await sql(connection, f"SELECT partition, next_offset, skipped FROM {progress}")
        return {partition: Reached(next_offset, skipped) for partition, next_offset, skipped in rows}

    async def save_progress(self, connection: AsyncConnection, made: Mapping[int, Reached]) -> None:
        """Adds to the progress in the transaction that applies the records. `skipped`: further ones."""
        for partition, (next_offset, skipped) in made.items():
            await sql(
                connection,
                f"""
                INSERT INTO "{self.schema}".progress AS p VALUES ($1, $2, $3)
                ON CONFLICT (partition) DO UPDATE
                SET next_offset = excluded.next_offset, skipped = p.skipped || excluded.skipped
                """,
                partition,
                next_offset,
                skipped,
            )

    async def end_progress(self, connection: AsyncConnection) -> None:
        """The next replay begins from the start."""
        await sql(connection, f'DROP TABLE IF EXISTS "{self.schema}".replayed, "{self.schema}".progress')

    async def compare(self, connection: AsyncConnection) -> list[TableComparison]:
        """Compares each table with its copy."""
        found = []
        for table in self._tables:
            live, shadow = [await self._hash(connection, name) for name in self._names(table)]
            found.append(TableComparison(table, *live, *shadow))
            if live != shadow:
                found[-1].differences = await self._differences(connection, table)
        return found

    async def _differences(self, connection: AsyncConnection, table: str) -> list[str]:
        live, shadow = self._names(table)
        key = await sql(
            connection,
            """
            SELECT quote_ident(attname)
            FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = ANY(indkey)
            WHERE indrelid = $1::text::regclass AND indisprimary
            ORDER BY array_position(indkey::int2[], attnum)
            """,
            live,
        )
        shown = f"concat_ws('/', {', '.join(column for (column,) in key)})" if key else "t::text"
        rows = await sql(
            connection,
            f"""
            SELECT DISTINCT {shown}
            FROM (
                (SELECT * FROM {live} EXCEPT ALL SELECT * FROM {shadow})
                UNION ALL
                (SELECT * FROM {shadow} EXCEPT ALL SELECT * FROM {live})
            ) AS t
            ORDER BY 1
            LIMIT {SHOWN}
            """,
        )
        return [row for (row,) in rows]

    async def switch(self, connection: AsyncConnection) -> None:
        """Replaces the live tables by the copies. The old tables stay in the retired schema until the next switch."""
        retired = f"{self._service}_retired"
        await sql(connection, f'DROP SCHEMA IF EXISTS "{retired}" CASCADE')
        await sql(connection, f'CREATE SCHEMA "{retired}" AUTHORIZATION "{self._service}_owner"')
        for table in self._tables:
            live, shadow = self._names(table)
            await sql(connection, f'ALTER TABLE {live} SET SCHEMA "{retired}"')
            await sql(connection, f'ALTER TABLE {shadow} SET SCHEMA "{self._service}"')
        await sql(connection, f'DROP SCHEMA "{self.schema}" CASCADE')

    def _names(self, table: str) -> tuple[str, str]:
        return f'"{self._service}"."{table}"', f'"{self.schema}"."{table}"'

    async def _refuse_attachments(self, connection: AsyncConnection) -> None:
        for table in self._tables:
            [(attached,)] = await sql(
                connection,
                """
                SELECT string_agg(name, ', ' ORDER BY name)
                FROM (
                    SELECT 'foreign key ' || conname
                    FROM pg_constraint
                    WHERE contype = 'f' AND $1::text::regclass IN (conrelid, confrelid)
                    UNION
                    SELECT 'trigger ' || tgname
                    FROM pg_trigger
                    WHERE tgrelid = $1::text::regclass AND NOT tgisinternal
                    UNION
                    SELECT 'view ' || ev_class::regclass
                    FROM pg_rewrite r
                    JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
                    WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = $1::text::regclass
                ) AS attached(name)
                """,
                self._names(table)[0],
            )
            if attached:
                raise Conflict(f"table {table} cannot be switched; these would stay with the old table: {attached}")

    async def _copy_policies(self, connection: AsyncConnection, table: str) -> None:
        live, shadow = self._names(table)
        [(secured, forced)] = await sql(
            connection, "SELECT relrowsecurity, relforcerowsecurity FROM pg_class WHERE oid = $1::text::regclass", live
        )
        if secured:
            await sql(connection, f"ALTER TABLE {shadow} ENABLE ROW LEVEL SECURITY")
        if forced:
            await sql(connection, f"ALTER TABLE {shadow} FORCE ROW LEVEL SECURITY")
        for name, kind, roles, command, using, check in await sql(
            connection,
            """
            SELECT policyname, permissive, roles::text[], cmd, qual, with_check
            FROM pg_policies
            WHERE schemaname = $1 AND tablename = $2
            """,
            self._service,
            table,
        ):
            to = ", ".join("PUBLIC" if role == "public" else f'"{role}"' for role in roles)
            statement = f'CREATE POLICY "{name}" ON {shadow} AS {kind} FOR {command} TO {to}'
            statement += f" USING ({using})" if using else ""
            statement += f" WITH CHECK ({check})" if check else ""
            await sql(connection, statement)

    async def _hash(self, connection: AsyncConnection, table: str) -> tuple[int, str]:
        """The row count and a hash that does not depend on the order of rows: equal for tables with equal rows."""
        [(rows, digest)] = await sql(
            connection,
            f"SELECT count(*), coalesce(sum(hashtextextended(t::text, 0)::numeric), 0)::text FROM {table} t",
        )
        return rows, digest
