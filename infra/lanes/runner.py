"""Processes lanes: claims them, calls the handlers with their first items, and retries or dead-letters failed items.

A failure here costs a pause and nothing else: if a process dies, another one claims its lanes after their leases have
run out. If a wake-up is missed, the next sweep finds the lane.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from contextvars import Context
from datetime import timedelta
from functools import partial
from typing import Any

import msgspec
from sqlalchemy.ext.asyncio import AsyncEngine

from infra.errors import InvalidMessage, NotYet, RetryLater, describe
from infra.failpoint import failpoint
from infra.lanes.claims import Claims, LaneHead, LaneLost, Lease, after
from infra.lanes.effects import Effects
from infra.lanes.lane import Work
from infra.observe import telemetry
from infra.observe.logs import get_logger
from infra.observe.metrics import Metrics
from infra.observe.redaction import redacted
from infra.postgres.db import is_transient, storable
from infra.postgres.dead_letters import DeadLetter, store_dead_letters
from infra.postgres.lane_items import ClaimedItem
from infra.postgres.tx import Database, Tx

SWEEP_SECONDS = 1.0
# After so many items in a row, a lane is given back so that other lanes have their turn.
IN_A_ROW = 10
# An item becomes a dead letter if its process died, or lost the lane, so many times while it handled the item.
MAX_RECOVERIES = 10
# Nothing else is started in the process in the first seconds of an item that may be the one that ends its processes.
ALONE_SECONDS = 5.0
# After such an item other items have their turn for this time.
BETWEEN_SUSPECTS_SECONDS = 1.0
# After a stop the handlers have this long to finish. Then their lanes are given to other processes.
DRAIN_SECONDS = 20.0
# Other processes are called at most once in this time: each of them then claims until it finds no more.
CALL_SECONDS = 0.1


class _Kind:
    """A kind of lane, and the lanes of it that this process holds."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.name = work.lane.name
        self.decoder = msgspec.json.Decoder(work.lane.item)
        self.running: dict[Lease, asyncio.Task[None]] = {}
        """By the claim and not by the lane: a lane can be claimed again before the task of its last claim has ended."""
        self.reserved: Counter[str] = Counter()
        """Places that transactions keep for lanes that they may claim, by tenant."""
        self.wanted = 0
        """Places for the lanes that are being claimed."""
        self.turn = ""
        """The tenant whose turn is next."""
        self.full = False
        self.behind = True
        """Lanes may be ready that this process had no place for: new ones stand behind them."""
        self.called_at = 0.0

    @property
    def free(self) -> int:
        """How many more lanes this process may hold."""
        return self.work.concurrency - len(self.running) - self.reserved.total() - self.wanted


class LaneRunner:
    """Processes lanes until stopped. `control`: an engine of its own with one connection."""

    def __init__(
        self, database: Database, works: Sequence[Work], control: AsyncEngine, metrics: Metrics, *, lease_seconds: float
    ) -> None:
        self._database = database
        self._metrics = metrics
        self.lease_seconds = lease_seconds
        self._kinds = {work.lane.name: _Kind(work) for work in works}
        self._claims = Claims(control, database.service, self.wake, lease_seconds=lease_seconds)
        self.owner = self._claims.owner
        self._woken: set[str] = set()
        self._event = asyncio.Event()
        self._stopping = False
        self._suspect: Lease | None = None
        """The claim of the only item of this process that may be the one that ends its processes."""
        self._alone_until = 0.0
        self._next_suspect_at = 0.0
        self._log = get_logger("infra.lanes.runner")

    def wake(self, kind: str) -> None:
        """Tells the runner that lanes of this kind may be ready."""
        if kind in self._kinds:
            self._woken.add(kind)
            self._event.set()

    def reserve(self, kind: str, tenant_id: str) -> bool:
        """Keeps a place for a lane of the tenant that a transaction may claim. False while older lanes wait for one."""
        held = self._kinds.get(kind)
        if held is None or held.behind or self._stopping:
            return False
        if self._suspect and time.monotonic() < self._alone_until:
            return False
        of_tenant = sum(lease.tenant_id == tenant_id for lease in held.running) + held.reserved[tenant_id]
        if held.free <= 0 or of_tenant >= held.work.per_tenant:
            return False
        held.reserved[tenant_id] += 1
        return True

    def give_up(self, kind: str, tenant_id: str) -> None:
        """The place that was reserved is not needed."""
        held = self._kinds[kind]
        held.reserved[tenant_id] -= 1
        held.reserved += Counter()  # a counter keeps the names that have come to 0
        if held.behind:
            self.wake(kind)

    def take(self, claimed: ClaimedItem) -> None:
        """Handles the item of a lane that a transaction has claimed for this process."""
        failpoint("after_lane_claim")
        item = claimed.item
        lease = Lease(item.kind, item.tenant_id, item.lane, claimed.lane_id, claimed.epoch, claimed.until)
        head = LaneHead(
            seq=claimed.seq,
            item_id=item.item_id,
            body=item.body,
            headers=item.headers,
            attempts=0,
            faults=0,
            recoveries=0,
            age=timedelta(0),
            expired=False,
            due=True,
            expires_in=item.expires_in,
        )
        self._begin(self._kinds[item.kind], lease, head)
        self.give_up(item.kind, item.tenant_id)

    def _begin(self, kind: _Kind, lease: Lease, head: LaneHead | None) -> None:
        # An empty context: the task does not belong to the trace of the transaction that claimed the lane.
        task = asyncio.create_task(self._process(kind, lease, head), name=f"lane {kind.name}", context=Context())
        kind.running[lease] = task
        task.add_done_callback(partial(self._ended, kind, lease))

    async def stop(self) -> None:
        """Claims no more lanes. `run` returns when the handlers have finished."""
        self._stopping = True
        self._event.set()

    async def run(self) -> None:
        renewing = asyncio.create_task(self._keep_leases())
        try:
            await self._fill_until_stopped()
            await self._drain()
        finally:
            renewing.cancel()
            with suppress(asyncio.CancelledError):
                await renewing
            await self._claims.close()

    async def _fill_until_stopped(self) -> None:
        sweep_at = 0.0
        while not self._stopping:
            self._event.clear()
            if time.monotonic() >= sweep_at:
                self._woken.update(self._kinds)
                sweep_at = time.monotonic() + SWEEP_SECONDS
            while self._woken:
                kind = self._kinds[self._woken.pop()]
                try:
                    due = await self._fill(kind)
                except Exception as error:
                    self._log.warning(
                        "could not claim lanes; will retry",
                        kind=kind.name,
                        error=describe(error),
                        exc_info=not is_transient(error),
                    )
                    break
                if due is not None:
                    sweep_at = min(sweep_at, time.monotonic() + due)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._event.wait(), max(0.0, sweep_at - time.monotonic()))

    async def _fill(self, kind: _Kind) -> float | None:
        """Claims lanes until all slots are in use or none is ready. Returns seconds until the next one, if known."""
        while (wanted := kind.free) > 0 and not self._stopping:
            if self._suspect and (alone := self._alone_until - time.monotonic()) > 0:
                return alone
            taken = Counter(lease.tenant_id for lease in kind.running) + kind.reserved
            suspects = self._suspect is None and time.monotonic() >= self._next_suspect_at
            kind.wanted = wanted
            try:
                claimed = await self._claims.claim(
                    kind.name, kind.turn, wanted, kind.work.per_tenant, taken, suspects=suspects
                )
            finally:
                kind.wanted = 0
            self._metrics.lane_takeovers.labels(kind.name).inc(claimed.taken_over)
            if claimed.lanes:
                failpoint("after_lane_claim")
            if claimed.suspect:
                [(self._suspect, _)] = claimed.lanes
                self._alone_until = time.monotonic() + ALONE_SECONDS
            for lease, head in claimed.lanes:
                self._begin(kind, lease, head)
            if len(claimed.lanes) == wanted:
                kind.turn = after(claimed.lanes[-1][0].tenant_id)
            elif kind.turn:
                kind.turn = ""  # the tenants behind it had their turn: begin with the first one again
            elif claimed.tenants <= 1 or not claimed.lanes:
                kind.behind = False
                return claimed.due
        kind.full = kind.behind = True
        if time.monotonic() - kind.called_at > CALL_SECONDS:
            kind.called_at = time.monotonic()
            await self._claims.call_others(kind.name)
        return None

    def _ended(self, kind: _Kind, lease: Lease, task: asyncio.Task[None]) -> None:
        taken = sum(held.tenant_id == lease.tenant_id for held in kind.running)
        del kind.running[lease]
        if lease is self._suspect:
            self._suspect = None
            self._next_suspect_at = time.monotonic() + BETWEEN_SUSPECTS_SECONDS
            for name in self._kinds:
                self.wake(name)
        if kind.full or taken == kind.work.per_tenant:
            kind.full = False
            self.wake(kind.name)

    def _leases(self) -> list[Lease]:
        return [lease for kind in self._kinds.values() for lease in kind.running if not lease.given_back]

    async def _keep_leases(self) -> None:
        while True:
            await asyncio.sleep(self.lease_seconds / 3)
            if not (leases := self._leases()):
                continue
            lost: list[Lease] = []
            try:
                lost = await self._claims.renew(leases)
            except Exception as error:
                self._log.warning(
                    "could not renew the leases of lanes; will retry",
                    error=describe(error),
                    exc_info=not is_transient(error),
                )
            now = time.monotonic()
            lost += [lease for lease in leases if lease.until < now and lease not in lost]
            for lease in lost:
                task = self._kinds[lease.kind].running.get(lease)
                # Once: a second cancellation would interrupt the handler while it cleans up after the first one.
                if task and not task.cancelling():
                    task.cancel()
                    self._lost(lease)

    def _lost(self, lease: Lease) -> None:
        self._metrics.lane_items.labels(lease.kind, "lost").inc()
        self._log.warning("lane lost to another process; its handler is stopped", kind=lease.kind)

    async def _drain(self) -> None:
        tasks = [task for kind in self._kinds.values() for task in kind.running.values()]
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=DRAIN_SECONDS)
        if not late:
            return
        leases = self._leases()
        for task in late:
            task.cancel()
        await asyncio.wait(late)
        await self._claims.give_back(leases)

    async def _process(self, kind: _Kind, lease: Lease, head: LaneHead | None) -> None:
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
                head = await self._step(kind, lease, head, in_a_row < IN_A_ROW)
        except LaneLost:
            self._lost(lease)
        except Exception as error:
            self._log.warning(
                "lane dropped after an error; it is claimed again when its lease has run out",
                kind=kind.name,
                error=describe(error),
                exc_info=not is_transient(error),
            )

    async def _step(self, kind: _Kind, lease: Lease, head: LaneHead, may_go_on: bool) -> LaneHead | None:
        """Handles the head. Returns the next one, or None if the lane was given back."""
        carrier = msgspec.json.decode(head.headers, type=dict[str, str])
        started = time.perf_counter()
        try:
            with telemetry.process(
                "lane",
                f"lane {kind.name}",
                carrier,
                age=head.age,
                message_id=str(head.item_id),
                attempt=head.attempts + 1,
            ):
                result = await self._database.run(
                    partial(self._do, kind, lease, head, may_go_on), tenant_id=lease.tenant_id or None
                )
        except LaneLost:
            raise
        except Exception as error:
            lease.given_back = False  # the transaction was rolled back
            return await self._failed(kind, lease, head, error, may_go_on)
        failpoint("after_lane_commit")
        self._metrics.lane_items.labels(kind.name, "expired" if head.expired else "done").inc()
        self._metrics.lane_seconds.labels(kind.name).observe(time.perf_counter() - started)
        return result

    async def _do(self, kind: _Kind, lease: Lease, head: LaneHead, may_go_on: bool, tx: Tx) -> LaneHead | None:
        if head.recoveries >= MAX_RECOVERIES:
            raise InvalidMessage("item", f"its process died, or lost the lane, {head.recoveries} times")
        try:
            item = kind.decoder.decode(head.body)
        except msgspec.DecodeError as error:
            raise InvalidMessage("item", str(error)) from error
        work = kind.work
        if not head.expired:
            effects = Effects(
                self._database,
                lease,
                tx,
                self._metrics,
                item_id=head.item_id,
                attempt=head.attempts + 1,
                seq=head.seq,
                may_go_on=may_go_on and not self._stopping,
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
        self, kind: _Kind, lease: Lease, head: LaneHead, error: Exception, may_go_on: bool
    ) -> LaneHead | None:
        lane = kind.work.lane
        transient = is_transient(error)
        dead = isinstance(error, InvalidMessage) or (not transient and head.faults >= len(lane.retries))
        text = redacted(describe(error))
        self._log.log(
            logging.ERROR if dead else logging.DEBUG if isinstance(error, NotYet) else logging.WARNING,
            "item stored as a dead letter; see claw dlq list" if dead else "could not process an item; will retry",
            kind=kind.name,
            item_id=str(head.item_id),
            attempt=head.attempts + 1,
            error=text,
            exc_info=error if not transient and not isinstance(error, InvalidMessage) else None,
        )
        result = None
        async with self._database.begin(tenant_id=lease.tenant_id or None) as tx:
            if dead:
                if kind.work.dead and (item := _readable(kind, head)) is not None:
                    await kind.work.dead(item, text, tx)
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
        self._metrics.lane_items.labels(kind.name, "dead" if dead else "waiting" if transient else "retried").inc()
        if dead:
            self._metrics.dead_letters.labels(kind.name).inc()
        self.wake(kind.name)  # so that the next claim tells when the lane is due
        return result

    async def _finish(self, tx: Tx, lease: Lease, head: LaneHead, state: str, may_go_on: bool) -> LaneHead | None:
        """Ends the head. Returns the next one if it may be handled at once. Otherwise the lane is given back."""
        [(held, *following)] = await tx.sql(
            "SELECT * FROM lane_finish($1, $2, $3, $4, $5)",
            lease.lane_id,
            lease.epoch,
            head.seq,
            state,
            may_go_on and not self._stopping,
        )
        if not held:
            raise lease.lost()
        if following[0] is None:
            lease.given_back = True
            return None
        return LaneHead(*following)


def _readable(kind: _Kind, head: LaneHead) -> Any:
    """The item, or None if it cannot be decoded."""
    try:
        return kind.decoder.decode(head.body)
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
