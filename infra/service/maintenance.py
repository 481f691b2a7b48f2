"""Maintenance in every service process: gauges every few seconds, pruning of the kernel's tables every minute, and once
a day, if it is set, the verification of the service's read models."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta

from infra.bus import outbox
from infra.clock import utcnow, wait_at_most
from infra.errors import Conflict, describe
from infra.lanes import lane
from infra.observe.logs import get_logger
from infra.observe.metrics import Metrics
from infra.postgres import dead_letters, inbox
from infra.postgres.database import Database
from infra.postgres.read_models import ReadModel
from infra.postgres.tx import Tx
from infra.security.reads import prune_reads
from infra.service import verification
from infra.service.redrive import discard_expired

OBSERVE_SECONDS = 5.0
OBSERVATIONS_PER_MAINTENANCE = 12

_log = get_logger("infra.service.maintenance")


class Maintenance:
    """Runs until stopped. Several processes of a service may run it at the same time.

    verify_at: the hour (UTC) from which `models` are verified, once a day; None: never.
    """

    def __init__(
        self,
        database: Database,
        metrics: Metrics,
        models: Sequence[ReadModel] = (),
        verify_at: int | None = None,
    ) -> None:
        self._database = database
        self._metrics = metrics
        self._models = models
        self._verify_at = verify_at
        self._verifying: asyncio.Task[None] | None = None
        self._kinds: set[str] = set()
        self._stopping = asyncio.Event()

    async def stop(self) -> None:
        self._stopping.set()

    async def run(self) -> None:
        ticks = 0
        while not self._stopping.is_set():
            works = [self._observe, *PRUNING] if ticks % OBSERVATIONS_PER_MAINTENANCE == 0 else [self._observe]
            for work in works:
                # Each has a transaction of its own: one table that cannot be pruned must not keep the others from it.
                try:
                    async with self._database.begin() as tx:
                        await work(tx)
                except Exception as error:
                    _log.warning("maintenance failed; will retry", work=work.__name__, error=describe(error))
            if self._verify_at is not None and (self._verifying is None or self._verifying.done()):
                # Beside this loop: it may take hours, and the gauges must go on.
                self._verifying = asyncio.create_task(self._verify(self._verify_at))
            ticks += 1
            await wait_at_most(OBSERVE_SECONDS, self._stopping)
        if self._verifying:
            await self._verifying

    async def _verify(self, hour: int) -> None:
        """Verifies the read models that were not verified since the hour last began."""
        for model in self._models:
            try:
                async with self._database.begin() as tx:
                    known = (await verification.last(await tx.connection())).get(model.name)
                if known and known.verified_at and known.verified_at >= last_time(hour, utcnow()):
                    continue
                found = await verification.verify(
                    self._database.engine, self._database.service, model, stopping=self._stopping
                )
            except Conflict:
                return  # Another process of the service is verifying them.
            except Exception as error:
                _log.warning("could not verify a read model; will retry", model=model.name, error=describe(error))
                return
            if found.left:
                first = ", ".join(f"{one.key} ({one.what})" for one in found.differences[:5])
                _log.error("a read model differs from its source", model=model.name, rows=found.left, first=first)

    async def _observe(self, tx: Tx) -> None:
        pending = await outbox.pending_by_destination(await tx.connection())
        parked = await dead_letters.count_parked(await tx.connection())
        letters = await dead_letters.count_open(await tx.connection())
        waiting = await lane.waiting(tx)
        verified = await verification.last(await tx.connection())
        archived = await tx.sql(
            """
            SELECT extract(epoch FROM clock_timestamp() - greatest(last_archived_time, pg_postmaster_start_time()))
            FROM pg_stat_archiver
            WHERE current_setting('archive_mode') <> 'off'
            """
        )
        [(damaged,)] = await tx.sql("SELECT coalesce(sum(checksum_failures), 0)::float8 FROM pg_stat_database")
        metrics = self._metrics
        metrics.damaged_pages.set(damaged)
        for (age,) in archived:
            metrics.wal_archived_age_seconds.set(age)
        for gauge in (
            metrics.outbox_depth,
            metrics.outbox_oldest_seconds,
            metrics.parked_keys,
            metrics.dead_letters_open,
            metrics.dead_letter_oldest_seconds,
        ):
            gauge.clear()
        # A kind without waiting items stays at 0: an autoscaler must not see its series end.
        for kind in self._kinds | waiting.keys():
            depth, oldest = waiting.get(kind, (0, 0.0))
            metrics.lane_depth.labels(kind).set(depth)
            metrics.lane_oldest_seconds.labels(kind).set(oldest)
        self._kinds |= waiting.keys()
        for model in self._models:
            name, known = f"{self._database.service}.{model.name}", verified.get(model.name)
            if known and known.different is not None:
                metrics.read_model_different_rows.labels(name).set(known.different)
            if self._verify_at is not None:
                at = known.verified_at.timestamp() if known and known.verified_at else 0
                metrics.read_model_verified.labels(name).set(at)
        for labels, (depth, oldest) in pending.items():
            metrics.outbox_depth.labels(*labels).set(depth)
            metrics.outbox_oldest_seconds.labels(*labels).set(oldest)
        for labels, count in parked.items():
            metrics.parked_keys.labels(*labels).set(count)
        for consumer, (count, oldest) in letters.items():
            metrics.dead_letters_open.labels(consumer).set(count)
            metrics.dead_letter_oldest_seconds.labels(consumer).set(oldest)


def last_time(hour: int, now: datetime) -> datetime:
    """The latest beginning of this hour (UTC)."""
    today = now.replace(hour=hour, minute=0, second=0, microsecond=0)
    return today if today <= now else today - timedelta(days=1)


async def prune_inbox(tx: Tx) -> None:
    await inbox.maintain(await tx.connection())


async def prune_dead_letters(tx: Tx) -> None:
    await dead_letters.prune(await tx.connection())


async def prune_answers(tx: Tx) -> None:
    """Deletes answers of `infra.service.idempotency` that are older than a day."""
    await tx.sql(
        # Locks the answers that it deletes; one that a request uses at this moment is skipped.
        """
        DELETE FROM idempotency
        WHERE (tenant_id, route, key) IN (
            SELECT tenant_id, route, key
            FROM idempotency
            WHERE created_at < clock_timestamp() - interval '1 day'
            LIMIT 10000
            FOR UPDATE SKIP LOCKED
        )
        """
    )


PRUNING: tuple[Callable[[Tx], Awaitable[None]], ...] = (
    prune_inbox,
    prune_dead_letters,
    discard_expired,
    lane.forget,
    prune_answers,
    prune_reads,
)
