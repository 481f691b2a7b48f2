"""Runs a server that knows no TLS on a socket in a closed folder, and serves mutual TLS before it on loopback.

For the wheels of PostgreSQL and Valkey, which are built without TLS. No port of the server itself is open, so nothing
reaches it without a certificate. ``python -m tooling.stack.tls_front PORT SOCKET TLS_FOLDER COMMAND…``
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import ssl
import struct
import sys
from functools import partial
from pathlib import Path

import uvloop

from infra.connections import TLS_FILES

# PostgreSQL's client asks for TLS in the clear, by these requests of eight bytes (its page "Message Formats").
_TLS_REQUEST, _GSS_REQUEST = (struct.pack("!II", 8, code) for code in (80877103, 80877104))
_FIRST_SECONDS = 10
_CHUNK_BYTES = 65_536


def main(port: int, path: str, folder: Path, command: list[str]) -> int:
    """Runs the command until it ends. Returns its exit code."""
    return uvloop.run(_run(port, path, folder, command))


def server_context(folder: Path) -> ssl.SSLContext:
    """For a server whose clients show a certificate of the same authority."""
    authority, certificate, key = (str(folder / name) for name in TLS_FILES)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=authority)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(certificate, key)
    return context


async def _run(port: int, path: str, folder: Path, command: list[str]) -> int:
    context = server_context(folder)
    process = await asyncio.create_subprocess_exec(*command)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, process.send_signal, number)
    if Path(path).name.startswith(".s.PGSQL."):
        server = await asyncio.start_server(partial(_postgres, path, context), "127.0.0.1", port)
    else:
        server = await asyncio.start_server(partial(_forward, path), "127.0.0.1", port, ssl=context)
    async with server:
        code = await process.wait()
    return code if code >= 0 else 128 - code


async def _postgres(
    path: str, context: ssl.SSLContext, client: asyncio.StreamReader, to_client: asyncio.StreamWriter
) -> None:
    """As `_forward`, after the client has asked for TLS. Any other client is refused."""
    try:
        async with asyncio.timeout(_FIRST_SECONDS):
            first = await client.readexactly(8)
            if first == _GSS_REQUEST:
                to_client.write(b"N")
                first = await client.readexactly(8)
            if first != _TLS_REQUEST:
                to_client.transport.abort()
                return
            to_client.write(b"S")
            await to_client.start_tls(context)
    except (OSError, EOFError, TimeoutError):
        to_client.transport.abort()
        return
    await _forward(path, client, to_client)


async def _forward(path: str, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
    try:
        server, to_server = await asyncio.open_unix_connection(path)
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


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:]))
