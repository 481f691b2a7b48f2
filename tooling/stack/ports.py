"""Checks that ports are free, and names the process that holds one that is not."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import Any

import psutil

from tooling.stack.engines.base import Engine, EngineError, Place
from tooling.stack.supervisor import orphans

# The first bytes of a client of each protocol, and the beginnings of a server's answer.
_GREETINGS = (
    ("PostgreSQL", b"\x00\x00\x00\x08\x04\xd2\x16\x2f", (b"S", b"N")),
    ("Redis or Valkey", b"PING\r\n", (b"+PONG", b"-NOAUTH", b"-DENIED")),
    ("RabbitMQ", b"AMQP\x00\x00\x09\x01", (b"\x01\x00\x00",)),
    ("HTTP", b"GET / HTTP/1.0\r\n\r\n", (b"HTTP/",)),
)


def check_ports(place: Place, engines: Iterable[Engine]) -> None:
    """Raises EngineError with every port that these engines need and that another process holds."""
    # RabbitMQ's port mapper outlives RabbitMQ and serves its next start, so this stack's own processes do not count.
    own = {connection.laddr.port for process in orphans(place.home) for connection in _listening(process)}
    busy = [
        f"{engine.NAME} needs port {place.ports[name]}, which {holder(place.ports[name])} holds"
        for engine in engines
        for name in engine.PORTS
        if not is_free(place.ports[name]) and place.ports[name] not in own
    ]
    if busy:
        advice = "Stop that process, or run this stack on other ports: CLAW_PORT_OFFSET=400 ./claw up"
        raise EngineError("\n".join([*busy, advice]))


def _listening(process: psutil.Process) -> list[Any]:
    try:
        return [c for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    except psutil.Error:
        return []


def is_free(port: int) -> bool:
    """True if a program can listen on this port of the loopback interface."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def holder(port: int) -> str:
    """The process that listens on the port, as far as this user can see it, and its protocol."""
    speaks = f" (it speaks {protocol})" if (protocol := _protocol(port)) else ""
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            process = psutil.Process(connection.pid)
            return f"process {process.pid} of user {process.username()}, {process.name()}{speaks},"
    return f"a process of another user{speaks}"


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
