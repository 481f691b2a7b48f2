"""The process of a service: its background loops, the limit of its stop, and its garbage collection."""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import gc
import resource
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

from infra.errors import describe
from infra.observe import logs

# Lanes, HTTP, gRPC and RabbitMQ drain one after the other, each for at most 10 to 30 s.
STOP_SECONDS = 120.0
# So much the process grows between two looks for garbage, beside those of Python's collector.
GROWTH_BYTES = 32 * 1024**2
LOOK_SECONDS = 0.5
_c_library = ctypes.CDLL("libc.so.6")


def freeze_loaded_modules() -> None:
    """Excludes all objects that exist now from garbage collection: modules and classes never become garbage."""
    gc.collect()
    gc.freeze()


def collect_by_bytes(loop: asyncio.AbstractEventLoop) -> None:
    """Collects garbage whenever the process has grown by GROWTH_BYTES. Python's collector counts objects, but libraries
    leave a refused request, or one to another service, in a cycle together with its body: three hundred bodies of a
    megabyte would stay before it looks."""
    least = _resident_bytes()

    def look() -> None:
        nonlocal least
        now = _resident_bytes()
        if now - least > GROWTH_BYTES:
            # Not the oldest objects: to look at all connections takes long, and few of them become garbage.
            gc.collect(1)
            # Otherwise the C library keeps most of the memory, in pieces between others.
            _c_library.malloc_trim(0)
            least = _resident_bytes()
        least = min(least, now)
        loop.call_later(LOOK_SECONDS, look)

    look()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def limit_stop(loop: asyncio.AbstractEventLoop) -> None:
    """Ends the process if it has not stopped by itself within STOP_SECONDS: a library may wait for an engine that is
    gone. The open tasks are logged, and all threads are written to stderr. Work that was not committed is done again
    later, as after a crash."""

    def report() -> None:
        names = sorted(task.get_name() for task in asyncio.all_tasks(loop))
        logs.get_logger("infra.service").error("the service does not stop; its process is ended", open_tasks=names)

    loop.call_later(STOP_SECONDS * 0.9, report)
    # A thread of its own: it also ends a process whose event loop is blocked or has ended.
    faulthandler.dump_traceback_later(STOP_SECONDS, exit=True)


class Running:
    """The background loops of the process. If one ends with an error, the process ends: half a service is worse."""

    def __init__(self, stack: AsyncExitStack, stopping: asyncio.Event) -> None:
        self._stack = stack
        self.stopping = stopping
        self.failed = 0

    def add(self, name: str, run: Callable[[], Awaitable[None]], stop: Callable[[], Awaitable[None]]) -> None:
        async def guarded() -> None:
            try:
                await run()
            except (Exception, asyncio.CancelledError):
                # No code of ours cancels these tasks, so a CancelledError comes from a library and is an error too.
                logs.get_logger("infra.service").error(f"{name} ended with an error; the service stops", exc_info=True)
                self.failed = 1
                self.stopping.set()

        task = asyncio.create_task(guarded(), name=name)

        async def drain() -> None:
            await stop()
            await task

        self._stack.push_async_callback(drain)


async def retry_start(what: str, start: Callable[[], Awaitable[None]], stopping: asyncio.Event) -> None:
    """Calls `start` until it works: a service that starts before its broker waits, and need not be restarted."""
    while not stopping.is_set():
        try:
            return await start()
        except OSError as error:
            logs.get_logger("infra.service").warning(
                f"could not connect to {what}; will retry in 1 s", error=describe(error)
            )
            await asyncio.sleep(1)
