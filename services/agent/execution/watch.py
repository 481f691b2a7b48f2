"""Stops the calls of a run when the run is cancelled or its time is over."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextvars import Context
from typing import Any, TypeVar
from uuid import UUID

from infra.observe.logs import get_logger
from infra.postgres.database import Database
from infra.postgres.db import is_transient

T = TypeVar("T")

# A cancel takes effect within a second.
POLL_SECONDS = 0.5


class CancelRequested(Exception):
    """The run is to be cancelled."""


class _Call:
    """A call, and the task that awaits it."""

    __slots__ = ("_task", "error")

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self._task = task
        self.error: Exception | None = None
        """The reason for which it was stopped."""

    def stop(self, error: Exception) -> None:
        if self.error is None:
            self.error = error
            self._task.cancel()


class Watch:
    """Finds the runs of this process that are to be cancelled, with one query for all of them."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._calls: dict[_Call, UUID] = {}
        """The calls under way, with their runs."""
        self._poll: asyncio.Task[None] | None = None

    async def guard(self, run_id: UUID, call: Coroutine[Any, Any, T], seconds: float) -> T:
        """Awaits `call`. Raises CancelRequested within a second of a cancel, TimeoutError after `seconds`."""
        if seconds <= 0:
            call.close()
            raise TimeoutError
        task = asyncio.current_task()
        assert task
        cancelling = task.cancelling()
        # The call stays in this task: another one for each call would cost as much as a call that answers at once.
        guarded = _Call(task)
        self._calls[guarded] = run_id
        if self._poll is None:
            # An empty context: it works for many tenants, and must not wait for the share of one.
            self._poll = asyncio.create_task(self._look_repeatedly(), context=Context())
        timer = task.get_loop().call_later(seconds, guarded.stop, TimeoutError())
        try:
            return await call
        except asyncio.CancelledError:
            if guarded.error and task.cancelling() == cancelling + 1:
                raise guarded.error from None
            raise
        finally:
            timer.cancel()
            if guarded.error:
                task.uncancel()
            del self._calls[guarded]

    async def look(self) -> None:
        """Stops the calls of the runs that are to be cancelled."""
        async with self._database.begin() as tx:
            rows = await tx.sql(
                "SELECT id FROM run WHERE id = ANY($1::uuid[]) AND cancel_reason IS NOT NULL",
                list(set(self._calls.values())),
            )
        cancelled = {run_id for (run_id,) in rows}
        for call, run_id in self._calls.items():
            if run_id in cancelled:
                call.stop(CancelRequested())

    async def _look_repeatedly(self) -> None:
        while self._calls:
            await asyncio.sleep(POLL_SECONDS)
            try:
                await self.look()
            except Exception as error:
                get_logger("agent.watch").warning(
                    "could not look for cancelled runs; will retry", exc_info=None if is_transient(error) else error
                )
        self._poll = None
