"""Is a port free, and if not, who has it?"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import Any

import psutil

from tooling.stack.engines.base import Engine, EngineError, Place
from tooling.stack.supervisor import orphans

# What a client of each says first, and how the server's answer begins.
_GREETINGS = (
    ("PostgreSQL", b"\x00\x00\x00\x08\x04\xd2\x16\x2f", (b"S", b"N")),
    ("Redis or Valkey", b"PING\r\n", (b"+PONG", b"-NOAUTH", b"-DENIED")),
    ("RabbitMQ", b"AMQP\x00\x00\x09\x01", (b"\x01\x00\x00",)),
    ("HTTP", b"GET / HTTP/1.0\r\n\r\n", (b"HTTP/",)),
)


def check_ports(place: Place, engines: Iterable[Engine]) -> None:
    """Raises EngineError naming every port that these engines need and somebody else has."""
    # A helper of an engine may outlive it: RabbitMQ's port mapper does. It serves the engine's next start.
    own = {connection.laddr.port for process in orphans(place.home) for connection in _listening(process)}
    busy = [
        f"port {place.ports[name]}, which {engine.NAME} needs, is taken by {holder(place.ports[name])}"
        for engine in engines
        for name in engine.PORTS
        if not is_free(place.ports[name]) and place.ports[name] not in own
    ]
    if busy:
        advice = "Stop it, or run this stack elsewhere: CLAW_PORT_OFFSET=400 ./claw up"
        raise EngineError("\n".join([*busy, advice]))


def _listening(process: psutil.Process) -> list[Any]:
    try:
        return [c for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    except psutil.Error:
        return []


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
    """Who listens there, as far as this user may know, and what it speaks."""
    speaks = f", which speaks {protocol}" if (protocol := _protocol(port)) else ""
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            process = psutil.Process(connection.pid)
            return f"{process.name()} (process {process.pid} of {process.username()}){speaks}"
    return f"another user's process{speaks}"


def _protocol(port: int) -> str | None:
    for name, greeting, answers in _GREETINGS:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                connection.sendall(greeting)
                if connection.recv(64).startswith(answers):
                    return name
        except OSError:
            continue
    return None
