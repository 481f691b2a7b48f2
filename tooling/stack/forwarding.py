"""Runs a server as a child process, and copies connections between its clients and it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import signal
from collections.abc import Awaitable, Callable

# From linux/prctl.h.
_PR_SET_PDEATHSIG = 1
_CHUNK_BYTES = 65_536

Connect = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]
"""Opens a connection to the server. Raises OSError."""


async def run_behind(command: list[str], front: Callable[[], Awaitable[asyncio.Server]]) -> int:
    """Runs the command until it ends, with the listener that `front` opens before it. Returns its exit code."""
    # Otherwise the server would go on alone if this process is killed, and its data would be in use at the next start.
    process = await asyncio.create_subprocess_exec(*command, preexec_fn=_die_with_parent)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, process.send_signal, number)
    async with await front():
        code = await process.wait()
    return code if code >= 0 else 128 - code


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


async def forward(connect: Connect, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
    """Copies both directions until both have ended."""
    try:
        server, to_server = await connect()
    except OSError:
        # The server does not listen yet, or no longer.
        to_client.transport.abort()
        return
    await asyncio.gather(_copy(client, to_server), _copy(server, to_client))
    for writer in (to_client, to_server):
        writer.close()


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(_CHUNK_BYTES):
            target.write(data)
            await target.drain()
    # TLS has no half-closed connection: the end of one side ends both.
    with contextlib.suppress(OSError, RuntimeError, NotImplementedError):
        if target.can_write_eof():
            target.write_eof()
        else:
            target.close()
