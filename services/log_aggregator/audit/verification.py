"""Verifies an audit chain against itself and its stored heads: for a request, and by itself once a day."""

from __future__ import annotations

from typing import NamedTuple

from infra.observe.logs import get_logger
from infra.observe.metrics import Metrics
from infra.postgres.database import Database
from infra.service.periodic import Periodic
from services.log_aggregator.audit import chains
from services.log_aggregator.audit.chains import Verification
from services.log_aggregator.audit.stored_heads import HeadsComparison, StoredHeads

_log = get_logger("services.log_aggregator.audit.verification")


class Checked(NamedTuple):
    found: Verification
    stored: HeadsComparison | None
    """None if the object store does not answer."""
    broken_at: int | None
    """The seq of the first record that either of them misses."""


async def check(database: Database, heads: StoredHeads, tenant_id: str) -> Checked:
    found = await chains.verify(database, tenant_id)
    stored = await heads.compare(database, tenant_id)
    breaks = [seq for seq in (found.broken_at, stored.mismatch_at if stored else None) if seq is not None]
    return Checked(found, stored, min(breaks, default=None))


class Verifier(Periodic):
    """Verifies each chain once a day, and reports to Prometheus. Runs until stopped; several processes share the work.

    A chain whose stored heads cannot be read counts as not verified, and is tried again after some minutes.
    """

    pause = 60.0
    failure = "could not verify the audit chains"

    def __init__(self, database: Database, heads: StoredHeads, metrics: Metrics) -> None:
        super().__init__()
        self._database = database
        self._heads = heads
        self._metrics = metrics

    async def tick(self) -> None:
        """Verifies all chains that are due."""
        async with self._database.begin() as tx:
            await tx.sql(
                """
                INSERT INTO audit_verification (tenant_id)
                SELECT tenant_id FROM audit_head h
                WHERE NOT EXISTS (SELECT FROM audit_verification v WHERE v.tenant_id = h.tenant_id)
                ORDER BY tenant_id
                ON CONFLICT DO NOTHING
                """
            )
        await self._observe()
        while not self._stopping.is_set() and (tenant_id := await self._next()) is not None:
            checked = await check(self._database, self._heads, tenant_id)
            await self._note(tenant_id, checked)
            await self._observe()

    async def _next(self) -> str | None:
        """Claims a chain that is due. If this process dies, the chain is due again in an hour."""
        async with self._database.begin() as tx:
            rows = await tx.sql(
                # Locks the chain; one that another process claims is skipped.
                """
                UPDATE audit_verification SET due_at = clock_timestamp() + interval '1 hour'
                WHERE tenant_id = (
                    SELECT tenant_id FROM audit_verification
                    WHERE due_at <= clock_timestamp()
                    ORDER BY due_at
                    LIMIT 1
                    FOR UPDATE SKIP LOCKED
                )
                RETURNING tenant_id
                """
            )
        return rows[0][0] if rows else None

    async def _note(self, tenant_id: str, checked: Checked) -> None:
        if checked.broken_at is not None:
            _log.error("an audit chain is broken", tenant=tenant_id, broken_at=checked.broken_at)
        async with self._database.begin() as tx:
            if checked.stored is None and checked.broken_at is None:
                await tx.sql(
                    """
                    UPDATE audit_verification SET due_at = clock_timestamp() + interval '10 minutes'
                    WHERE tenant_id = $1
                    """,
                    tenant_id,
                )
                return
            await tx.sql(
                """
                UPDATE audit_verification
                SET verified_at = clock_timestamp(), due_at = clock_timestamp() + interval '1 day', broken_at = $2
                WHERE tenant_id = $1
                """,
                tenant_id,
                checked.broken_at,
            )

    async def _observe(self) -> None:
        async with self._database.begin() as tx:
            [(broken, oldest)] = await tx.sql(
                """
                SELECT count(*) FILTER (WHERE broken_at IS NOT NULL),
                       coalesce(max(extract(epoch FROM clock_timestamp() - coalesce(verified_at, seen_at))), 0)::float8
                FROM audit_verification
                """
            )
        self._metrics.audit_chains_broken.set(broken)
        self._metrics.audit_unverified_seconds.set(oldest)
