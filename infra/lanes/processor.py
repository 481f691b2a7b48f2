"""Handles the items of a lane that this process holds, one by one: calls the handler, and retries or dead-letters a
failed item."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import msgspec

from infra.errors import InvalidMessage, NotYet, RetryLater, describe
from infra.failpoint import failpoint
from infra.lanes.claims import LaneHead, LaneLost, Lease
from infra.lanes.effects import Effects
from infra.lanes.lane import Work
from infra.observe import telemetry
from infra.observe.logs import get_logger
from infra.observe.metrics import Metrics
from infra.observe.redaction import redacted
from infra.outgoing import shares
from infra.postgres.database import Database
from infra.postgres.db import is_transient, storable
from infra.postgres.dead_letters import DeadLetter, store_dead_letters
from infra.postgres.tx import Tx

# After so many items in a row, a lane is given back so that other lanes have their turn.
IN_A_ROW = 10
# An item becomes a dead letter if its process died, or lost the lane, so many times while it handled the item.
MAX_RECOVERIES = 10

_log = get_logger("infra.lanes.processor")


def report_lost(lease: Lease, metrics: Metrics) -> None:
    """Reports that another process has the lane now."""
    metrics.lane_items.labels(lease.kind, "lost").inc()
    _log.warning("lane lost to another process; its handler is stopped", kind=lease.kind)


class LaneProcessor:
    """The handlers of one process. `wake`: called with the kind of a lane that has to be claimed again."""

    def __init__(
        self, database: Database, works: Sequence[Work], metrics: Metrics, wake: Callable[[str], None]
    ) -> None:
        self._database = database
        self._decoders = {work.lane.name: msgspec.json.Decoder(work.lane.item) for work in works}
        self._metrics = metrics
        for work in works:
            metrics.dead_letters.labels(work.lane.name)
        self._wake = wake
        self.stopping = False
        """The process stops: after the present item each lane is given back."""

    async def process(self, work: Work, lease: Lease, head: LaneHead | None) -> None:
        """Handles the lane's items one by one, until none is due or other lanes have their turn."""
        try:
            if head is None or not (head.due or head.expired):
                lease.given_back = True
                async with self._database.begin() as tx:
                    await lease.fence(tx)
                    await tx.sql("SELECT lane_release($1)", lease.lane_id)
                head = None
            in_a_row = 0
            while head is not None:
                in_a_row += 1
                head = await self._step(work, lease, head, in_a_row < IN_A_ROW)
        except LaneLost:
            report_lost(lease, self._metrics)
        except Exception as error:
            _log.warning(
                "lane dropped after an error; it is claimed again when its lease has run out",
                kind=work.lane.name,
                error=describe(error),
                exc_info=not is_transient(error),
            )

    async def _step(self, work: Work, lease: Lease, head: LaneHead, may_go_on: bool) -> LaneHead | None:
        """Handles the head. Returns the next one, or None if the lane was given back."""
        carrier = msgspec.json.decode(head.headers, type=dict[str, str])
        shares.work_for(lease.tenant_id)
        started = time.perf_counter()
        try:
            with telemetry.process(
                "lane",
                f"lane {work.lane.name}",
                carrier,
                age=head.age,
                message_id=str(head.item_id),
                attempt=head.attempts + 1,
            ):
                result = await self._database.run(
                    partial(self._do, work, lease, head, may_go_on), tenant_id=lease.tenant_id or None
                )
        except LaneLost:
            raise
        except Exception as error:
            lease.given_back = False  # the transaction was rolled back
            return await self._failed(work, lease, head, error, may_go_on)
        failpoint("after_lane_commit")
        self._metrics.lane_items.labels(work.lane.name, "expired" if head.expired else "done").inc()
        self._metrics.lane_seconds.labels(work.lane.name).observe(time.perf_counter() - started)
        return result

    async def _do(self, work: Work, lease: Lease, head: LaneHead, may_go_on: bool, tx: Tx) -> LaneHead | None:
        if head.recoveries >= MAX_RECOVERIES:
            raise InvalidMessage("item", f"its process died, or lost the lane, {head.recoveries} times")
        try:
            item = self._decoders[work.lane.name].decode(head.body)
        except msgspec.DecodeError as error:
            raise InvalidMessage("item", str(error)) from error
        if not head.expired:
            effects = Effects(
                self._database,
                lease,
                tx,
                self._metrics,
                item_id=head.item_id,
                attempt=head.attempts + 1,
                seq=head.seq,
                may_go_on=may_go_on and not self.stopping,
            )
            ended = await work.handler(item, effects, tx)
            if ended is not None:
                lease.given_back = ended.next is None
                return ended.next
        elif work.expired:
            await work.expired(item, tx)
        await tx.flush()
        result = await self._finish(tx, lease, head, "expired" if head.expired else "done", may_go_on)
        failpoint("before_lane_commit")
        return result

    async def _failed(
        self, work: Work, lease: Lease, head: LaneHead, error: Exception, may_go_on: bool
    ) -> LaneHead | None:
        lane = work.lane
        transient = is_transient(error)
        dead = isinstance(error, InvalidMessage) or (not transient and head.faults >= len(lane.retries))
        text = redacted(describe(error))
        _log.log(
            logging.ERROR if dead else logging.DEBUG if isinstance(error, NotYet) else logging.WARNING,
            "item stored as a dead letter; see ./claw dlq list" if dead else "could not process an item; will retry",
            kind=work.lane.name,
            item_id=str(head.item_id),
            attempt=head.attempts + 1,
            error=text,
            exc_info=error if not transient and not isinstance(error, InvalidMessage) else None,
        )
        result = None
        async with self._database.begin(tenant_id=lease.tenant_id or None) as tx:
            if dead:
                if work.dead and (item := self._readable(work, head)) is not None:
                    await work.dead(item, text, tx)
                result = await self._finish(tx, lease, head, "dead", may_go_on)
                await store_dead_letters(
                    await tx.connection(),
                    lane.name,
                    "lane",
                    [_dead_letter(lease, head, text)],
                    self._database.sealing,
                )
            else:
                await lease.fence(tx)
                await tx.sql(
                    """
                    UPDATE lane_item
                    SET attempts = attempts + 1, faults = faults + $3::int, error = $4,
                        not_before = clock_timestamp() + $5::interval
                    WHERE lane_id = $1 AND seq = $2
                    """,
                    lease.lane_id,
                    head.seq,
                    0 if transient else 1,
                    storable(text, 4000),
                    _pause(error, head.attempts) if transient else lane.retries[head.faults],
                )
                lease.given_back = True
                await tx.sql("SELECT lane_release($1)", lease.lane_id)
        self._metrics.lane_items.labels(work.lane.name, "dead" if dead else "waiting" if transient else "retried").inc()
        if dead:
            self._metrics.dead_letters.labels(work.lane.name).inc()
        self._wake(work.lane.name)  # so that the next claim tells when the lane is due
        return result

    async def _finish(self, tx: Tx, lease: Lease, head: LaneHead, state: str, may_go_on: bool) -> LaneHead | None:
        """Ends the head. Returns the next one if it may be handled at once. Otherwise the lane is given back."""
        [(held, *following)] = await tx.sql(
            "SELECT * FROM lane_finish($1, $2, $3, $4, $5)",
            lease.lane_id,
            lease.epoch,
            head.seq,
            state,
            may_go_on and not self.stopping,
        )
        if not held:
            raise lease.lost()
        if following[0] is None:
            lease.given_back = True
            return None
        return LaneHead(*following)

    def _readable(self, work: Work, head: LaneHead) -> Any:
        """The item, or None if it cannot be decoded."""
        try:
            return self._decoders[work.lane.name].decode(head.body)
        except msgspec.DecodeError:
            return None


def _pause(error: Exception, attempts: int) -> timedelta:
    """After a transient error an item is retried after 1 s, 2 s, 4 s … 64 s, or after the time that the error names."""
    if isinstance(error, RetryLater):
        return error.after
    return timedelta(seconds=2 ** min(attempts, 6)) * random.uniform(0.75, 1.0)


def _dead_letter(lease: Lease, head: LaneHead, error: str) -> DeadLetter:
    headers: dict[str, Any] = msgspec.json.decode(head.headers)
    return DeadLetter(
        destination=lease.kind,
        place="",
        message_id=str(head.item_id),
        key=lease.lane,
        tenant_id=lease.tenant_id or None,
        attempts=head.attempts + 1,
        error=error,
        headers=msgspec.json.encode(headers).decode(),
        payload=head.body,
    )
