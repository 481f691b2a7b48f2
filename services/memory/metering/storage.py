"""The meter of stored byte-hours: the exact integral of a tenant's stored bytes over time, in the table ``storage``.

A file counts from the transaction that adds its row until the one that deletes it. Each change of the bytes and each
sample brings the meter up to now and reports the hours that have ended, in one transaction. A sample that is missed
changes nothing: the next one reports the same hours with the same ids and amounts.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from infra.postgres.database import Database
from infra.postgres.tx import Tx
from infra.service.periodic import Periodic
from protos.catalog import USAGE_RECORDS
from protos.messages.billing import UsageRecorded

_HOUR = timedelta(hours=1)
_MICROSECOND = timedelta(microseconds=1)
_HOUR_MICROSECONDS = _HOUR // _MICROSECOND


class StorageMeter(NamedTuple):
    bytes: int
    """Stored since `since`."""
    rest: int
    """Byte-microseconds before `since` that are not reported yet."""
    since: datetime


def advance(meter: StorageMeter, now: datetime) -> tuple[list[tuple[datetime, int]], StorageMeter]:
    """Returns the whole byte-hours of each hour that has ended (its beginning, UTC), and the meter at `now`.

    The part of a byte-hour that remains is carried over, so the sum is exact.
    """
    stored, rest, since = meter
    hours = []
    end = since.astimezone(UTC).replace(minute=0, second=0, microsecond=0) + _HOUR
    while stored and end <= now:
        whole, rest = divmod(rest + stored * ((end - since) // _MICROSECOND), _HOUR_MICROSECONDS)
        if whole:
            hours.append((end - _HOUR, whole))
        since, end = end, end + _HOUR
    # The clock may have been set back.
    now = max(now, since)
    return hours, StorageMeter(stored, rest + stored * ((now - since) // _MICROSECOND), now)


async def change(tx: Tx, difference: int) -> None:
    """Adds `difference` to the bytes that the tenant stores from now on. 0: a sample."""
    tenant_id = tx.tenant_id
    assert tenant_id is not None
    # Locks the row. The time is read after that, so the intervals of two transactions never overlap.
    [(stored, rest, since, now)] = await tx.sql(
        """
        INSERT INTO storage AS s
        VALUES ($1, 0, 0, clock_timestamp())
        ON CONFLICT (tenant_id) DO UPDATE SET bytes = s.bytes
        RETURNING bytes, rest::text, since, clock_timestamp()
        """,
        tenant_id,
    )
    hours, meter = advance(StorageMeter(stored, int(rest), since), now)
    for hour, quantity in hours:
        record = UsageRecorded(
            tenant_id=tenant_id,
            usage_id=f"storage/{hour:%Y-%m-%dT%H}",
            resource="memory/storage",
            quantities={"storage_byte_hours": quantity},
            occurred_at=hour,
        )
        tx.publish(USAGE_RECORDS, record, key=tenant_id)
    await tx.sql(
        "UPDATE storage SET bytes = $2, rest = $3::text::numeric, since = $4 WHERE tenant_id = $1",
        tenant_id,
        meter.bytes + difference,
        str(meter.rest),
        meter.since,
    )


class Sampler(Periodic):
    """Takes a sample of each tenant after each full hour. Runs until stopped; several processes may run it."""

    pause = 60.0
    failure = "could not report stored bytes"

    def __init__(self, database: Database) -> None:
        super().__init__()
        self._database = database

    async def tick(self) -> None:
        async with self._database.begin() as tx:
            rows = await tx.sql(
                """
                SELECT tenant_id
                FROM storage
                WHERE bytes > 0 AND since < date_trunc('hour', clock_timestamp(), 'UTC')
                ORDER BY since
                """
            )
        for (tenant_id,) in rows:
            async with self._database.begin(tenant_id=tenant_id) as tx:
                await change(tx, 0)
