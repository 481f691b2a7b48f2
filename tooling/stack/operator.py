"""Functions for the operator's commands: they open the services' databases as the administrator."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from aiokafka.errors import KafkaError

from infra.bus import outbox
from infra.errors import describe
from infra.postgres.database import Database
from infra.postgres.db import create_engine, is_transient, sql
from infra.security.audit import audit
from tooling.stack.engines.base import EngineError
from tooling.stack.home import Home, home_folder
from tooling.stack.keys import public_file
from tooling.stack.services import KEYS_FOLDER

T = TypeVar("T")
# In containers: engine → the name of its address, and the variable that has it.
_VARIABLES = {
    "postgres": ("url", "CLAW_ADMIN_DATABASE_URL"),
    "kafka": ("bootstrap_servers", "CLAW_KAFKA_BOOTSTRAP_SERVERS"),
    "milvus": ("url", "CLAW_MILVUS_URL"),
    "opensearch": ("url", "CLAW_OPENSEARCH_URL"),
}


def actor() -> str:
    """The name of the person who runs the command, for the audit record."""
    return f"cli:{os.environ.get('SUDO_USER') or os.environ.get('USER') or os.getuid()}"


def in_containers() -> bool:
    """True in a container of compose.yml: the environment names the system's parts, and there is no state folder."""
    return "CLAW_ADMIN_DATABASE_URL" in os.environ


def access() -> dict[str, Any]:
    """The operator's access: `base_url` and `admin_token` of the gateway, and that to each engine in `engines`.

    Raises EngineError if no stack was ever started here, or if the container is not the one for operators.
    """
    if not in_containers():
        return Home(home_folder()).credentials()
    try:
        return {
            "base_url": os.environ["CLAW_GATEWAY_URL"],
            "admin_token": os.environ["CLAW_ADMIN_TOKEN"],
            "engines": {engine: {name: os.environ[variable]} for engine, (name, variable) in _VARIABLES.items()},
        }
    except KeyError as error:
        raise EngineError(
            f"{error.args[0]}: must be set in the environment, as in the container operator: docker compose run --rm "
            "operator"
        ) from None


def engines_access() -> dict[str, dict[str, str]]:
    """The administrator's access to each engine. Raises EngineError as `access`."""
    engines: dict[str, dict[str, str]] = access()["engines"]
    return engines


def keys_folder() -> Path:
    """The folder of keys of this stack, or the one of the containers. Raises EngineError if there are no keys."""
    if named := os.environ.get("CLAW_KEYS_FOLDER"):
        return Path(named)
    folder = home_folder() / KEYS_FOLDER
    if not public_file(folder).exists():
        raise EngineError(f"{folder}: has no keys. Start a stack with ./claw up")
    return folder


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
        raise EngineError(f"an engine does not answer ({describe(error)}). {remedy()}") from error
    finally:
        kafka.setLevel(level)


def local_time(option: str, time: datetime) -> datetime:
    """The time that an option gives, with this machine's time zone if it names none.

    Raises EngineError for one that is outside of the years 1 to 9999 in UTC.
    """
    try:
        return time.astimezone().astimezone(UTC)
    except (OverflowError, ValueError):
        raise EngineError(f"{option}: {time.isoformat()} is too early or too late") from None


def remedy() -> str:
    """The commands for a part of the stack that does not answer."""
    if in_containers():
        return "docker compose ps shows which; docker compose up -d starts it"
    return "./claw status shows which; ./claw up starts it"


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
