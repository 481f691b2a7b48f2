"""Group commit: writes that wait at the same moment share one transaction, and so one flush of the disk.

While one group commits, the next one gathers. A write that comes alone is a group of one and does not wait.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import Context
from typing import Generic, TypeVar

import msgspec

from infra.postgres.db import is_transient

W = TypeVar("W")


class _Pending(msgspec.Struct, Generic[W]):
    write: W
    done: asyncio.Future[None]


class GroupCommit(Generic[W]):
    """Commits the writes of one process in groups, in the order in which they came.

    `commit` writes a group in one transaction and returns the errors of the writes that it left out, by their index in
    the group. If it raises, it has committed nothing.
    """

    def __init__(
        self,
        commit: Callable[[Sequence[W]], Awaitable[Mapping[int, Exception]]],
        *,
        largest: int,
        size: Callable[[W], int] = lambda _: 1,
    ) -> None:
        """largest: the most that the sizes of a group's writes are together. A larger write is a group of one."""
        self._commit = commit
        self._largest = largest
        self._size = size
        self._waiting: deque[_Pending[W]] = deque()
        self.uncommitted = 0
        """The number of writes that wait or are being committed."""
        self.working: asyncio.Task[None] | None = None
        """The task that commits. None while nothing waits."""

    async def write(self, write: W) -> None:
        """Returns after the commit. Raises the error of this write, or the transient error of its group.

        A write is committed even if its caller was cancelled.
        """
        await self.submit(write)

    def submit(self, write: W) -> asyncio.Future[None]:
        """Adds the write behind those that wait. The result becomes done after the commit, as `write` returns."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Pending(write, done))
        self.uncommitted += 1
        if self.working is None:
            # An empty context: the task works for many callers and belongs to the trace of none.
            self.working = asyncio.create_task(self._work(), name="group commit", context=Context())
        return done

    async def _work(self) -> None:
        try:
            while self._waiting:
                # Writes that are submitted in the same turn of the event loop come along, above all the next write of a
                # caller that does not await its first one.
                await asyncio.sleep(0)
                group = [self._waiting.popleft()]
                left = self._largest - self._size(group[0].write)
                while self._waiting and (left := left - self._size(self._waiting[0].write)) >= 0:
                    group.append(self._waiting.popleft())
                try:
                    await self._end(group)
                finally:
                    self.uncommitted -= len(group)
        finally:
            self.working = None

    async def _end(self, group: Sequence[_Pending[W]]) -> None:
        refused: Mapping[int, Exception]
        try:
            refused = await self._commit([pending.write for pending in group])
        except Exception as error:
            if len(group) > 1 and not is_transient(error):
                # One of the writes is at fault. Each alone: the others must not fail with it.
                for pending in group:
                    await self._end([pending])
                return
            refused = dict.fromkeys(range(len(group)), error)
        for index, pending in enumerate(group):
            if pending.done.done():
                continue  # the caller was cancelled
            if error_of := refused.get(index):
                pending.done.set_exception(error_of)
            else:
                pending.done.set_result(None)
