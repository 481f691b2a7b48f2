"""What the operator's commands share: the databases of the services, by the administrator's access."""

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
from infra.postgres.db import create_engine, is_transient, sql
from infra.postgres.tx import Database
from infra.security.audit import audit
from tooling.stack.engines.base import EngineError
from tooling.stack.home import Home, home_folder

T = TypeVar("T")


def actor() -> str:
    """Who acts, for the audit record."""
    return f"cli:{os.environ.get('SUDO_USER') or os.environ.get('USER') or os.getuid()}"


def engines_access() -> dict[str, dict[str, str]]:
    """The administrator's access to each engine. Raises EngineError where no stack was ever started."""
    access: dict[str, dict[str, str]] = Home(home_folder()).credentials()["engines"]
    return access


def run(work: Coroutine[Any, Any, T]) -> T:
    """Runs a command's work. Raises EngineError where an engine does not answer."""
    # It would tell of every refused connection beside the one error that says what to do.
    kafka = logging.getLogger("aiokafka")
    level = kafka.level
    kafka.setLevel(logging.CRITICAL)
    try:
        return asyncio.run(work)
    except Exception as error:
        if not is_transient(error) and not isinstance(error, KafkaError):
            raise
        reason = f"an engine does not answer ({describe(error)})"
        raise EngineError(f"{reason}. See which: ./claw status. Start it: ./claw up") from error
    finally:
        kafka.setLevel(level)


def printable(text: str) -> str:
    """`text` on one line, with what could move a terminal's cursor or colour shown escaped: strangers wrote it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


async def services(url: str) -> list[str]:
    """The services that have their kernel tables in this database."""
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
    """The database of one service, as an administrator."""
    engine = create_engine(url, pool_size=4, name="claw", schema=service)
    try:
        yield Database(engine, service)
    finally:
        await engine.dispose()


async def resend_everywhere(url: str, destination: str, since: datetime | None = None) -> dict[str, int]:
    """Service → how many messages are sent again; services that kept none are left out."""
    counts = {}
    for name in await services(url):
        async with database(url, name) as service_database, service_database.begin() as tx:
            count = await outbox.resend(await tx.connection(), destination, since=since)
            if count:
                counts[name] = count
                audit(tx, actor(), "outbox.resend", "destination", destination, count=str(count))
    return counts
