"""Functions for the operator's commands: they open the services' databases as the administrator."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, TypeVar

from aiokafka.errors import KafkaError

from infra.bus import outbox
from infra.errors import describe
from infra.postgres.database import Database
from infra.postgres.db import create_engine, is_transient, sql
from infra.security.audit import audit
from tooling.stack.engines.base import EngineError
from tooling.stack.home import Home, home_folder

T = TypeVar("T")


def actor() -> str:
    """The name of the person who runs the command, for the audit record."""
    return f"cli:{os.environ.get('SUDO_USER') or os.environ.get('USER') or os.getuid()}"


def engines_access() -> dict[str, dict[str, str]]:
    """The administrator's access to each engine. Raises EngineError if no stack was ever started."""
    access: dict[str, dict[str, str]] = Home(home_folder()).credentials()["engines"]
    return access


def run(work: Coroutine[Any, Any, T]) -> T:
    """Runs the work of a command. Raises EngineError if an engine does not answer."""
    # aiokafka would log every refused connection. The one error below says what to do.
    kafka = logging.getLogger("aiokafka")
    level = kafka.level
    kafka.setLevel(logging.CRITICAL)
    try:
        return asyncio.run(work)
    except Exception as error:
        if not is_transient(error) and not isinstance(error, KafkaError):
            raise
        reason = f"an engine does not answer ({describe(error)})"
        raise EngineError(f"{reason}. ./claw status shows which; ./claw up starts it") from error
    finally:
        kafka.setLevel(level)


def printable(text: str) -> str:
    """`text` on one line. Control characters are escaped, because text from outside could steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


async def services(url: str) -> list[str]:
    """The names of the services whose tables are in this database."""
    engine = create_engine(url, pool_size=1, name="claw")
    try:
        async with engine.connect() as connection:
            rows = await sql(
                connection,
                "SELECT table_schema FROM information_schema.tables WHERE table_name = 'dead_letter' ORDER BY 1",
            )
    finally:
        await engine.dispose()
    return [name for (name,) in rows]


@asynccontextmanager
async def database(url: str, service: str) -> AsyncIterator[Database]:
    """The database of one service, opened as the administrator."""
    engine = create_engine(url, pool_size=4, name="claw", schema=service)
    try:
        yield Database(engine, service)
    finally:
        await engine.dispose()


async def resend_everywhere(url: str, destination: str, since: datetime | None = None) -> dict[str, int]:
    """Marks the messages to `destination` for sending. Returns service → their number, if it is not 0."""
    counts = {}
    for name in await services(url):
        async with database(url, name) as service_database, service_database.begin() as tx:
            count = await outbox.resend(await tx.connection(), destination, since=since)
            if count:
                counts[name] = count
                audit(tx, actor(), "outbox.resend", "destination", destination, count=str(count))
    return counts
