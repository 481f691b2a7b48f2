"""Holds lanes: claims them, has their items handled (`processor`), renews the leases and gives lanes back.

A failure here costs a pause and nothing else: if a process dies, another one claims its lanes after their leases have
run out. If a wake-up is missed, the next sweep finds the lane.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from contextvars import Context
from datetime import timedelta
from functools import partial

from sqlalchemy.ext.asyncio import AsyncEngine

from infra.errors import describe
from infra.failpoint import failpoint
from infra.lanes.claims import Claims, LaneHead, Lease, next_tenant_id
from infra.lanes.lane import Work
from infra.lanes.processor import LaneProcessor, report_lost
from infra.observe.logs import get_logger
from infra.observe.metrics import Metrics
from infra.postgres.database import Database
from infra.postgres.db import is_transient
from infra.postgres.lane_items import ClaimedItem

SWEEP_SECONDS = 1.0
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
        self._metrics = metrics
        self.lease_seconds = lease_seconds
        self._kinds = {work.lane.name: _Kind(work) for work in works}
        self._processor = LaneProcessor(database, works, metrics, self.wake)
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
        handling = self._processor.process(kind.work, lease, head)
        task = asyncio.create_task(handling, name=f"lane {kind.name}", context=Context())
        kind.running[lease] = task
        task.add_done_callback(partial(self._ended, kind, lease))

    async def stop(self) -> None:
        """Claims no more lanes. `run` returns when the handlers have finished."""
        self._stopping = self._processor.stopping = True
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
                kind.turn = next_tenant_id(claimed.lanes[-1][0].tenant_id)
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
                    report_lost(lease, self._metrics)

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
