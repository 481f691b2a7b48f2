"""The threads that tenants share."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

from infra.outgoing import shares
from infra.service.threads import TenantThreads

T = TypeVar("T")


@pytest.fixture
def threads() -> Iterator[TenantThreads]:
    made = TenantThreads(4)
    yield made
    made.shutdown()


async def call(threads: TenantThreads, whose: str, work: Callable[[], T]) -> T:
    """Does the work in a thread, for this tenant."""
    shares.work_for(whose)
    return await asyncio.get_running_loop().run_in_executor(threads, work)


async def test_a_tenants_calls_leave_threads_to_the_next_tenant(threads: TenantThreads) -> None:
    go_on = threading.Event()
    begun = threading.Semaphore(0)

    def held() -> bool:
        begun.release()
        return go_on.wait(60)

    hostile = [asyncio.create_task(call(threads, "hostile", held)) for _ in range(20)]
    await asyncio.sleep(0)
    try:
        async with asyncio.timeout(20):
            assert await asyncio.create_task(call(threads, "other", lambda: 1)) == 1
            assert await asyncio.create_task(call(threads, "", lambda: 2)) == 2
        # A task that is cancelled does not end its thread, so the tenant gets no other one for it.
        for one in hostile[:2]:
            one.cancel()
        async with asyncio.timeout(20):
            assert await asyncio.create_task(call(threads, "third", lambda: 3)) == 3
        assert [begun.acquire(blocking=False) for _ in range(3)] == [True, True, False]
    finally:
        go_on.set()
    assert await asyncio.gather(*hostile[2:]) == [True] * 18


async def test_an_error_is_the_callers_and_the_thread_is_free_again(threads: TenantThreads) -> None:
    for _ in range(9):
        with pytest.raises(ZeroDivisionError):
            await asyncio.create_task(call(threads, "t", lambda: 1 // 0))


def test_calls_that_wait_for_a_thread_are_cancelled_at_the_end() -> None:
    threads, go_on = TenantThreads(1), threading.Event()
    first, second = threads.submit(go_on.wait, 60), threads.submit(go_on.wait, 60)
    third = threads.submit(go_on.wait, 60)
    threads.shutdown(wait=False)
    go_on.set()
    assert first.result(60)
    assert second.cancelled()
    assert third.cancelled()
