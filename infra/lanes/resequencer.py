"""The resequencer: handles messages in the order of their positions, although a bus delivers them in any order.

The sender counts the messages of a key (`next_position`). A message that comes too early waits for those before it. A
missing message is skipped only if it is known to be dead, or too old to come: until then it may be in the sender's
outbox, in a retry queue, or on its way.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

import msgspec

from infra.clock import utcnow
from infra.errors import NotYet
from infra.lanes.lane import Lane
from infra.observe import telemetry
from infra.observe.logs import get_logger
from infra.postgres.tx import QUEUE_HORIZON, Tx

# After this time the resequencer checks for the first time whether the missing messages are dead. It is longer than a
# message needs for a second and a third attempt, after 5 and 30 seconds.
GRACE = timedelta(seconds=45)
CHECK_AGAIN = timedelta(seconds=15)
# The sender's outbox keeps a message for this time. After it a message that has not come cannot be sent again.
LOST_AFTER = QUEUE_HORIZON

Handle = Callable[[bytes], Awaitable[None]]
"""Handles a message by its stored content, in the transaction at hand."""


class MissingMessages(msgspec.Struct, frozen=True):
    """The item of a gap lane: the message at `position` waits for messages before it."""

    key: str
    position: int
    since: datetime | None = None


@dataclass(frozen=True)
class Resequencer:
    """Puts one kind of message in order. `gaps`: the lane whose runner calls `skip_gap`."""

    gaps: Lane[MissingMessages]

    async def accept(self, tx: Tx, key: str, position: int, content: bytes, handle: Handle) -> None:
        """Handles the message and those that waited for it, or stores it until those before it have come.

        position: from 1 per key, without a gap. 0: the message has no position and is handled at once. content: all
        that `handle` needs; personal content in it must be sealed. Transactions for the same key run one at a time.
        """
        if position == 0:
            await handle(content)
            return
        last = await self._last(tx, key)
        if position > last + 1:
            await self._store(tx, key, position, content)
            return
        await handle(content)
        await self._handle_next(tx, key, max(last, position), handle)

    async def skip_gap(self, tx: Tx, gap: MissingMessages, handle: Handle) -> None:
        """Handles the messages that wait, up to that of `gap`, in order, without the missing messages before them.

        Raises NotYet if a missing message may still come.
        """
        last = await self._last(tx, gap.key)
        too_old = gap.since is not None and utcnow() - gap.since > LOST_AFTER
        dead = await self._dead(tx, gap.key)
        # Not only the message of `gap`: one before it may have come later, and may wait too.
        for (waiting,) in await tx.sql(
            """
            SELECT position FROM early_message
            WHERE tenant_id = $1 AND name = $2 AND key = $3 AND position BETWEEN $4 AND $5
            ORDER BY position
            """,
            tx.tenant_id or "",
            self.gaps.name,
            gap.key,
            last + 1,
            gap.position,
        ):
            if waiting <= last:
                continue
            missing = range(last + 1, waiting)
            log = get_logger("infra.lanes.resequencer", kind=self.gaps.name, key=gap.key)
            if not too_old and not dead.issuperset(missing):
                log.warning("messages are missing; those behind them wait", first=missing[0], last=missing[-1])
                raise NotYet(CHECK_AGAIN, "missing messages may still come")
            log.warning("missing messages skipped; see ./claw dlq list", first=missing[0], last=missing[-1])
            last = await self._handle_next(tx, gap.key, waiting - 1, handle)

    async def _dead(self, tx: Tx, key: str) -> set[int]:
        """The positions of the key's messages that are dead letters here and are not being redriven."""
        rows = await tx.sql(
            """
            SELECT (headers::json ->> 'ce_sequence')::bigint FROM dead_letter
            WHERE source = 'rabbit' AND key = $1 AND coalesce(tenant_id, '') = $2 AND state IN ('failed', 'discarded')
                AND headers::json ->> 'ce_sequence' ~ '^[0-9]{1,18}$'
            """,
            key,
            tx.tenant_id or "",
        )
        return {position for (position,) in rows}

    async def _last(self, tx: Tx, key: str) -> int:
        """The position up to which the messages of the key are handled. Its row is locked."""
        [(last,)] = await tx.sql(
            """
            INSERT INTO sequence AS s (tenant_id, name, key, last) VALUES ($1, $2, $3, 0)
            ON CONFLICT (tenant_id, name, key) DO UPDATE SET last = s.last
            RETURNING last
            """,
            tx.tenant_id or "",
            self.gaps.name,
            key,
        )
        return int(last)

    async def _handle_next(self, tx: Tx, key: str, last: int, handle: Handle) -> int:
        """Handles the stored messages that follow `last` without a gap. Returns the position of the last of them."""
        while rows := await tx.sql(
            """
            DELETE FROM early_message
            WHERE tenant_id = $1 AND name = $2 AND key = $3 AND position = $4
            RETURNING parcel, headers
            """,
            tx.tenant_id or "",
            self.gaps.name,
            key,
            last + 1,
        ):
            [(content, headers)] = rows
            last += 1
            with telemetry.record(msgspec.json.decode(headers, type=dict[str, str]), "handle early message"):
                await handle(bytes(content))
        await tx.sql(
            "UPDATE sequence SET last = $4 WHERE tenant_id = $1 AND name = $2 AND key = $3",
            tx.tenant_id or "",
            self.gaps.name,
            key,
            last,
        )
        return last

    async def _store(self, tx: Tx, key: str, position: int, content: bytes) -> None:
        await tx.sql(
            """
            INSERT INTO early_message (tenant_id, name, key, position, parcel, headers)
            VALUES ($1, $2, $3, $4, $5, $6)
            """,
            tx.tenant_id or "",
            self.gaps.name,
            key,
            position,
            content,
            msgspec.json.encode(telemetry.carrier()).decode(),
        )
        now = utcnow()
        tx.enqueue(self.gaps, lane=key, item=MissingMessages(key, position, now), after=GRACE)


async def next_position(tx: Tx, name: str, key: str) -> int:
    """The position of the next message of this kind and key, from 1.

    Other transactions that need one for the key wait until this one ends, so that no position is drawn and not used.
    """
    [(last,)] = await tx.sql(
        """
        INSERT INTO sequence AS s (tenant_id, name, key, last) VALUES ($1, $2, $3, 1)
        ON CONFLICT (tenant_id, name, key) DO UPDATE SET last = s.last + 1
        RETURNING last
        """,
        tx.tenant_id or "",
        name,
        key,
    )
    return int(last)
