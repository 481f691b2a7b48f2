"""What the operator's commands share: the databases of the services, by the administrator's access."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from infra.cli.home import Home, home_folder
from infra.db import create_engine, sql
from infra.engines.base import EngineError
from infra.tx import Database


def actor() -> str:
    """Who acts, for the audit record."""
    return f"cli:{os.environ.get('SUDO_USER') or os.environ.get('USER') or os.getuid()}"


def engines_access() -> dict[str, dict[str, str]]:
    """The administrator's access to each engine. Raises EngineError where no stack was ever started."""
    path = Home(home_folder()).path / "credentials.json"
    try:
        access: dict[str, dict[str, str]] = json.loads(path.read_text())["engines"]
    except FileNotFoundError:
        raise EngineError(f"{path} is not there: no stack was started here. Start it with ./claw up") from None
    return access


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
    engine = create_engine(url, pool_size=2, name="claw", schema=service)
    try:
        yield Database(engine, service)
    finally:
        await engine.dispose()
