"""Roles, schemas and the kernel's own tables, made for every service alike.

Three roles a service: ``<service>_owner`` owns the schema and runs migrations only; ``<service>_request`` is bound
by row-level security to the tenant of its transaction; ``<service>_worker`` serves relays, consumers and sweepers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import asyncpg
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncConnection

from infra.postgres.db import create_engine, sql

_KERNEL = sorted((Path(__file__).parent / "kernel").glob("*.sql"))
# Any fixed number: it only has to be the same in every process that prepares this database.
_PREPARE_LOCK = 7_203_311


@dataclass(frozen=True)
class Passwords:
    """One password per role of a service."""

    owner: str
    request: str
    worker: str


def known_kernel_steps() -> list[str]:
    """The names of the steps that make the kernel's tables, as the table kernel_step has them."""
    return [step.name for step in _KERNEL]


def role_url(admin_url: str, service: str, role: str, password: str) -> str:
    """The URL of a service's role (``owner``, ``request`` or ``worker``) on the server and database of `admin_url`."""
    url = make_url(admin_url).set(username=f"{service}_{role}", password=password)
    return url.render_as_string(hide_password=False)


async def prepare_database(admin_url: str, services: Mapping[str, Passwords]) -> None:
    """Makes roles, schema and kernel tables of each service, or brings them up to date. Safe to run again.

    Raises ValueError for a service name that is not a plain identifier, before anything is changed.
    """
    for service in services:
        if not service.isidentifier() or not service.islower():
            raise ValueError(f"service: {service!r} is not a lower-case identifier")
    engine = create_engine(admin_url, pool_size=1, name="prepare")
    try:
        for service, passwords in services.items():
            async with engine.begin() as connection:
                # Two `up` at once would both create the role and one would fail.
                await sql(connection, "SELECT pg_advisory_xact_lock($1)", _PREPARE_LOCK)
                await _prepare_roles(connection, admin_url, service, passwords)
                await _prepare_schema(connection, service)
                await _prepare_kernel(connection, service)
    finally:
        await engine.dispose()


async def prepare_roles(admin_url: str, services: Mapping[str, Passwords]) -> None:
    """Makes the roles of each service only, for a database whose schemas are restored from a dump."""
    engine = create_engine(admin_url, pool_size=1, name="prepare")
    try:
        for service, passwords in services.items():
            async with engine.begin() as connection:
                await sql(connection, "SELECT pg_advisory_xact_lock($1)", _PREPARE_LOCK)
                await _prepare_roles(connection, admin_url, service, passwords)
    finally:
        await engine.dispose()


async def migrate(admin_url: str, service: str, folder: Path) -> None:
    """Brings a service's own tables up to date by the Alembic revisions in `folder`, as the schema's owner."""

    def upgrade(connection: Connection) -> None:
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        config.set_main_option("path_separator", "newline")
        config.set_main_option("version_locations", str(folder))
        config.attributes.update(connection=connection, schema=service)
        command.upgrade(config, "head")

    engine = create_engine(admin_url, pool_size=1, name="migrate")
    try:
        async with engine.begin() as connection:
            await sql(connection, "SET LOCAL transaction_timeout = 0")
            await sql(connection, "SELECT pg_advisory_xact_lock($1)", _PREPARE_LOCK)
            await _become_owner(connection, service)
            await connection.run_sync(upgrade)
    finally:
        await engine.dispose()


async def _become_owner(connection: AsyncConnection, service: str) -> None:
    await sql(connection, f'SET LOCAL ROLE "{service}_owner"')
    await sql(connection, f'SET LOCAL search_path = "{service}"')


async def _prepare_roles(connection: AsyncConnection, admin_url: str, service: str, passwords: Passwords) -> None:
    for role, password in vars(passwords).items():
        name = f"{service}_{role}"
        # A role belongs to the whole server. To write a role that is right already can fail if another database of the
        # server is prepared at the same moment.
        if await _works(role_url(admin_url, service, role, password)):
            continue
        if not await sql(connection, "SELECT 1 FROM pg_roles WHERE rolname = $1", name):
            await sql(connection, f'CREATE ROLE "{name}" LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE')
        [(literal,)] = await sql(connection, "SELECT quote_literal($1::text)", password)
        await sql(connection, f'ALTER ROLE "{name}" PASSWORD {literal}')
        await sql(connection, f'ALTER ROLE "{name}" SET search_path = "{service}", public')


async def _prepare_schema(connection: AsyncConnection, service: str) -> None:
    await sql(connection, f'CREATE SCHEMA IF NOT EXISTS "{service}" AUTHORIZATION "{service}_owner"')
    for role in ("request", "worker"):
        await sql(connection, f'GRANT USAGE ON SCHEMA "{service}" TO "{service}_{role}"')
        for kind, rights in (
            ("TABLES", "SELECT, INSERT, UPDATE, DELETE"),
            ("SEQUENCES", "USAGE"),
            ("FUNCTIONS", "EXECUTE"),
        ):
            await sql(
                connection,
                f"""
                ALTER DEFAULT PRIVILEGES FOR ROLE "{service}_owner" IN SCHEMA "{service}"
                GRANT {rights} ON {kind} TO "{service}_{role}"
                """,
            )


async def _works(url: str) -> bool:
    """True if the server accepts this login."""
    try:
        connection = await asyncpg.connect(url)
    except asyncpg.InvalidAuthorizationSpecificationError:
        return False
    await connection.close()
    return True


async def _prepare_kernel(connection: AsyncConnection, service: str) -> None:
    await _become_owner(connection, service)
    await sql(connection, "CREATE TABLE IF NOT EXISTS kernel_step (name text PRIMARY KEY, applied_at timestamptz)")
    applied = {name for (name,) in await sql(connection, "SELECT name FROM kernel_step")}
    for step in _KERNEL:
        if step.name not in applied:
            raw = await connection.get_raw_connection()
            assert raw.driver_connection is not None
            # The driver's own call: it takes many statements at once, inside the transaction already begun.
            await raw.driver_connection.execute(step.read_text())
            await sql(connection, "INSERT INTO kernel_step VALUES ($1, now())", step.name)
    await sql(connection, "SELECT inbox_partitions()")


def tenant_policy(service: str, table: str) -> tuple[str, ...]:
    """Statements that bind `table` (it has a ``tenant_id text``) to the tenant set in the request role's transaction.

    Without one the policy raises instead of showing no rows: an empty answer would hide the mistake.
    """
    own = "USING (tenant_id = current_tenant()) WITH CHECK (tenant_id = current_tenant())"
    return (
        f'ALTER TABLE "{table}" ENABLE ROW LEVEL SECURITY',
        f'CREATE POLICY tenant ON "{table}" TO "{service}_request" {own}',
        f'CREATE POLICY worker ON "{table}" TO "{service}_worker" USING (true) WITH CHECK (true)',
    )
