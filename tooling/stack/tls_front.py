"""Runs a server that knows no TLS on a socket in a closed folder, and serves mutual TLS before it on loopback.

For the wheels of PostgreSQL and Valkey, which are built without TLS. No port of the server itself is open, so nothing
reaches it without a certificate. ``python -m tooling.stack.tls_front PORT SOCKET TLS_FOLDER COMMAND…``
"""

from __future__ import annotations

import asyncio
import ssl
import struct
import sys
from functools import partial
from pathlib import Path

import uvloop

from infra.connections import TLS_FILES
from tooling.stack.forwarding import Connect, forward, run_behind

# PostgreSQL's client asks for TLS in the clear, by these requests of eight bytes (its page "Message Formats").
_TLS_REQUEST, _GSS_REQUEST = (struct.pack("!II", 8, code) for code in (80877103, 80877104))
_FIRST_SECONDS = 10


def main(port: int, path: str, folder: Path, command: list[str]) -> int:
    """Runs the command until it ends. Returns its exit code."""
    context = server_context(folder)
    connect = partial(asyncio.open_unix_connection, path)
    if Path(path).name.startswith(".s.PGSQL."):
        front = partial(asyncio.start_server, partial(_postgres, connect, context), "127.0.0.1", port)
    else:
        front = partial(asyncio.start_server, partial(forward, connect), "127.0.0.1", port, ssl=context)
    return uvloop.run(run_behind(command, front))


def server_context(folder: Path) -> ssl.SSLContext:
    """For a server whose clients show a certificate of the same authority."""
    authority, certificate, key = (str(folder / name) for name in TLS_FILES)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=authority)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(certificate, key)
    # gRPC asks for HTTP/2 by name.
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


async def _postgres(
    connect: Connect, context: ssl.SSLContext, client: asyncio.StreamReader, to_client: asyncio.StreamWriter
) -> None:
    """As `forward`, after the client has asked for TLS. Any other client is refused."""
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
    await forward(connect, client, to_client)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:]))
