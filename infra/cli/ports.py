"""Is a port free, and if not, who has it?"""

from __future__ import annotations

import socket
from collections.abc import Iterable

import psutil

from infra.engines.base import Engine, EngineError, Place

# What each server says first, or to a greeting, and how to name it.
_GREETINGS = {
    b"": (b"",),
    b"\x00\x00\x00\x08\x04\xd2\x16\x2f": (b"S", b"N"),
}


def check_ports(place: Place, engines: Iterable[Engine]) -> None:
    """Raises EngineError naming every port that these engines need and somebody else has."""
    busy = [
        f"port {place.ports[name]}, which {engine.NAME} needs, is taken by {holder(place.ports[name])}"
        for engine in engines
        for name in engine.PORTS
        if not is_free(place.ports[name])
    ]
    if busy:
        advice = "Stop it, or run this stack elsewhere: CLAW_PORT_OFFSET=400 ./claw up"
        raise EngineError("\n".join([*busy, advice]))


def is_free(port: int) -> bool:
    """Whether one can listen on this port of the loopback interface."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def holder(port: int) -> str:
    """Who listens there, as far as this user may know."""
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            process = psutil.Process(connection.pid)
            return f"{process.name()} (process {process.pid} of {process.username()})"
    return "another user's process"
