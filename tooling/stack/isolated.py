"""Runs a server in a network namespace of its own, and forwards one port of loopback to it.

For a server that listens on every interface and asks for no password: only this machine can reach the forwarded port,
and no other process can reach the server's other ports. The forwarded port serves mutual TLS if TLS_FOLDER exists.
``python -m tooling.stack.isolated PORT TLS_FOLDER COMMAND…``
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import socket
import struct
import sys
from functools import partial
from pathlib import Path

import uvloop

from infra.errors import describe
from tooling.stack.forwarding import forward, run_behind
from tooling.stack.tls_front import server_context

# From linux/sched.h, linux/sockios.h and linux/if.h.
_CLONE_NEWUSER, _CLONE_NEWNET = 0x1000_0000, 0x4000_0000
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1


def main(port: int, folder: Path, command: list[str]) -> int:
    """Runs the command until it ends. Returns its exit code.

    If the machine allows no namespace, runs the command in place of this process: `./claw doctor` then warns. With TLS
    it refuses, because the server's own port would be open without TLS.
    """
    context = server_context(folder) if folder.exists() else None
    # A socket stays in the namespace in which it was made.
    listener = socket.create_server(("127.0.0.1", port))
    if not is_possible():
        listener.close()
        if context:
            print("TLS needs a network namespace, which this machine does not allow", file=sys.stderr)  # noqa: T201
            return 1
        os.execvp(command[0], command)
    _enter_namespace()
    to_server = partial(forward, partial(asyncio.open_connection, "127.0.0.1", port))
    return uvloop.run(run_behind(command, partial(asyncio.start_server, to_server, sock=listener, ssl=context)))


def is_isolated(pid: int) -> bool:
    """True if the process is in another network namespace than this one."""
    try:
        return os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")
    except OSError:
        return False


def is_possible() -> bool:
    """Tries it in a child process: on some machines only a later step fails, and no process can return."""
    if child := os.fork():
        return os.waitpid(child, 0)[1] == 0
    try:
        _enter_namespace()
    except OSError as error:
        print(f"could not make a network namespace: {describe(error)}", file=sys.stderr, flush=True)  # noqa: T201
        os._exit(1)
    os._exit(0)


def _enter_namespace() -> None:
    """Moves this process to a new user namespace and a new network namespace. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path("/proc/self", name).write_text(text)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
