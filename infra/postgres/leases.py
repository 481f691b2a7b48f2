"""Leases over a fixed set of names, shared evenly among the processes that want them.

A lease is a row with an owner, an epoch and an expiry by the database's clock. A stopped process loses its leases
when they run out; an advisory lock would stay held for as long as the process stays stopped.
"""

from __future__ import annotations

import time
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine

from infra.clock import uuid7
from infra.postgres.db import sql

LEASE_SECONDS = 9.0


class Leases:
    """This process's part of the leases ``<kind>:0`` … ``<kind>:<count - 1>``.

    `held` maps the number to the epoch under which it is held; `due` is when `refresh` next goes to the database,
    by the monotonic clock. Not to be used by two tasks at once.
    """

    def __init__(self, engine: AsyncEngine, kind: str, count: int, *, seconds: float = LEASE_SECONDS) -> None:
        self._engine = engine
        self._kind = kind
        self._count = count
        self._seconds = seconds
        self.due = 0.0
        self.owner: UUID = uuid7()
        self.held: dict[int, int] = {}

    async def refresh(self) -> None:
        """Renews, claims and gives back, where a third of the lease has passed since the last time."""
        if time.monotonic() < self.due:
            return
        async with self._engine.begin() as connection:
            await sql(
                connection,
                "INSERT INTO lease_member VALUES ($1, $2, clock_timestamp()) "
                "ON CONFLICT (kind, owner) DO UPDATE SET seen_at = excluded.seen_at",
                self._kind,
                self.owner,
            )
            [(members,)] = await sql(
                connection,
                "SELECT count(*) FROM lease_member WHERE kind = $1 "
                "AND seen_at > clock_timestamp() - make_interval(secs => $2)",
                self._kind,
                self._seconds,
            )
            share = -(-self._count // members)
            await sql(
                connection,
                "UPDATE lease SET expires_at = clock_timestamp() WHERE name IN (SELECT name FROM lease "
                # In the order in which they are claimed below: given back in another one, what is kept is not what is
                # renewed, and the difference is nobody's until it runs out.
                "WHERE owner = $1 AND starts_with(name, $2) ORDER BY length(name), name OFFSET $3)",
                self.owner,
                f"{self._kind}:",
                share,
            )
            rows = await sql(
                connection,
                # Its own are renewed although expired, as long as nobody has taken them: the epoch stays.
                "INSERT INTO lease AS l SELECT $1 || ':' || n, $2, 1, clock_timestamp() + make_interval(secs => $3) "
                "FROM (SELECT n FROM generate_series(0, $4::int - 1) n LEFT JOIN lease o ON o.name = $1 || ':' || n "
                "WHERE o.name IS NULL OR o.owner = $2 OR o.expires_at < clock_timestamp() "
                "ORDER BY o.owner = $2 DESC NULLS LAST, n LIMIT $5) free ORDER BY n "
                "ON CONFLICT (name) DO UPDATE SET owner = excluded.owner, expires_at = excluded.expires_at, "
                "epoch = l.epoch + (l.owner <> excluded.owner)::int "
                "WHERE l.owner = excluded.owner OR l.expires_at < clock_timestamp() RETURNING name, epoch",
                self._kind,
                self.owner,
                self._seconds,
                self._count,
                share,
            )
        self.held = {int(name.rpartition(":")[2]): epoch for name, epoch in rows}
        self.due = time.monotonic() + self._seconds / 3

    async def release(self) -> None:
        """Gives all back at once, so that a clean stop leaves no pause for the next holder."""
        async with self._engine.begin() as connection:
            await sql(
                connection,
                "UPDATE lease SET expires_at = clock_timestamp() WHERE owner = $1 AND starts_with(name, $2)",
                self.owner,
                f"{self._kind}:",
            )
            await sql(connection, "DELETE FROM lease_member WHERE kind = $1 AND owner = $2", self._kind, self.owner)
        self.held = {}
