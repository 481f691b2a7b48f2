"""Calls of many callers that an engine answers together for less than one by one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Generic, NamedTuple, TypeVar
from weakref import WeakValueDictionary

from infra.outgoing.shares import work_for

Key = TypeVar("Key", bound=Hashable)
Asked = TypeVar("Asked")
Answer = TypeVar("Answer")
Call = Callable[[Key, Sequence[Asked]], Awaitable[Sequence[Answer | Exception]]]


class Together(Generic[Key, Asked, Answer]):
    """An item is passed to `call` at once while fewer than `at_once` calls for its key run. Those that come meanwhile
    wait for the end of a call, and then go together, up to `most` of them. So no answer is older than its question.

    `call` returns one answer or error per item. An error that it raises reaches the callers of all these items.
    """

    def __init__(self, call: Call[Key, Asked, Answer], *, at_once: int, most: int) -> None:
        self._call = call
        self._at_once = at_once
        self._most = most
        # A group exists while a caller waits for it or a call of it runs.
        self._groups: WeakValueDictionary[Key, _Group[Key, Asked, Answer]] = WeakValueDictionary()

    async def ask(self, key: Key, item: Asked) -> Answer:
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group(self._call, key, self._at_once, self._most)
        return await group.ask(item)


class _Waiting(NamedTuple, Generic[Asked, Answer]):
    asked: Asked
    answer: asyncio.Future[Answer]


class _Group(Generic[Key, Asked, Answer]):
    def __init__(self, call: Call[Key, Asked, Answer], key: Key, at_once: int, most: int) -> None:
        self._call = call
        self._key = key
        self._at_once = at_once
        self._most = most
        self._waiting: deque[_Waiting[Asked, Answer]] = deque()
        self._calls = 0
        # The loop itself keeps only weak references to its tasks.
        self._tasks: set[asyncio.Task[None]] = set()

    async def ask(self, item: Asked) -> Answer:
        waiting = _Waiting(item, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._calls < self._at_once:
            self._calls += 1
            task = asyncio.create_task(self._work())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        answer: Answer = await waiting.answer
        return answer

    async def _work(self) -> None:
        # For many tenants: it must not wait for the share of the one that asked first.
        work_for("")
        try:
            while self._waiting:
                taken = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
                # A caller whose time is over has cancelled its part.
                if batch := [each for each in taken if not each.answer.done()]:
                    await self._ask(batch)
        finally:
            self._calls -= 1

    async def _ask(self, batch: Sequence[_Waiting[Asked, Answer]]) -> None:
        try:
            answers = await self._call(self._key, [each.asked for each in batch])
        except Exception as error:
            answers = [error] * len(batch)
        for each, answer in zip(batch, answers, strict=True):
            if each.answer.done():
                continue
            if isinstance(answer, Exception):
                each.answer.set_exception(answer)
            else:
                each.answer.set_result(answer)
