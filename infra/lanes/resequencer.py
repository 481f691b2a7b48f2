"""Messages handled in the order of their positions, whatever order a bus brings them in.

Who sends them counts them per key (`next_position`). One that comes too early waits for those before it, but not for
long, for they may never come (a dead letter): then a lane's item leaves the gap behind.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta

import msgspec

from infra.clock import utcnow
from infra.lanes.lane import Lane
from infra.observe import telemetry
from infra.observe.logs import get_logger
from infra.postgres.tx import Tx

# Longer than a message needs that is tried a second and a third time, after 5 and 30 seconds.
GRACE = timedelta(seconds=45)

Handle = Callable[[bytes], Awaitable[None]]
"""Does what a message asks for, by its parcel, in the transaction at hand."""


class Gap(msgspec.Struct, frozen=True):
    """This message has waited for long enough for those before it."""

    key: str
    position: int


@dataclass(frozen=True)
class Ordered:
    """One kind of messages. `gaps`: the lane whose runner calls `close_gap`."""

    gaps: Lane[Gap]

    async def take(self, tx: Tx, key: str, position: int, parcel: bytes, handle: Handle) -> None:
        """Handles the message, and those that waited for it; or has it wait.

        position: from 1 per key, without a gap; 0: it has none and waits for nobody. parcel: all that `handle` needs,
        personal content in it sealed. Messages of a key take turns until the transaction ends.
        """
        if position == 0:
            await handle(parcel)
            return
        last = await self._last(tx, key)
        if position > last + 1:
            await self._park(tx, key, position, parcel)
            return
        await handle(parcel)
        await self._go_on(tx, key, max(last, position), handle)

    async def close_gap(self, tx: Tx, gap: Gap, handle: Handle) -> None:
        """Handles what waits still up to the gap's message, in order, without what never came."""
        last = await self._last(tx, gap.key)
        # Not the gap's message alone: one that is before it may have come behind it, and wait too.
        for (waiting,) in await tx.sql(
            "SELECT position FROM early_message WHERE tenant_id = $1 AND name = $2 AND key = $3 "
            "AND position BETWEEN $4 AND $5 ORDER BY position",
            tx.tenant_id or "",
            self.gaps.name,
            gap.key,
            last + 1,
            gap.position,
        ):
            if waiting <= last:
                continue
            get_logger("infra.lanes.resequencer").warning(
                "messages did not come, those behind them are handled; are they dead letters? see claw dlq list",
                kind=self.gaps.name,
                key=gap.key,
                missing=f"{last + 1} to {waiting - 1}",
            )
            last = await self._go_on(tx, gap.key, waiting - 1, handle)

    async def _last(self, tx: Tx, key: str) -> int:
        """Up to which position the messages of the key are handled. Its row is locked."""
        [(last,)] = await tx.sql(
            "INSERT INTO sequence AS s (tenant_id, name, key, last) VALUES ($1, $2, $3, 0) "
            "ON CONFLICT (tenant_id, name, key) DO UPDATE SET last = s.last RETURNING last",
            tx.tenant_id or "",
            self.gaps.name,
            key,
        )
        return int(last)

    async def _go_on(self, tx: Tx, key: str, last: int, handle: Handle) -> int:
        """Handles all that follow `last` without a gap. Returns the last of them."""
        while rows := await tx.sql(
            "DELETE FROM early_message WHERE tenant_id = $1 AND name = $2 AND key = $3 AND position = $4 "
            "RETURNING parcel, headers",
            tx.tenant_id or "",
            self.gaps.name,
            key,
            last + 1,
        ):
            [(parcel, headers)] = rows
            last += 1
            with telemetry.record(msgspec.json.decode(headers, type=dict[str, str]), "handle early message"):
                await handle(bytes(parcel))
        await tx.sql(
            "UPDATE sequence SET last = $4 WHERE tenant_id = $1 AND name = $2 AND key = $3",
            tx.tenant_id or "",
            self.gaps.name,
            key,
            last,
        )
        return last

    async def _park(self, tx: Tx, key: str, position: int, parcel: bytes) -> None:
        await tx.sql(
            "INSERT INTO early_message (tenant_id, name, key, position, parcel, headers) "
            "VALUES ($1, $2, $3, $4, $5, $6)",
            tx.tenant_id or "",
            self.gaps.name,
            key,
            position,
            parcel,
            msgspec.json.encode(telemetry.carrier()).decode(),
        )
        tx.enqueue(self.gaps, lane=key, item=Gap(key, position), not_before=utcnow() + GRACE)


async def next_position(tx: Tx, name: str, key: str) -> int:
    """The position of the next message of this kind and key, from 1. Whoever else wants one waits for the end of the
    transaction, so that none is given and not used."""
    [(last,)] = await tx.sql(
        "INSERT INTO sequence AS s (tenant_id, name, key, last) VALUES ($1, $2, $3, 1) "
        "ON CONFLICT (tenant_id, name, key) DO UPDATE SET last = s.last + 1 RETURNING last",
        tx.tenant_id or "",
        name,
        key,
    )
    return int(last)
