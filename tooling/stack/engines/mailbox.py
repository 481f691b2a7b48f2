"""A mail server for development: it accepts every mail, keeps it as a file, and sends nothing on."""

from __future__ import annotations

import asyncio
import sys
from importlib.metadata import version
from typing import Any

from tooling.stack.engines.base import Place, Program

NAME = "mailbox"
PORTS = {"mailbox": 1025}


def install() -> None:
    """Does nothing: it is a Python package."""


def prepare(place: Place) -> None:
    place.folder(NAME)


def program(place: Place) -> Program:
    handler = ("-c", "aiosmtpd.handlers.Mailbox", access(place)["maildir"])
    listen = ("-n", "-l", f"127.0.0.1:{place.ports['mailbox']}")
    return Program((sys.executable, "-m", "aiosmtpd", *listen, *handler))


async def ready(place: Place) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", place.ports["mailbox"])
    try:
        greeting = await reader.readline()
        writer.write(b"EHLO claw\r\n")
        answer = await reader.readline()
        writer.write(b"QUIT\r\n")
        await writer.drain()
    finally:
        writer.close()
        await writer.wait_closed()
    if not (greeting.startswith(b"220") and answer.startswith(b"250")):
        raise ConnectionError(f"the mailbox greeted with {greeting!r} and answered {answer!r}")
    return version("aiosmtpd")


def access(place: Place) -> dict[str, Any]:
    """`maildir`: the folder of the received mails, in the Maildir format."""
    return {"url": f"smtp://127.0.0.1:{place.ports['mailbox']}", "maildir": str(place.folder(NAME) / "mails")}
