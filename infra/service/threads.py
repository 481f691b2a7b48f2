"""The threads beside the event loop, which tenants share."""

from __future__ import annotations

import os
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Any, ParamSpec, TypeVar

from infra.outgoing.shares import Shares, tenant

P = ParamSpec("P")
T = TypeVar("T")

# A tenant alone has as many threads as an event loop has by default.
THREADS = 2 * min(32, (os.cpu_count() or 1) + 4)


class TenantThreads(ThreadPoolExecutor):
    """The executor of `asyncio.to_thread`: checks of schemas and large bodies, calls of the object store.

    By `Shares`: otherwise each costly check of one tenant would come before the next check of another one. A thread
    cannot be cancelled: a call counts until it ends.
    """

    def __init__(self, threads: int = THREADS) -> None:
        super().__init__(threads, "beside")
        self._guard = threading.Lock()
        self._shares = Shares(threads)
        self._waiting: defaultdict[str, deque[tuple[Future[Any], Callable[[], Any]]]] = defaultdict(deque)
        # Each piece of the platform's own work asks for itself, so it gets any thread that is free.
        self._of_platform = count()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        asker = tenant.get() or f"platform {next(self._of_platform)}"
        with self._guard:
            self._waiting[asker].append((future, lambda: fn(*args, **kwargs)))
            self._start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Also cancels the calls that wait for a thread."""
        with self._guard:
            for queue in self._waiting.values():
                for future, _ in queue:
                    future.cancel()
            self._waiting.clear()
        super().shutdown(wait, cancel_futures=cancel_futures)

    def _start(self) -> None:
        """Starts the calls that may start. The caller has the guard."""
        for asker, queue in list(self._waiting.items()):
            while queue and self._shares.take_now(asker):
                super().submit(self._work, asker, *queue.popleft())
                # The others come first next time.
                self._waiting[asker] = self._waiting.pop(asker)
            if not queue:
                del self._waiting[asker]

    def _work(self, asker: str, future: Future[Any], call: Callable[[], Any]) -> None:
        try:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)
        finally:
            with self._guard:
                self._shares.give(asker)
                self._start()
