"""Leases over a fixed set of names, shared evenly among the processes that want them.

A lease is a row with an owner, an epoch and an expiry by the database's clock. A process that is stopped loses its
leases when they run out. A process that has died loses them at once: each owner has an advisory lock, and the server
frees it when the connection ends. The lock alone would not do: it stays held for as long as a process stays stopped.
"""

from __future__ import annotations

import time
from uuid import UUID

from infra.clock import uuid7
from infra.postgres.db import Pool, sql

LEASE_SECONDS = 9.0
# The keys of the advisory locks that are held in this database.
_ALIVE = """
    SELECT (classid::bigint << 32) | objid::bigint
    FROM pg_locks
    WHERE locktype = 'advisory' AND objsubid = 1
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


class Leases:
    """This process's share of the leases ``<kind>:0`` … ``<kind>:<count - 1>``. For one task at a time."""

    def __init__(self, engine: Pool, kind: str, count: int, *, seconds: float = LEASE_SECONDS) -> None:
        self._engine = engine
        self._kind = kind
        self._count = count
        self._seconds = seconds
        self.due = 0.0
        """The next `refresh` at or after this time of the monotonic clock goes to the database."""
        self.owner: UUID = uuid7()
        self.held: dict[int, int] = {}
        """Number → the epoch under which the lease is held."""

    async def refresh(self) -> None:
        """Renews, claims and gives back leases, if a third of the lease's time has passed since the last refresh."""
        if time.monotonic() < self.due:
            return
        async with self._engine.transaction() as connection:
            await sql(
                connection,
                # The lock stays with this connection of the pool until the connection ends.
                f"""
                SELECT pg_advisory_lock(own.key)
                FROM (SELECT hashtextextended($1::uuid::text, 0) AS key) own
                WHERE own.key NOT IN ({_ALIVE})
                """,
                self.owner,
            )
            await sql(
                connection,
                """
                INSERT INTO lease_member VALUES ($1, $2, clock_timestamp())
                ON CONFLICT (kind, owner) DO UPDATE SET seen_at = excluded.seen_at
                """,
                self._kind,
                self.owner,
            )
            [(members,)] = await sql(
                connection,
                f"""
                SELECT count(*) FROM lease_member
                WHERE kind = $1 AND seen_at > clock_timestamp() - make_interval(secs => $2)
                    AND hashtextextended(owner::text, 0) IN ({_ALIVE})
                """,
                self._kind,
                self._seconds,
            )
            share = -(-self._count // members)
            await sql(
                connection,
                # Gives back the leases beyond the share, and those of the dead. Locks in the order of the names, as
                # everywhere. The order of the share is that of the claim below: otherwise a lease could be kept here
                # and not renewed there.
                f"""
                WITH ended AS MATERIALIZED (
                    SELECT name, owner FROM lease
                    WHERE starts_with(name, $2)
                        AND (owner = $1 OR hashtextextended(owner::text, 0) NOT IN ({_ALIVE}))
                    ORDER BY name
                    FOR UPDATE
                )
                UPDATE lease SET expires_at = clock_timestamp()
                WHERE name IN (
                    (SELECT name FROM ended WHERE owner = $1 ORDER BY length(name), name OFFSET $3)
                    UNION ALL
                    SELECT name FROM ended WHERE owner <> $1
                )
                """,
                self.owner,
                f"{self._kind}:",
                share,
            )
            rows = await sql(
                connection,
                # Locks in the order of the names. Leases of this process are renewed even if they have expired, as long
                # as no other process has claimed them: their epoch stays.
                """
                INSERT INTO lease AS l
                SELECT $1 || ':' || n, $2, 1, clock_timestamp() + make_interval(secs => $3)
                FROM (
                    SELECT n
                    FROM generate_series(0, $4::int - 1) n
                    LEFT JOIN lease o ON o.name = $1 || ':' || n
                    WHERE o.name IS NULL OR o.owner = $2 OR o.expires_at < clock_timestamp()
                    ORDER BY o.owner = $2 DESC NULLS LAST, n
                    LIMIT $5
                ) free
                ORDER BY $1 || ':' || n
                ON CONFLICT (name) DO UPDATE
                SET owner = excluded.owner, expires_at = excluded.expires_at,
                    epoch = l.epoch + (l.owner <> excluded.owner)::int
                WHERE l.owner = excluded.owner OR l.expires_at < clock_timestamp()
                RETURNING name, epoch
                """,
                self._kind,
                self.owner,
                self._seconds,
                self._count,
                share,
            )
        self.held = {int(name.rpartition(":")[2]): epoch for name, epoch in rows}
        self.due = time.monotonic() + self._seconds / 3

    async def release(self) -> None:
        """Gives all leases back, so that after a clean stop the next owner has them at once."""
        async with self._engine.transaction() as connection:
            await sql(
                connection,
                # Locks the rows in the order of their names, as `refresh` does: otherwise the two could deadlock.
                """
                UPDATE lease SET expires_at = clock_timestamp()
                WHERE name IN (
                    SELECT name FROM lease
                    WHERE owner = $1 AND starts_with(name, $2)
                    ORDER BY name
                    FOR UPDATE
                )
                """,
                self.owner,
                f"{self._kind}:",
            )
            await sql(connection, "DELETE FROM lease_member WHERE kind = $1 AND owner = $2", self._kind, self.owner)
        self.held = {}
