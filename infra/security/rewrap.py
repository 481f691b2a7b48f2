"""Seals stored values again under a new master key, while services write. It can be interrupted at any time.

A value carries the id of its master key, so the rows themselves say how far the work is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncEngine

from infra.postgres.db import sql
from infra.security.crypto import Cipher

BATCH_ROWS = 200


@dataclass(frozen=True)
class SealedColumn:
    """A column of values that `Cipher` has sealed."""

    table: str
    column: str
    purpose: str
    context: tuple[str, ...]
    """SQL expressions of type text: the context with which each value is sealed."""
    where: str = "true"
    """The rows whose value the cipher has sealed; in the others it is sealed under a subject's key."""


KERNEL = (
    SealedColumn(
        "dead_letter",
        "payload",
        "dead letter",
        ("coalesce(tenant_id, '')", "message_id::text"),
        where="sealed AND subject_id IS NULL AND payload <> ''",
    ),
    SealedColumn("subject_key", "wrapped", "subject key", ("tenant_id", "subject_id")),
    SealedColumn("idempotency", "answer", "idempotency", ("tenant_id", "route", "key")),
)
"""The columns that every service's schema has."""


async def count_old(engine: AsyncEngine, cipher: Cipher, column: SealedColumn) -> int:
    """The number of values that are sealed under another master key than the first one."""
    async with engine.connect() as connection:
        query = f"SELECT count(*) FROM {column.table} WHERE {_is_old(column)}"
        [(count,)] = await sql(connection, query, cipher.key_id)
    return int(count)


async def rewrap(engine: AsyncEngine, cipher: Cipher, column: SealedColumn, report: Callable[[int], None]) -> None:
    """Seals each old value of the column again, a few rows a transaction, once through the table.

    Rows that another transaction has locked are left for the next call. `report` gets the number of rows of each
    transaction. Raises InvalidMessage if a value does not open; then nothing of its transaction is changed.
    """
    after = (0, 0)
    while True:
        async with engine.begin() as connection:
            rows = await sql(
                connection,
                f"""
                -- Locks the rows until the commit, in the order of the table, and waits for none of them.
                SELECT ctid, {column.column}, ARRAY[{", ".join(column.context)}]::text[]
                FROM {column.table}
                WHERE ctid > $2::tid AND {_is_old(column)}
                ORDER BY ctid
                LIMIT {BATCH_ROWS}
                FOR UPDATE SKIP LOCKED
                """,
                cipher.key_id,
                after,
            )
            if not rows:
                return
            new = [
                cipher.seal(cipher.open(sealed, column.purpose, *context), column.purpose, *context)
                for _, sealed, context in rows
            ]
            await sql(
                connection,
                f"""
                UPDATE {column.table} AS t SET {column.column} = n.sealed
                FROM unnest($1::tid[], $2::bytea[]) AS n(place, sealed)
                WHERE t.ctid = n.place
                """,
                [place for place, _, _ in rows],
                new,
            )
        after = rows[-1][0]
        report(len(rows))


def _is_old(column: SealedColumn) -> str:
    return f"{column.where} AND {column.column} IS NOT NULL AND substring({column.column} FROM 2 FOR 4) <> $1"
