"""The database of a stack: dumped from one snapshot and restored in one transaction, both as a stream."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO
from urllib.parse import unquote, urlsplit

import asyncpg

from infra.postgres.schema import known_kernel_steps
from tooling.stack.backup.parts import Manifest
from tooling.stack.checkout import CHECKOUT
from tooling.stack.engines import postgres
from tooling.stack.engines.base import EngineError
from tooling.stack.home import SERVICES

_PIECE_BYTES = 1024 * 1024
# Provisioning drops the inbox's partitions 120 days after their month.
_NEAR_ITS_END = "90 days"
_ARCHIVE_SECONDS = 60


@dataclass(frozen=True)
class Snapshot:
    """A snapshot of the database, and the versions that its tables had."""

    id: str
    at: datetime
    server: str
    migrations: dict[str, str]
    """Service → revision, of the services that have tables of their own."""
    kernel_steps: list[str]


@asynccontextmanager
async def snapshot(url: str) -> AsyncIterator[Snapshot]:
    """A snapshot that a dump can use until the block ends."""
    connection = await asyncpg.connect(url, server_settings={"idle_in_transaction_session_timeout": "0"})
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            id_ = await connection.fetchval("SELECT pg_export_snapshot()")
            at = await connection.fetchval("SELECT now()")
            migrations, steps = {}, set()
            for schema, table in await connection.fetch(
                """
                SELECT table_schema, table_name
                FROM information_schema.tables
                WHERE table_schema = ANY($1::text[]) AND table_name IN ('alembic_version', 'kernel_step')
                """,
                SERVICES,
            ):
                if table == "kernel_step":
                    steps |= {name for (name,) in await connection.fetch(f'SELECT name FROM "{schema}".kernel_step')}
                else:
                    migrations[schema] = await connection.fetchval(f'SELECT version_num FROM "{schema}".{table}')
            server = str(await connection.fetchval("SHOW server_version"))
            yield Snapshot(id_, at, server, migrations, sorted(steps))
    finally:
        await connection.close()


def dump(url: str, taken: Snapshot, socket: Path | None = None) -> Iterator[bytes]:
    """pg_dump's custom format of the whole database. Raises EngineError if pg_dump fails.

    `socket`: the folder of the server's socket, if its programs cannot use the port of the URL.
    """
    return _output("pg_dump", ["--format=custom", f"--snapshot={taken.id}"], _access(url, socket))


def base(url: str, socket: Path | None) -> Iterator[bytes]:
    """A tar file of the data folder, for a recovery with archived WAL. Raises EngineError if pg_basebackup fails.

    The tar file has the WAL of the time in which it was made, so it does not wait for the archive.
    """
    options = ["--pgdata=-", "--format=tar", "--wal-method=fetch", "--checkpoint=fast", "--no-manifest"]
    return _output("pg_basebackup", options, _access(url, socket))


def _output(name: str, options: list[str], access: dict[str, str]) -> Iterator[bytes]:
    with (
        TemporaryFile() as errors,
        subprocess.Popen([_program(name), *options], env=access, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        assert process.stdout
        try:
            while piece := process.stdout.read(_PIECE_BYTES):
                yield piece
        except BaseException:
            process.kill()
            raise
        _check(process, name, errors)


def restore(url: str, pieces: Iterable[bytes], socket: Path | None = None) -> None:
    """Restores a dump, whole or not at all. The roles exist already. Raises EngineError if pg_restore fails.

    `socket`: as in `dump`.
    """
    command = [_program("pg_restore"), "--single-transaction", f"--dbname={_database(url)}"]
    with (
        TemporaryFile() as errors,
        subprocess.Popen(command, env=_access(url, socket), stdin=subprocess.PIPE, stderr=errors) as process,
    ):
        feed(process, pieces)
        _check(process, "pg_restore", errors)


def feed(process: subprocess.Popen[bytes], pieces: Iterable[bytes]) -> None:
    """Gives the program its input. If it ends before, the caller sees that by its exit code.

    Kills it if a piece cannot be made: without the end of a dump, pg_restore must not commit.
    """
    assert process.stdin
    try:
        for piece in pieces:
            process.stdin.write(piece)
        process.stdin.close()
    except BrokenPipeError:
        return
    except BaseException:
        process.kill()
        raise


def check_versions(manifest: Manifest, where: str) -> None:
    """Raises EngineError if the backup has tables of newer code, or is of a newer PostgreSQL."""
    newer = [name for name in manifest.kernel_steps if name not in known_kernel_steps()]
    for service, revision in sorted(manifest.migrations.items()):
        folder = CHECKOUT / "services" / service / "migrations"
        if not any(f'\nrevision = "{revision}"\n' in path.read_text() for path in folder.glob("*.py")):
            newer.append(f"{service} {revision}")
    if newer:
        raise EngineError(
            f"{where}: the backup has tables of newer code ({', '.join(newer)}): restore it with the code that made it "
            "or newer code. Nothing was changed"
        )
    major = int(manifest.postgres.partition(".")[0])
    if major > int(postgres.MAJOR):
        raise EngineError(
            f"{where}: the backup is of PostgreSQL {major}, and this is {postgres.MAJOR}. Nothing was changed"
        )


async def drop_schemas(url: str, names: Iterable[str]) -> None:
    """Drops the schemas that the provisioning has made."""
    connection = await asyncpg.connect(url)
    try:
        for name in names:
            await connection.execute(f'DROP SCHEMA IF EXISTS "{name}" CASCADE')
    finally:
        await connection.close()


async def send_all_again(url: str) -> int:
    """Marks all kept messages of the outboxes as not sent, because the brokers are empty. Returns their number.

    Consumers drop the messages that they had handled before the snapshot: their inboxes are of the same snapshot. An
    inbox's partition that is soon to be dropped gets another name, with which it stays: the messages of an old backup
    are sent only now.
    """
    count = 0
    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction():
            for (schema,) in await connection.fetch(
                "SELECT table_schema FROM information_schema.tables WHERE table_name = 'outbox' ORDER BY 1"
            ):
                for (name,) in await connection.fetch(
                    f"""
                    SELECT c.relname
                    FROM pg_inherits i
                    JOIN pg_class c ON c.oid = i.inhrelid
                    WHERE i.inhparent = '"{schema}".inbox'::regclass
                        AND to_timestamp(substring(c.relname from '^inbox_(\\d{{6}})$'), 'YYYYMM') + interval '1 month'
                            < now() - interval '{_NEAR_ITS_END}'
                    """
                ):
                    await connection.execute(f'ALTER TABLE "{schema}"."{name}" RENAME TO "{name}_restored"')
                done = await connection.execute(
                    f'UPDATE "{schema}".outbox SET published_at = NULL WHERE published_at IS NOT NULL'
                )
                count += int(done.split()[-1])
                await connection.execute(f'DELETE FROM "{schema}".outbox_held_back')
    finally:
        await connection.close()
    return count


async def archive_now(url: str) -> None:
    """Lets the server archive the WAL that it has until now, and waits for it.

    Raises EngineError if it is not archived within a minute.
    """
    connection = await asyncpg.connect(url, timeout=10)
    try:
        # A recovery to a moment reads until a later commit: this is one.
        await connection.execute("SELECT pg_current_xact_id()")
        name = await connection.fetchval("SELECT pg_walfile_name(pg_switch_wal())")
        async with asyncio.timeout(_ARCHIVE_SECONDS):
            while not await connection.fetchval(
                "SELECT last_archived_wal >= $1 FROM pg_stat_archiver, pg_sleep(0.2)", name
            ):
                pass
    except TimeoutError:
        raise EngineError(f"the segment {name} of the WAL cannot be archived: ./claw status shows the reason") from None
    finally:
        await connection.close()


async def has_tenants(url: str) -> bool:
    """True if the database has a tenant."""
    connection = await asyncpg.connect(url, timeout=10)
    try:
        if not await connection.fetchval("""SELECT to_regclass('"user".tenant')"""):
            return False
        return bool(await connection.fetchval('SELECT EXISTS (SELECT FROM "user".tenant)'))
    finally:
        await connection.close()


def _program(name: str) -> str:
    """A client program: of the local stack's PostgreSQL, or else of the system."""
    own = postgres.BIN / name
    if found := str(own) if own.exists() else shutil.which(name):
        return found
    raise EngineError(f"{name} is missing: install the client programs of PostgreSQL {postgres.MAJOR}")


def _access(url: str, socket: Path | None) -> dict[str, str]:
    """The environment of a client program: other users can see the arguments of a process."""
    parts = urlsplit(url)
    access = {
        "PGHOST": str(socket) if socket else parts.hostname or "",
        "PGPORT": str(parts.port or 5432),
        "PGUSER": unquote(parts.username or ""),
        "PGPASSWORD": unquote(parts.password or ""),
        "PGDATABASE": _database(url),
    }
    return {**os.environ, **access}


def _database(url: str) -> str:
    return unquote(urlsplit(url).path.removeprefix("/"))


def _check(process: subprocess.Popen[bytes], name: str, errors: IO[bytes]) -> None:
    if process.wait():
        errors.seek(0)
        raise EngineError(f"PostgreSQL's {name} failed: {errors.read().decode(errors='replace').strip()}")
