"""Works off lanes: claims them, gives their heads to the handlers, and takes care of what fails.

What is lost here costs a pause and nothing else: a lane whose process dies is taken by another once its lease has run
out, a wake-up that nobody hears is found by the next sweep.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import msgspec
from sqlalchemy.ext.asyncio import AsyncEngine

from infra.errors import InvalidMessage, NotYet, RetryLater, Transient, describe
from infra.failpoint import failpoint
from infra.lanes.claims import Claims, Head, LaneLost, Lease, after
from infra.lanes.effects import Effects
from infra.lanes.lane import Work
from infra.observe import telemetry
from infra.observe.logs import get_logger
from infra.observe.metrics import Metrics
from infra.observe.redaction import redacted
from infra.postgres.db import is_transient, storable
from infra.postgres.dead_letters import DeadLetter, store_dead_letters
from infra.postgres.tx import Database, Tx

SWEEP_SECONDS = 1.0
# So many items of a lane before others have their turn.
IN_A_ROW = 10
# An item over which its process has died so often is what kills it.
MAX_RECOVERIES = 10
# At a stop the handlers have so long to finish; then other processes take their lanes.
DRAIN_SECONDS = 20.0
# Other processes are called at most so often: each hears it once and then looks for itself.
CALL_SECONDS = 0.1


class _Kind:
    """A kind of lane and what this process has of it."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.name = work.lane.name
        self.decoder = msgspec.json.Decoder(work.lane.item)
        self.running: dict[int, tuple[Lease, asyncio.Task[None]]] = {}
        # The tenant whose turn is next.
        self.turn = ""
        self.full = False
        self.called_at = 0.0


class LaneRunner:
    """Works off lanes until stopped. `control`: an engine of its own, of one connection."""

    def __init__(
        self, database: Database, works: Sequence[Work], control: AsyncEngine, metrics: Metrics, *, lease_seconds: float
    ) -> None:
        self._database = database
        self._metrics = metrics
        self._lease_seconds = lease_seconds
        self._kinds = {work.lane.name: _Kind(work) for work in works}
        self._claims = Claims(control, database.service, self.wake, lease_seconds=lease_seconds)
        self._woken: set[str] = set()
        self._event = asyncio.Event()
        self._stopping = False
        self._log = get_logger("infra.lanes.runner")

    def wake(self, kind: str) -> None:
        """There may be something to do in lanes of this kind."""
        if kind in self._kinds:
            self._woken.add(kind)
            self._event.set()

    async def stop(self) -> None:
        """Takes nothing more; `run` returns once the handlers have finished."""
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
                        "lanes cannot be claimed now, trying again",
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
        """Claims lanes until all slots are taken or none is ready. Returns when there is more, in seconds."""
        while (wanted := kind.work.concurrency - len(kind.running)) > 0 and not self._stopping:
            taken = Counter(lease.tenant_id for lease, _ in kind.running.values())
            claimed = await self._claims.claim(kind.name, kind.turn, wanted, kind.work.per_tenant, taken)
            failpoint("after_lane_claim")
            for lease, head in claimed.lanes:
                task = asyncio.create_task(self._work_off(kind, lease, head), name=f"lane {kind.name}")
                kind.running[lease.lane_id] = lease, task
                task.add_done_callback(partial(self._ended, kind, lease))
            if len(claimed.lanes) == wanted:
                kind.turn = after(claimed.lanes[-1][0].tenant_id)
            elif kind.turn:
                kind.turn = ""  # the tenants behind it had their turn, round again
            elif claimed.tenants <= 1 or not claimed.lanes:
                return claimed.due
        kind.full = True
        if time.monotonic() - kind.called_at > CALL_SECONDS:
            kind.called_at = time.monotonic()
            await self._claims.call_others(kind.name)
        return None

    def _ended(self, kind: _Kind, lease: Lease, task: asyncio.Task[None]) -> None:
        taken = sum(held.tenant_id == lease.tenant_id for held, _ in kind.running.values())
        del kind.running[lease.lane_id]
        if kind.full or taken == kind.work.per_tenant:
            kind.full = False
            self.wake(kind.name)

    def _leases(self) -> list[Lease]:
        return [lease for kind in self._kinds.values() for lease, _ in kind.running.values()]

    async def _keep_leases(self) -> None:
        while True:
            await asyncio.sleep(self._lease_seconds / 3)
            if not (leases := self._leases()):
                continue
            lost: list[Lease] = []
            try:
                lost = await self._claims.renew(leases)
            except Exception as error:
                self._log.warning(
                    "leases of lanes cannot be renewed now",
                    error=describe(error),
                    exc_info=not is_transient(error),
                )
            now = time.monotonic()
            lost += [lease for lease in leases if lease.until < now and lease not in lost]
            for lease in lost:
                held, task = self._kinds[lease.kind].running.get(lease.lane_id, (None, None))
                # Once: a second cancellation would break off the cleaning up after the first.
                if task and held is lease and not task.cancelling():
                    task.cancel()
                    self._lost(lease)

    def _lost(self, lease: Lease) -> None:
        self._metrics.lane_items.labels(lease.kind, "lost").inc()
        self._log.warning("lane lost to another process, its handler is stopped", kind=lease.kind)

    async def _drain(self) -> None:
        tasks = [task for kind in self._kinds.values() for _, task in kind.running.values()]
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

    async def _work_off(self, kind: _Kind, lease: Lease, head: Head | None) -> None:
        """The lane's items one by one, until there is none that is due or others have their turn."""
        try:
            if head is None or not (head.due or head.expired):
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
                "lane left, it is taken again when its lease has run out",
                kind=kind.name,
                error=describe(error),
                exc_info=not is_transient(error),
            )

    async def _step(self, kind: _Kind, lease: Lease, head: Head, may_go_on: bool) -> Head | None:
        """Does the head. Returns the next one; None where the lane was given back."""
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
            return await self._failed(kind, lease, head, error, may_go_on)
        failpoint("after_lane_commit")
        self._metrics.lane_items.labels(kind.name, "expired" if head.expired else "done").inc()
        self._metrics.lane_seconds.labels(kind.name).observe(time.perf_counter() - started)
        return result

    async def _do(self, kind: _Kind, lease: Lease, head: Head, may_go_on: bool, tx: Tx) -> Head | None:
        if head.recoveries >= MAX_RECOVERIES:
            raise InvalidMessage("item", f"its process died, or lost it, {head.recoveries} times")
        try:
            item = kind.decoder.decode(head.body)
        except msgspec.DecodeError as error:
            raise InvalidMessage("item", str(error)) from error
        work = kind.work
        if not head.expired:
            effects = Effects(self._database, lease, tx, self._metrics, item_id=head.item_id, attempt=head.attempts + 1)
            await work.handler(item, effects, tx)
        elif work.expired:
            await work.expired(item, tx)
        await tx.flush()
        result = await self._finish(tx, lease, head, "expired" if head.expired else "done", may_go_on)
        failpoint("before_lane_commit")
        return result

    async def _failed(self, kind: _Kind, lease: Lease, head: Head, error: Exception, may_go_on: bool) -> Head | None:
        lane = kind.work.lane
        passing = isinstance(error, Transient) or is_transient(error)
        dead = isinstance(error, InvalidMessage) or (not passing and head.faults >= len(lane.retries))
        text = redacted(describe(error))
        self._log.log(
            40 if dead else 10 if isinstance(error, NotYet) else 30,
            "item set aside as a dead letter; see claw dlq list" if dead else "item not done, it is tried again",
            kind=kind.name,
            item_id=str(head.item_id),
            attempt=head.attempts + 1,
            error=text,
            exc_info=error if not passing and not isinstance(error, InvalidMessage) else None,
        )
        result = None
        async with self._database.begin(tenant_id=lease.tenant_id or None) as tx:
            if dead:
                if kind.work.dead and (item := _readable(kind, head)) is not None:
                    await kind.work.dead(item, text, tx)
                result = await self._finish(tx, lease, head, "dead", may_go_on)
                await store_dead_letters(await tx.connection(), lane.name, "lane", [_dead_letter(lease, head, text)])
            else:
                await lease.fence(tx)
                await tx.sql(
                    "UPDATE lane_item SET attempts = attempts + 1, faults = faults + $3::int, error = $4, "
                    "not_before = clock_timestamp() + $5::interval WHERE lane_id = $1 AND seq = $2",
                    lease.lane_id,
                    head.seq,
                    0 if passing else 1,
                    storable(text, 4000),
                    _pause(error, head.attempts) if passing else lane.retries[head.faults],
                )
                await tx.sql("SELECT lane_release($1)", lease.lane_id)
        self._metrics.lane_items.labels(kind.name, "dead" if dead else "waiting" if passing else "retried").inc()
        if dead:
            self._metrics.dead_letters.labels(kind.name).inc()
        self.wake(kind.name)  # so that it is known when the lane is due
        return result

    async def _finish(self, tx: Tx, lease: Lease, head: Head, state: str, may_go_on: bool) -> Head | None:
        """Ends the head. Returns the next one, if it may be done at once; else the lane is given back."""
        [(held, *following)] = await tx.sql(
            "SELECT * FROM lane_finish($1, $2, $3, $4, $5)",
            lease.lane_id,
            lease.epoch,
            head.seq,
            state,
            may_go_on and not self._stopping,
        )
        if not held:
            raise LaneLost(f"lane {lease.kind}: another process has it")
        return None if following[0] is None else Head(*following)


def _readable(kind: _Kind, head: Head) -> Any:
    """The item; None where it is none that can be decoded."""
    try:
        return kind.decoder.decode(head.body)
    except msgspec.DecodeError:
        return None


def _pause(error: Exception, attempts: int) -> timedelta:
    """What passes by itself is asked again after 1 s, 2 s, 4 s … 64 s, or when it said."""
    if isinstance(error, RetryLater):
        return error.after
    return timedelta(seconds=2 ** min(attempts, 6)) * random.uniform(0.75, 1.0)


def _dead_letter(lease: Lease, head: Head, error: str) -> DeadLetter:
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
