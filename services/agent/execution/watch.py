"""Stops the calls of a run when the run is cancelled or its time is over."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
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


class Watch:
    """Finds the runs of this process that are to be cancelled, with one query for all of them."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._calls: dict[UUID, set[asyncio.Task[Any]]] = {}
        self._cancelled: set[UUID] = set()
        self._poll: asyncio.Task[None] | None = None

    async def guard(self, run_id: UUID, call: Coroutine[Any, Any, T], seconds: float) -> T:
        """Awaits `call`. Raises CancelRequested within a second of a cancel, TimeoutError after `seconds`."""
        if seconds <= 0:
            call.close()
            raise TimeoutError
        task = asyncio.create_task(call)
        self._calls.setdefault(run_id, set()).add(task)
        if self._poll is None:
            self._poll = asyncio.create_task(self._look_repeatedly())
        try:
            async with asyncio.timeout(seconds):
                return await task
        except asyncio.CancelledError:
            if run_id in self._cancelled:
                raise CancelRequested from None
            raise
        finally:
            self._calls[run_id].discard(task)
            if not self._calls[run_id]:
                del self._calls[run_id]
                self._cancelled.discard(run_id)

    async def look(self) -> None:
        """Cancels the calls of the runs that are to be cancelled."""
        async with self._database.begin() as tx:
            rows = await tx.sql(
                "SELECT id FROM run WHERE id = ANY($1::uuid[]) AND cancel_reason IS NOT NULL", list(self._calls)
            )
        for (run_id,) in rows:
            for task in self._calls.get(run_id, ()):
                self._cancelled.add(run_id)
                task.cancel()

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
